"""The visits of masked latent prediction: what is still hidden after each, what is drawn, and what stays.

Runs a `MaskedLatentGenerator` step by step. Knows nothing of weights, losses or how a generation is asked for.

Legend: B samples, N positions, C channels, D width, E width of the features, m positions drawn at a visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.continuous import Denoising, LatentNoise, LatentStep
from tokenloom.generators.diffusion_head import DiffusionHead, process
from tokenloom.generators.sampling import Guidance, guide

if TYPE_CHECKING:
    from tokenloom.generators.masked_continuous import MaskedLatentGenerator


def check_visits(visits: Sequence[int], steps: int) -> tuple[int, ...]:
    """Raises unless there is a positive number of visits for each step."""
    good = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in visits)
    if not good or len(visits) != steps:
        raise TokenloomError(
            f"visits are whole numbers from 1 up, one for each of {steps} steps, got {tuple(visits)}."
        )
    return tuple(visits)


def hidden_counts(size: int, visits: int) -> list[int]:
    """How many of `size` positions are still hidden after each visit: the cosine schedule of MaskGIT and MAR.

    At least one is left before the last visit, and one fewer than before if any.
    """
    left, counts = size, []
    for visit in range(1, visits):
        target = math.floor(size * math.cos(math.pi / 2 * visit / visits) + 1e-6)
        left = max(1, min(left - 1, target))
        counts.append(left)
    return [*counts, 0]


@dataclass(frozen=True)
class LatentRun:
    """One call of `generate`, checked and ready to run.

    Attributes:
        batch: Samples B.
        guidance: The guidance; where it is enabled, the null half runs behind the conditional half.
        denoising: How the tokens of each step are drawn.
        visits: How often each step is visited.
        prefix: Condition rows (B or 2B, P, D).
        noise: The noise of all draws.
        rank: LongTensor (B, N): positions of a step are made in rising rank.
        dense: Whether hidden rows run through the encoder (the reference rung).
        on_step: Called after each visit.
    """

    batch: int
    guidance: Guidance
    denoising: tuple[Denoising, ...]
    visits: tuple[int, ...]
    prefix: Tensor
    noise: LatentNoise
    rank: Tensor
    dense: bool
    on_step: Callable[[LatentStep], None] | None


@torch.no_grad()
def run_visits(model: MaskedLatentGenerator, run: LatentRun, latents: Tensor, hidden: Tensor) -> Tensor:
    """Latents (B, N, C) after the visits of all steps; `hidden` (B, N) says what is to be made."""
    step_of, size, done = model.order.step.to(hidden.device), hidden.shape[1], 0
    features = torch.zeros(run.batch, size, model.network.bridge.out_features, dtype=model.dtype).to(
        hidden.device
    )
    made = torch.zeros_like(hidden)
    for step, head in enumerate(model.heads):
        places = model.places_of(step)
        unknown = hidden[:, places].sum(1, keepdim=True)
        for visit, left in enumerate(hidden_counts(len(places), run.visits[step])):
            now = hidden & (step_of == step)
            share = 1 - max(1, left) / len(places)
            scale = run.guidance.at(
                (step + share) / len(model.heads), step=done, made=int((~hidden).sum(1).min())
            )
            z = _see(model, run, latents, hidden, step, (features, made) if step else None)
            rank = run.rank.masked_fill(~now, size).argsort(dim=1, stable=True).argsort(dim=1)
            chosen = now & (rank < now.sum(1, keepdim=True) - unknown * left // len(places))
            shown = now if head.whole_map else chosen
            index = places.expand(run.batch, -1) if head.whole_map else _first(chosen)
            if index.shape[1]:
                drawn = _draw(model, run, step, visit, z, latents, shown, index, scale)
                model._check_finite(drawn, step)
                latents = _put(latents, drawn, index, shown)
            features = torch.where(chosen[..., None], z[: run.batch], features)
            made, hidden, done = made | chosen, hidden & ~chosen, done + 1
            if run.on_step is not None:
                final = ~hidden
                run.on_step(
                    LatentStep(done - 1, sum(run.visits), latents * final[..., None], final.all(0).cpu())
                )
    return latents


def _first(chosen: Tensor) -> Tensor:
    """Layout indices (B, m) of the chosen positions (B, N); a sample with fewer than others is padded with any."""
    return (~chosen).long().argsort(dim=1, stable=True)[:, : int(chosen.sum(1).max())]


def _see(
    model: MaskedLatentGenerator,
    run: LatentRun,
    latents: Tensor,
    hidden: Tensor,
    step: int,
    context: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Features (B or 2B, N, E) of both halves, which share latents and context."""
    halves = len(run.prefix) // run.batch
    told = None if context is None else (context[0].repeat(halves, 1, 1), context[1].repeat(halves, 1))
    shown = latents.to(model.dtype).repeat(halves, 1, 1)
    return model.network(shown, run.prefix, hidden.repeat(halves, 1), step, told, run.dense)


def _draw(
    model: MaskedLatentGenerator,
    run: LatentRun,
    step: int,
    visit: int,
    z: Tensor,
    latents: Tensor,
    shown: Tensor,
    places: Tensor,
    scale: float,
) -> Tensor:
    """Tokens (B, m, C) at layout indices (B, m); where not `shown` (B, N), a map is held to what is known."""
    head, way = cast("DiffusionHead", model.heads[step]), run.denoising[step]
    tables, offset = process(way.steps), visit * way.steps if head.whole_map else 0
    guided = len(z) != run.batch and scale != 1
    z = z if guided else z[: run.batch]
    z = z.gather(1, places.repeat(len(z) // run.batch, 1)[..., None].expand(-1, -1, z.shape[-1]))
    index = places[..., None].expand(-1, -1, model.channels)
    free, fixed = shown.gather(1, places)[..., None], latents.gather(1, index)
    first = x = run.noise(places, offset)
    for at in reversed(range(way.steps)):
        if head.whole_map:
            x = torch.where(free, x, tables.add_noise(fixed, first, at))
        fresh = run.noise(places, offset + way.steps - at) * way.temperature if at else first
        x = head.step(x, z, tables, at, fresh, _mixer(scale) if guided else None, way.clip)
    return x


def _mixer(scale: float) -> Callable[[Tensor], Tensor]:
    """Mixes the noise predicted by both halves."""

    def mix(both: Tensor) -> Tensor:
        conditional, null_half = both.chunk(2)
        return guide(conditional, null_half, scale)

    return mix


def _put(latents: Tensor, drawn: Tensor, places: Tensor, where: Tensor) -> Tensor:
    """Latents with drawn tokens (B, m, C) at layout indices (B, m), where `where` (B, N) holds."""
    index = places[..., None].expand(-1, -1, drawn.shape[-1])
    return torch.where(where[..., None], latents.scatter(1, index, drawn), latents)
