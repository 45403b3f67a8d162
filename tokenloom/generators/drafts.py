"""Draft and verify inside a block: the passes of a denoising schedule, several of them in one forward (FreeDave, Wu and Zhang 2025).

A pass turns a canvas into the next one: from the logits of a canvas it draws every hidden position and reveals some of them.
Logits change little from pass to pass, so the passes to come are guessed with the logits at hand. One forward then takes the
next canvas and the guesses side by side, and gives the logits from which each next canvas really follows. Guesses that it
confirms are kept: the result is that of one pass a forward, by construction. The noise of a draw depends on its seed, position and
pass alone, so that this holds at every temperature. Every sample of a batch advances on its own.

Knows plans and tensors; knows nothing of models, guidance or sampling, which come as functions.

Legend: B samples, m positions of a block, c canvases a forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.row_plan import RowPlan, StepRows


class Canvas(NamedTuple):
    """A block between two passes.

    Attributes:
        codes: LongTensor (B, m); 0 where nothing is decided.
        shown: BoolTensor (B, m), which positions are decided.
    """

    codes: Tensor
    shown: Tensor

    def equal(self, other: Canvas) -> Tensor:
        """BoolTensor (B, 1): which samples are the same."""
        same = (self.codes == other.codes) & (self.shown == other.shown)
        return same.all(1, keepdim=True)

    def where(self, chosen: Tensor, other: Canvas) -> Canvas:
        """This one for the samples `chosen` (B, 1), and the other elsewhere."""
        return Canvas(
            torch.where(chosen, self.codes, other.codes), torch.where(chosen, self.shown, other.shown)
        )


@dataclass
class Forwards:
    """How many forwards a generation of block diffusion took; `generate` writes them into the one it is given.

    Attributes:
        passes: Forwards of one pass each, what the schedule asks for.
        made: Forwards that ran. A block of a batch takes as many as its slowest sample.
        alone: LongTensor (B,), the forwards that each sample would have taken alone.
    """

    passes: int = 0
    made: int = 0
    alone: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))

    def reset(self, batch: int, device: torch.device) -> None:
        """Starts at 0 for a batch."""
        self.passes = self.made = 0
        self.alone = torch.zeros(batch, dtype=torch.long, device=device)

    def count(self, needed: Tensor) -> None:
        """Adds a forward that the samples `needed` (B, 1) asked for."""
        self.made += 1
        self.alone = self.alone + needed.squeeze(1).long()


def check_drafts(drafts: object) -> int:
    """The number of guesses beside the canvas that is sure.

    Raises:
        TokenloomError: If it is no whole number of at least 0.
    """
    if isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 0:
        raise TokenloomError(f"drafts must be a whole number of at least 0, got {drafts!r}.")
    return drafts


@dataclass(frozen=True, eq=False)
class DraftPlan(RowPlan):
    """A plan some of whose feeds hold the same rows several times; copies of a feed do not see one another.

    Attributes:
        copies: For each feed, how often its rows are in it; feeds of several copies stay out of the cache.
    """

    copies: tuple[int, ...] = ()

    def _step(self, step: int) -> StepRows:
        """The sources of every copy, one copy behind the other."""
        found, copies = super()._step(step), self.copies[step]
        if copies == 1:
            return found
        size = len(found.rows) // copies
        sources = [found.sources % size + size * copy for copy in range(copies)]
        return replace(
            found,
            sources=torch.cat(sources, dim=1),
            weights=found.weights.repeat(1, copies),
            positions=found.positions.repeat(copies),
        )

    def step_mask(self, step: int) -> Tensor | None:
        """Mask (n, L) as for every plan, without what other copies hold."""
        mask, copies, count = super().step_mask(step), self.copies[step], len(self.feeds[step])
        if copies == 1:
            return mask
        before = sum(self.committed[:step])
        mask = torch.ones(count, before + count, dtype=torch.bool) if mask is None else mask
        copy = torch.arange(count) // (count // copies)
        mask[:, before:] &= copy[:, None] == copy[None, :]
        return mask


@lru_cache(maxsize=64)
def draft_plan(plan: RowPlan, drafts: int) -> DraftPlan:
    """The plan of a schedule, with two feeds a block: its first pass, and one for canvases of all later passes.

    Args:
        plan: A plan that visits every step once a pass, the passes behind the first without rows that stay.
        drafts: Guesses a forward; a block of T passes takes T - 2 at most.
    """
    visits = plan.visits or tuple(range(len(plan.feeds)))
    kept: list[tuple[Tensor, int, int, int]] = []
    for block in range(plan.order.num_steps):
        first, turns = visits.index(block), visits.count(block)
        kept.append((plan.feeds[first], plan.committed[first], block, 1))
        if turns > 1:
            copies = min(drafts + 1, turns - 1)
            kept.append((plan.feeds[first + 1].repeat(copies), 0, block, copies))
    feeds, committed, blocks, copied = zip(*kept, strict=True)
    values: dict[str, Any] = {entry.name: getattr(plan, entry.name) for entry in fields(RowPlan)}
    values |= {"feeds": feeds, "committed": committed, "visits": blocks}
    return DraftPlan(**values, copies=copied)


def denoise(
    start: Canvas,
    turns: int,
    drafts: int,
    forward: Callable[[int, list[Canvas]], Tensor],
    reveal: Callable[[Canvas, Tensor, Tensor], Canvas],
    forwards: Forwards,
) -> Canvas:
    """Takes a block through all passes of its schedule.

    Args:
        start: What is known before the first pass.
        turns: Passes T.
        drafts: Guesses a forward; 0 is one pass a forward.
        forward: From (forwards made in this block, c canvases) to logits (B, c m, V).
        reveal: From (canvas, its logits (B, m, V), LongTensor (B, 1) index of the pass) to the next canvas. Passes behind
            the last have to leave a finished canvas as it is.
        forwards: Where forwards are counted.

    Returns:
        The finished canvas.
    """
    turn = torch.zeros_like(start.codes[:, :1])  # index of the pass that made `sure`
    copies = max(1, min(drafts + 1, turns - 1))
    forwards.passes += turns
    forwards.count(turn == 0)
    logits = forward(0, [start])
    sure = reveal(start, logits, turn)
    for index in range(1, turns):
        forwards.count(turn < turns - 1)
        canvases = [sure]
        for ahead in range(1, copies):
            canvases.append(reveal(canvases[-1], logits, turn + ahead))
        found = forward(index, canvases).chunk(copies, dim=1)
        logits, turn = found[0], turn + 1
        sure = reveal(sure, logits, turn)
        right = torch.ones_like(turn, dtype=torch.bool)
        for guess, seen in zip(canvases[1:], found[1:], strict=True):
            right = right & guess.equal(sure)
            if not bool(right.any()):
                break
            logits, turn = torch.where(right[..., None], seen, logits), turn + right
            sure = reveal(guess, seen, turn).where(right, sure)
        if copies > 1 and bool((turn >= turns - 1).all()):
            break
    return sure
