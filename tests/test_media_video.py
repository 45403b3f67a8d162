"""Clips in files: what is written is read again, and what cannot be read is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenloom import TokenloomError
from tokenloom.media_video import check_clip_output, read_clip, save_clip


def ball(count: int, size: tuple[int, int] = (16, 12)) -> list[Image.Image]:
    """A red square that moves to the right on white."""
    frames = []
    for index in range(count):
        array = np.full((size[1], size[0], 3), 255, np.uint8)
        array[4:8, index % size[0] : index % size[0] + 3] = (200, 30, 30)
        frames.append(Image.fromarray(array))
    return frames


@pytest.mark.parametrize("name", ["out.gif", "out.webp"])
def test_clips_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    frames = ball(5)
    clip = read_clip(save_clip(frames, tmp_path / "new" / name, fps=10))
    assert clip.fps == pytest.approx(10)
    assert [np.asarray(frame).tolist() for frame in clip.frames] == [
        np.asarray(one).tolist() for one in frames
    ]
    pixels = clip.pixels()
    assert pixels.shape == (1, 5, 3, 12, 16)
    assert (float(pixels.min()), float(pixels.max())) == (pytest.approx(30 / 127.5 - 1), 1.0)
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize("name", ["out.gif", "out.webp"])
def test_frames_that_stay_are_repeated(tmp_path: Path, name: str) -> None:
    frames = ball(2)
    clip = read_clip(save_clip([frames[0], *[frames[1]] * 3, frames[0]], tmp_path / name, fps=20))
    assert len(clip.frames) == 5
    assert clip.fps == pytest.approx(20)
    assert [frame.getpixel((0, 5)) == (200, 30, 30) for frame in clip.frames] == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for index, frame in enumerate(ball(12)):
        frame.save(tmp_path / f"frame{index}.png")
    clip = read_clip(tmp_path)
    assert clip.fps is None
    wanted = [np.asarray(frame).tolist() for frame in ball(12)]
    assert [np.asarray(frame).tolist() for frame in clip.frames] == wanted


def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    ball(1)[0].save(tmp_path / "one.png")
    assert read_clip(tmp_path / "one.png").pixels().shape == (1, 1, 3, 12, 16)
    assert len(read_clip(save_clip(ball(1), tmp_path / "one.gif")).frames) == 1


def test_a_gif_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    content = save_clip(ball(6), tmp_path / "whole.gif").read_bytes()
    cut = tmp_path / "cut.gif"
    for share in (0.3, 0.6, 0.9, 0.99):
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(TokenloomError, match="damaged or cut short"):
            read_clip(cut)


def test_clips_that_are_too_long_are_refused(tmp_path: Path) -> None:
    path = save_clip(ball(9), tmp_path / "long.gif")
    with pytest.raises(TokenloomError, match="at most 8 frames"):
        read_clip(path, max_frames=8)
    Image.new("L", (1, 1)).save(
        tmp_path / "many.gif",
        save_all=True,
        append_images=[Image.new("L", (1, 1), index % 2 * 255) for index in range(1, 10_000)],
        duration=20,
    )
    with pytest.raises(TokenloomError, match="at most 4,096 frames"):
        read_clip(tmp_path / "many.gif")


def test_what_is_no_clip_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.gif").write_text("not a clip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for index, side in enumerate((4, 5)):
        Image.new("RGB", (side, side)).save(tmp_path / "mixed" / f"{index}.png")
    for name, message in {
        "text.gif": "no clip that can be read",
        "missing.gif": "There is no clip",
        "missing.mp4": "There is no clip",
        "empty": "has no frames",
        "mixed": "one size, but .* has 4x4, 5x5",
    }.items():
        with pytest.raises(TokenloomError, match=message):
            read_clip(tmp_path / name)


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenloomError, match=r"Unknown clip format '\.gf'.*\.gif"):
        check_clip_output("x.gf")
    with pytest.raises(TokenloomError, match="got the folder"):
        check_clip_output(tmp_path)
    with pytest.raises(TokenloomError, match="got 0 frames"):
        save_clip([], tmp_path / "x.gif")
    with pytest.raises(TokenloomError, match="of 2 sizes"):
        save_clip([*ball(1), *ball(1, (8, 8))], tmp_path / "x.gif")
    with pytest.raises(TokenloomError, match=r"at most 50 in a \.gif file, got 60"):
        save_clip(ball(2), tmp_path / "x.gif", fps=60)
    monkeypatch.setattr("tokenloom.media_video.find_spec", lambda name: None)
    with pytest.raises(TokenloomError, match="need PyAV"):
        save_clip(ball(2), tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())
