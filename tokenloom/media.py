"""Reads picture files of every common kind as plain RGB, writes pictures atomically, and arranges them in sheets.

Knows files, Pillow, and the range of pixels that models use. Knows nothing of tokens or models. Torch is imported only
where a tensor is made, so that a path can be checked without waiting for it.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from tokenloom.errors import TokenloomError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 89_000_000
"""The largest picture that is read (about 9,400 x 9,400). A larger one is more likely an attack or a mistake."""

_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tiff": "TIFF",
}
_GAP = 8  # pixels between the pictures of a sheet

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Everything Pillow's decoders are known to raise for a damaged file.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a picture file as upright 8-bit RGB.

    Transparent pictures are laid on white, of an animation the first frame is taken, 16-bit and float pictures are scaled
    to 8 bits, CMYK is converted, and the EXIF orientation of a camera is applied.

    Args:
        path: The file; PNG, JPEG, WebP, GIF, BMP, TIFF and whatever else Pillow reads.

    Returns:
        A picture of mode "RGB" that is fully in memory (the file is closed).

    Raises:
        TokenloomError: If the file is missing, empty, no picture, damaged, zero-sized or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    _check_file(path)
    try:
        with Image.open(path) as image:
            _check_size(path, image.size)
            image.load()
            orientation = _orientation(image)
            picture = to_rgb(image)
    except UnidentifiedImageError as error:
        raise TokenloomError(
            f"{str(path)!r} is not a picture that can be read. Expected PNG, JPEG, WebP, GIF, BMP or TIFF: "
            "check that the file is what its name says, and that the download was complete."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, "more than that") from error
    except TokenloomError:
        raise
    except (*_DECODER_ERRORS, MemoryError) as error:
        raise TokenloomError(
            f"The picture {str(path)!r} is damaged or cut short ({str(error) or type(error).__name__}). "
            "Replace it, or take it out of the folder and of captions.jsonl."
        ) from error
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any Pillow mode to RGB, transparent parts on white.

    Args:
        image: A picture of any mode. Modes "I" and "F" do not say their range: values up to 65,535 are taken as 16-bit, a
            float picture within [0, 1] as fractions of white, and anything larger is scaled to its own maximum.

    Returns:
        A new picture of mode "RGB" and the same size.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # "La" and "PA" have no direct conversion to RGBA in every Pillow version.
        straight = image.convert("LA") if image.mode == "La" else image
        layer = straight.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Scales a grey picture of 16 or 32 bits a pixel to 8 bits."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(values.max())
    if image.mode == "F":
        white = 1.0 if peak <= 1.0 else 255.0 if peak <= 255.0 else peak
    else:
        white = max(65535.0, peak)
    return Image.fromarray((values.clip(0.0) / white * 255.0).round().astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (upright) if there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS:
        return 1


def _check_file(path: Path) -> None:
    """Raises for a path that cannot be a picture file."""
    if path.is_dir():
        raise TokenloomError(
            f"Expected a picture file, got the folder {str(path)!r}. Name one file inside it."
        )
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenloomError(f"There is no picture file {str(path)!r} ({reason}). Check the path.") from error
    if size == 0:
        raise TokenloomError(f"The picture file {str(path)!r} is empty (0 bytes). Replace it.")


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Raises for a picture without pixels or with far too many."""
    width, height = size
    if width < 1 or height < 1:
        raise TokenloomError(f"The picture {str(path)!r} has no pixels ({width} x {height}). Replace it.")
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height}")


def _too_large(path: Path, got: str) -> TokenloomError:
    return TokenloomError(
        f"The picture {str(path)!r} is too large: at most {MAX_PIXELS:,} pixels are read, got {got}. Make it smaller first."
    )


def check_output(path: str | os.PathLike[str]) -> Path:
    """Checks that a picture can be written to `path`, before time is spent on making it. Writes nothing.

    Args:
        path: The file to be; its folder may still be missing.

    Returns:
        The path.

    Raises:
        TokenloomError: The ending is no picture format, the path is a folder, or the place cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise TokenloomError(
            f"Expected the name of a picture file, got the folder {str(path)!r}. Add for instance /out.png."
        )
    if path.suffix.lower() not in _FORMATS:
        raise unknown_name(
            "picture format", path.suffix, _FORMATS, f"End {path.name!r} for instance in .png."
        )
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise unwritable(path, f"{str(ancestor)!r} is not a folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise unwritable(path, f"no permission to write in {str(ancestor)!r}")
    return path


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Writes a picture so that the file is either whole or untouched; missing folders are made.

    Args:
        image: The picture.
        path: The file; its ending chooses the format (PNG, JPEG, WebP, GIF, BMP, TIFF).

    Returns:
        The path.

    Raises:
        TokenloomError: The ending is no picture format, or the place cannot be written.
    """
    path = check_output(path)
    buffer = io.BytesIO()
    options = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    image.save(buffer, _FORMATS[path.suffix.lower()], **options)
    return write_atomically(path, buffer.getvalue())


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Writes a file under a temporary name beside its place, then renames it; missing folders are made.

    Args:
        path: The file.
        content: Bytes, or text to be written as UTF-8.

    Returns:
        The path.

    Raises:
        TokenloomError: The place cannot be written. Whatever was there before is unchanged.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(path)
    except OSError as error:
        raise unwritable(path, error.strerror or str(error)) from error
    finally:
        try:
            scratch.unlink(missing_ok=True)
        except OSError:
            pass  # its folder does not exist, and that has been reported
    return path


def unwritable(path: Path, reason: str) -> TokenloomError:
    """The error that says that a file cannot be written, and why."""
    return TokenloomError(
        f"{str(path)!r} cannot be written: {reason}. Choose another folder, or free its place."
    )


def to_pixels(image: Image.Image) -> Tensor:
    """Returns a picture of any mode as float32 pixels (1, 3, H, W) in [-1, 1]."""
    import torch

    array = torch.from_numpy(np.array(to_rgb(image)))
    return array.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Returns float pixels (B, 3, H, W) in [-1, 1] as RGB pictures; what lies outside is clipped."""
    levels = ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """Returns a picture with every pixel repeated `factor` times in both directions."""
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sheet(
    images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None
) -> Image.Image:
    """Arranges pictures in rows on white, each with an optional label below it.

    Args:
        images: At least one picture. The largest width and height set the size of a place.
        columns: Pictures a row; by default as close to a square as possible.
        labels: One text a picture, shortened to the width of its place and of the empty labels that follow in its row.

    Returns:
        An RGB picture.

    Raises:
        TokenloomError: No picture, not one label a picture, or a number of columns below 1.

    Example:
        >>> sheet([Image.new("RGB", (64, 64))] * 4).size
        (152, 152)
    """
    if not images:
        raise TokenloomError("Expected at least one picture for a sheet, got none.")
    if labels is not None and len(labels) != len(images):
        raise TokenloomError(f"Expected one label for each of the {len(images)} pictures, got {len(labels)}.")
    across = columns if columns is not None else int(np.ceil(np.sqrt(len(images))))
    if across < 1:
        raise TokenloomError(f"Expected at least 1 column, got {across}.")
    across = min(across, len(images))
    down = -(-len(images) // across)
    font = ImageFont.load_default()
    width, height = max(image.width for image in images), max(image.height for image in images)
    strip = int(sum(font.getbbox("Agjp")[1::2])) + 2 if labels is not None else 0
    page = Image.new(
        "RGB",
        (_GAP + across * (width + _GAP), _GAP + down * (height + strip + _GAP)),
        (255, 255, 255),
    )
    pen = ImageDraw.Draw(page)
    for index, image in enumerate(images):
        left = _GAP + index % across * (width + _GAP)
        top = _GAP + index // across * (height + strip + _GAP)
        page.paste(to_rgb(image), (left, top))
        if labels is not None and labels[index]:
            row_end = min((index // across + 1) * across, len(images))
            free = next((place for place in range(index + 1, row_end) if labels[place]), row_end) - index
            text = _shorten(labels[index], free * (width + _GAP) - _GAP, font)
            pen.text((left, top + height + 1), text, (0, 0, 0), font)
    return page


def _shorten(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Cuts a text to a width in pixels, with three dots where something was cut."""
    flat = " ".join(text.split())[:200]
    if font.getlength(flat) <= width:
        return flat
    while flat and font.getlength(flat + "...") > width:
        flat = flat[:-1]
    return flat.rstrip() + "..."
