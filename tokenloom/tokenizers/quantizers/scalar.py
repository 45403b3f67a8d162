"""Finite scalar quantization: every dimension is rounded to a few levels.

Knows vectors and levels. Knows nothing of pictures or of codebooks that are learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.tokenizers.quantizers.base import Quantized, Quantizer, straight_through

BOUNDS = ("atanh", "tan", "symmetric", "clamp")


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023): every dimension is rounded to a few levels.

    No codebook is stored and none can collapse. The first dimension is the least significant digit of the code.

    Args:
        levels: Levels per dimension; the codebook has prod(levels) entries.
        bound: How a dimension is squashed into its levels. "atanh" and "tan" are the two published forms of the
            shifted tanh, whose even level counts reach from -1 to just below 1: "atanh" is the current one, "tan" the
            earlier one. "symmetric" is a tanh with levels evenly spread from -1 to 1, "clamp" the same with a
            clamp instead of the tanh.
    """

    basis: Tensor
    level_count: Tensor

    def __init__(self, levels: list[int], bound: str = "atanh") -> None:
        super().__init__()
        if not levels or any(level < 2 for level in levels):
            raise TokenloomError(f"FSQ needs at least one dimension of two or more levels, got {levels}.")
        if bound not in BOUNDS:
            raise unknown_name("FSQ bound", bound, BOUNDS)
        self.levels = tuple(int(level) for level in levels)
        self.dim = len(self.levels)
        self.codebook_size = int(torch.tensor(self.levels).prod())
        self.form = bound
        basis = torch.tensor((1, *self.levels[:-1])).cumprod(0)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("level_count", torch.tensor(self.levels), persistent=False)

    @property
    def _symmetric(self) -> bool:
        return self.form in ("symmetric", "clamp")

    def bound(self, z: Tensor) -> Tensor:
        """Squashes each dimension into its range of levels, centred so that rounding hits each level.

        Args:
            z: (..., d) float vectors.

        Returns:
            (..., d): whole numbers are levels, from -(L // 2) for the shifted forms and from 0 for the symmetric ones.
        """
        if self._symmetric:
            unit = z.clamp(-1, 1) if self.form == "clamp" else z.tanh()
            return (unit + 1) * (self.level_count - 1) / 2
        sign = 1 if self.form == "atanh" else -1
        half = (self.level_count - 1) * (1 + sign * 1e-3) / 2
        offset = (self.level_count % 2 == 0) * 0.5
        shift = torch.atanh(offset / half) if self.form == "atanh" else torch.tan(offset / half)
        return (z + shift).tanh() * half - offset

    def _round(self, bounded: Tensor) -> Tensor:
        return (bounded + 0.5).floor() if self._symmetric else bounded.round()

    def _to_unit(self, digits: Tensor) -> Tensor:
        """Vectors in [-1, 1] of levels as `bound` counts them."""
        if self._symmetric:
            return digits * 2 / (self.level_count - 1) - 1
        return digits / (self.level_count // 2)

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors; computed in float32. NaN stays NaN in `z_q` and gives a valid code."""
        bounded = self.bound(z.float())
        digits = self._round(bounded).detach()
        lowest = 0 if self._symmetric else self.level_count // 2
        codes = ((digits.nan_to_num(0.0).long() + lowest) * self.basis).sum(-1)
        return Quantized(codes, self._to_unit(straight_through(bounded, digits)).to(z.dtype), {}, {})

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) in [-1, 1] of LongTensor codes (B, N)."""
        digits = (codes[..., None] // self.basis) % self.level_count
        return self._to_unit(digits if self._symmetric else digits - self.level_count // 2)
