"""What animated WebP, H.264 and AV1 make of the same clips at the same number of bits: baselines of a video tokenizer.

Only payload counts, what a decoder could not know beforehand: the VP8 data of WebP's frames without their frame headers, the
slices of H.264, the frame units of AV1. At a few hundred bytes a clip no codec can code all pixels, so every clip is also
coded at smaller sizes and with fewer frames, which are enlarged and held; the best PSNR at or under the budget counts. What
was chosen is not charged. H.264 and AV1 need PyAV. Knows nothing of tokenizers.

Shapes: T frames, H rows, W columns.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.evaluation.codecs import av1_frame_bytes
from tokenloom.evaluation.metrics import psnr_of_mse
from tokenloom.evaluation.pictures import to_pil

VIDEO_CODECS = ("webp", "h264", "av1")
_SCALES = (1.0, 0.5, 0.25, 0.125)
_HOLDS = (1, 2, 4, 8)
_ENCODERS = {"h264": ("libx264",), "av1": ("libaom-av1", "libsvtav1")}
_WORST = {"h264": 51, "av1": 63}  # the constant rate factor of the lowest quality
_RATE = 8
_LEAST_SIDE = 16


@dataclass(frozen=True)
class CodedClip:
    """A coded clip.

    Attributes:
        clip: uint8 (T, 3, H, W), decoded.
        bits: Payload.
        scale: Side of the coded frames, as a share.
        hold: Frames that each coded frame stands for.
        psnr: Of all pixels of the clip, in dB.
    """

    clip: Tensor
    bits: int
    scale: float
    hold: int
    psnr: float


def video_codec_names() -> tuple[str, ...]:
    """The codecs that can be written here."""
    return tuple(name for name in VIDEO_CODECS if name == "webp" or _encoder(name) is not None)


def _encoder(codec: str) -> str | None:
    if find_spec("av") is None:
        return None
    import av

    return next((name for name in _ENCODERS[codec] if name in av.codecs_available), None)


def code_clip_within(codec: str, clip: Tensor, budget_bits: float) -> CodedClip | None:
    """The coding of a clip with the highest PSNR whose payload is at or under the budget.

    Args:
        codec: One of `VIDEO_CODECS`.
        clip: uint8 (T, 3, H, W).
        budget_bits: Bits allowed for the whole clip.

    Returns:
        The coded clip, or `None` if nothing is small enough.

    Raises:
        TokenloomError: For an unknown codec, one that is not there, or another kind of clip.
    """
    if codec not in VIDEO_CODECS:
        raise unknown_name("video codec", codec, VIDEO_CODECS)
    if codec not in video_codec_names():
        raise TokenloomError(f"{codec} needs PyAV with its encoder: pip install av. WebP works without it.")
    if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8:
        raise TokenloomError(f"Expected a clip uint8 (T, 3, H, W), got {clip.dtype} {tuple(clip.shape)}.")
    best = None
    for hold in _HOLDS:
        if hold > 1 and hold >= len(clip):
            break
        for scale in _SCALES:
            found = _best_quality(codec, clip, budget_bits, scale, hold)
            if found is not None and (best is None or found.psnr > best.psnr):
                best = found
    return best


def _best_quality(codec: str, clip: Tensor, budget: float, scale: float, hold: int) -> CodedClip | None:
    """Bisects the quality at one size and rate of frames; bits grow with it but for rare wiggles."""
    height, width = clip.shape[2:]
    least = _LEAST_SIDE if codec != "webp" else 1
    size = (max(least, round(width * scale)), max(least, round(height * scale)))
    frames = [picture.resize(size, Image.Resampling.LANCZOS) for picture in map(to_pil, clip[::hold])]
    low, high, best = 0, 100 if codec == "webp" else _WORST[codec], None
    while low <= high:
        quality = (low + high) // 2
        bits, made = _CODERS[codec](frames, quality)
        if bits <= budget:
            best, low = (bits, made), quality + 1
        else:
            high = quality - 1
    if best is None:
        return None
    enlarged = np.stack(
        [np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in best[1]]
    )
    output = torch.from_numpy(enlarged).permute(0, 3, 1, 2).repeat_interleave(hold, dim=0)[: len(clip)]
    error = ((output.float() - clip.float()) / 255).square().mean()
    return CodedClip(output, best[0], scale, hold, float(psnr_of_mse(error).clamp(max=100)))


def _code_webp(frames: Sequence[Image.Image], quality: int) -> tuple[int, list[Image.Image]]:
    """Payload bits and decoded frames of an animated WebP."""
    buffer = io.BytesIO()
    duration = [
        100 + index for index in range(len(frames))
    ]  # all different, so that Pillow joins no equal frames
    options: dict[str, Any] = {
        "save_all": True,
        "append_images": frames[1:],
        "duration": duration,
        "method": 4,
    }
    frames[0].save(buffer, "WEBP", quality=quality, **options)
    with Image.open(buffer) as opened:
        made = [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
    made += made[-1:] * (len(frames) - len(made))
    return 8 * webp_payload_bytes(buffer.getvalue()), made


def webp_payload_bytes(data: bytes) -> int:
    """Bytes of the pictures inside a WebP file, animated or not, without their headers."""

    def inside(position: int, end: int) -> int:
        total = 0
        while position + 8 <= end:
            kind, size = (
                data[position : position + 4],
                int.from_bytes(data[position + 4 : position + 8], "little"),
            )
            start = position + 8
            if kind == b"ANMF":
                total += inside(start + 16, start + size)
            elif kind == b"VP8 ":
                total += max(0, size - 10)
            elif kind in (b"VP8L", b"ALPH"):
                total += max(0, size - 5)
            position = start + size + size % 2
        return total

    return inside(12, len(data))


def _code_av(codec: str) -> Callable[[Sequence[Image.Image], int], tuple[int, list[Image.Image]]]:
    count = {"h264": h264_slice_bytes, "av1": av1_frame_bytes}[codec]

    def code(frames: Sequence[Image.Image], quality: int) -> tuple[int, list[Image.Image]]:
        os.environ.setdefault("SVT_LOG", "1")  # errors alone
        import av

        buffer, size = io.BytesIO(), 0
        with av.open(buffer, "w", format="matroska") as container:
            stream: Any = container.add_stream(_encoder(codec), rate=_RATE)
            width, height = frames[0].size
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            stream.options = {"crf": str(_WORST[codec] - quality)} | (
                {"preset": "slow"} if codec == "h264" else {}
            )
            for picture in frames:
                array = np.pad(np.asarray(picture), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                    size += count(bytes(packet))
                    container.mux(packet)
            for packet in stream.encode():
                size += count(bytes(packet))
                container.mux(packet)
        buffer.seek(0)
        with av.open(buffer) as opened:
            made = [frame.to_image().crop((0, 0, width, height)) for frame in opened.decode(video=0)]
        return 8 * size, made

    return code


def h264_slice_bytes(data: bytes) -> int:
    """Bytes of the slices (NAL units 1 and 5) of an H.264 byte stream."""
    units = re.split(rb"\x00\x00\x00?\x01", data)
    return sum(len(unit) for unit in units if unit and unit[0] & 31 in (1, 5))


_CODERS: dict[str, Callable[[Sequence[Image.Image], int], tuple[int, list[Image.Image]]]] = {
    "webp": _code_webp,
    "h264": _code_av("h264"),
    "av1": _code_av("av1"),
}
