"""The contract every tokenizer keeps: media in, integer codes out, and back.

Knows layouts and how to check codes. Knows nothing of generators, prompts or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.layouts import Layout

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Tokenizer(ModelMixin, ConfigMixin):
    """Base class: `encode(media) -> codes`, `decode(codes) -> media`, `reconstruct(media) -> media`.

    Subclasses set `modality`, `layout` and `vocab_size`. Codes are LongTensor (B, N) in layout order. A tokenizer whose
    first codes decode alone says so with `lengths`; its `encode` and `reconstruct` then take `num_tokens`.
    """

    config_name = "config.json"  # type: ignore[assignment]
    modality: str
    layout: Layout
    vocab_size: int

    @property
    def lengths(self) -> Sequence[int]:
        """Numbers of codes k, rising, for which `decode(codes[:, :k])` works; the last is N.

        One number, N, unless a subclass says more, for instance `range(1, N + 1)`.
        """
        return (self.layout.size,)

    def encode(self, media: Any) -> Tensor:
        """Codes (B, N) of a batch of media."""
        raise TokenloomError(f"{type(self).__name__} does not define encode(); override it.")

    def decode(self, codes: Tensor) -> Any:
        """Media of codes (B, N)."""
        raise TokenloomError(f"{type(self).__name__} does not define decode(); override it.")

    def reconstruct(self, media: Any) -> Any:
        """`decode(encode(media))`."""
        return self.decode(self.encode(media))

    @property
    def bits_per_sample(self) -> float:
        """Bits of one sample's codes: N log2(vocab_size)."""
        return self.layout.size * math.log2(self.vocab_size)

    def check_num_tokens(self, num_tokens: int, lengths: Sequence[int] | None = None) -> int:
        """Raises a clear error unless a sample can be cut to so many codes; returns the number.

        Args:
            num_tokens: Number of codes.
            lengths: Numbers that are possible; `None` = `self.lengths`.
        """
        possible = self.lengths if lengths is None else lengths
        if isinstance(num_tokens, bool) or num_tokens not in possible:
            raise TokenloomError(
                f"{type(self).__name__} can make and decode {_numbers(possible)} codes, not num_tokens={num_tokens!r}."
            )
        return num_tokens

    def check_codes(self, codes: Tensor, count: int | Sequence[int] | None = None) -> None:
        """Raises a clear error unless `codes` is an integer (B, N) tensor inside the vocabulary.

        Args:
            codes: What shall be decoded.
            count: N, or all N that are possible; `None` = `self.lengths`.
        """
        possible = self.lengths if count is None else (count,) if isinstance(count, int) else count
        given = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(type(codes))
        whole = isinstance(codes, Tensor) and codes.dtype in _INTEGERS
        if not whole or codes.ndim != 2 or codes.shape[1] not in possible:
            shape = f"(B, {possible[0]})" if len(possible) == 1 else f"(B, k), k = {_numbers(possible)}"
            raise TokenloomError(
                f"{type(self).__name__}.decode expects integer codes of shape {shape}, got {given}."
            )
        if self.vocab_size > 1 << 63:  # every int64 is a code
            return
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.vocab_size):
            raise TokenloomError(
                f"Codes must lie in 0..{self.vocab_size - 1}, got {int(codes.min())}..{int(codes.max())}; "
                "were they made by another tokenizer?"
            )


def _numbers(values: Sequence[int]) -> str:
    """ "1..64", or "1, 5 or 14"."""
    if isinstance(values, range) and values.step == 1 and len(values) > 2:
        return f"{values[0]}..{values[-1]}"
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
