"""Writing pictures: whole or not at all, and sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenloom import media
from tokenloom.errors import TokenloomError


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.JPEG", "d.webp", "e.gif", "f.bmp", "g.tiff"])
def test_every_format_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (20, 10), (200, 30, 60))
    path = media.save_image(picture, tmp_path / "new" / "folder" / name)
    back = np.array(media.open_image(path)).astype(int)
    assert np.abs(back - np.array(picture).astype(int)).max() <= 8
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_png_is_exact(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = media.save_image(Image.fromarray(array), tmp_path / "x.png")
    assert np.array_equal(np.array(Image.open(path)), array)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.pgn", r"Unknown picture format '\.pgn'\. Did you mean '\.png'"),
        ("x", "picture format"),
        ("", "folder"),
    ],
)
def test_endings_that_are_no_picture(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        media.save_image(Image.new("RGB", (2, 2)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TokenloomError, match=r"cannot be written: .*file' is not a folder"):
        media.check_output(tmp_path / "file" / "x.png")
    with pytest.raises(TokenloomError, match="cannot be written"):
        media.write_atomically(tmp_path / "file" / "x.txt", "text")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.os, "access", lambda path, mode: False)
    with pytest.raises(TokenloomError, match="no permission to write"):
        media.check_output(tmp_path / "x.png")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media.write_atomically(tmp_path / "x.txt", "old")

    def fail(self: Path, content: bytes) -> int:
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(TokenloomError, match="No space left on device"):
        media.write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_sheet_places_every_picture() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    page = media.sheet([Image.new("RGB", (10, 12), colour) for colour in colours], columns=2)
    gap = media._GAP
    assert page.size == (2 * 10 + 3 * gap, 2 * 12 + 3 * gap)
    assert page.getpixel((gap, gap)) == colours[0]
    assert page.getpixel((gap + 10 + gap, gap)) == colours[1]
    assert page.getpixel((gap, gap + 12 + gap)) == colours[2]
    assert page.getpixel((gap + 10 + gap, gap + 12 + gap)) == (255, 255, 255)


def test_sheet_labels_stay_below_their_picture() -> None:
    black = media.sheet(
        [Image.new("RGB", (60, 20), (255, 0, 0))] * 2, 1, ["a very long prompt " * 50, "short"]
    )
    plain = media.sheet([Image.new("RGB", (60, 20), (255, 0, 0))] * 2, 1)
    assert black.width == plain.width
    assert black.height > plain.height
    label = np.array(black)[media._GAP + 20 : black.height // 2].astype(int)
    assert (label.sum(-1) < 384).any()  # dark strokes right below the first picture
    assert (np.array(black)[:, -media._GAP :] == 255).all()


def test_a_label_runs_over_empty_ones_in_its_row() -> None:
    pictures = [Image.new("RGB", (40, 10))] * 3
    alone = media.sheet(pictures, 3, ["a rather long prompt", "b", "c"])
    wide = media.sheet(pictures, 3, ["a rather long prompt", "", "c"])
    between = (48 + media._GAP, 10 + media._GAP, 96 + media._GAP, alone.height)  # below the second picture
    assert np.array(wide.crop(between)).astype(int).sum() < np.array(alone.crop(between)).astype(int).sum()
    assert (np.array(wide)[:, -media._GAP :] == 255).all()


@pytest.mark.parametrize(
    ("count", "columns", "labels"), [(0, None, None), (1, 0, None), (1, -2, None), (1, None, ["a", "b"])]
)
def test_sheets_that_cannot_be(count: int, columns: int | None, labels: list[str] | None) -> None:
    with pytest.raises(TokenloomError, match="Expected"):
        media.sheet([Image.new("RGB", (4, 4))] * count, columns, labels)


def test_enlarge_repeats_pixels() -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert np.array_equal(np.array(media.enlarge(picture, 3)), np.array(picture).repeat(3, 0).repeat(3, 1))
    assert media.enlarge(picture, 1) is picture
