"""Scratch folders: gone when their block ends, swept when their process was killed, left alone while it lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.release.scratch import scratch_folder

_KEEP = """
import sys, time
from pathlib import Path
from peftkit.release.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), "logits") as folder:
    (folder / "logits.f32").write_bytes(bytes(100))
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_gone_after_its_block_whatever_happened(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch_folder(tmp_path / "scratch", "combine") as folder:
        (folder / "file").write_text("x")
        raise KeyError
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", _KEEP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    with scratch_folder(tmp_path, "logits") as mine:
        assert theirs.is_dir()
        assert mine.is_dir()
    other.kill()
    other.wait()
    other.stdout.close()
    assert theirs.is_dir()
    with scratch_folder(tmp_path, "logits"):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []
