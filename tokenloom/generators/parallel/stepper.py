"""The parallel rung: a loop over windows of steps that are guessed, run in one forward, and kept while they are right.

Every sample advances on its own. Works for generators that are what their row plan says: tokens of earlier steps and learned
queries, each row fed once. Knows the generator's embeddings, heads and guidance; what is guessed and what counts is in `drafts`
and `acceptance`.

Legend: B samples, n rows and m positions of a window, N positions, P prefix rows, S steps, D width, J heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.arguments import Run, Step
from tokenloom.generators.parallel.acceptance import Coupled, Samplings, Speculative
from tokenloom.generators.parallel.drafts import SOURCES, Draft
from tokenloom.generators.parallel.options import Parallel
from tokenloom.generators.parallel.windows import Window, WindowCache, Windows

if TYPE_CHECKING:
    from tokenloom.generators.base import Generator


class ParallelStepper:
    """One generation by windows.

    Args:
        generator: The generator.
        prefix: Prefix rows (B or 2B, P, D), the null half last.
        visible: BoolTensor (B or 2B, P), which prefix rows may be looked at; `None` is all.
        options: How to decode; "parallel" is `Parallel()`.

    Raises:
        TokenloomError: If the generator is more than its plan, or draws codes in a way of its own and shall be speculative.
    """

    def __init__(
        self, generator: Any, prefix: Tensor, visible: Tensor | None, options: Parallel | str = "parallel"
    ) -> None:
        self.options = options if isinstance(options, Parallel) else Parallel()
        check(generator, self.options)
        self.generator: Generator = generator
        self.prefix, self.visible = prefix, visible
        plan, device = generator.plan, prefix.device
        size = generator.order.layout.size
        self.windows = Windows(plan, self.options.window, device)
        self.cache = WindowCache(generator.transformer.new_cache(len(prefix), self.windows.slots))
        self.condition = generator.pooled_condition(prefix)
        constant = self.condition is not None
        self.modulations = generator.transformer.modulations(self.condition) if constant else None
        self.position = torch.where(plan.position < 0, size, plan.position).to(device)
        self.query = plan.query.to(device) if bool(plan.query.any()) else None
        vectors = torch.zeros_like(plan.position) if plan.learned is None else plan.learned.clamp(min=0)
        self.vector = vectors.to(device)

    def run(self, generator: Any, run: Run) -> Tensor:
        """Codes (B, N) of a generation."""
        order, device, seeds, on_step = generator.order, self.prefix.device, run.seeds, run.on_step
        batch, size, steps = len(seeds), order.layout.size, run.limit or order.num_steps
        samplings = Samplings(run.sampling, order.num_steps, device)
        scales = torch.tensor(run.scales(order), device=device)
        vocabulary = generator.special + generator.vocab_size
        draft = SOURCES[self.options.draft](order, seeds, vocabulary, generator.special)
        judge: Coupled | Speculative = Coupled(samplings, seeds, generator._sample)
        if self.options.accept == "speculative":
            judge = Speculative(samplings, seeds, size, generator.special)
        codes = torch.zeros(batch, size + 1, dtype=torch.long, device=device)  # the last column is a filler
        known = torch.zeros_like(codes, dtype=torch.bool)
        if run.kept is not None:
            codes[:, :size], known[:, :size] = run.kept
        done, guessed, reported = [0] * batch, [0] * batch, 0
        while min(done) < steps:
            window = self.windows.at(done)
            ends = [start + count for start, count in zip(done, window.counts, strict=True)]
            self._guess(codes, known, guessed, ends, draft, samplings)
            logits = self._logits(codes, window, scales, batch)
            draft.observe(codes, window.positions, logits)
            guesses = codes.gather(1, window.positions)
            verdict = judge(logits, guesses, known.gather(1, window.positions), window)
            codes.scatter_(1, window.positions, verdict.codes)
            right = verdict.right.tolist()
            gains = [min(count, matched + 1) for count, matched in zip(window.counts, right, strict=True)]
            if self.options.stats is not None:
                self.options.stats.add(gains, window.counts, right)
            done, guessed = [start + gain for start, gain in zip(done, gains, strict=True)], ends
            if on_step is not None:
                self._report(on_step, codes[:, :size], range(reported, min(steps, *done)))
                reported = min(steps, *done)
        return codes[:, :size].masked_fill((order.step >= steps).to(device), 0)

    def _guess(
        self,
        codes: Tensor,
        kept: Tensor,
        guessed: list[int],
        ends: list[int],
        draft: Draft,
        samplings: Samplings,
    ) -> None:
        """Writes drafts for the steps that enter the window, one step after the other; known codes stay."""
        for ahead in range(max(end - start for start, end in zip(guessed, ends, strict=True))):
            steps = [
                start + ahead if start + ahead < end else -1 for start, end in zip(guessed, ends, strict=True)
            ]
            positions = self.windows.positions_of(steps)
            temperatures = samplings.temperature[self._column(steps).clamp(min=0)].expand_as(positions)
            guesses = draft.guess(codes, positions, temperatures)
            held = codes.gather(1, positions)
            codes.scatter_(1, positions, torch.where(kept.gather(1, positions), held, guesses))

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.prefix.device)[:, None]

    def _logits(self, codes: Tensor, window: Window, scales: Tensor, batch: int) -> Tensor:
        """Guided logits (B, m, V) of a window, given all codes (B, N + 1) so far."""
        generator = self.generator
        halves = len(self.prefix) // batch
        rows = window.rows.repeat(halves, 1)
        self.cache.aim(window.slots.repeat(halves, 1), window.mask.shape[2])
        taps = generator.run_rows(
            self._embed(codes.repeat(halves, 1), rows),
            rows,
            mask=self._mask(window.mask, rows),
            cache=self.cache,
            condition=self.condition,
            modulations=self.modulations,
        )
        sources = window.sources.repeat(1, halves, 1)
        weights = window.weights.to(taps[0].dtype).repeat(1, halves, 1)
        hidden = torch.stack(
            [
                taps[min(head, len(taps) - 1)].gather(1, source[..., None].expand(-1, -1, taps[0].shape[2]))
                * weight[..., None]
                for head, (source, weight) in enumerate(zip(sources, weights, strict=True))
            ]
        )
        if halves == 2:
            given, null = hidden.chunk(2, dim=1)
            scale = scales[window.steps][..., None]
            hidden = torch.where(scale == 1, given, null + scale * (given - null)).to(hidden.dtype)
        return generator._head(hidden, window.weights, generator._table())

    def _embed(self, codes: Tensor, rows: Tensor) -> Tensor:
        """Embeddings (B, n, D) of row ids (B, n)."""
        generator, prefix = self.generator, self.prefix
        x = generator.tokens(codes.gather(1, self.position[rows]) + generator.special)
        if self.query is not None:
            none = torch.zeros(0, dtype=torch.long)
            every = torch.arange(int(self.vector.max()) + 1)
            vectors = generator._embed(codes[:1], none, every, None)[0]
            x = torch.where(self.query[rows][..., None], vectors[self.vector[rows]].to(x.dtype), x)
        length = prefix.shape[1]
        if not length or not bool((rows < length).any()):
            return x
        place = rows.clamp(max=length - 1)[..., None].expand(-1, -1, prefix.shape[2])
        return torch.where((rows < length)[..., None], prefix.gather(1, place).to(x.dtype), x)

    def _mask(self, mask: Tensor, rows: Tensor) -> Tensor:
        """The mask (B or 2B, 1, n, L) with what samples hide of their prefix; a row still sees itself."""
        if self.visible is None:
            return mask.repeat(len(rows) // len(mask), 1, 1)[:, None]
        length, first = self.visible.shape[1], self.windows.scratch
        mask = mask.repeat(len(rows) // len(mask), 1, 1)
        own = rows[:, :, None] == torch.arange(length, device=rows.device)
        mask[:, :, first : first + length] &= self.visible[:, None] | own
        return mask[:, None]

    def _report(self, on_step: Callable[[Step], None], codes: Tensor, steps: range) -> None:
        """Calls `on_step` for steps that are final for all samples now."""
        order = self.generator.order
        for step in steps:
            committed = order.step <= step
            on_step(Step(step, order.num_steps, codes * committed.to(codes.device), committed))


def check(generator: Any, options: Parallel) -> None:
    """Raises unless the generator is what its plan says.

    Raises:
        TokenloomError: If it visits positions several times, feeds something of its own, or limits what is drawn.
    """
    from tokenloom.generators.base import Generator  # it imports this module

    own = isinstance(generator, Generator) and generator.plan.visits is None
    kind = type(generator)
    if not own or kind._run is not Generator._run or kind._feed is not Generator._feed:
        raise TokenloomError(
            f"Parallel decoding checks tokens that were guessed, and {kind.__name__} feeds something else or visits positions "
            "several times; use decode='auto'."
        )
    if options.accept == "speculative" and kind._sample is not Generator._sample:
        raise TokenloomError(
            f"{kind.__name__} draws codes in a way of its own; use Parallel(accept='coupled')."
        )
