"""Steps that are recorded once and replayed: CUDA graphs of a whole generation, or of one step in buckets of length.

A generation whose shapes are all known is one recording: scales, diagonals, blocks. Where one position a step is made over
hundreds of steps, the first step is one recording and the rest one a bucket: the number of the step, the rows and the
guidance scale are read from tensors on the device, keys are written at an index, and attention runs over the bucket under a
mask. Nothing waits for the device between steps; unusable logits are looked for once, at the end. Where steps cannot be
recorded, a replay runs them, which is how this module is tested without a GPU. Knows plans and runs; knows no paradigm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.decoding.cached import CachedStepper
from tokenloom.generators.sampling import checks_later

if TYPE_CHECKING:
    from tokenloom.generators.arguments import Run

WHOLE_STEPS = 128
"""Steps up to which a generation is one recording."""
BUCKET = 64
"""Rows by which the length that a recorded step attends over grows."""

Replay = Callable[[], object]


def graph_of(work: Replay, device: torch.device) -> Replay:
    """A function that repeats `work` on the same tensors: a CUDA graph, or where there is none, `work`."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is set up on first use must not be recorded
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def key_of(generator: Any, run: Run, visible: Tensor | None) -> tuple[object, ...]:
    """What a recording depends on besides the weights: shapes, settings of every step, what is kept."""
    last = max(1, generator.order.num_steps - 1)
    samplings = tuple(run.sampling.at(step / last) for step in range(generator.order.num_steps))
    shapes = (run.batch, tuple(run.prefix.shape), run.prefix.dtype, visible is None, run.kept is None)
    return (*shapes, run.guidance.enabled, tuple(run.scales(generator.order)), samplings)


def record(generator: Any, run: Run, visible: Tensor | None) -> Program:
    """The recording of a generation like `run`."""
    long = generator.order.num_steps > WHOLE_STEPS
    return (StepProgram if long and _alike(generator, run, visible) else Program)(generator, run, visible)


def _alike(generator: Any, run: Run, visible: Tensor | None) -> bool:
    """Whether all steps after the first have the same shapes and settings, and feed tokens alone."""
    from tokenloom.generators.base import Generator

    if visible is not None or type(generator)._feed is not Generator._feed:
        return False
    last, (_, second, *_) = max(1, generator.order.num_steps - 1), generator.plan.steps
    first = run.sampling.at(0.0)
    if any(run.sampling.at(step / last) != first for step in range(last + 1)):
        return False
    return all(
        step.mask is None
        and step.predicts
        and len(step.rows) == len(step.tokens) == step.committed == len(second.rows)
        and len(step.positions) == len(second.positions)
        and torch.equal(step.sources, second.sources)
        and torch.equal(step.weights, second.weights)
        for step in generator.plan.steps[1:]
    )


class Program:
    """A whole generation on tensors of its own.

    Args:
        generator: The generator.
        run: A generation of the same shapes and settings.
        visible: Which prefix rows may be looked at, or `None`.
    """

    def __init__(self, generator: Any, run: Run, visible: Tensor | None) -> None:
        self.generator = generator
        kept = None if run.kept is None else (run.kept[0].clone(), run.kept[1].clone())
        self.prefix, self.seeds, self.kept = run.prefix.clone(), run.seeds.clone(), kept
        self.visible = None if visible is None else visible.clone()
        self.like = replace(run, prefix=self.prefix, seeds=self.seeds, kept=kept, on_step=None)
        steps, device = generator.order.num_steps, generator.device
        self.codes = torch.zeros(run.batch, generator.order.layout.size, dtype=torch.long, device=device)
        self.usable = torch.ones(steps, dtype=torch.bool, device=device)
        self.cache = generator.transformer.new_cache(run.prefix.shape[0], generator.plan.capacity)
        self.prepare(device)

    def prepare(self, device: torch.device) -> None:
        """Makes the recordings."""
        self.replay = graph_of(self._whole, device)

    def __call__(self, run: Run, visible: Tensor | None) -> Tensor:
        """Codes (B, N) of a generation of the shapes and settings that were recorded."""
        self.prefix.copy_(run.prefix)
        self.seeds.copy_(run.seeds)
        if self.kept is not None and run.kept is not None:
            for own, given in zip(self.kept, run.kept, strict=True):
                own.copy_(given)
        if self.visible is not None and visible is not None:
            self.visible.copy_(visible)
        self.play()
        if not bool(self.usable.all()):
            self._complain()
        return self.codes.clone()

    def play(self) -> None:
        """Replays every step."""
        self.replay()

    def _whole(self) -> None:
        self.cache.reset()
        flags: list[Tensor] = []
        stepper = CachedStepper(self.generator, self.prefix, self.visible, self.cache)
        with checks_later(flags):
            self.codes.copy_(self.generator._run(replace(self.like, stepper=stepper)))
        if flags:
            self.usable[: len(flags)].copy_(torch.stack(flags))

    def _complain(self) -> None:
        from tokenloom.generators.arguments import diagnose

        step = int((~self.usable).nonzero()[0])
        raise TokenloomError(
            f"Step {step} of {len(self.usable)}: Logits must be finite, or -inf for forbidden ids. "
            f"{diagnose(self.generator)}"
        )


class _Bucket:
    """The cache of a `StepProgram` as attention sees it: written at an index, read up to a fixed length."""

    def __init__(self, cache: Any, length: int, slots: Tensor) -> None:
        self.slots, self.length = slots, length
        self.layers = [_BucketLayer(self, layer) for layer in cache.layers]


class _BucketLayer:
    def __init__(self, bucket: _Bucket, layer: Any) -> None:
        self.bucket, self.keys, self.values = bucket, layer.keys, layer.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, h, n, d) at the slots and returns the rows of the bucket."""
        slots, length = self.bucket.slots, self.bucket.length
        self.keys.index_copy_(2, slots, keys.to(self.keys.dtype))
        self.values.index_copy_(2, slots, values.to(self.values.dtype))
        return self.keys[:, :, :length], self.values[:, :, :length]


class StepProgram(Program):
    """A generation of many steps of one shape: the first is a recording, the others one a bucket of length."""

    def prepare(self, device: torch.device) -> None:
        """Makes the recordings."""
        plan, steps = self.generator.plan, self.generator.plan.on(device)
        self.tokens = torch.stack([step.tokens for step in steps[1:]])
        self.rows = torch.stack([step.rows for step in steps[1:]])
        self.places = torch.stack([step.positions for step in steps[1:]])
        count = self.rows.shape[1]
        start = plan.committed[0]
        self.starts = torch.arange(len(steps) - 1, device=device) * count + start
        scales = self.like.scales(self.generator.order)
        self.scales = torch.tensor(scales, device=device, dtype=torch.float32)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        stepper = CachedStepper(self.generator, self.prefix, None, self.cache)
        self.modulated = stepper.modulations is not None
        self.first = graph_of(self._first, device)
        ends = [
            min(-(-(start + (s + 1) * count) // BUCKET) * BUCKET, plan.capacity)
            for s in range(len(steps) - 1)
        ]
        self.first()  # a recorded step needs tokens to start from
        made = {end: graph_of(self._next(end), device) for end in sorted(set(ends))}
        self.others = [made[end] for end in ends]

    def play(self) -> None:
        """Replays the first step and, for each further step, that of its bucket."""
        self.first()
        for step in self.others:
            step()

    def _first(self) -> None:
        """The prefix, and the first positions; clears what an earlier generation left in the buffers."""
        generator, run = self.generator, self.like
        for layer in self.cache.layers:
            layer.keys.zero_()
            layer.values.zero_()
        self.cache.reset()
        self.turn.zero_()
        stepper = CachedStepper(generator, self.prefix, None, self.cache)
        if self.modulated:  # further steps read what this one has worked out
            self.condition, self.modulations = stepper.condition, stepper.modulations
        step = generator.plan.on(self.codes.device)[0]
        taps = stepper(generator._feed(self.prefix)(run.both(self.codes), 0), 0)
        hidden = generator._collect(taps, step.sources, step.weights)
        self._commit(hidden, step.weights, step.positions, self.scales[:1], self.usable[:1])

    def _next(self, length: int) -> Replay:
        """One further step that attends over `length` rows."""
        generator, run = self.generator, self.like
        weights = generator.plan.on(self.codes.device)[1]
        columns = torch.arange(length, device=self.codes.device)

        def step() -> None:
            rows, tokens, positions, start = (
                table.index_select(0, self.turn)[0]
                for table in (self.rows, self.tokens, self.places, self.starts)
            )
            slots = start + torch.arange(len(rows), device=rows.device)
            x = generator._embed(run.both(self.codes), tokens, tokens[:0], None)
            taps = generator.run_rows(
                x,
                rows,
                mask=(columns < start + len(rows))[None],
                cache=_Bucket(self.cache, length, slots),
                condition=self.condition if self.modulated else None,
                modulations=self.modulations if self.modulated else None,
            )
            hidden = generator._collect(taps, weights.sources, weights.weights)
            following = self.turn + 1
            usable = torch.zeros(1, dtype=torch.bool, device=rows.device)
            self._commit(hidden, weights.weights, positions, self.scales.index_select(0, following), usable)
            self.usable.index_copy_(0, following, usable)
            self.turn.copy_(following)

        return step

    def _commit(
        self, hidden: Tensor, weights: Tensor, positions: Tensor, scale: Tensor, usable: Tensor
    ) -> None:
        """Guides, draws and writes the codes at `positions`; `usable` (1,) says whether the logits were."""
        generator, run = self.generator, self.like
        if run.guidance.enabled:
            halves = hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden
            given, null = halves.chunk(2, dim=1)
            mixed = null + scale * (given - null)
            hidden = torch.where(scale == 1, given, mixed).to(hidden.dtype)
        logits = generator._head(hidden, weights, generator._table())
        flags: list[Tensor] = []
        with checks_later(flags):
            ids = generator._sample(logits, run.seeds, positions, run.sampling.at(0.0), 0)
        usable.copy_(flags[0])
        if self.kept is not None:
            known, keep = (each.index_select(1, positions) for each in self.kept)
            ids = torch.where(keep, known, ids)
        self.codes.index_copy_(1, positions, ids)
