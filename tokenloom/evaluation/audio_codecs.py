"""Opus, MP3 and Vorbis through libsndfile at a budget of bits, charged their payload without container.

Knows files in memory and samples. Each codec is tried at several rates and settings; the best setting within the budget
counts, and where none fits, the smallest, which is then marked. Shapes: (S,) samples.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import soundfile
import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media_audio import resample

_LEVELS = (0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)  # libsndfile: 1 is smallest


@dataclass(frozen=True)
class SoundCodec:
    """How a codec is called.

    Attributes:
        format: Of soundfile.
        subtype: Of soundfile.
        rates: Samples a second that it takes.
        headers: Packets of an Ogg stream that hold no sound; 0 for files without Ogg.
        options: Further options of soundfile.
    """

    format: str
    subtype: str
    rates: tuple[int, ...]
    headers: int
    options: dict[str, Any]


CODECS = {
    "opus": SoundCodec("OGG", "OPUS", (8000, 16000, 24000, 48000), 2, {}),
    "vorbis": SoundCodec("OGG", "VORBIS", (8000, 16000, 22050, 44100), 3, {}),
    "mp3": SoundCodec("MP3", "MPEG_LAYER_III", (8000, 16000, 24000, 44100), 0, {"bitrate_mode": "CONSTANT"}),
}


@dataclass(frozen=True)
class Coded:
    """A sound after a codec.

    Attributes:
        audio: Samples (S,) at the rate of the original.
        payload_bits: Bits without container.
        file_bits: Bits of the file.
        fits: Whether the payload is within the budget.
    """

    audio: Tensor
    payload_bits: int
    file_bits: int
    fits: bool


def code_within(name: str, audio: Tensor, sample_rate: int, bits: float) -> Coded:
    """The largest coding of a sound whose payload is at most `bits`; else the smallest there is.

    Args:
        name: One of `CODECS`.
        audio: Float samples (S,).
        sample_rate: Samples a second.
        bits: Budget of the payload.

    Raises:
        TokenloomError: For an unknown codec, or one that this libsndfile does not write.
    """
    if name not in CODECS:
        raise unknown_name("sound codec", name, CODECS)
    codec = CODECS[name]
    rates = [rate for rate in codec.rates if rate <= sample_rate] or list(codec.rates[:1])
    tried = [
        (rate, level, _encode(codec, audio, sample_rate, rate, level)) for rate in rates for level in _LEVELS
    ]
    sized = [(_payload(content, codec.headers), rate, content) for rate, _, content in tried]
    fitting = [item for item in sized if item[0] <= bits]
    payload, _, content = (
        max(fitting, key=lambda item: item[:2]) if fitting else min(sized, key=lambda i: i[:2])
    )
    return Coded(_decode(content, len(audio), sample_rate), payload, 8 * len(content), bool(fitting))


def _encode(codec: SoundCodec, audio: Tensor, sample_rate: int, rate: int, level: float) -> bytes:
    buffer = io.BytesIO()
    samples = resample(audio, sample_rate, rate).clamp(-1, 1).numpy()
    try:
        with soundfile.SoundFile(
            buffer,
            "w",
            rate,
            1,
            format=codec.format,
            subtype=codec.subtype,
            compression_level=level,
            **codec.options,
        ) as file:
            file.write(samples)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise TokenloomError(
            f"This libsndfile does not write {codec.subtype} ({error}). Update the package soundfile to 0.13 or later."
        ) from error
    return buffer.getvalue()


def _decode(content: bytes, size: int, sample_rate: int) -> Tensor:
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    audio = resample(torch.from_numpy(samples[:, 0].copy()), rate, sample_rate)
    return torch.nn.functional.pad(audio, (0, max(0, size - len(audio))))[:size]


def _payload(content: bytes, headers: int) -> int:
    """Bits of the packets of an Ogg stream behind its headers; of other files all bits."""
    return 8 * (sum(ogg_packets(content)[headers:]) if headers else len(content))


def ogg_packets(content: bytes) -> list[int]:
    """Bytes of each packet of an Ogg stream (RFC 3533).

    Raises:
        TokenloomError: If it is no such stream.
    """
    place, sizes, size = 0, [], 0
    while place < len(content):
        if content[place : place + 4] != b"OggS" or place + 27 > len(content):
            raise TokenloomError(f"Expected an Ogg page at byte {place}.")
        (count,) = struct.unpack_from("B", content, place + 26)
        lengths = content[place + 27 : place + 27 + count]
        for length in lengths:
            size += length
            if length < 255:
                sizes.append(size)
                size = 0
        place += 27 + count + sum(lengths)
    return sizes
