"""Rectified flow: noisy samples, the way from noise to data, and guidance on that way.

A sample at level s is `(1 - s) data + s noise`, and its velocity is `noise - data` (Liu et al. 2022): level 1 is noise, level
0 data, as in diffusers' flow-matching schedulers. Knows arrays and levels. Knows nothing of pictures, codes or networks.

Sampling steps are taken here and not by diffusers' `FlowMatchEulerDiscreteScheduler`, whose steps and shifted levels these
equal: it has no second-order step, and importing it loads scipy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.rng import as_seeds, normal

Velocity = Callable[[Tensor, int, float], Tensor]
"""(sample (B, ...), number of the step, level) -> velocity (B, ...)."""

Level = TypeVar("Level", float, Tensor)
_MOMENTUM = -0.5
_LONGEST = 2.5


def mix(data: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """Samples `(1 - s) data + s noise` of data and noise (B, ...) at levels s (B,)."""
    levels = levels.view(-1, *(1,) * (data.ndim - 1)).to(data.dtype)
    return (1 - levels) * data + levels * noise


def make_levels(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps + 1` levels from 1 to 0 between which steps are taken.

    Args:
        steps: Number of steps.
        shift: More than 1 takes smaller steps near noise: s becomes shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23).

    Raises:
        TokenloomError: If `steps` is not a number from 1.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise TokenloomError(f"steps must be a whole number from 1, got {steps!r}.")
    return [shifted(1 - index / steps, shift) for index in range(steps + 1)]


def shifted(level: Level, shift: float) -> Level:
    """A level, or a tensor of levels, after `make_levels`' shift."""
    return shift * level / (1 + (shift - 1) * level)


def integrate(velocity: Velocity, noise: Tensor, levels: list[float], order: int = 1) -> Tensor:
    """Follows the velocity from noise (B, ...) at the first level to the last.

    Args:
        velocity: The flow.
        noise: Where to start.
        levels: Falling levels; one step from each to the next.
        order: 1: Euler. 2: Adams-Bashforth, `1.5 v - 0.5 v of the step before`, whose first step is Euler's.
    """
    sample, before = noise, None
    for step, (level, following) in enumerate(itertools.pairwise(levels)):
        now = velocity(sample, step, level)
        mean = now if order == 1 or before is None else 1.5 * now - 0.5 * before
        sample, before = sample + (following - level) * mean, now
    return sample


class Guide:
    """Guidance of one sampling: the velocity from that with and that without the condition.

    Args:
        scale: 1 = no guidance, and `enabled` is false.
        projected: Adaptive projected guidance (Sadat et al. 2024) by diffusers' functions: the difference of the two runs
            through a momentum of -0.5, its norm is at most 2.5, and only its part orthogonal to the conditioned velocity counts.
            Else classifier-free guidance (Ho & Salimans 2022).
    """

    def __init__(self, scale: float, projected: bool) -> None:
        if not math.isfinite(scale):
            raise TokenloomError(f"guidance must be a finite number, got {scale!r}.")
        self.scale, self.enabled = scale, scale != 1
        self.momentum = None
        if projected and self.enabled:
            from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

            self.momentum = MomentumBuffer(_MOMENTUM)

    def __call__(self, conditioned: Tensor, free: Tensor) -> Tensor:
        """Guided velocity of two velocities (B, ...)."""
        if self.momentum is None:
            return free + self.scale * (conditioned - free)
        from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

        return normalized_guidance(
            conditioned,
            free,
            self.scale - 1,
            self.momentum,
            eta=0.0,
            norm_threshold=_LONGEST,
            use_original_formulation=True,
        )


def start_noise(
    shape: tuple[int, ...],
    like: Tensor,
    seeds: int | list[int] | Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Gaussian noise of a batch, a pure function of the seeds.

    Args:
        shape: (B, ...).
        like: A tensor on the device and in the dtype of the result.
        seeds: One seed a sample, or one number s for s, s + 1, ...; `None`: seed 0 for every sample, so that a sample does not
            depend on its place in the batch.
        noise: The noise itself, of this shape, in place of seeds.

    Raises:
        TokenloomError: For noise of another shape, or seeds that `tokenloom.rng.as_seeds` refuses.
    """
    if noise is not None:
        if noise.shape != shape:
            raise TokenloomError(f"noise must have the shape {shape}, got {tuple(noise.shape)}.")
        return noise.to(like)
    batch, count = shape[0], math.prod(shape[1:])
    rows = torch.zeros(batch, dtype=torch.long) if seeds is None else as_seeds(seeds, batch)
    places = torch.arange(count, device=like.device)
    return normal(rows.to(like.device)[:, None], 0, places).view(shape).to(like)
