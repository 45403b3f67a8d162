"""Diffusion heads: a small network that draws a continuous token given what a transformer says of its place.

MAR (Li et al. 2024, eq. 1) trains a perceptron to predict the noise in one token; Hi-MAR (Zheng et al. 2025) a
transformer that denoises a whole map. Both follow the cosine process of improved diffusion (Nichol and Dhariwal 2021)
over 1000 times, and draw in fewer steps by keeping some of the times. This module knows conditions as vectors a row; it
knows nothing of masks over a layout, orders or the transformer before it.

The steps are our own, because `DDPMScheduler` of diffusers draws its noise inside `step`: it can be given neither noise
that depends on (seed, position) alone nor a temperature. The arithmetic is the same, with tables in float64.

Legend: B samples, n rows, C channels, D width of the condition, W width of the head, T kept times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.generators.continuous import TimeEmbedding
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.layers import make_norm

TIMES = 1000
EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Process:
    """The tables of a diffusion over T times kept of 1000; all float64 (T,).

    Attributes:
        times: LongTensor (T,), the kept times, rising.
        total: Share of the signal left, the product of all 1 - beta so far.
        before: The same at the kept time before; 1 at the first.
    """

    times: Tensor
    total: Tensor
    before: Tensor

    @cached_property
    def betas(self) -> Tensor:
        """Variance added between a kept time and the one before."""
        return 1 - self.total / self.before

    @cached_property
    def posterior(self) -> Tensor:
        """Variance of the value before, given the value and the clean token."""
        return self.betas * (1 - self.before) / (1 - self.total)

    @cached_property
    def small(self) -> Tensor:
        """Logarithm of `posterior`, with the first, which is 0, replaced by the second."""
        variance = self.posterior.clone()
        variance[0] = variance[min(1, len(variance) - 1)]
        return variance.log()

    @cached_property
    def large(self) -> Tensor:
        """Logarithm of `betas`."""
        return self.betas.log()

    def add_noise(self, clean: Tensor, noise: Tensor, at: Tensor | int) -> Tensor:
        """The token at kept time `at`, an int or LongTensor (B,): q(x_t | x_0)."""
        kept = self.total.to(clean.device)[at]
        return _rows(kept.sqrt(), clean) * clean + _rows((1 - kept).sqrt(), clean) * noise

    def mean(self, noisy: Tensor, noise: Tensor, at: Tensor | int, clip: float | None = None) -> Tensor:
        """Mean of the value before, given a value and the noise predicted in it; `clip` bounds the clean token."""
        total = self.total.to(noisy.device)[at]
        clean = _rows(total.rsqrt(), noisy) * noisy - _rows((1 / total - 1).sqrt(), noisy) * noise
        return self.mean_of(clean if clip is None else clean.clamp(-clip, clip), noisy, at)

    def mean_of(self, clean: Tensor, noisy: Tensor, at: Tensor | int) -> Tensor:
        """Mean of the value before, given a value and the clean token: q(x_(t-1) | x_t, x_0)."""
        device = noisy.device
        total, before, beta = (t.to(device)[at] for t in (self.total, self.before, self.betas))
        return (
            _rows(beta * before.sqrt() / (1 - total), noisy) * clean
            + _rows((1 - before) * (1 - beta).sqrt() / (1 - total), noisy) * noisy
        )


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """float64 values (B,) or () as float32 that broadcast against (B, ...)."""
    values = values.to(torch.float32)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


@lru_cache(maxsize=16)
def process(steps: int = TIMES) -> Process:
    """The cosine process with `steps` of its 1000 times kept, evenly spaced from the first to the last.

    Raises:
        TokenloomError: For a number of steps outside 1..1000.
    """
    if not 1 <= steps <= TIMES:
        raise TokenloomError(f"A diffusion head draws in 1 to {TIMES} steps, got {steps}.")
    ends = [math.cos((i / TIMES + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(TIMES + 1)]
    alphas = [max(after / before, 1 - 0.999) for before, after in itertools.pairwise(ends)]
    total = torch.tensor(alphas, dtype=torch.float64).cumprod(0)
    stride, place, kept = (TIMES - 1) / (steps - 1) if steps > 1 else 1.0, 0.0, []
    for _ in range(steps):
        kept.append(round(place))
        place += stride  # summed up as published: the rounding of exact halves depends on it
    times = torch.tensor(kept)
    total = total[times]
    return Process(times, total, torch.cat((torch.ones(1, dtype=torch.float64), total[:-1])))


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a diffusion head.

    Attributes:
        kind: "rows" (a perceptron, each row by itself) or "map" (a transformer over all rows).
        width: Width W.
        depth: Number of blocks.
        heads: Attention heads of "map".
        mlp_width: Hidden width of the blocks of "map"; `None` means 4 W.
        steps: Steps of a draw unless the caller says otherwise.
    """

    kind: str = "rows"
    width: int = 1024
    depth: int = 3
    heads: int = 8
    mlp_width: int | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise unknown_name("kind of diffusion head", self.kind, _KINDS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadConfig:
        """Builds a config from JSON values; unknown keys are errors with the closest match."""
        check_options(cls, values, "option of a diffusion head")
        return cls(**values)


class RowBlock(nn.Module):
    """A residual perceptron, modulated by the condition of its row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = make_norm("layer", width, EPS, True)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """Maps (..., W) to (..., W)."""
        shift, scale, gate = self.modulation(active).chunk(3, dim=-1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


class RowNetwork(nn.Module):
    """Predicts the noise in each row by itself, and where its variance lies between the two bounds (MAR, Hi-MAR).

    Args:
        channels: Channels C.
        condition: Width D of the conditions.
        config: Shape of the network.
        size: Rows of a token map; of no consequence here.
    """

    learns_variance = True

    def __init__(self, channels: int, condition: int, config: HeadConfig, size: int) -> None:
        super().__init__()
        width = config.width
        self.time, self.condition = TimeEmbedding(width), nn.Linear(condition, width)
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(RowBlock(width) for _ in range(config.depth))
        self.norm = make_norm("layer", width, EPS, False)
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 2 * channels)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, times: Tensor, z: Tensor) -> Tensor:
        """(..., 2 C) of noisy rows (..., C), times that broadcast to (...), and conditions (..., D)."""
        active = F.silu(self.time(times) + self.condition(z))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, active)
        shift, scale = self.modulation(active).chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift)


class MapNetwork(nn.Module):
    """Predicts the noise in all rows of a map together, each modulated by its own condition (Hi-MAR).

    Args:
        channels: Channels C.
        condition: Width D of the conditions.
        config: Shape of the network.
        size: Rows of the map.
    """

    learns_variance = False
    places: Tensor

    def __init__(self, channels: int, condition: int, config: HeadConfig, size: int) -> None:
        super().__init__()
        width = config.width
        self.time, self.condition = TimeEmbedding(width), nn.Linear(condition, width)
        self.embed = nn.Linear(channels, width)
        self.register_buffer("places", _waves(size, width))
        self.transformer = Transformer(
            TransformerConfig(
                width=width,
                heads=config.heads,
                depth=config.depth,
                mlp="gelu_tanh",
                mlp_width=config.mlp_width or 4 * width,
                norm="layer",
                norm_affine=False,
                norm_eps=EPS,
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
                modulation="own",
                final_modulation=True,
                rope=False,
            )
        )
        self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, times: Tensor, z: Tensor) -> Tensor:
        """(B, n, C) of noisy rows (B, n, C), times (B or 1, 1), and conditions (B, n, D)."""
        condition = self.time(times) + self.condition(z)
        return self.out(self.transformer(self.embed(x) + self.places, condition=condition)[0])


def _waves(size: int, width: int) -> Tensor:
    """Fixed positions (size, W) of a square map, sines then cosines, columns before rows (DiT); else of a line."""
    side = math.isqrt(size)
    place = torch.arange(size)
    axes = [place % side, place // side] if side * side == size and width % 4 == 0 else [place]
    half = width // (2 * len(axes))
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = [axis.double()[:, None] * frequencies for axis in axes]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return F.pad(waves, (0, width - waves.shape[1])).float()


_KINDS: dict[str, type[RowNetwork] | type[MapNetwork]] = {"rows": RowNetwork, "map": MapNetwork}
Mix = Callable[[Tensor], Tensor]


class DiffusionHead(nn.Module):
    """A network that predicts noise, its training loss, and one step of a draw.

    Args:
        channels: Channels C.
        condition: Width D of the conditions.
        config: Shape of the network.
        size: Rows of a map.
    """

    def __init__(self, channels: int, condition: int, config: HeadConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.network = _KINDS[config.kind](channels, condition, config, size)

    @property
    def whole_map(self) -> bool:
        """Whether the network sees all rows at once."""
        return self.config.kind == "map"

    def loss(self, clean: Tensor, z: Tensor, at: Tensor, noise: Tensor) -> Tensor:
        """Loss of each row, (B, n): squared error of the noise, plus, for a learned variance, the variational bound in
        bits with the mean held fixed (Nichol and Dhariwal, eq. 16), as published.

        Args:
            clean: Tokens (B, n, C).
            z: Conditions (B, n, D).
            at: LongTensor, times in 0..999: (B, n), or (B, 1) for a map.
            noise: Standard normal (B, n, C).
        """
        tables = process()
        flat = at.expand(clean.shape[:2]).flatten()
        rows, drawn = clean.float().flatten(0, 1), noise.float().flatten(0, 1)
        noisy = tables.add_noise(rows, drawn, flat)
        output = self.network(noisy.unflatten(0, clean.shape[:2]).to(z.dtype), at, z).float().flatten(0, 1)
        guess = output[:, : clean.shape[-1]]
        loss = (drawn - guess).square().mean(-1)
        if self.network.learns_variance:
            loss = loss + _bound(tables, rows, noisy, guess.detach(), output[:, clean.shape[-1] :], flat)
        return loss.unflatten(0, clean.shape[:2])

    def step(
        self,
        x: Tensor,
        z: Tensor,
        tables: Process,
        at: int,
        noise: Tensor,
        mix: Mix | None = None,
        clip: float | None = None,
    ) -> Tensor:
        """One step of a draw, from kept time `at` to the one before (DDPM).

        Args:
            x: Noisy rows (B, n, C), float32.
            z: Conditions (B, n, D), or (2B, n, D) with the null half behind where `mix` is given.
            tables: `process(steps)`.
            at: Index of the kept time, steps - 1 first and 0 last.
            noise: (B, n, C), times the temperature; unused at the last step.
            mix: Guidance: noise predicted by both halves, (2B, n, C), to (B, n, C).
            clip: Bound of the clean token that the predicted noise stands for.
        """
        both = x if mix is None else x.repeat(2, 1, 1)
        times = tables.times[at].to(x.device).expand(1, 1)
        output = self.network(both.to(z.dtype), times, z).float()
        guess, rest = output[..., : x.shape[-1]], output[: len(x), :, x.shape[-1] :]
        mean = tables.mean(x, guess if mix is None else mix(guess), at, clip)
        if at == 0:
            return mean
        low, high = float(tables.small[at]), float(tables.large[at])
        if not self.network.learns_variance:
            return mean + math.exp(0.5 * high) * noise
        share = (rest + 1) / 2
        return mean + torch.exp(0.5 * (share * high + (1 - share) * low)) * noise


def _bound(
    tables: Process, clean: Tensor, noisy: Tensor, guess: Tensor, variance: Tensor, at: Tensor
) -> Tensor:
    """Variational bound of rows (M, C) in bits, (M,): KL divergence, or at time 0 the likelihood on a grid of 1/255."""
    device = clean.device
    low, high = (_rows(table.to(device)[at], clean) for table in (tables.small, tables.large))
    true, mean = tables.mean_of(clean, noisy, at), tables.mean(noisy, guess, at)
    share = (variance + 1) / 2
    log = share * high + (1 - share) * low
    divergence = 0.5 * (log - low - 1 + torch.exp(low - log) + (true - mean).square() * torch.exp(-log))
    nats = torch.where((at == 0)[:, None], _surprise(clean, mean, 0.5 * log), divergence)
    return nats.mean(-1) / math.log(2)


def _surprise(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood of values in [-1, 1], rounded to 256 levels, under a normal; the tails are open."""

    def below(x: Tensor) -> Tensor:  # the published approximation of the normal distribution function
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    scale = torch.exp(-log_scale)
    upper, lower = below(scale * (values - mean + 1 / 255)), below(scale * (values - mean - 1 / 255))
    mass = torch.where(values < -0.999, upper, torch.where(values > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()
