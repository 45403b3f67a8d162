"""What JPEG, WebP, AVIF and JPEG 2000 make of the same pictures at the same number of bits: the baselines of a
learned tokenizer.

At 64 x 64 pixels a file is mostly headers, so two counts are given. `file` is every byte of the file.
`payload` is what is left when everything is taken away that a decoder could know beforehand, as it knows a
tokenizer's weights:

* JPEG: the bytes between the start-of-scan header and the end-of-image marker (no quantisation and no Huffman
  tables; the tables are the standard ones, so no picture smuggles information into them).
* WebP: the VP8 chunk without its ten-byte frame header (RIFF and chunk headers are dropped as well).
* AVIF: the AV1 frame and tile-group units of the media data, without temporal delimiters and sequence
  headers.
* JPEG 2000: the packet data of the tile parts, without markers (irreversible wavelet, one layer).

The budget is held against the payload by default, which favours the codec. To be fair at rates where a codec
cannot code all pixels, every picture is also coded at smaller sizes and with both chroma samplings and
enlarged again; the best PSNR at or under the budget counts. The picture size, quality and chroma sampling
that were chosen are not charged to the codec either.

Knows nothing of tokenizers. Shapes: N pictures, pixels uint8 (N, 3, H, W).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.evaluation.metrics import psnr, psnr_of_mse, ssim
from tokenloom.evaluation.pictures import as_uint8, check_pixels, to_pil

Encode = Callable[[Image.Image, int], bytes]
Count = Literal["payload", "file"]
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)


@dataclass(frozen=True)
class Encoded:
    """One coded picture: its settings, both counts of bits, and the decoded pixels uint8 (3, H, W)."""

    quality: int
    scale: float
    variant: str
    file_bits: int
    payload_bits: int
    pixels: Tensor


@dataclass(frozen=True)
class CodecResult:
    """Averages over pictures that a codec could code within the budget.

    `psnr` is the mean of the pictures' PSNR, `psnr_of_mean` the PSNR of the mean squared error over all of
    them.
    """

    codec: str
    budget_bits: float
    count: str
    pictures: int
    fitted: int
    payload_bits: float
    file_bits: float
    psnr: float
    psnr_of_mean: float
    ssim: float
    mean_scale: float

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary."""
        return asdict(self)


def codec_names() -> tuple[str, ...]:
    """Codecs that this installation of Pillow can write."""
    return tuple(name for name in _VARIANTS if name == "jpeg" or features.check(_FEATURES.get(name, name)))


def evaluate_codec(codec: str, pixels: Tensor, budget_bits: float, count: Count = "payload") -> CodecResult:
    """Codes every picture at the best quality within a budget and measures what comes back.

    Args:
        codec: "jpeg", "webp", "avif" or "jpeg2000".
        pixels: uint8 (N, 3, H, W).
        budget_bits: Bits allowed for one picture.
        count: Which bits the budget is held against, "payload" or "file".

    Returns:
        Averages over the pictures that fit; `fitted` says how many did (figures are NaN if none).

    Raises:
        TokenloomError: If the codec is unknown or not built into Pillow, or the pixels are not uint8 (N, 3,
            H, W).
    """
    check_pixels(pixels)
    coded = [encode_within(codec, picture, budget_bits, count) for picture in pixels]
    kept = [index for index, result in enumerate(coded) if result is not None]
    results = [result for result in coded if result is not None]
    if not results:
        nan = float("nan")
        return CodecResult(codec, budget_bits, count, len(pixels), 0, nan, nan, nan, nan, nan, nan)
    decoded = torch.stack([result.pixels for result in results]).float() / 255
    reference = pixels[kept].float() / 255
    return CodecResult(
        codec=codec,
        budget_bits=budget_bits,
        count=count,
        pictures=len(pixels),
        fitted=len(results),
        payload_bits=float(np.mean([result.payload_bits for result in results])),
        file_bits=float(np.mean([result.file_bits for result in results])),
        psnr=float(psnr(decoded, reference).clamp(max=100).mean()),
        psnr_of_mean=float(psnr_of_mse((decoded - reference).square().mean())),
        ssim=float(ssim(decoded, reference).mean()),
        mean_scale=float(np.mean([result.scale for result in results])),
    )


def encode_within(codec: str, pixels: Tensor, budget_bits: float, count: Count = "payload") -> Encoded | None:
    """Finds the coding of one picture with the highest PSNR whose bits are at or under the budget.

    Args:
        codec: "jpeg", "webp", "avif" or "jpeg2000".
        pixels: uint8 (3, H, W).
        budget_bits: Bits allowed.
        count: "payload" or "file".

    Returns:
        The coded picture, or None if no setting is small enough.
    """
    if count not in ("payload", "file"):
        raise unknown_name("bit count", count, ("payload", "file"))
    original, best, best_error = to_pil(pixels), None, float("inf")
    reference = pixels.float()
    for scale in SCALES:
        size = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
        small = original if scale == 1.0 else original.resize(size, Image.Resampling.LANCZOS)
        for variant, encode in _variants(codec).items():
            found = _largest_quality(codec, encode, small, budget_bits, count)
            if found is None:
                continue
            quality, data = found
            decoded = _decode(data, original.size)
            error = float((decoded.float() - reference).square().mean())
            if error < best_error:
                best_error = error
                best = Encoded(quality, scale, variant, 8 * len(data), payload_bits(codec, data), decoded)
    return best


def payload_bits(codec: str, data: bytes) -> int:
    """Bits of a coded file without its headers, by the rules at the top of this module.

    Raises:
        TokenloomError: If the codec is unknown or the file does not have the expected structure.
    """
    _variants(codec)
    try:
        size = _PAYLOADS[codec](data)
    except (IndexError, ValueError) as error:
        raise TokenloomError(
            f"Expected a whole {codec} file, got {len(data)} bytes that cannot be parsed ({error})."
        ) from error
    return 8 * size


def _largest_quality(
    codec: str, encode: Encode, image: Image.Image, budget: float, count: Count
) -> tuple[int, bytes] | None:
    """Bisects the quality; sizes grow with it but for rare wiggles, which cost a step at most."""
    low, high, quality, best = (
        0,
        100,
        0,
        None,
    )  # the lowest quality comes first: if that is too large, all are
    while low <= high:
        data = encode(image, quality)
        bits = payload_bits(codec, data) if count == "payload" else 8 * len(data)
        if bits <= budget:
            best, low = (quality, data), quality + 1
        else:
            high = quality - 1
        quality = (low + high) // 2
    return best


def _decode(data: bytes, size: tuple[int, int]) -> Tensor:
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return as_uint8([picture])[0]


def _save(image: Image.Image, quality: int, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    if options["format"] == "JPEG2000":  # takes a compression ratio: 1 at quality 100, 1024 at 0
        levels = min(6, min(image.size).bit_length())
        options = options | {"quality_layers": [2 ** ((100 - quality) / 10)], "num_resolutions": levels}
        image.save(buffer, **options)
    else:
        image.save(buffer, quality=quality, **options)
    return buffer.getvalue()


_FEATURES = {"jpeg2000": "jpg_2000"}  # where Pillow's name of a feature is not the codec's

_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "jpeg": {name: {"format": "JPEG", "subsampling": name, "optimize": False} for name in ("4:2:0", "4:4:4")},
    "webp": {
        "4:2:0": {"format": "WEBP", "method": 6},
        "4:2:0 sharp": {"format": "WEBP", "method": 6, "use_sharp_yuv": True},
    },
    "avif": {name: {"format": "AVIF", "subsampling": name, "speed": 6} for name in ("4:2:0", "4:4:4")},
    "jpeg2000": {
        "4:4:4": {
            "format": "JPEG2000",
            "no_jp2": True,
            "irreversible": True,
            "mct": 1,
            "quality_mode": "rates",
        }
    },
}


def _variants(codec: str) -> dict[str, Encode]:
    if codec not in _VARIANTS:
        raise unknown_name("codec", codec, _VARIANTS)
    if codec not in codec_names():
        raise TokenloomError(
            f"This Pillow cannot write {codec}. Install Pillow 11.3 or newer, or leave {codec} out."
        )
    return {name: partial(_save, options=options) for name, options in _VARIANTS[codec].items()}


def _jpeg_payload(data: bytes) -> int:
    """Entropy-coded bytes of a baseline file: everything after the start-of-scan header but the two bytes of
    end-of-image.
    """
    position = 2
    while data[position : position + 2] != b"\xff\xda":
        if data[position] != 0xFF:
            raise ValueError("a marker was expected")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    start = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data.rindex(b"\xff\xd9") - start


def _webp_payload(data: bytes) -> int:
    """Bytes of the VP8 chunk behind its frame tag, start code and dimensions."""
    position = 12
    while data[position : position + 4] != b"VP8 ":
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
        if position >= len(data):
            raise ValueError("no VP8 chunk")
    return int.from_bytes(data[position + 4 : position + 8], "little") - 10


def _avif_payload(data: bytes) -> int:
    """Bytes of AV1 frames inside the media-data box."""
    position = 0
    while data[position + 4 : position + 8] != b"mdat":
        size = int.from_bytes(data[position : position + 4], "big")
        if size < 8 or position + size >= len(data):
            raise ValueError("no media data")
        position += size
    end = position + (int.from_bytes(data[position : position + 4], "big") or len(data) - position)
    return av1_frame_bytes(data[position + 8 : end])


def av1_frame_bytes(data: bytes) -> int:
    """Bytes of AV1 frame (6), frame-header (3) and tile-group (4) units in a row of units."""
    position, end, total = 0, len(data), 0
    while position < end:
        header = data[position]
        kind, has_extension, has_size = (header >> 3) & 15, (header >> 2) & 1, (header >> 1) & 1
        position += 1 + has_extension
        size = end - position
        if has_size:
            size, position = _leb128(data, position)
        if kind in (3, 4, 6):
            total += size
        position += size
    return total


def _jpeg2000_payload(data: bytes) -> int:
    """Bytes between each start-of-data marker and the end of its tile part."""
    position, total = 2, 0
    while data[position : position + 2] != b"\xff\x90":
        if data[position] != 0xFF:
            raise ValueError("a marker was expected")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    while data[position : position + 2] == b"\xff\x90":
        size = int.from_bytes(data[position + 6 : position + 10], "big")
        end = position + size if size else len(data) - 2
        if end > len(data):
            raise ValueError("a tile part is cut off")
        total += end - data.index(b"\xff\x93", position, end) - 2
        position = end
    return total


_PAYLOADS: dict[str, Callable[[bytes], int]] = {
    "jpeg": _jpeg_payload,
    "webp": _webp_payload,
    "avif": _avif_payload,
    "jpeg2000": _jpeg2000_payload,
}


def _leb128(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[position + index]
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, position + index + 1
    raise ValueError("a size that never ends")


def compare_codecs(
    pixels: Tensor, budget_bits: float, names: Sequence[str] | None = None
) -> list[CodecResult]:
    """Evaluates several codecs (all available ones by default) at one payload budget."""
    return [evaluate_codec(name, pixels, budget_bits) for name in (names or codec_names())]
