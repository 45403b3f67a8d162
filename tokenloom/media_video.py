"""Reads clips (GIF, animated WebP and PNG, folders of frames; video files where PyAV is present), and writes them atomically.

Knows files, Pillow and PyAV. Knows nothing of tokens or models; torch is imported only where a tensor is made.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media import _DECODER_ERRORS, MAX_PIXELS, open_image, to_rgb, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

MAX_FRAMES = 4096
"""The longest clip that is read; a longer one would fill the memory."""

_CLIP_PIXELS = 3 * MAX_PIXELS  # of all frames together, 800 MB of bytes
_ANIMATIONS = (".gif", ".webp", ".png", ".apng")
_VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
_OUTPUTS = (".gif", ".webp", ".mp4")


class Clip(NamedTuple):
    """A clip.

    Attributes:
        frames: RGB pictures of one size.
        fps: Frames a second; `None` where the file does not say.
    """

    frames: list[Image.Image]
    fps: float | None

    def pixels(self) -> Tensor:
        """Float32 frames (1, T, 3, H, W) in [-1, 1], as video tokenizers take them."""
        import torch

        array = torch.from_numpy(np.stack([np.asarray(frame) for frame in self.frames]))
        return array.permute(0, 3, 1, 2)[None].float() / 127.5 - 1


def read_clip(path: str | os.PathLike[str], *, max_frames: int = MAX_FRAMES) -> Clip:
    """Reads a clip; a picture is a clip of one frame.

    Frames that an animation shows longer than others are repeated, so that all last equally long.

    Args:
        path: GIF, WebP, PNG, a video file (needs PyAV), or a folder of pictures, read in the order of the numbers in their names.
        max_frames: Longer clips are refused.

    Raises:
        TokenloomError: If there is no such clip, it is damaged or cut short, too long or too large, or its frames differ in size.
    """
    path = Path(path)
    if path.is_dir():
        timed = [(frame, 0.0) for frame in _limited(path, _folder(path), max_frames)]
    elif path.suffix.lower() in _VIDEOS:
        timed = list(_limited_pairs(path, _video(path), max_frames))
    else:
        timed = list(_limited_pairs(path, _animation(path), max_frames))
    sizes = sorted({frame.size for frame, _ in timed})
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:4])
        raise TokenloomError(
            f"All frames of a clip have one size, but {str(path)!r} has {shown}; resize them first."
        )
    return _even(path, timed, max_frames)


def check_clip_output(path: str | os.PathLike[str]) -> Path:
    """Checks that a clip can be written under this name, before time is spent on making it. Writes nothing.

    Raises:
        TokenloomError: If the ending is none of GIF, WebP and MP4, the path is a folder, or MP4 needs PyAV.
    """
    path = Path(path)
    if path.is_dir():
        raise TokenloomError(
            f"Expected the name of a clip, got the folder {str(path)!r}. Add for instance /out.gif."
        )
    if path.suffix.lower() not in _OUTPUTS:
        raise unknown_name("clip format", path.suffix, _OUTPUTS, f"End {path.name!r} for instance in .gif.")
    if path.suffix.lower() == ".mp4":
        _require_av(path)
    return path


def check_rate(path: str | os.PathLike[str], fps: float) -> None:
    """Checks that a clip of so many frames a second can be written under this name.

    Raises:
        TokenloomError: If the rate is not above 0, or more than 50 in a GIF or 1,000 in another file.
    """
    suffix = Path(path).suffix
    most = 50.0 if suffix.lower() == ".gif" else 1000.0
    if not 0 < fps <= most:
        raise TokenloomError(f"fps must lie above 0 and be at most {most:g} in a {suffix} file, got {fps!r}.")


def save_clip(frames: Sequence[Image.Image], path: str | os.PathLike[str], fps: float = 8.0) -> Path:
    """Writes a clip so that the file is either whole or untouched; missing folders are made.

    Args:
        frames: At least one picture, all of one size.
        path: The file; its ending chooses GIF (at most 256 colours a frame), animated WebP (lossless) or MP4.
        fps: Frames a second; GIF counts in hundredths of a second, so at most 50 there.

    Raises:
        TokenloomError: For no frames, frames of several sizes, a rate that is not above 0, or a place that cannot be written.
    """
    path = check_clip_output(path)
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise TokenloomError(
            f"A clip needs at least one frame and one size for all, got {len(frames)} frames of {len(sizes)} sizes."
        )
    check_rate(path, fps)
    pictures = [to_rgb(frame) for frame in frames]
    if path.suffix.lower() == ".mp4":
        return write_atomically(path, _encode_video(pictures, fps))
    buffer = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 / fps)}
    options |= {"loop": 0} | ({"lossless": True} if path.suffix.lower() == ".webp" else {})
    pictures[0].save(buffer, "WEBP" if path.suffix.lower() == ".webp" else "GIF", **options)
    return write_atomically(path, buffer.getvalue())


# ---- reading


def _limited(path: Path, frames: Iterator[Image.Image], most: int) -> Iterator[Image.Image]:
    for frame, _ in _limited_pairs(path, ((frame, 0.0) for frame in frames), most):
        yield frame


def _limited_pairs(
    path: Path, frames: Iterator[tuple[Image.Image, float]], most: int
) -> Iterator[tuple[Image.Image, float]]:
    """The same frames; an error before there are too many or too large ones."""
    pixels = count = 0
    for frame, seconds in frames:
        count += 1
        pixels += frame.width * frame.height
        if count > most:
            raise _too_long(path, most)
        if pixels > _CLIP_PIXELS:
            raise TokenloomError(
                f"The clip {str(path)!r} is too large: at most {_CLIP_PIXELS:,} pixels in all frames are read. Make it smaller."
            )
        yield frame, seconds
    if not count:
        raise TokenloomError(f"{str(path)!r} has no frames. Expected a clip of at least one.")


def _too_long(path: Path, most: int) -> TokenloomError:
    return TokenloomError(
        f"The clip {str(path)!r} is too long: at most {most:,} frames are read. Cut it, or pass max_frames=..."
    )


def _folder(path: Path) -> Iterator[Image.Image]:
    files = [
        file for file in path.iterdir() if file.suffix.lower() in _PICTURES and not file.name.startswith(".")
    ]
    for file in sorted(files, key=_by_number):
        yield open_image(file)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _animation(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Frames and how many seconds they last, 0 if the file does not say."""
    if not path.is_file() or not path.stat().st_size:
        raise TokenloomError(f"There is no clip {str(path)!r}, or it is empty. Check the path.")
    try:
        with Image.open(path) as image:
            if image.format == "GIF" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
                raise OSError("its end is missing")
            if image.width * image.height > MAX_PIXELS:
                raise TokenloomError(
                    f"The frames of {str(path)!r} are too large, {image.width} x {image.height}."
                )
            for frame in ImageSequence.Iterator(image):
                yield to_rgb(frame), float(frame.info.get("duration", 0)) / 1000
    except UnidentifiedImageError as error:
        kinds = ", ".join((*_ANIMATIONS, *_VIDEOS))
        raise TokenloomError(
            f"{str(path)!r} is no clip that can be read. Expected {kinds} or a folder."
        ) from error
    except TokenloomError:
        raise
    except (*_DECODER_ERRORS, MemoryError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> TokenloomError:
    return TokenloomError(
        f"The clip {str(path)!r} is damaged or cut short ({str(error) or type(error).__name__}). Replace it."
    )


def _video(path: Path) -> Iterator[tuple[Image.Image, float]]:
    if not path.is_file():
        raise TokenloomError(f"There is no clip {str(path)!r}. Check the path.")
    _require_av(path)
    import av

    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
            for frame in container.decode(video=0):
                yield frame.to_image(), float(1 / rate) if rate else 0.0
    except (av.error.FFmpegError, *_DECODER_ERRORS) as error:
        raise _damaged(path, error) from error


def _require_av(path: Path) -> None:
    if find_spec("av") is None:
        raise TokenloomError(
            f"{path.suffix} files need PyAV, which is not installed: pip install av. GIF and WebP work without it."
        )


def _even(path: Path, timed: list[tuple[Image.Image, float]], most: int) -> Clip:
    """Frames that all last equally long: as long as the shortest of them."""
    unit = min((seconds for _, seconds in timed if seconds > 0), default=0.0)
    if not unit or len(timed) == 1:
        return Clip([frame for frame, _ in timed], 1 / unit if unit else None)
    repeats = [max(1, round(seconds / unit)) for _, seconds in timed]
    if sum(repeats) > most:
        raise _too_long(path, most)
    frames = [frame for (frame, _), count in zip(timed, repeats, strict=True) for _ in range(count)]
    return Clip(frames, 1 / unit)


# ---- writing


def _encode_video(frames: Sequence[Image.Image], fps: float) -> bytes:
    """An MP4 file; sides that are odd are repeated by one pixel, which the colour format needs."""
    from fractions import Fraction

    import av

    buffer = io.BytesIO()
    width, height = frames[0].size
    with av.open(buffer, "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for picture in frames:
            array = np.pad(np.asarray(picture), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
