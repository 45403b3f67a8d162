"""Reads and writes sound files: any kind that libsndfile knows, as mono float32 at the rate that a model wants.

Files are read and resampled block by block, so that hours of sound need no more memory than what is returned. Knows files,
rates and samples. Knows nothing of codes or models.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media import unwritable

_FORMATS: dict[str, tuple[str, str | None]] = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", None),
}
_MOST_RATE = 768_000
_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # what a program writes that does not know yet how long its WAV will be
_LOST_SAMPLES = 2304  # two frames of MP3, by which decoders may differ


def load_audio(
    path: str | os.PathLike[str], sample_rate: int | None = None, *, seconds: float | None = None
) -> tuple[Tensor, int]:
    """Reads a sound file as one channel.

    The content decides how it is read, not the ending of the name. Channels are averaged.

    Args:
        path: A WAV, FLAC, OGG, Opus, MP3 or AIFF file.
        sample_rate: Rate in Hz to resample to; `None` = that of the file.
        seconds: Read no more than this from the beginning; `None` = everything.

    Returns:
        Float32 samples (1, S), in [-1, 1] for files of integers, and their rate.

    Raises:
        TokenloomError: If there is no such file, it is no sound, is cut off, is empty or holds NaN.
    """
    with _open(Path(path)) as file:
        rate = file.samplerate if sample_rate is None else sample_rate
    return torch.cat(list(audio_blocks(path, sample_rate, limit=seconds)), dim=1), rate


def audio_blocks(
    path: str | os.PathLike[str],
    sample_rate: int | None = None,
    *,
    seconds: float = 30.0,
    limit: float | None = None,
) -> Iterator[Tensor]:
    """Reads a sound file block by block; the blocks in a row are what `load_audio` returns.

    Args:
        path: As for `load_audio`.
        sample_rate: Rate in Hz to resample to; `None` = that of the file.
        seconds: Length of a block.
        limit: Read no more seconds than this.

    Yields:
        Float32 samples (1, n).

    Raises:
        TokenloomError: As for `load_audio`.
    """
    path = Path(path)
    rate = sound_rate(path)
    resampler = _Resampler(rate, rate if sample_rate is None else _check_rate(sample_rate))
    for block in _mono_blocks(path, seconds, limit):
        yield from resampler.push(block)
    yield from resampler.finish()


@dataclass(frozen=True)
class SoundEnd:
    """The end of a sound.

    Attributes:
        samples: Its last samples, float32 (..., n).
        total: Number of all its samples S, at the rate of `samples`.
        peak: Its largest magnitude before it was resampled, (..., 1).
    """

    samples: Tensor
    total: int
    peak: Tensor


def audio_end(path: str | os.PathLike[str], sample_rate: int, count: int) -> SoundEnd:
    """Reads a sound file to its end block by block, and resamples no more than its last samples.

    Args:
        path: As for `load_audio`.
        sample_rate: Rate in Hz to resample to.
        count: Samples wanted, at this rate; fewer come if the sound is shorter.

    Returns:
        The last samples (1, n) of what `load_audio` returns, up to rounding.

    Raises:
        TokenloomError: As for `load_audio`.
    """
    rate = sound_rate(path)
    needed = _reach(rate, sample_rate, count)
    kept: list[Tensor] = []
    done, held, peak = 0, 0, torch.zeros(1)
    for block in _mono_blocks(Path(path)):
        kept.append(block)
        done, held = done + block.numel(), held + block.numel()
        peak = torch.maximum(peak, block.abs().amax())
        while held - kept[0].numel() >= needed:
            held -= kept.pop(0).numel()
    return SoundEnd(*_resampled_end(torch.cat(kept)[None], done, rate, sample_rate, count), peak)


def resample_end(audio: Tensor, sampling_rate: int | None, sample_rate: int, count: int) -> SoundEnd:
    """The last `count` samples of `resample(audio, ...)`, from no more than the end of samples (..., S)."""
    rate = _known_rate(sampling_rate, sample_rate)
    end = audio[..., -_reach(rate, sample_rate, count) :]
    peak = audio.abs().amax(-1, keepdim=True)
    return SoundEnd(*_resampled_end(end, audio.shape[-1], rate, sample_rate, count), peak)


def _reach(rate: int, sample_rate: int, count: int) -> int:
    """Samples before the end that the last `count` samples follow from."""
    plan = _Resampler(rate, _check_rate(sample_rate))
    return -(-count * plan.source // plan.target) + plan.margin + 2 * plan.source


def _resampled_end(end: Tensor, done: int, rate: int, sample_rate: int, count: int) -> tuple[Tensor, int]:
    """The last samples, and the number of all, of a sound of `done` samples that ends with `end` (..., s)."""
    plan = _Resampler(rate, sample_rate)
    skip = -(done - end.shape[-1]) % plan.source  # where a whole number of new samples begins
    total = -(-done * plan.target // plan.source)
    return resample(end[..., skip:], rate, sample_rate)[..., -min(count, total) :], total


def sound_rate(path: str | os.PathLike[str]) -> int:
    """Samples a second of a sound file.

    Raises:
        TokenloomError: As for `load_audio`.
    """
    with _open(Path(path)) as file:
        rate = int(file.samplerate)
    if not 1 <= rate <= _MOST_RATE:
        raise TokenloomError(
            f"The sound file {str(path)!r} says that it has {rate} samples a second; expected 1 to {_MOST_RATE}. Export it again."
        )
    return rate


def to_mono(audio: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """One channel of float32 samples (B, 1, S) from sound of any common form.

    Args:
        audio: (S,), (C, S) or (B, C, S) samples; floats, or integers of 8 (unsigned), 16 or 32 bits, which are scaled to
            [-1, 1].

    Raises:
        TokenloomError: For another number of axes or another kind of number, no samples, NaN, or (S, C) order.
    """
    values = torch.as_tensor(audio)
    if values.ndim not in (1, 2, 3) or values.numel() == 0:
        raise TokenloomError(
            f"Sound is samples of shape (S,), (C, S) or (B, C, S), at least one; got {tuple(values.shape)}."
        )
    if values.ndim > 1 and values.shape[-1] <= 8 < values.shape[-2]:
        raise TokenloomError(
            f"Sound of shape {tuple(values.shape)} looks like (S, C); samples come last. Transpose it."
        )
    scaled = _to_float(values)
    if not bool(scaled.isfinite().all()):
        raise TokenloomError("The sound contains NaN or infinity. Repair it, e.g. with audio.nan_to_num(0).")
    return scaled.reshape((1,) * (3 - scaled.ndim) + scaled.shape).mean(1, keepdim=True)


def resample(audio: Tensor, sampling_rate: int | None, sample_rate: int) -> Tensor:
    """Resamples (..., S) samples from `sampling_rate` to `sample_rate` (windowed sinc of torchaudio).

    Raises:
        TokenloomError: If `sampling_rate` is missing or no rate.
    """
    rate = _known_rate(sampling_rate, sample_rate)
    if rate == sample_rate:
        return audio
    from torchaudio.functional import resample as sinc

    return sinc(audio, rate, _check_rate(sample_rate))


def _known_rate(sampling_rate: int | None, sample_rate: int) -> int:
    if sampling_rate is None:
        raise TokenloomError(
            f"The sampling rate of the sound is missing. Pass sampling_rate=..., in Hz; this model works at {sample_rate}."
        )
    return _check_rate(sampling_rate)


def save_audio(audio: Tensor | np.ndarray[Any, Any], path: str | os.PathLike[str], sample_rate: int) -> Path:
    """Writes one channel to a file that is either whole or untouched; missing folders are made.

    Sound beyond [-1, 1] is turned down as a whole until it fits, never clipped.

    Args:
        audio: (S,), (1, S) or (1, 1, S) samples.
        path: The file; its ending chooses the format (.wav with 16 bits, .flac, .ogg, .opus, .mp3).
        sample_rate: Rate in Hz.

    Returns:
        The path.

    Raises:
        TokenloomError: For an unknown ending, more than one sound, NaN, a rate that the format does not hold, or a place
            that cannot be written.
    """
    path = check_audio_output(path)
    mono = to_mono(audio.detach().cpu() if isinstance(audio, Tensor) else audio)
    if mono.shape[0] != 1:
        raise TokenloomError(f"A file holds one sound, got a batch of {mono.shape[0]}. Save them one by one.")
    samples = mono[0, 0] / mono.abs().amax().clamp(min=1)
    with AudioWriter(path, sample_rate) as file:
        file.write(samples)
    return path


class AudioWriter:
    """Writes one channel to a file piece by piece. The file appears when all is written, or not at all.

    Args:
        path: The file; its ending chooses the format, as for `save_audio`. Missing folders are made.
        sample_rate: Rate in Hz.

    Raises:
        TokenloomError: For an unknown ending, a rate that the format does not hold, or a place that cannot be written.

    Example:
        >>> with AudioWriter("long.wav", 16000) as file:  # doctest: +SKIP
        ...     file.write(torch.zeros(16000))
    """

    def __init__(self, path: str | os.PathLike[str], sample_rate: int) -> None:
        self.path = check_audio_output(path)
        self.written = 0
        self._scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        kind, subtype = _FORMATS[self.path.suffix.lower()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._scratch.touch()
            self._file = soundfile.SoundFile(
                self._scratch, "w", _check_rate(sample_rate), 1, format=kind, subtype=subtype
            )
        except OSError as error:
            raise unwritable(self.path, error.strerror or str(error)) from error
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            self._scratch.unlink(missing_ok=True)
            raise TokenloomError(
                f"{self.path.suffix} files cannot hold {sample_rate} Hz: {error}. Write a .wav instead."
            ) from error

    def write(self, audio: Tensor) -> None:
        """Appends samples (S,) in [-1, 1]; what lies outside is clipped."""
        try:
            self._file.write(audio.detach().cpu().float().clamp(-1, 1).numpy())
        except (
            soundfile.SoundFileError,
            AssertionError,
            OSError,
        ) as error:  # it asserts that all was written
            raise unwritable(self.path, str(error) or "no space left") from error
        self.written += len(audio)

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                self._scratch.replace(self.path)
        except (OSError, soundfile.SoundFileError) as error:
            raise unwritable(self.path, str(error)) from error
        finally:
            self._scratch.unlink(missing_ok=True)


def check_audio_output(path: str | os.PathLike[str]) -> Path:
    """Checks that sound can be written to `path`, before time is spent on making it. Writes nothing.

    Raises:
        TokenloomError: The ending is no sound format, the path is a folder, or the place cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise TokenloomError(
            f"Expected the name of a sound file, got the folder {str(path)!r}. Add e.g. /out.wav."
        )
    if path.suffix.lower() not in _FORMATS:
        raise unknown_name("sound format", path.suffix, _FORMATS, f"End {path.name!r} for instance in .wav.")
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise TokenloomError(
            f"{str(path)!r} cannot be written: {str(ancestor)!r} is no folder that you may write in. Choose another folder."
        )
    return path


class _Resampler:
    """Resamples a stream: pushed blocks come out resampled, as if they had been one piece."""

    def __init__(self, source: int, target: int) -> None:
        common = math.gcd(source, target)
        self.source, self.target = source // common, target // common
        # the filter of torchaudio reaches 6 zero crossings of the lower rate, with a little roll-off
        reach = math.ceil(6 * self.source / (0.99 * min(self.source, self.target))) + self.source
        self.margin = -(-reach // self.source) * self.source
        self.kept = torch.zeros(0)
        self.before = 0  # samples at the beginning of `kept` that have come out already

    def push(self, block: Tensor) -> Iterator[Tensor]:
        """Takes (n,) samples; yields (1, m) where enough are known."""
        if self.source == self.target:
            yield block[None]
            return
        self.kept = torch.cat([self.kept, block])
        ready = (self.kept.numel() - self.before - self.margin) // self.source * self.source
        if ready > 0:
            yield self._emit(self.kept, ready)
            stop = self.before + ready
            start = max(0, stop - self.margin)
            self.kept, self.before = self.kept[start:], stop - start

    def finish(self) -> Iterator[Tensor]:
        """Yields what is left."""
        left = self.kept.numel() - self.before
        if left > 0:
            yield self._emit(self.kept, left)

    def _emit(self, samples: Tensor, count: int) -> Tensor:
        skip = self.before // self.source * self.target
        size = -(-count * self.target // self.source)
        return resample(samples, self.source, self.target)[None, skip : skip + size]


def _open(path: Path) -> soundfile.SoundFile:
    """The open file; errors say whether the place, the file or its content is at fault."""
    if path.is_dir():
        raise TokenloomError(f"Expected a sound file, got the folder {str(path)!r}. Name one file inside it.")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise TokenloomError(
            f"There is no sound file {str(path)!r} ({error.strerror}). Check the path."
        ) from error
    if size == 0:
        raise TokenloomError(f"The sound file {str(path)!r} is empty (0 bytes). Replace it.")
    try:
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        raise TokenloomError(
            f"{str(path)!r} is no sound file that can be read ({error}). Convert it to WAV, FLAC, OGG or MP3."
        ) from error


def _mono_blocks(path: Path, seconds: float = 30.0, limit: float | None = None) -> Iterator[Tensor]:
    """Samples (n,) of a file at its own rate, block by block; raises if the file is damaged, cut off or empty."""
    with _open(path) as file:
        rate = file.samplerate
        wanted = math.inf if limit is None else max(1, round(limit * rate))
        done = 0
        for block in _raw_blocks(file, path, max(1, round(seconds * rate)), wanted):
            _check_finite(block, path, done, rate)
            done += block.shape[0]
            yield torch.from_numpy(block.mean(axis=1, dtype=np.float32))
        if done == 0:
            raise TokenloomError(f"The sound file {str(path)!r} holds no samples. Replace it.")
        if done < wanted:
            _check_whole(file, path, done)


def _raw_blocks(
    file: soundfile.SoundFile, path: Path, size: int, limit: float
) -> Iterator[np.ndarray[Any, Any]]:
    """Blocks (n, C) of float32, at most `limit` samples in all."""
    while limit > 0:
        try:
            block = file.read(int(min(size, limit)), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise TokenloomError(
                f"The sound file {str(path)!r} is damaged or cut off ({error}). Copy it again."
            ) from error
        if not len(block):
            return
        limit -= len(block)
        yield block


def _check_finite(block: np.ndarray[Any, Any], path: Path, start: int, rate: int) -> None:
    bad = ~np.isfinite(block).all(axis=1)
    if bad.any():
        second = (start + int(bad.argmax())) / rate
        raise TokenloomError(
            f"The sound file {str(path)!r} contains NaN or infinity at {second:.3f} s. Export it again as 16-bit WAV."
        )


def _check_whole(file: soundfile.SoundFile, path: Path, done: int) -> None:
    """Raises if the header promises more samples than the file holds."""
    promised = _promised_by_wav(path, file.channels) or file.frames
    slack = 0 if file.format in ("WAV", "FLAC") else max(_LOST_SAMPLES, promised // 100)
    if done < promised - slack:
        raise TokenloomError(
            f"The sound file {str(path)!r} is cut off: its header promises {promised / file.samplerate:.3f} s, it holds "
            f"{done / file.samplerate:.3f} s. Copy it again, or read its beginning with seconds=..."
        )


def _promised_by_wav(path: Path, channels: int) -> int | None:
    """Samples a channel that the header of a WAV file states; `None` for other files and unknown lengths."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
            return None
        width = 0
        while len(header := file.read(8)) == 8:
            name, size = header[:4], struct.unpack("<I", header[4:])[0]
            if name == b"data":
                return None if size in _UNKNOWN_SIZE or not width else size // width
            body = file.read(min(size + size % 2, 64)) if name == b"fmt " else b""
            if len(body) >= 14:
                width = struct.unpack("<H", body[12:14])[0]
                compressed = struct.unpack("<H", body[:2])[0] not in (1, 3, 0xFFFE)
                width = 0 if compressed or width % channels else width
            file.seek(size + size % 2 - len(body), os.SEEK_CUR)
    return None


def _to_float(values: Tensor) -> Tensor:
    if values.dtype == torch.uint8:
        return (values.float() - 128) / 128
    if values.dtype in (torch.int16, torch.int32):
        return (values.double() / -float(torch.iinfo(values.dtype).min)).float()
    if not values.is_floating_point():
        raise TokenloomError(
            f"Sound is floats, or integers of 8 (unsigned), 16 or 32 bits; got {values.dtype}. Convert it to float32."
        )
    return values.float()


def _check_rate(rate: object) -> int:
    """A rate in Hz as int."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or int(rate) != rate:
        raise TokenloomError(f"A sampling rate is a whole number of Hz, got {rate!r}.")
    if not 1 <= rate <= _MOST_RATE:
        raise TokenloomError(f"A sampling rate lies in 1..{_MOST_RATE} Hz, got {rate}. Is it in kHz?")
    return int(rate)
