"""The contract of audio tokenizers: sound to K codes a frame and back, whatever the lengths in a batch.

Knows samples, frames, codebooks, and how to check and pad them. Knows no network and no files.

Legend: B batch, S samples, T frames, K codebooks, N = T K tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.layouts import Layout
from tokenloom.tokenizers.base import _INTEGERS, Tokenizer

PADDING = -1
"""Stands in codes where a shorter sample of a batch has ended. It decodes to silence."""

_LOUD = 2.0  # sound in [-1, 1] does not get there; integers that were not scaled do

Lengths = int | Sequence[int] | Tensor | None


class AudioCodec(Tokenizer):
    """Base class of audio tokenizers: `encode(audio) -> (B, K, T)` codes, `decode(codes) -> (B, 1, S)` samples.

    Codes of a sample never depend on what else is in its batch, nor on padding. Subclasses call `describe` in their
    constructor and define `_encode_equal` and `_decode_equal`, for batches of one length.

    `layout` is that of `frames` frames, for generators of that length; `layout_for` gives others, `flatten` and `unflatten`
    bring codes into layout order and back.

    Attributes:
        sample_rate: Samples a second, in Hz.
        hop_length: Samples a frame.
        codebook_sizes: Codes of each of the K codebooks.
    """

    modality = "audio"
    sample_rate: int
    hop_length: int
    codebook_sizes: tuple[int, ...]

    def describe(self, sample_rate: int, hop_length: int, codebook_sizes: Sequence[int], frames: int) -> None:
        """Sets what the contract promises."""
        if min(sample_rate, hop_length, frames, len(codebook_sizes)) < 1:
            raise TokenloomError(
                f"Sample rate, samples a frame, frames and codebooks must be at least 1; got {sample_rate}, {hop_length}, "
                f"{frames} and {len(codebook_sizes)}."
            )
        self.sample_rate, self.hop_length = int(sample_rate), int(hop_length)
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.vocab_size = max(self.codebook_sizes)
        self.layout = self.layout_for(frames)

    @property
    def frame_rate(self) -> float:
        """Frames a second, in Hz."""
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks K."""
        return len(self.codebook_sizes)

    def bits_per_second(self, num_codebooks: int | None = None) -> float:
        """Nominal rate of the codes of the first codebooks, in bit/s."""
        return self.frame_rate * self._bits(num_codebooks)

    @property
    def bits_per_sample(self) -> float:
        """Bits of one sample of the length of `layout`."""
        return self.layout.shape[0] * self._bits(None)  # type: ignore[operator]

    def _bits(self, num_codebooks: int | None) -> float:
        return sum(math.log2(size) for size in self.codebook_sizes[: self.count_codebooks(num_codebooks)])

    def num_frames(self, samples: int) -> int:
        """Frames T of a sound of `samples` samples; the last one may be partly silence."""
        return -(-samples // self.hop_length)

    def layout_for(self, frames: int, num_codebooks: int | None = None) -> Layout:
        """The layout of T frames of the first codebooks: time, then codebook."""
        return Layout.frames(frames, self.count_codebooks(num_codebooks))

    def flatten(self, codes: Tensor) -> Tensor:
        """Codes (B, N) in the order of `layout_for(T, k)` of codes (B, k, T), for generators.

        Raises:
            TokenloomError: If the codes are not those of whole samples of one length.
        """
        valid = self.valid_frames(codes)
        if bool((valid < codes.shape[2]).any()):
            raise TokenloomError(
                f"Samples of {valid.tolist()} frames have no common layout; cut them to one length before flatten."
            )
        return codes.transpose(1, 2).flatten(1)

    def unflatten(self, codes: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Codes (B, k, T) of codes (B, N) in layout order."""
        count = self.count_codebooks(num_codebooks)
        if not isinstance(codes, Tensor) or codes.ndim != 2 or codes.shape[1] % count:
            given = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes)
            raise TokenloomError(
                f"Expected codes (B, N) where N is a multiple of {count} codebooks, got {given}."
            )
        return codes.unflatten(1, (-1, count)).transpose(1, 2).contiguous()

    def streaming(self) -> AbstractContextManager[Any]:
        """A context in which `encode` and `decode` take a sound in pieces."""
        raise TokenloomError(
            f"{type(self).__name__} cannot work piece by piece: its networks look ahead or keep no state. Encode whole "
            "sounds, or use an AudioTokenizer, which streams."
        )

    @torch.no_grad()
    def encode(self, media: Tensor, *, lengths: Lengths = None, num_codebooks: int | None = None) -> Tensor:
        """Codes of sound.

        Args:
            media: Float samples (B, 1, S) or (B, S) in [-1, 1] at `sample_rate`.
            lengths: Samples of each sound that count; what lies behind is padding. `None` = S.
            num_codebooks: Use only the first k codebooks; `None` = all.

        Returns:
            LongTensor (B, k, T), T = num_frames(longest); `PADDING` behind the end of shorter sounds.

        Raises:
            TokenloomError: For sound of another shape, NaN, or lengths and codebooks that do not fit.
        """
        audio = self.check_audio(media)
        count, sizes = self.count_codebooks(num_codebooks), self.check_lengths(lengths, audio)
        frames = self.num_frames(max(sizes, default=0))
        codes = torch.full((len(sizes), count, frames), PADDING, dtype=torch.long, device=audio.device)
        for size in sorted(
            set(sizes)
        ):  # sounds of one length need no padding, so none can change their codes
            rows = [row for row, other in enumerate(sizes) if other == size]
            codes[rows, :, : self.num_frames(size)] = self._encode_equal(audio[rows, :, :size], count)
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor, *, lengths: Lengths = None) -> Tensor:
        """Sound of codes.

        Args:
            codes: LongTensor (B, k, T) of the first k codebooks, 1 <= k <= K.
            lengths: Samples that each sound shall have; `None` = all that its frames give.

        Returns:
            Samples (B, 1, S), S = the largest length; zero behind the end of shorter sounds.

        Raises:
            TokenloomError: For codes of another shape or vocabulary, or lengths that the frames do not give.
        """
        valid = self.valid_frames(codes).tolist()
        sizes = self._decoded_lengths(lengths, valid)
        parts: list[Tensor] = [codes.new_zeros(1, 0)] * len(valid)
        for frames in sorted(set(valid)):
            rows = [row for row, other in enumerate(valid) if other == frames]
            sounds = self._decode_equal(codes[rows, :, :frames].long())
            for row, sound in zip(rows, sounds, strict=True):
                parts[row] = sound
        return assemble(parts, sizes, next(self.parameters()))

    def reconstruct(
        self, media: Tensor, *, lengths: Lengths = None, num_codebooks: int | None = None
    ) -> Tensor:
        """Samples (B, 1, S) after encoding and decoding sound of the same length."""
        audio = self.check_audio(media)
        sizes = self.check_lengths(lengths, audio)
        return self.decode(self.encode(audio, lengths=sizes, num_codebooks=num_codebooks), lengths=sizes)

    def _encode_equal(self, audio: Tensor, count: int) -> Tensor:
        """Codes (b, count, t) of samples (b, 1, s) that all count."""
        raise TokenloomError(f"{type(self).__name__} does not define _encode_equal(); override it.")

    def _decode_equal(self, codes: Tensor) -> Tensor:
        """Samples (b, 1, s) of codes (b, k, t) without padding; s may differ a little from t frames."""
        raise TokenloomError(f"{type(self).__name__} does not define _decode_equal(); override it.")

    def count_codebooks(self, num_codebooks: int | None) -> int:
        """The number of codebooks that an argument names.

        Raises:
            TokenloomError: Unless it lies in 1..K.
        """
        if num_codebooks is None:
            return self.num_codebooks
        if isinstance(num_codebooks, bool) or not isinstance(num_codebooks, int):
            raise TokenloomError(f"num_codebooks must be a whole number, got {num_codebooks!r}.")
        if not 1 <= num_codebooks <= self.num_codebooks:
            raise TokenloomError(f"num_codebooks must lie in 1..{self.num_codebooks}, got {num_codebooks}.")
        return num_codebooks

    def check_audio(self, audio: Tensor, *, empty: bool = False) -> Tensor:
        """Samples (B, 1, S) in the dtype of the weights; `empty` allows S = 0."""
        given = f"{audio.dtype} {tuple(audio.shape)}" if isinstance(audio, Tensor) else repr(type(audio))
        whole = isinstance(audio, Tensor) and audio.is_floating_point() and audio.ndim in (2, 3)
        if not whole or (audio.ndim == 3 and audio.shape[1] != 1) or (audio.shape[-1] == 0 and not empty):
            raise TokenloomError(
                f"{type(self).__name__} expects float samples of shape (B, 1, S) or (B, S) at {self.sample_rate} Hz, got "
                f"{given}; tokenloom.media_audio.to_mono makes them of other forms."
            )
        if audio.numel():
            peak = float(audio.detach().abs().amax())
            if not math.isfinite(peak):
                raise TokenloomError(
                    "The sound contains NaN or infinity. Repair it, e.g. with audio.nan_to_num(0)."
                )
            if peak > _LOUD:
                warnings.warn(f"Samples reach {peak:.3g}, but this tokenizer expects [-1, 1].", stacklevel=3)
        weight = next(value for value in self.parameters() if value.is_floating_point())
        return (audio if audio.ndim == 3 else audio[:, None]).to(weight.dtype)

    def check_lengths(self, lengths: Lengths, audio: Tensor) -> list[int]:
        """Samples of each sound of (B, 1, S) that count."""
        return _lengths(lengths, audio.shape[0], [audio.shape[2]] * audio.shape[0], "the sound has")

    def _decoded_lengths(self, lengths: Lengths, frames: list[int]) -> list[int]:
        most = [count * self.hop_length for count in frames]
        return _lengths(lengths, len(frames), most, "the codes give")

    def check_codes(self, codes: Tensor, count: int | Sequence[int] | None = None) -> None:
        """Raises a clear error unless `codes` are integers (B, k, T) of the first k codebooks.

        Args:
            codes: What shall be decoded; `PADDING` may stand in the last frames of a sample, in all codebooks.
            count: k, or all k that are possible; `None` = 1 to K.
        """
        self.valid_frames(codes)
        possible = (count,) if isinstance(count, int) else count
        if possible is not None and codes.shape[1] not in possible:
            raise TokenloomError(f"Expected codes of {possible} codebooks, got {tuple(codes.shape)}.")

    def valid_frames(self, codes: Tensor) -> Tensor:
        """Checks codes, and counts the frames of each sample that are not padding.

        Args:
            codes: As for `check_codes`.

        Returns:
            LongTensor (B,): the frames of each sample that are not padding.

        Raises:
            TokenloomError: Unless `codes` are integers (B, k, T) of the first k codebooks.
        """
        given = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(type(codes))
        whole = isinstance(codes, Tensor) and codes.dtype in _INTEGERS and codes.ndim == 3
        if not whole or not 1 <= codes.shape[1] <= self.num_codebooks:
            raise TokenloomError(
                f"{type(self).__name__} expects integer codes of shape (B, k, T) with k in "
                f"1..{self.num_codebooks}, got {given}; unflatten() brings (B, N) into this shape."
            )
        used = codes != PADDING
        valid = used[:, 0].sum(1)
        if not torch.equal(
            used,
            (torch.arange(codes.shape[2], device=codes.device) < valid[:, None])[:, None].expand_as(used),
        ):
            raise TokenloomError(
                f"Codes of {PADDING} mark the end of a sample: they may stand in its last frames only, in all codebooks."
            )
        if bool((valid == 0).any()) and codes.shape[2]:
            raise TokenloomError(
                f"A sample has at least one frame, but sample {int(valid.argmin())} is all {PADDING}."
            )
        sizes = torch.tensor(self.codebook_sizes[: codes.shape[1]], device=codes.device)[:, None]
        if bool((used & ((codes < 0) | (codes >= sizes))).any()):
            raise TokenloomError(
                f"Codes must lie below the codebook sizes {self.codebook_sizes[: codes.shape[1]]}, got "
                f"{int(codes.min())}..{int(codes.max())}; were they made by another tokenizer?"
            )
        return valid


def assemble(parts: list[Tensor], sizes: list[int], like: Tensor) -> Tensor:
    """Sounds (1, s) of different lengths as one batch (B, 1, S), each cut or filled with silence to its size."""
    audio = torch.zeros(len(parts), 1, max(sizes, default=0), dtype=like.dtype, device=like.device)
    for row, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        audio[row, :, : min(size, part.shape[-1])] = part[:, :size]
    return audio


def _lengths(lengths: Lengths, batch: int, most: list[int], what: str) -> list[int]:
    """Checks lengths against the most that each sound has."""
    if lengths is None:
        return most
    values = [lengths] * batch if isinstance(lengths, int) else [int(value) for value in lengths]
    if len(values) != batch:
        raise TokenloomError(f"Expected one length a sound, {batch} in all, got {len(values)}.")
    for row, (value, limit) in enumerate(zip(values, most, strict=True)):
        if not 1 <= value <= limit:
            raise TokenloomError(f"Length {row} must lie in 1..{limit}, what {what}; got {value}.")
    return values
