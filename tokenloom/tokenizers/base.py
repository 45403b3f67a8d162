"""The contract every tokenizer keeps: media in, integer codes out, and back.

Knows layouts and how to check codes. Knows nothing of generators, prompts or files.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.layouts import Layout

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Tokenizer(ModelMixin, ConfigMixin):
    """Base class: `encode(media) -> codes`, `decode(codes) -> media`, `reconstruct(media) -> media`.

    Subclasses set `modality`, `layout` and `vocab_size`. Codes are LongTensor (B, N) in layout order.
    """

    config_name = "config.json"  # type: ignore[assignment]
    modality: str
    layout: Layout
    vocab_size: int

    def encode(self, media: Tensor) -> Tensor:
        """Codes (B, N) of a batch of media."""
        raise TokenloomError(f"{type(self).__name__} does not define encode(); override it.")

    def decode(self, codes: Tensor) -> Tensor:
        """Media of codes (B, N)."""
        raise TokenloomError(f"{type(self).__name__} does not define decode(); override it.")

    def reconstruct(self, media: Tensor) -> Tensor:
        """`decode(encode(media))`."""
        return self.decode(self.encode(media))

    @property
    def bits_per_sample(self) -> float:
        """Bits of one sample's codes: N log2(vocab_size)."""
        return self.layout.size * math.log2(self.vocab_size)

    def check_codes(self, codes: Tensor) -> None:
        """Raises a clear error unless `codes` is an integer (B, N) tensor inside the vocabulary."""
        size = self.layout.size
        given = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(type(codes))
        whole = isinstance(codes, Tensor) and codes.dtype in _INTEGERS
        if not whole or codes.ndim != 2 or codes.shape[1] != size:
            raise TokenloomError(
                f"{type(self).__name__}.decode expects integer codes of shape (B, {size}), got {given}."
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.vocab_size):
            raise TokenloomError(
                f"Codes must lie in 0..{self.vocab_size - 1}, got {int(codes.min())}..{int(codes.max())}; "
                "were they made by another tokenizer?"
            )
