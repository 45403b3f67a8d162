"""What generators of continuous tokens share: latents, their noise, time, kept positions and what `on_step` gets.

A continuous token is a vector of C numbers (a latent of an autoencoder, a code vector) instead of a code, so there is no
softmax: a generator denoises it, by a flow (velocities, next-cell prediction) or by diffusion (noise, MAR). This module
serves both and knows neither: no solver, no loss, no transformer.

Legend: B samples, N positions, C channels, D width, P prefix rows, n positions of one step, K draws a position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.arguments import diagnose
from tokenloom.generators.conditions import Condition, Given, describe
from tokenloom.generators.orders import Order
from tokenloom.generators.sampling import Sampling
from tokenloom.layers import TimeEmbedding as TimeEmbedding
from tokenloom.rng import normal


@dataclass(frozen=True)
class LatentStep:
    """What `on_step` receives after each step of a generator of continuous tokens.

    Attributes:
        index: Step just finished, 0 to num_steps - 1.
        num_steps: Steps in all.
        latents: float32 (B, N, C) in layout order; positions not yet made hold 0. Do not write into it.
        committed: BoolTensor (N,), true where `latents` is final.
    """

    index: int
    num_steps: int
    latents: Tensor
    committed: Tensor


@dataclass(frozen=True)
class Denoising:
    """How continuous tokens are made from noise; what `Sampling` is to codes.

    Attributes:
        steps: Evaluations of the network (or of its head) a token; at least 1.
        solver: Name of a solver; each generator says which it has. Empty means its default.
        temperature: Factor of the noise that is added on the way, not of the noise a token starts from (as published
            for MAR); at least 0. Deterministic solvers add none.
        clip: Bound of the clean values predicted on the way, which are clipped to -clip .. clip (`clip_sample` of
            diffusers); `None` does not clip, as published. Where a network was trained little, the largest magnitude of
            its training latents stops errors at the first, noisiest times from growing.

    Raises:
        TokenloomError: For values outside these ranges.

    Example:
        >>> Denoising(steps=4, solver="euler").steps
        4
    """

    steps: int = 50
    solver: str = ""
    temperature: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise TokenloomError(f"Denoising takes a whole number of steps from 1 up, got {self.steps!r}.")
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < float("inf"):
            raise TokenloomError(
                f"The temperature of denoising is a number from 0 up, got {self.temperature!r}."
            )
        if self.clip is not None and not (
            isinstance(self.clip, (int, float)) and 0 < self.clip < float("inf")
        ):
            raise TokenloomError(
                f"The clip of denoising is a number above 0, or None for none, got {self.clip!r}."
            )

    @classmethod
    def of(cls, value: Denoising | Sampling | None, default: Denoising) -> Denoising:
        """Takes what `generate` may be given as `sampling`; of a `Sampling`, only a temperature has a meaning here."""
        if value is None:
            return default
        if isinstance(value, Sampling):
            if value != Sampling(value.temperature) or callable(value.temperature):
                raise TokenloomError(
                    "Continuous tokens are not drawn from a softmax: top_k, top_p and schedules do not apply. "
                    "Pass Denoising(steps, solver, temperature, clip)."
                )
            return replace(default, temperature=value.temperature)
        if not isinstance(value, cls):
            raise TokenloomError(
                f"sampling must be Denoising(steps, solver, temperature, clip), got {value!r}."
            )
        return replace(value, solver=value.solver or default.solver)

    def check(self, solvers: tuple[str, ...]) -> None:
        """Raises unless `solver` is one of these."""
        if self.solver not in solvers:
            raise unknown_name("solver", self.solver, solvers)


class LatentNoise:
    """The Gaussian noise of a generation: of the seeds, or as recorded.

    Args:
        seeds: LongTensor (B,); draw k of channel c at layout index p is `rng.normal(seed, p, c, k)`.
        channels: Channels C.
        recorded: float (K, B, N, C) in layout order, which takes the place of the seeds, or `None`.
    """

    def __init__(self, seeds: Tensor, channels: int, recorded: Tensor | None = None) -> None:
        self.seeds, self.recorded = seeds[:, None, None], recorded
        self.channels = torch.arange(channels, device=seeds.device)

    def __call__(self, positions: Tensor, draw: int) -> Tensor:
        """Noise (B, n, C), float32, of draw `draw` at layout indices (n,), or (B, n) where samples differ."""
        positions = positions.to(self.seeds.device)
        if self.recorded is None:
            rows = positions[:, None] if positions.ndim == 1 else positions[..., None]
            return normal(self.seeds, rows, self.channels, draw)
        if draw >= len(self.recorded):
            raise TokenloomError(
                f"Noise holds {len(self.recorded)} draws of every position, but draw {draw} is needed; pass more, or "
                "leave it out."
            )
        if positions.ndim == 1:
            return self.recorded[draw][:, positions]
        return self.recorded[draw].gather(1, positions[..., None].expand(-1, -1, len(self.channels)))


class ContinuousGenerator(ModelMixin, ConfigMixin):
    """Base class of the generators of continuous tokens: latents (B, N, C) in layout order.

    A subclass sets `order`, `condition` and `channels` in its constructor, and defines `loss` and `generate` with the
    argument names of `Generator`, plus `noise` for recorded noise.
    """

    config_name = "config.json"  # type: ignore[assignment]
    order: Order
    condition: Condition
    channels: int

    def check_latents(self, latents: Any, name: str = "latents") -> None:
        """Raises unless `latents` are floating (B, N, C), finite, in layout order."""
        size = self.order.layout.size
        good = isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim == 3
        if not good or tuple(latents.shape[1:]) != (size, self.channels):
            raise TokenloomError(
                f"{name} must be a floating tensor of shape (B, {size}, {self.channels}) in layout order, got "
                f"{describe(latents)}. Maps (B, C, H, W) become rows by map.flatten(2).transpose(1, 2)."
            )
        if not bool(torch.isfinite(latents).all()):
            raise TokenloomError(f"{name} hold NaN or infinite values; check what made them.")

    def _kept(self, known: Any, keep: Any, batch: int) -> tuple[Tensor, Tensor] | None:
        """Known latents (B, N, C), float32, and where to keep them (B, N); `None` where nothing is kept."""
        if known is None and keep is None:
            return None
        if not isinstance(known, Tensor) or not isinstance(keep, Tensor):
            raise TokenloomError(
                "known and keep belong together: latents (B, N, C), and which of them to keep."
            )
        self.check_latents(known, "known")
        size = self.order.layout.size
        known = known.expand(batch, -1, -1) if len(known) == 1 else known
        keep = keep.expand(batch, -1) if keep.ndim == 1 or keep.shape[0] == 1 else keep
        if len(known) != batch or tuple(keep.shape) != (batch, size) or keep.dtype != torch.bool:
            raise TokenloomError(
                f"known must be ({batch}, {size}, {self.channels}) latents and keep a boolean ({batch}, {size}) or "
                f"({size},) mask, got {tuple(known.shape)} and {keep.dtype} {tuple(keep.shape)}."
            )
        return known.to(self.device, torch.float32), keep.to(self.device)

    def _noise(self, seeds: Tensor, recorded: Any, draws: int) -> LatentNoise:
        """The noise of a generation that needs `draws` draws of every position; `recorded` is checked."""
        if recorded is None:
            return LatentNoise(seeds, self.channels)
        size, batch = self.order.layout.size, len(seeds)
        good = isinstance(recorded, Tensor) and recorded.is_floating_point() and recorded.ndim == 4
        if not good or tuple(recorded.shape[1:]) != (batch, size, self.channels) or recorded.shape[0] < draws:
            raise TokenloomError(
                f"noise must be a floating tensor of shape (K, {batch}, {size}, {self.channels}) in layout order with "
                f"K >= {draws} draws of every position, got {describe(recorded)}."
            )
        return LatentNoise(seeds, self.channels, recorded.to(self.device, torch.float32))

    def _prefix(self, condition: Given | None, batch: int) -> Tensor:
        """Prefix rows (B, P, D) of a condition; `None` is the null condition."""
        if condition is None:
            condition = self.condition.null(batch, self.device)
        return self.condition(condition, batch, self.device)

    def _null_prefix(self, condition: Given | None, batch: int) -> Tensor:
        """Prefix rows (B, P, D) of the null condition that stands beside `condition` in guidance."""
        if condition is None:
            return self._prefix(None, batch)
        return self._prefix(self.condition.null_like(condition, self.device), batch)

    def _taught_prefix(self, condition: Given | None, batch: int, drop: float = 0.0) -> Tensor:
        """Prefix rows (B, P, D) for teacher forcing; in training mode a share `drop` of the conditions is the null one."""
        if condition is not None:
            self.condition.check(condition)
            if condition.shape[0] != batch:
                raise TokenloomError(
                    f"The condition holds {condition.shape[0]} samples, but there are latents of {batch}; give one a "
                    "sample."
                )
        prefix = self._prefix(condition, batch)
        if not self.training or drop == 0 or condition is None:
            return prefix
        dropped = torch.rand(batch, 1, 1, device=prefix.device) < drop
        return torch.where(dropped, self._null_prefix(condition, batch), prefix)

    def _check_finite(self, values: Tensor, step: int) -> None:
        """Raises where the network gave values that are not finite, and names the cause."""
        if not bool(torch.isfinite(values).all()):
            raise TokenloomError(
                f"Step {step} of {self.order.num_steps}: the network gave values that are not finite. {diagnose(self)}"
            )
