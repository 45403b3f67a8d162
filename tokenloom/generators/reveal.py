"""Which hidden positions a visit decides, for paradigms that draw all of them and keep the surest (MaskGIT, block diffusion).

The scores come from the logits and from counter-based noise, so that they depend on nothing but the seed, the position and
the visit. Knows nothing of models or plans.

Legend: B samples, n positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.rng import gumbel, noise

REVEALS = ("confidence", "random", "order")
REVEAL_NOISE_ID = 0xFFFFFFFE  # vocabulary id reserved for choosing positions; no code shares its noise


def confidence_score(
    logits: Tensor, ids: Tensor, seeds: Tensor, counter: Tensor, strength: float | Tensor = 0.0
) -> Tensor:
    """Log-probability of the drawn ids, plus Gumbel noise.

    Args:
        logits: (B, n, V).
        ids: LongTensor (B, n), the drawn ids.
        seeds: LongTensor (B,).
        counter: LongTensor (n,) or (B, n), what the noise of each position depends on beside the seed.
        strength: Factor of the noise, or one a sample (B, 1); 0 for none.

    Returns:
        float32 (B, n); the largest first.
    """
    confidence = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    if not isinstance(strength, Tensor) and strength == 0:
        return confidence
    return confidence + strength * gumbel(seeds[:, None], counter, REVEAL_NOISE_ID)


def random_score(seeds: Tensor, places: Tensor) -> Tensor:
    """A random sequence of the places (n,) or (B, n) for every seed, float32 (B, n)."""
    return noise(seeds[:, None], places, REVEAL_NOISE_ID)


def surest(score: Tensor, hidden: Tensor, leave: Tensor) -> Tensor:
    """The hidden positions with the largest scores, all but `leave` of them.

    Args:
        score: (B, n).
        hidden: BoolTensor (B, n), which positions are undecided.
        leave: LongTensor (B, 1), how many stay undecided.

    Returns:
        BoolTensor (B, n); among equal scores earlier positions come first.
    """
    ranks = score.masked_fill(~hidden, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return hidden & (ranks < hidden.sum(1, keepdim=True) - leave)
