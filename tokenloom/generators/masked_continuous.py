"""Masked prediction of continuous tokens with a diffusion head (MAR, Li et al. 2024; Hi-MAR, Zheng et al. 2025).

Mask: everybody sees every token that is not hidden. Input: a bidirectional encoder over the condition and the tokens that
exist; its decoder has a learned vector at every hidden place. Head: each hidden place has a feature, from which a small
diffusion network draws its token, alone (MAR) or together with the whole map (Hi-MAR). Steps: the order gives what is
made one after the other (one grid; or a small grid and then a large one), and every step is *visited* several times: of a
random sequence of its positions, floor(n cos(pi k / 2K)) are still hidden after visit k of K.

Nothing computed at one visit is valid at the next, so there is no cache: the reference rung runs hidden rows through the
encoder where nobody sees them, the cached rung leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.generators.arguments import check_batch
from tokenloom.generators.conditions import Given, make_condition
from tokenloom.generators.continuous import ContinuousGenerator, Denoising, LatentStep
from tokenloom.generators.decoding import RUNGS
from tokenloom.generators.diffusion_head import DiffusionHead, HeadConfig, process
from tokenloom.generators.masked import MaskRule, draw_hidden
from tokenloom.generators.masked_network import MaskedAutoencoder
from tokenloom.generators.masked_visits import LatentRun, check_visits, run_visits
from tokenloom.generators.orders import Order
from tokenloom.generators.sampling import Guidance, Sampling
from tokenloom.generators.transformer import TransformerConfig
from tokenloom.rng import as_seeds, noise

_SEQUENCE_NOISE_ID = 0xFFFFFFFE  # vocabulary id reserved for the sequence of positions


@dataclass(frozen=True)
class LatentMaskRule:
    """Settings of masked prediction of continuous tokens; tuples have one entry a step of the order.

    Attributes:
        visits: How often a step is visited, unless the caller says otherwise.
        mask_schedules: Law of the share of hidden positions in training (`MaskRule.mask_schedule`).
        mask_min: Smallest share under "truncnorm".
        label_drop: Share of the samples whose condition is dropped in training.
        context_drop: Share of the samples for which, in training, a later step is told nothing of the earlier ones.
        loss_weights: Weights of the losses of the steps.
        repeats: How many times and noises are drawn for every token in training.
    """

    visits: tuple[int, ...] = (64,)
    mask_schedules: tuple[str, ...] = ("truncnorm",)
    mask_min: float = 0.7
    label_drop: float = 0.1
    context_drop: float = 0.5
    loss_weights: tuple[float, ...] = (1.0,)
    repeats: int = 4

    def __post_init__(self) -> None:
        for name in ("visits", "mask_schedules", "loss_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len({len(self.visits), len(self.mask_schedules), len(self.loss_weights)}) != 1:
            raise TokenloomError(
                "visits, mask_schedules and loss_weights hold one entry a step of the order, "
                f"got {self.visits}, {self.mask_schedules} and {self.loss_weights}."
            )
        check_visits(self.visits, len(self.visits))
        for schedule in self.mask_schedules:
            MaskRule(mask_schedule=schedule, mask_min=self.mask_min, label_drop=self.label_drop)


class MaskedLatentGenerator(ContinuousGenerator):
    """Fills in hidden latents (B, N, C) over several visits of every step of its order.

    Args:
        order_config: `Order.to_config()`. One step, for example `orders.blocks(grid, (H, W))`, is MAR; the two scales of
            `orders.scales(Layout.scales([8, 16]))` are Hi-MAR.
        channels: Channels C of a token.
        encoder_config: Fields of `TransformerConfig`.
        decoder_config: The same for the decoder.
        head_configs: Fields of `HeadConfig`, for each step.
        condition_config: As for `Generator`.
        prefix_repeats: How many rows each row of the condition fills.
        rule_config: Fields of `LatentMaskRule`.
    """

    @register_to_config
    def __init__(
        self,
        order_config: dict[str, Any],
        channels: int,
        encoder_config: dict[str, Any],
        decoder_config: dict[str, Any],
        head_configs: list[dict[str, Any]],
        condition_config: dict[str, Any] | None = None,
        prefix_repeats: int = 1,
        rule_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.order, self.channels, self.repeats = Order.from_config(order_config), channels, prefix_repeats
        check_options(LatentMaskRule, rule_config or {}, "rule option of MaskedLatentGenerator")
        self.rule = LatentMaskRule(**(rule_config or {}))
        heads = [HeadConfig.from_dict(values) for values in head_configs]
        steps = self.order.num_steps
        if len(heads) != steps or len(self.rule.visits) != steps:
            raise TokenloomError(
                f"{self.order} has {steps} steps, but there are {len(heads)} heads and visits for "
                f"{len(self.rule.visits)} steps; give one of each a step."
            )
        encoder, decoder = (
            TransformerConfig.from_dict(encoder_config),
            TransformerConfig.from_dict(decoder_config),
        )
        self.condition = make_condition(condition_config, encoder.width)
        rows = self.condition.length * prefix_repeats
        self.network = MaskedAutoencoder(self.order, channels, rows, encoder, decoder)
        sizes = [part.stop - part.start for part in self.order.slices]
        self.heads = nn.ModuleList(
            DiffusionHead(channels, decoder.width, config, size)
            for config, size in zip(heads, sizes, strict=True)
        )

    def _rows(self, prefix: Tensor) -> Tensor:
        """Every row of the condition, repeated: (B, P, D)."""
        return prefix.repeat_interleave(self.repeats, dim=1)

    def places_of(self, step: int) -> Tensor:
        """Layout indices (n,) of a step."""
        return self.order.permutation[self.order.slices[step]].to(self.device)

    # ---- teacher forcing --------------------------------------------------------------------------------------------

    def features(
        self,
        latents: Tensor,
        condition: Given | None = None,
        masked: Tensor | None = None,
        step: int = 0,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the heads are told of every position, from the latents that are not hidden.

        Args:
            latents: (B, N, C) in layout order.
            condition: What the model's condition takes; `None` is the null condition.
            masked: BoolTensor (B, N) or (N,), what is hidden; `None` hides this step and all later ones.
            step: The step of the order that is being made.
            context: Features (B, N, E) of earlier steps, and where there are some, as in generation; `None` shows the
                latents of earlier steps themselves.

        Returns:
            (B, N, E) in layout order.
        """
        self.check_latents(latents)
        hidden = self._hidden(masked, latents, step)
        prefix = self._rows(self._taught_prefix(condition, len(latents)))
        return self.network(latents.to(self.dtype), prefix, hidden, step, context)

    def logits(self, latents: Tensor, condition: Given | None = None, masked: Tensor | None = None) -> Tensor:
        """`features(latents, condition, masked)`: what stands in for logits where tokens are continuous."""
        return self.features(latents, condition, masked)

    def _hidden(self, masked: Tensor | None, latents: Tensor, step: int) -> Tensor:
        size = self.order.layout.size
        if masked is None:
            masked = self.order.step >= step
        good = isinstance(masked, Tensor) and masked.dtype == torch.bool
        if not good or tuple(masked.shape) not in ((size,), (1, size), (len(latents), size)):
            got = f"{masked.dtype} {tuple(masked.shape)}" if isinstance(masked, Tensor) else repr(masked)
            raise TokenloomError(f"masked must be boolean, ({len(latents)}, {size}) or ({size},), got {got}.")
        return masked.to(latents.device).expand(len(latents), -1)

    def loss(self, latents: Tensor, condition: Given | None = None, masked: Tensor | None = None) -> Tensor:
        """Diffusion loss of the hidden tokens (MAR, eq. 2), summed over the steps with their weights.

        A step is trained with random positions of its own hidden and all later steps hidden. Later steps are told the
        features of the hidden positions of earlier steps, without gradient, or nothing (`context_drop`).

        Args:
            latents: (B, N, C) in layout order.
            condition: What the model's condition takes; dropped for a share `label_drop` in training mode.
            masked: BoolTensor (B, N) or (N,), what is hidden of each step; `None` draws it.
        """
        self.check_latents(latents)
        batch, device, rule = len(latents), latents.device, self.rule
        step_of = self.order.step.to(device)
        context: tuple[Tensor, Tensor] | None = None
        total = torch.zeros((), device=device)
        for step, head in enumerate(self.heads):
            places = self.places_of(step)
            law = MaskRule(mask_schedule=rule.mask_schedules[step], mask_min=rule.mask_min)
            hidden = (step_of > step).expand(batch, -1).clone()
            own = (
                draw_hidden(batch, len(places), law, device=device)
                if masked is None
                else self._hidden(masked, latents, step)[:, places]
            )
            hidden[:, places] = own
            prefix = self._rows(self._taught_prefix(condition, batch, rule.label_drop))
            z = self.network(latents.to(self.dtype), prefix, hidden, step, self._told(context))
            part = self._head_loss(head, latents[:, places], z[:, places], own)
            total = total + rule.loss_weights[step] * part
            made = hidden & (step_of == step)
            features = torch.where(made[..., None], z.detach(), 0.0 if context is None else context[0])
            context = (features, made if context is None else made | context[1])
        return total

    def _told(self, context: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The context, of which a share `context_drop` of the samples loses everything in training mode."""
        if context is None or not self.training:
            return context
        told = torch.rand(len(context[1]), 1, device=context[1].device) >= self.rule.context_drop
        return context[0], context[1] & told

    def _head_loss(self, head: Any, clean: Tensor, z: Tensor, hidden: Tensor) -> Tensor:
        """Mean over hidden rows; of a head that sees a whole map, over all its rows, of which the others count as 0."""
        repeats = self.rule.repeats
        clean, z, hidden = clean.repeat(repeats, 1, 1), z.repeat(repeats, 1, 1), hidden.repeat(repeats, 1)
        shape = (len(clean), 1) if head.whole_map else hidden.shape
        at = torch.randint(len(process().times), shape, device=clean.device)
        rows = head.loss(clean, z, at, torch.randn_like(clean, dtype=torch.float32)) * hidden
        return rows.mean() if head.whole_map else rows.sum() / hidden.sum().clamp(min=1)

    def forward(
        self, latents: Tensor, condition: Given | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """`loss(...)`, the training forward."""
        return self.loss(latents, condition, masked)

    # ---- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        condition: Given | None = None,
        *,
        batch_size: int | None = None,
        guidance: float | Guidance | Callable[[float], float] = 1.0,
        sampling: Denoising | Sampling | Sequence[Denoising] | None = None,
        seeds: int | list[int] | Tensor | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        on_step: Callable[[LatentStep], None] | None = None,
        decode: str = "auto",
        noise: Tensor | None = None,
        sequence: Tensor | None = None,
        visits: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Generates latents.

        Args:
            condition: Batch of conditions; `None` is the null condition.
            batch_size: Number of samples where there is no condition.
            guidance: `u + g (c - u)` on the predicted noise. Progress is the share of positions that a visit leaves made
                (at least one is taken to be hidden, as published), every step of the order counting alike.
            sampling: `Denoising`, one for all steps of the order or one a step; default the steps of each head.
            seeds: One seed a sample, as for `Generator.generate`.
            known: Latents (B, N, C) to keep.
            keep: BoolTensor (B, N) or (N,), where to keep them.
            on_step: Called after each visit with a `LatentStep`.
            decode: "auto", "reference" or "cached".
            noise: Recorded noise (K, B, N, C). A head of T steps uses draw 0 to begin with and draw k before its step
                k + 1; one that sees a whole map uses T more at every visit.
            sequence: LongTensor (B, N) of layout indices: of two positions of a step, the earlier one here is made first;
                `None` is a random sequence of the seed.
            visits: How often each step of the order is visited; one number for all, or one each.

        Returns:
            float32 (B, N, C) in layout order.

        Raises:
            TokenloomError: For bad arguments, or if the network gives values that are not finite.
        """
        if decode not in ("auto", *RUNGS):
            raise unknown_name("decode rung", decode, ["auto", *RUNGS])
        condition, batch = check_batch(self.condition, condition, batch_size, self.device)
        kept = self._kept(known, keep, batch)
        numbers, strength = as_seeds(seeds, batch, self.device), Guidance.of(guidance)
        steps = self.order.num_steps
        counts = (
            self.rule.visits if visits is None else (visits,) * steps if isinstance(visits, int) else visits
        )
        counts, denoising = check_visits(counts, steps), self._denoising(sampling)
        prefix = self._prefix(condition, batch)
        if strength.enabled:
            prefix = torch.cat((prefix, self._null_prefix(condition, batch)))
        draws = max(
            way.steps * (count if head.whole_map else 1)
            for way, count, head in zip(denoising, counts, self.heads, strict=True)
        )
        run = LatentRun(
            batch,
            strength,
            denoising,
            counts,
            self._rows(prefix),
            self._noise(numbers, noise, draws),
            self._rank(sequence, numbers),
            decode == "reference",
            on_step,
        )
        latents = torch.zeros(batch, self.order.layout.size, self.channels, device=self.device)
        hidden = torch.ones(latents.shape[:2], dtype=torch.bool, device=self.device)
        if kept is not None:
            latents, hidden = torch.where(kept[1][..., None], kept[0], latents), ~kept[1]
        return run_visits(self, run, latents, hidden)

    def _denoising(
        self, sampling: Denoising | Sampling | Sequence[Denoising] | None
    ) -> tuple[Denoising, ...]:
        """How each step of the order is drawn."""
        steps = len(self.heads)
        given: list[Any] = list(sampling) if isinstance(sampling, (list, tuple)) else [sampling] * steps
        if len(given) != steps:
            raise TokenloomError(
                f"sampling holds {len(given)} entries for {steps} steps of the order; give one, or one each."
            )
        ways = [
            Denoising.of(value, Denoising(cast("DiffusionHead", head).config.steps, "ddpm"))
            for value, head in zip(given, self.heads, strict=True)
        ]
        for way in ways:
            way.check(("ddpm",))
        return tuple(ways)

    def _rank(self, sequence: Tensor | None, seeds: Tensor) -> Tensor:
        """LongTensor (B, N): the place of every position in the sequence in which positions are made."""
        size = self.order.layout.size
        places = torch.arange(size, device=self.device)
        if sequence is None:
            return (
                noise(seeds[:, None], places, _SEQUENCE_NOISE_ID).argsort(dim=1, stable=True).argsort(dim=1)
            )
        shape = (len(seeds), size)
        if not isinstance(sequence, Tensor) or sequence.is_floating_point() or tuple(sequence.shape) != shape:
            raise TokenloomError(f"sequence must be an integer tensor {shape} of layout indices.")
        sequence = sequence.to(self.device)
        if not torch.equal(sequence.sort(dim=1).values, places.expand(shape)):
            raise TokenloomError(f"Every row of sequence must hold each of 0..{size - 1} once.")
        return sequence.argsort(dim=1)
