"""Every image of a set is decoded before anything is trained on it, and a bad one is named, never dropped."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftkit.data.tasks.images import images_sha256, read_image_table, read_images
from peftkit.data.tasks.picture import check, rgb
from peftkit.errors import ConfigError, DataError
from peftkit.events import Note

Image = pytest.importorskip("PIL.Image")


def noise(width: int, height: int, seed: int = 0) -> Any:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, five images, four endings."""
    root = tmp_path / "set"
    for name in ("b/2.png", "b/1.JPG", "a/x.webp", "a/10.bmp", "a/9.jpeg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(12, 8).save(root / name)
    return root


def notes(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def refused(source: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_images(source, **options)
    return caught.value


def test_a_folder_of_class_folders_is_read_in_the_order_of_its_names(folder: Path) -> None:
    rows = read_images(folder)
    assert [(row.where.file, row.target) for row in rows] == [
        ("a/10.bmp", "a"),
        ("a/9.jpeg", "a"),
        ("a/x.webp", "a"),
        ("b/1.JPG", "b"),
        ("b/2.png", "b"),
    ]
    assert [row.image for row in rows] == [folder / row.where.file for row in rows]


def test_hidden_files_are_skipped_and_counted(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "a" / "._9.jpeg").write_bytes(b"x")
    (folder / "b" / "Thumbs.db").write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / "README.md").write_text("hello")
    told: list[Any] = []
    assert len(read_images(folder, report=told.append)) == 5
    assert notes(told) == [f"{folder}: skipped 4 hidden files", f"{folder}: skipped what is no image: README.md"]


def test_all_that_cannot_be_used_is_listed_at_once(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "loose.png").write_bytes((folder / "b/2.png").read_bytes())
    (folder / "a/notes.txt").write_text("hello")
    (folder / "a/text.png").write_text("hello")
    (folder / "a/zero.png").write_bytes(b"")
    (folder / "b/cut.jpg").write_bytes((folder / "b/1.JPG").read_bytes()[:-40])
    (folder / "b/cut.png").write_bytes((folder / "b/2.png").read_bytes()[:-80])
    (folder / "b/gone.png").symlink_to("nowhere.png")
    noise(3, 400).save(folder / "b/line.png")
    Image.new("L", (4, 4)).save(folder / "b/tiff.png", format="TIFF")
    said = str(refused(folder))
    for name, why in {
        "empty": "without images",
        "loose.png": "has no label",
        "a/notes.txt": "'.txt' is none of",
        "a/text.png": "is not an image in JPEG",
        "a/zero.png": "is empty (0 bytes)",
        "b/cut.jpg": "cannot be decoded",
        "b/cut.png": "cannot be decoded",
        "b/gone.png": "is not there",
        "b/line.png": "more than 100 times",
        "b/tiff.png": "is not an image in JPEG",
    }.items():
        line = next(line for line in said.splitlines() if line.startswith(f"- {name}: "))
        assert why in line, line
    assert "10 problems in a set of 12 images" in said


def test_twenty_problems_are_shown_and_all_are_counted(folder: Path) -> None:
    for number in range(25):
        (folder / "a" / f"bad{number:02}.png").write_bytes(b"no image")
    said = refused(folder).fact
    assert "25 problems" in said
    assert said.count("\n- a/bad") == 20
    assert said.endswith("and 5 more")


def test_folders_inside_class_folders_are_refused_with_the_folder_that_was_meant(test_data: Path) -> None:
    error = refused(test_data / "sign_digits_subset")
    assert "test/0: is a folder inside a class folder" in error.fact
    assert str(test_data / "sign_digits_subset" / "test") in str(error.hint)


@pytest.mark.parametrize("made", ["nothing", "a file", "an empty folder", "only hidden files"])
def test_what_is_no_image_set_is_an_error(made: str, tmp_path: Path) -> None:
    source = tmp_path / "set"
    if made == "a file":
        source.write_text("x")
    elif made != "nothing":
        source.mkdir()
    if made == "only hidden files":
        (source / ".hidden").write_text("x")
    assert str(source) in refused(source).fact
    assert str(source) in refused(source, labelled=False).fact


def test_real_photographs(test_data: Path) -> None:
    rows = read_images(test_data / "sign_digits_subset" / "train")
    assert len(rows) == 100
    assert sorted({row.target for row in rows}) == [str(digit) for digit in range(10)]


def test_images_to_predict_need_no_class_folders(folder: Path) -> None:
    rows = read_images(folder / "a", labelled=False)
    assert [(row.where.file, row.target) for row in rows] == [("10.bmp", None), ("9.jpeg", None), ("x.webp", None)]


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first, and refuses the second
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    assert "decompression bomb" in str(check(path).problem)
    with pytest.raises(DataError, match="decompression bomb"):
        rgb(path)


def test_the_first_frame_of_an_animation_counts_and_is_told(folder: Path) -> None:
    first = Image.new("RGB", (8, 8), (250, 0, 0))
    others = [Image.new("RGB", (8, 8), (0, 250, 0))]
    first.save(folder / "a/moves.webp", save_all=True, append_images=others, lossless=True)
    first.save(folder / "b/moves.png", save_all=True, append_images=others)
    told: list[Any] = []
    rows = read_images(folder, report=told.append)
    assert notes(told) == ["the first frame stands for 2 animated images: a/moves.webp, b/moves.png"]
    moving = [rgb(row.image) for row in rows if row.image and row.image.stem == "moves"]
    assert [image.getpixel((3, 3)) for image in moving] == [(250, 0, 0)] * 2


def test_a_phones_picture_with_a_second_view_is_one_picture(tmp_path: Path) -> None:
    noise(16, 12).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[noise(16, 12, 1)])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    seen = check(tmp_path / "phone.jpg")
    assert (seen.problem, seen.animated) == (None, False)


def upright(orientation: int, image: np.ndarray) -> np.ndarray:
    """TIFF 6.0, tag 274: where the stored row 0 and column 0 are in the picture that a person sees."""
    turned = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(image),
    }
    return turned[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    stored, exif = noise(6, 4), Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(rgb(tmp_path / "x.png")), upright(orientation, np.asarray(stored)))


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    alpha = np.dstack([np.full((16, 16, 3), 100, np.uint8), grey])
    deep = (np.arange(256, dtype=np.uint16).reshape(16, 16)) * 257
    wanted = {
        "grey.png": (Image.fromarray(grey), np.dstack([grey] * 3)),
        "bit.png": (Image.fromarray(grey > 127), np.dstack([np.where(grey > 127, 255, 0)] * 3)),
        "deep.png": (Image.fromarray(deep), np.dstack([grey] * 3)),
        "alpha.png": (Image.fromarray(alpha), None),
        "grey-alpha.png": (Image.fromarray(np.dstack([grey, np.zeros_like(grey)]), "LA"), np.full((16, 16, 3), 255)),
        "cmyk.jpg": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), np.full((16, 16, 3), [255, 0, 0])),
        "palette.png": (Image.new("RGB", (16, 16), (9, 80, 7)).quantize(4), np.full((16, 16, 3), [9, 80, 7])),
    }
    for name, (image, pixels) in wanted.items():
        image.save(tmp_path / name)
        assert check(tmp_path / name).problem is None
        made = rgb(tmp_path / name)
        assert made.mode == "RGB"
        share = grey[..., None] / 255
        expected = 100 * share + 255 * (1 - share) if pixels is None else pixels
        atol = 2 if name.endswith(".jpg") else 0.51  # JPEG rounds; half a step where alpha is blended
        np.testing.assert_allclose(np.asarray(made), np.broadcast_to(expected, (16, 16, 3)), atol=atol, rtol=0)
    assert len(wanted) == 7


def test_transparency_is_put_on_white_as_transformers_does(tmp_path: Path) -> None:
    from transformers.image_transforms import convert_to_rgb

    draw = np.random.default_rng(3)
    Image.fromarray(draw.integers(0, 256, (9, 9, 4), dtype=np.uint8)).save(tmp_path / "x.png")
    Image.new("P", (9, 9)).save(tmp_path / "y.png", transparency=0)
    for name in ("x.png", "y.png"):
        theirs = convert_to_rgb(Image.open(tmp_path / name), return_numpy=True)
        np.testing.assert_array_equal(np.asarray(rgb(tmp_path / name)), theirs)


def test_the_digest_changes_with_a_byte_a_name_or_a_label_and_with_nothing_else(folder: Path, tmp_path: Path) -> None:
    whole = images_sha256(folder, read_images(folder))
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert images_sha256(moved, read_images(moved)) == whole
    (moved / "a" / ".hidden").write_text("x")
    assert images_sha256(moved, read_images(moved)) == whole
    seen = {whole}
    (moved / "a" / "9.jpeg").rename(moved / "a" / "99.jpeg")
    seen.add(images_sha256(moved, read_images(moved)))
    (moved / "a").rename(moved / "c")
    seen.add(images_sha256(moved, read_images(moved)))
    noise(12, 8, seed=1).save(moved / "b" / "2.png")
    seen.add(images_sha256(moved, read_images(moved)))
    assert len(seen) == 4
    one = read_images(folder)[:1]
    line = json.dumps(["a/10.bmp", "a", hashlib.sha256((folder / "a/10.bmp").read_bytes()).hexdigest()]) + "\n"
    assert images_sha256(folder, one) == hashlib.sha256(line.encode()).hexdigest()


def test_a_table_names_images_relative_to_itself(folder: Path) -> None:
    (folder / "rows.csv").write_text("image,label,camera\nb/2.png,two,x\na/9.jpeg,nine,y\nb/2.png,two,z\n")
    rows = read_image_table(folder / "rows.csv")
    assert [(str(row.where), row.target, row.columns) for row in rows] == [
        ("rows.csv:2", "two", {"camera": "x"}),
        ("rows.csv:3", "nine", {"camera": "y"}),
        ("rows.csv:4", "two", {"camera": "z"}),
    ]
    assert [row.image for row in rows] == [folder / "b/2.png", folder / "a/9.jpeg", folder / "b/2.png"]
    (folder / "rows.jsonl").write_text('{"photo": "b/2.png", "digit": 2}\n{"photo": "a/9.jpeg", "digit": 9}\n')
    assert [row.target for row in read_image_table(folder / "rows.jsonl", "photo", "digit")] == ["2", "9"]
    assert [row.target for row in read_image_table(folder / "rows.jsonl", "photo", labelled=False)] == [None, None]


def test_everything_wrong_with_a_table_is_listed_by_line(folder: Path) -> None:
    (folder / "a/zero.png").write_bytes(b"")
    rows = [
        {"image": "b/2.png"},
        {"image": "", "label": "x"},
        {"image": 3, "label": "x"},
        {"image": "b/2.png", "label": None},
        {"image": "b/2.png", "label": True},
        {"image": "b/none.png", "label": "x"},
        {"image": "a/zero.png", "label": "x"},
        {"image": "b/1.JPG", "label": "x"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        read_image_table(folder / "rows.jsonl")
    said = caught.value.fact
    for line, why in enumerate(["no column 'label'", "''", "3", "None", "True", "is not there", "is empty"], start=1):
        (found,) = [each for each in said.splitlines() if each.startswith(f"- rows.jsonl:{line}: ")]
        assert why in found
    assert "7 problems" in said
    assert "rows.jsonl:8" not in said


def test_without_pillow_the_command_that_installs_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("PIL"):
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return true(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError) as caught:
        read_images(folder)
    assert "peftkit[tasks]" in str(caught.value.hint)


def test_a_half_written_file_never_passes(tmp_path: Path) -> None:
    """Cut anywhere in the picture's data, each format is found out."""
    found = 0
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        whole = io.BytesIO()
        noise(64, 64).save(whole, format=kind)
        data = whole.getvalue()
        for share in (0.02, 0.3, 0.6, 0.95):
            path = tmp_path / f"{kind}-{share}.png"
            path.write_bytes(data[: int(len(data) * share)])
            assert check(path).problem, (kind, share)
            found += 1
    assert found == 16
