"""The token table: what turns codes into rows, and, where it is tied, hidden states into logits.

Knows nothing of orders, plans or sampling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError


class TokenTable(nn.Module):
    """Token embeddings (V, D), optionally the sum of a vector a digit and a vector a code.

    Codes of a scalar quantizer are numbers in mixed radix; neighbouring codes then share most of their vectors, which a
    plain table would have to learn code by code.

    Args:
        vocab_size: Number of codes V.
        width: Width D.
        levels: Radix of each digit, least significant first; `None` for a plain table.
    """

    places: Tensor

    def __init__(self, vocab_size: int, width: int, levels: list[int] | None) -> None:
        super().__init__()
        self.codes = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.codes.weight, std=0.02 if levels is None else 0.005)
        self.levels = tuple(levels or ())
        if levels:
            if math.prod(levels) != vocab_size:
                raise TokenloomError(
                    f"code_levels {levels} multiply to {math.prod(levels)}, not to {vocab_size}."
                )
            self.digits = nn.Parameter(torch.randn(sum(levels), width) * 0.02 / len(levels) ** 0.5)
            bases = [math.prod(levels[:index]) for index in range(len(levels))]
            offsets = [sum(levels[:index]) for index in range(len(levels))]
            ids = torch.arange(vocab_size)
            places = [
                ids // base % level + offset
                for base, level, offset in zip(bases, levels, offsets, strict=True)
            ]
            self.register_buffer("places", torch.stack(places, dim=1), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table (V, D)."""
        if not self.levels:
            return self.codes.weight
        return self.codes.weight + F.embedding(self.places, self.digits).sum(1)

    def forward(self, codes: Tensor) -> Tensor:
        """Embeddings (..., D) of codes (...)."""
        if not self.levels:
            return self.codes(codes)
        return self.codes(codes) + F.embedding(self.places[codes], self.digits).sum(-2)
