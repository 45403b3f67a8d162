"""Next-cell prediction: continuous tokens, a square of them a step, each made from noise by a flow (xAR, Ren et al. 2025).

Mask: a row sees its own cell and all earlier ones. Input: every position holds its token mixed with noise at the time of
its cell; while a cell is made its time runs from 1 (noise) to 0 (data), and the cells before it stand at 0. Training
gives every cell a time of its own, so that the model learns from flawed context (noisy context learning). Head: each
row predicts the velocity at its own place. Steps: one a cell, 4 cells of 8 x 8 tokens, each of 40 to 50 evaluations of
the network, against the cached cells before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.generators import decoding
from tokenloom.generators.arguments import check_batch
from tokenloom.generators.conditions import Condition, Given, make_condition
from tokenloom.generators.continuous import (
    ContinuousGenerator,
    Denoising,
    LatentNoise,
    LatentStep,
)
from tokenloom.generators.flow import SOLVERS, clip_data, make_solver
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import cell_plan
from tokenloom.generators.sampling import Guidance, Sampling, guide
from tokenloom.generators.stages import Stages
from tokenloom.generators.transformer import TransformerConfig
from tokenloom.layers import TimeEmbedding
from tokenloom.rng import as_seeds

TIMES = 1000  # times are whole thousandths to the network
DEFAULT = Denoising(steps=50, solver="sde")


@dataclass(frozen=True)
class CellRule:
    """Settings of next-cell prediction.

    Attributes:
        label_drop: Share of the samples whose condition is dropped by `loss` in training mode.
        time_mean: Mean of the normal number whose sigmoid is the time of a cell in training.
        time_std: Its standard deviation.
        frequencies: Number of sinusoids of the time embedding.
    """

    label_drop: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0
    frequencies: int = 256


@dataclass(frozen=True)
class _Run:
    """What stays the same during one generation."""

    prefix: Tensor  # (B or 2B, P, D), the conditional half first
    stepper: decoding.Stepper
    sampling: Denoising
    noise: LatentNoise
    kept: tuple[Tensor, Tensor] | None


class NextCellGenerator(ContinuousGenerator):
    """Predicts the velocities of all tokens of a cell at once, with earlier cells as context.

    The condition modulates every block together with the time (adaLN). A condition of one row (a class) does no more;
    rows of a longer one (words) also stand before the first cell, where every cell sees them.

    Args:
        order_config: `Order.to_config()`; a step of the order is a cell: `orders.blocks(Layout.grid(16, 16), (8, 8))`.
        channels: Channels C of a token.
        transformer_config: Fields of `TransformerConfig` of the first stage; modulation defaults to "own".
        condition_config: As for `Generator`.
        decoder_config: Fields of the second stage that differ from the first (xAR has an encoder and a decoder of
            equal shape: {}); `None` for one stage.
        causal_prefix: Whether prefix rows see only earlier prefix rows.
        rule_config: Fields of `CellRule`.
    """

    row_position: Tensor

    @register_to_config
    def __init__(
        self,
        order_config: dict[str, Any],
        channels: int,
        transformer_config: dict[str, Any],
        condition_config: dict[str, Any] | None = None,
        decoder_config: dict[str, Any] | None = None,
        causal_prefix: bool = False,
        rule_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_options(CellRule, rule_config or {}, "rule option of NextCellGenerator")
        self.order, self.channels = Order.from_config(order_config), channels
        self.rule = CellRule(**(rule_config or {}))
        first = {"modulation": "own", **transformer_config}
        configs = [TransformerConfig.from_dict(first)]
        width = configs[0].width
        if decoder_config is not None:
            configs.append(TransformerConfig.from_dict({**first, "condition_width": width, **decoder_config}))
        self.condition = make_condition(condition_config, width)
        if not self.condition.length or type(self.condition).forward is Condition.forward:
            raise TokenloomError(
                "NextCellGenerator needs a condition of at least one row, and has no token table: 'class', 'words', "
                f"'features', or 'none' of length 1; got {condition_config!r}."
            )
        self.words = self.condition.length if self.condition.length > 1 else 0  # prefix rows that are fed
        self.plan = cell_plan(self.order, self.words, causal_prefix)
        coords = self.order.layout.coords
        outside = torch.zeros(1, coords.shape[1], dtype=coords.dtype)
        places = torch.cat((coords, outside))[self.plan.position]  # -1, a prefix row, picks the last
        self.transformer = Stages(channels, configs, places)
        self.time = TimeEmbedding(width, self.rule.frequencies)
        self.head = nn.Linear(configs[-1].width, channels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    # ---- what decode rungs ask for ----------------------------------------------------------------------------------

    def pooled_condition(self, prefix: Tensor) -> Tensor | None:
        """`None`: the adaLN condition holds the time and comes with every call."""
        return None

    def run_rows(self, x: Tensor, rows: Tensor, *, mask: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        """Runs all stages on embeddings (B, n, D) of row ids (n,); options as in `Stages.forward`."""
        return self.transformer(
            x, rows.to(x.device), mask=None if mask is None else mask.to(x.device), **options
        )

    def _modulators(self, prefix: Tensor, times: Tensor) -> Tensor:
        """adaLN conditions (B, G, D) of times (B or 1, G): the mean of the prefix rows plus the embedded time."""
        return prefix.mean(1, keepdim=True) + self.time((times.float() * TIMES).floor())

    # ---- teacher forcing --------------------------------------------------------------------------------------------

    def velocity(self, noisy: Tensor, times: Tensor, condition: Given | None = None) -> Tensor:
        """Velocities of noisy tokens, all cells in one forward: the teacher-forced call of this paradigm.

        Args:
            noisy: Floating (B, N, C) in layout order, (1 - t) latents + t noise with the time t of the cell.
            times: Floating (B, S), the time of each cell, in [0, 1].
            condition: What the model's condition takes; `None` is the null condition.

        Returns:
            (B, N, C) in layout order, the prediction of noise - latents. A cell depends on itself and on
            the noisy cells before it.
        """
        self._check_times(times, noisy)
        return self._velocity(noisy, times, condition, self._taught_prefix(condition, len(noisy)))

    def _velocity(self, noisy: Tensor, times: Tensor, condition: Given | None, prefix: Tensor) -> Tensor:
        order, plan, device = self.order, self.plan, noisy.device
        x = self.transformer.embed(
            noisy[:, order.permutation.to(device)].to(self.dtype), prefix if self.words else None
        )
        groups = order.step[order.permutation]
        if self.words:  # prefix rows stand at time 0
            groups = torch.cat((torch.full((self.words,), order.num_steps), groups))
            times = F.pad(times, (0, 1))
        modulations = self.transformer.modulations(
            self._modulators(prefix, times.to(device)), groups.to(device)
        )
        visible = self._visible(condition)
        rows = torch.arange(plan.rows)
        mask = plan.mask_for(visible, rows, plan.rows, plan.mask)
        hidden = self.run_rows(x, rows, mask=mask, modulations=modulations)[0]
        return self.head(hidden[:, self.words :])[:, order.inverse.to(device)]

    def _visible(self, condition: Given | None) -> Tensor | None:
        return None if condition is None or not self.words else self.condition.visible(condition)

    def _check_times(self, times: Any, latents: Tensor) -> None:
        self.check_latents(latents)
        wanted = (len(latents), self.order.num_steps)
        good = isinstance(times, Tensor) and times.is_floating_point() and tuple(times.shape) == wanted
        if not good or not bool(((times >= 0) & (times <= 1)).all()):
            got = f"{times.dtype} {tuple(times.shape)}" if isinstance(times, Tensor) else repr(times)
            raise TokenloomError(
                f"times must be floating {wanted}, one a sample and cell, in [0, 1], got {got}."
            )

    def _mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy tokens (B, N, C): each cell at its own time."""
        if noise.shape != latents.shape:
            raise TokenloomError(
                f"noise must have the shape of the latents, {tuple(latents.shape)}, got {tuple(noise.shape)}."
            )
        time = times[:, self.order.step.to(times.device), None].to(latents)
        return (1 - time) * latents + time * noise.to(latents)

    def logits(
        self,
        latents: Tensor,
        condition: Given | None = None,
        *,
        noise: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """The teacher-forced prediction of latents under the name that generators of codes give it.

        Args:
            latents: Floating (B, N, C) in layout order.
            condition: As for `velocity`.
            noise: (B, N, C); `None` takes the counter-based noise of the seeds 0 to B-1.
            times: (B, S); `None` is 0.5 everywhere.

        Returns:
            Velocities (B, N, C) of the latents mixed with the noise at these times.
        """
        self.check_latents(latents)
        batch, size = latents.shape[:2]
        if noise is None:
            seeds = torch.arange(batch, device=latents.device)
            noise = LatentNoise(seeds, self.channels)(torch.arange(size), 0)
        if times is None:
            times = torch.full((batch, self.order.num_steps), 0.5, device=latents.device)
        self._check_times(times, latents)
        return self.velocity(self._mix(latents, noise, times), times, condition)

    def loss(
        self,
        latents: Tensor,
        condition: Given | None = None,
        *,
        noise: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Flow-matching loss: mean squared error of the velocities, a scalar.

        Args:
            latents: Floating (B, N, C) in layout order, of about unit variance.
            condition: As for `velocity`; in training mode the share `label_drop` of it is dropped.
            noise: (B, N, C) standard normal; `None` draws it.
            times: (B, S) in [0, 1], one a sample and cell; `None` draws sigmoid(normal).
        """
        self.check_latents(latents)
        batch, rule = len(latents), self.rule
        if noise is None:
            noise = torch.randn_like(latents)
        if times is None:
            times = torch.randn(batch, self.order.num_steps, device=latents.device)
            times = torch.sigmoid(rule.time_mean + rule.time_std * times)
        self._check_times(times, latents)
        noisy = self._mix(latents, noise, times)
        prefix = self._taught_prefix(condition, batch, rule.label_drop)
        predicted = self._velocity(noisy, times, condition, prefix)
        return F.mse_loss(predicted.float(), (noise - latents).float())

    def forward(self, latents: Tensor, condition: Given | None = None, **recorded: Any) -> Tensor:
        """`loss(latents, condition)`, the training forward."""
        return self.loss(latents, condition, **recorded)

    # ---- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        condition: Given | None = None,
        *,
        batch_size: int | None = None,
        guidance: float | Guidance | Callable[[float], float] = 1.0,
        sampling: Denoising | Sampling | None = None,
        seeds: int | list[int] | Tensor | None = None,
        noise: Tensor | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        on_step: Callable[[LatentStep], None] | None = None,
        decode: str = "auto",
    ) -> Tensor:
        """Generates continuous tokens.

        Args:
            condition: Batch of conditions; `None` is the null condition.
            batch_size: Number of samples where there is no condition.
            guidance: Classifier-free guidance `u + g (c - u)` of velocities; g is a function of the cell. A cell with
                g = 1 runs the conditional half alone.
            sampling: `Denoising(steps, solver, temperature, clip)` with the solver "sde" (default, 50 steps), "euler" or
                "heun".
            seeds: One seed a sample; an int s means s, s + 1, ...; `None` draws fresh ones.
            noise: float (K, B, N, C) in layout order, recorded noise in place of that of the seeds: draw 0 is what a
                position starts from, draw k the noise that "sde" adds after evaluation k - 1; K is `steps` for "sde"
                and 1 for the others.
            known: Latents (B, N, C) to keep.
            keep: BoolTensor (B, N) or (N,), where to keep them; the rest is generated. In a cell that is kept in part,
                known tokens follow the path from their noise to their value.
            on_step: Called after each cell with a `LatentStep`.
            decode: "auto", "reference" or "cached"; all give the same latents up to rounding.

        Returns:
            float32 (B, N, C) in layout order.

        Raises:
            TokenloomError: For bad arguments, or if the model gives values that are not finite.
        """
        condition, batch = check_batch(self.condition, condition, batch_size, self.device)
        strength, chosen = Guidance.of(guidance), Denoising.of(sampling, DEFAULT)
        chosen.check(SOLVERS)
        draws = make_solver(chosen.solver, chosen.steps).draws
        source = self._noise(as_seeds(seeds, batch, self.device), noise, draws)
        prefix, visible = self._prefix(condition, batch), self._visible(condition)
        if strength.enabled:
            prefix = torch.cat((prefix, self._null_prefix(condition, batch)))
            visible = None if visible is None else visible.repeat(2, 1)
        stepper = decoding.make(decode, self, prefix, visible)
        run = _Run(prefix, stepper, chosen, source, self._kept(known, keep, batch))
        order = self.order
        latents = torch.zeros(batch, order.layout.size, self.channels, device=self.device)
        committed = torch.zeros(order.layout.size, dtype=torch.bool)
        for index, step in enumerate(self.plan.steps):
            count = len(step.positions)
            progress = index / max(1, order.num_steps - 1)
            scale = strength.at(progress, step=index, made=order.slices[index].start, count=count)
            cell = self._make_cell(run, index, scale)
            latents[:, step.positions.to(self.device)] = cell
            committed[step.positions] = True
            if index + 1 < order.num_steps:
                self._run_cell(run, cell.repeat(len(prefix) // batch, 1, 1), index, 0.0, commit=True)
            if on_step is not None:
                on_step(LatentStep(index, order.num_steps, latents, committed.clone()))
        return latents

    def _make_cell(self, run: _Run, index: int, scale: float) -> Tensor:
        """Solves the flow of one cell; float32 (B, n, C)."""
        positions = self.plan.steps[index].positions.to(self.device)
        start = x = run.noise(positions, 0)
        known, keep = start, torch.zeros_like(start[..., :1], dtype=torch.bool)
        if run.kept is not None:
            known, keep = run.kept[0][:, positions], run.kept[1][:, positions, None]
            if bool(keep.all()):
                return known
        solver = make_solver(run.sampling.solver, run.sampling.steps, run.sampling.temperature)
        for turn, time in enumerate(solver.times):
            x = torch.where(keep, (1 - time) * known + time * start, x)
            velocity = self._guided_velocity(run, x, index, time, scale)
            velocity = clip_data(x, velocity, time, run.sampling.clip)
            x = solver.step(x, velocity, turn, lambda draw: run.noise(positions, draw))
        self._check_finite(x, index)
        return torch.where(keep, known, x)

    def _guided_velocity(self, run: _Run, x: Tensor, index: int, time: float, scale: float) -> Tensor:
        """Velocities (B, n, C), float32, of a cell (B, n, C) at a time."""
        both = scale != 1 and len(run.prefix) > len(x)
        hidden = self._run_cell(run, x.repeat(2, 1, 1) if both else x, index, time, commit=False)
        velocity = self.head(hidden).float()
        if not both:
            return velocity
        conditional, null = velocity.chunk(2)
        return guide(conditional, null, scale)

    def _run_cell(self, run: _Run, cell: Tensor, index: int, time: float, commit: bool) -> Tensor:
        """Hidden states (b, n, D) of the cell of a step; b may be the conditional half alone."""
        prefix = run.prefix[: len(cell)]
        fed = self.words if index == 0 else 0
        x = self.transformer.embed(cell.to(self.dtype), prefix if fed else None)
        times = torch.tensor([[0.0] * fed + [time] * (cell.shape[1] if fed else 1)], device=self.device)
        condition = self._modulators(prefix, times)
        return run.stepper(x, index, condition=condition, commit=commit)[0][:, fed:]
