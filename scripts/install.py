"""Install peftkit with the tested versions into the Python that runs this file; a CPU torch where there is no GPU.

Plain `torch` on Linux is a CUDA build of several GB. Where no NVIDIA driver answers, the CPU build is taken: from the
package index or wheel folder that pip already knows when one is there, from PyTorch's own CPU index otherwise.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str) -> int:
    """Run pip; its output goes to the terminal."""
    return subprocess.call([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments])


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.call([command, "-L"], stdout=subprocess.DEVNULL) == 0


def torch_version() -> str:
    """The pinned version of torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith("torch=="))


def main() -> int:
    """Install torch first, then everything else at the tested versions."""
    version = torch_version()
    if not has_gpu() and sysconfig.get_platform().startswith("linux"):
        print(f"no NVIDIA driver answers: installing the CPU build of torch {version}")
        local = f"torch=={version}+cpu"
        done = pip("install", "--quiet", local) == 0 or pip("install", "--quiet", "--index-url", CPU_INDEX, local) == 0
        if not done:
            print(f"the CPU build of torch could not be had from {CPU_INDEX}; trying the package index's own build")
    code = pip("install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[dev]")
    if code != 0:
        print("installation failed; the lines above say why. Run it again with: make setup")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
