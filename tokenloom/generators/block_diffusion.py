"""Block diffusion: blocks one after the other, each denoised in several passes (BD3-LM, Arriola et al. 2025; NBDiff, 2025).

Mask: a row of the current block sees all earlier tokens and the whole block, decided or not; a token sees the tokens before
it ("causal", NBDiff: the cache is that of a next-token model) or its whole block too ("block", BD3-LM). Input: each position
of the block is fed its token where it is decided, else a learned vector. Head: each row predicts its own place. Steps: one a
block, `passes` forwards each; the first one also writes the block before into the cache.

Every pass draws all undecided positions and keeps the surest of them, an equal share a pass. With one pass this is
next-block prediction with queries; with blocks of one position it is next-token prediction, which is where block growth
starts (`grow`): the same weights train on blocks of 1, 2, 4, ... positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.generators.base import Generator, Run, Step
from tokenloom.generators.conditions import Given
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan, query_plan
from tokenloom.generators.reveal import REVEALS, confidence_score, random_score, surest
from tokenloom.generators.sampling import Sampling

CONTEXTS = ("causal", "block")


@dataclass(frozen=True)
class DiffusionRule:
    """Settings of block diffusion.

    Attributes:
        passes: Forwards a block where `generate` is not told; a block of fewer positions takes one a position.
        context: "causal" (a token sees the tokens before it) or "block" (it sees its whole block too).
        reveal: Which draws of a pass stay: "confidence" (the most probable), "random", or "order" (first come first).
        choice_temperature: Strength of the Gumbel noise on the confidence at the first pass; it falls linearly to 0 at the
            last, and is off at sampling temperature 0.
    """

    passes: int = 4
    context: str = "causal"
    reveal: str = "confidence"
    choice_temperature: float = 0.0

    def __post_init__(self) -> None:
        _check_passes(self.passes)
        if self.context not in CONTEXTS:
            raise unknown_name("context of block diffusion", self.context, CONTEXTS)
        if self.reveal not in REVEALS:
            raise unknown_name("reveal rule", self.reveal, REVEALS)


def _check_passes(passes: object) -> int:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise TokenloomError(f"passes must be a whole number of at least 1, got {passes!r}.")
    return passes


@lru_cache(maxsize=64)
def denoise_plan(
    order: Order, prefix: int, causal_prefix: bool = False, passes: int = 1, causal: bool = True
) -> RowPlan:
    """The rows of `query_plan`, with the queries of a block fed once a pass and the tokens before it at the first.

    Args:
        order: Any order; its steps are the blocks.
        prefix: Number of prefix rows P.
        causal_prefix: Whether prefix rows see only earlier prefix rows.
        passes: Most forwards a block.
        causal: Whether a token sees only the tokens before it in decode order.
    """
    plan = query_plan(order, prefix, causal_prefix)
    mask = plan.mask
    if causal:
        token = (plan.position >= 0) & ~plan.query
        mask = mask & (~(token[:, None] & token[None, :]) | torch.ones_like(mask).tril())
    feeds, committed, visits = [], [], []
    for block, (feed, kept, place) in enumerate(zip(plan.feeds, plan.committed, order.slices, strict=True)):
        for turn in range(min(passes, place.stop - place.start)):
            feeds.append(feed[kept:] if turn else feed)
            committed.append(0 if turn else kept)
            visits.append(block)
    return replace(plan, feeds=tuple(feeds), committed=tuple(committed), mask=mask, visits=tuple(visits))


class BlockDiffusionGenerator(Generator):
    """Denoises the positions of a step in several passes; `rule_config` holds the fields of `DiffusionRule`.

    Works with every order of every layout; `orders.blocks(Layout.line(n), b)` is the published one.
    """

    rule: DiffusionRule

    def make_rule(self, options: dict[str, Any]) -> DiffusionRule:
        """A `DiffusionRule`."""
        check_options(DiffusionRule, options, "rule option of BlockDiffusionGenerator")
        return DiffusionRule(**options)

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """Tokens, and the rows of the current block once a pass."""
        return denoise_plan(order, prefix, causal_prefix, self.rule.passes, self.rule.context == "causal")

    def grow(self, order: Order) -> None:
        """Takes another order over the same layout, for instance larger blocks; no weight changes.

        Raises:
            TokenloomError: If the layout differs.
        """
        if order.layout != self.order.layout:
            raise TokenloomError(
                f"The layout of this generator is {self.order.layout}, but the order has {order.layout}."
            )
        device = self.row_position.device
        self.order = order
        self.plan = self.make_plan(order, self.condition.length, bool(self.config["causal_prefix"]))
        self._register_tables(self.config["prefix_rope"])
        for name, table in list(self.named_buffers(recurse=False)):
            self.register_buffer(name, table.to(device), persistent=False)
        self.register_to_config(order_config=order.to_config())

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _block_rows(self, codes: Tensor, shown: Tensor, positions: Tensor) -> Tensor:
        """Rows (B, m, D) of a block: the tokens of (B, N) where `shown`, a learned vector elsewhere."""
        positions = positions.to(codes.device)
        nothing = positions[:0]
        unknown = self._embed(codes, nothing, torch.zeros(1, dtype=torch.long), None)
        tokens = self._embed(codes, positions, nothing, None)
        return torch.where(shown[:, positions, None], tokens, unknown)

    def _noisy_inputs(self, codes: Tensor, shown: Tensor, prefix: Tensor) -> Tensor:
        """Embeddings (B, R, D) of all rows, for teacher forcing."""
        position, query = self.plan.position, self.plan.query
        none = torch.zeros(0, dtype=torch.long)
        clean = position[(position >= 0) & ~query]
        before = self._embed(codes, clean, none, prefix) if len(clean) else prefix
        return torch.cat((before, self._block_rows(codes, shown, position[query])), dim=1)

    # ---- teacher forcing --------------------------------------------------------------------------------------------

    def draw_shown(self, batch: int) -> Tensor:
        """Positions to show in training, BoolTensor (B, N): of a block of m all but k, k uniform in 1..m."""
        order, device = self.order, self.row_position.device
        sizes = torch.tensor([part.stop - part.start for part in order.slices], device=device)
        block = torch.arange(order.num_steps, device=device).repeat_interleave(sizes)
        keys = torch.rand(batch, len(block), device=device) + block
        ranks = keys.argsort(1).argsort(1) - (sizes.cumsum(0) - sizes)[block]
        count = (torch.rand(batch, order.num_steps, device=device) * sizes).long() + 1
        return (ranks >= count[:, block])[:, order.inverse.to(device)]

    def logits(self, codes: Tensor, condition: Given | None = None, shown: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            codes: LongTensor (B, N) in layout order.
            condition: What the model's condition takes; `None` is the null condition.
            shown: BoolTensor (B, N), the positions that the rows of their own block see; `None` is none of them, as at
                the first pass.

        Returns:
            (B, N, V) in layout order: position p is predicted from earlier blocks and from what is shown of its own. A
            shown position sees itself.
        """
        batch, device = codes.shape[0], codes.device
        condition = self.condition.null(batch, device) if condition is None else condition
        shown = torch.zeros_like(codes, dtype=torch.bool) if shown is None else shown.to(device)
        if shown.dtype != torch.bool or shown.shape != codes.shape:
            raise TokenloomError(
                f"shown must be a boolean tensor {tuple(codes.shape)}, got {shown.dtype} {tuple(shown.shape)}."
            )
        prefix = self._prefix(condition, batch, device)
        return self._forced(self._noisy_inputs(codes, shown, prefix), prefix, condition)

    def loss(
        self,
        codes: Tensor,
        condition: Given | None = None,
        weights: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> Tensor:
        """Nats a token: in every block the mean cross-entropy of the positions that are not shown, blocks by size.

        With k of m positions hidden, k uniform, the expectation is the negative log-likelihood of a sequence that reveals
        the positions of each block one by one in a random sequence, and so a bound of that of any (Uria et al. 2014).

        Args:
            codes: LongTensor (B, N).
            condition: What the model's condition takes.
            weights: (N,) or (B, N), by which the cross-entropy of each position is multiplied; `None` is 1.
            shown: As in `logits`; `None` draws it in training mode, and shows nothing in evaluation mode, where the loss is
                that of decoding with one pass.
        """
        if shown is None and self.training:
            shown = self.draw_shown(codes.shape[0]).to(codes.device)
        logits = self.logits(codes, condition, shown)
        if shown is not None:
            share = self._hidden_share(~shown)
            weights = share if weights is None else weights.to(share) * share
        return self._mean_loss(logits, codes, condition, weights)

    def _hidden_share(self, hidden: Tensor) -> Tensor:
        """Weights (B, N): m / k at the k hidden positions of a block of m, 0 elsewhere."""
        step = self.order.step.to(hidden.device)
        sizes = step.bincount().float()
        counts = torch.zeros(len(hidden), len(sizes), device=hidden.device)
        counts.index_add_(1, step, hidden.float())
        return hidden * (sizes / counts.clamp(min=1))[:, step]

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate(
        self, condition: Given | None = None, *, passes: int | None = None, **options: Any
    ) -> Tensor:
        """Generates codes; see `Generator.generate`.

        Args:
            condition: Batch of conditions; `None` is the null condition.
            passes: Forwards a block; `None` is `rule_config["passes"]`.
            **options: As for every generator.
        """
        if passes is None:
            return super().generate(condition, **options)
        other = copy.copy(self)  # the same weights; only the plan differs
        other.rule = replace(self.rule, passes=passes)
        other.plan = other.make_plan(self.order, self.condition.length, bool(self.config["causal_prefix"]))
        return other.generate(condition, **options)

    def _run(self, run: Run) -> Tensor:
        """Pass after pass. The noise is that of (seed, position + N pass), so that every draw is a new one."""
        order, size = self.order, self.order.layout.size
        codes = torch.zeros(run.batch, size, dtype=torch.long, device=self.device)
        shown = torch.zeros_like(codes, dtype=torch.bool)
        visits: Sequence[int] = self.plan.visits or ()
        turn, unknown = 0, torch.zeros(run.batch, 1, dtype=torch.long, device=self.device)
        for index, (step, block) in enumerate(zip(self.plan.steps, visits, strict=True)):
            turn = turn + 1 if index and visits[index - 1] == block else 0
            positions = step.positions.to(codes.device)
            if turn == 0:
                if run.kept is not None:
                    shown[:, positions] = run.kept[1][:, positions]
                    codes[:, positions] = (run.kept[0] * run.kept[1])[:, positions]
                unknown = (~shown[:, positions]).sum(1, keepdim=True)
            logits = self._pass(run, index, codes, shown)
            sampling = run.sampling.at(block / max(1, order.num_steps - 1))
            counter, last = positions + size * turn, index + 1 == len(visits) or visits[index + 1] != block
            turns = visits.count(block)
            ids = self._sample(logits, run.seeds, counter, sampling, index)
            score = self._score(logits, ids, run, counter, sampling, 1 - (turn + 1) / turns)
            hidden = ~shown[:, positions]
            chosen = surest(score, hidden, unknown * (turns - 1 - turn) // turns)
            codes[:, positions] = torch.where(chosen, ids, codes[:, positions])
            shown[:, positions] = ~hidden | chosen
            if last and run.on_step is not None:
                run.on_step(Step(block, order.num_steps, codes, order.step <= block))
        return codes

    def _pass(self, run: Run, index: int, codes: Tensor, shown: Tensor) -> Tensor:
        """Guided logits (B, m, V) of the block of a feed."""
        step, order = self.plan.steps[index], self.order
        block = (self.plan.visits or ())[index]
        codes, shown = run.both(codes), run.both(shown)
        rows = [self._block_rows(codes, shown, step.positions)]
        if len(step.tokens) or not index:
            none = torch.zeros(0, dtype=torch.long)
            rows.insert(0, self._embed(codes, step.tokens, none, None if index else run.prefix))
        taps = run.stepper(torch.cat(rows, dim=1), index)
        scale = run.guidance.at(
            block / max(1, order.num_steps - 1),
            step=block,
            made=order.slices[block].start,
            count=len(step.positions),
        )
        hidden = self._guide(self._collect(taps, step.sources, step.weights), scale, run.batch)
        return self._head(hidden, step.weights, self._table())

    def _score(
        self, logits: Tensor, ids: Tensor, run: Run, counter: Tensor, sampling: Sampling, fading: float
    ) -> Tensor:
        """How early a drawn id (B, m) shall stay, (B, m)."""
        if self.rule.reveal == "order":
            return -torch.arange(ids.shape[1], device=ids.device).expand_as(ids).float()
        if self.rule.reveal == "random":
            return random_score(run.seeds, counter % self.order.layout.size)
        strength = self.rule.choice_temperature * fading if sampling.temperature != 0 else 0.0
        return confidence_score(logits, ids + self.special, run.seeds, counter, strength)
