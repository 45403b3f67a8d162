"""Block diffusion: blocks one after the other, each denoised in several passes (BD3-LM, Arriola et al. 2025; NBDiff, 2025).

Mask: a row of the current block sees all earlier tokens and the whole block, decided or not; a token sees the tokens before
it ("causal", NBDiff: the cache is that of a next-token model) or its whole block too ("block", BD3-LM). Input: each position
of the block is fed its token where it is decided, else a learned vector. Head: each row predicts its own place. Steps: one a
block, `passes` forwards each; the first one also writes the block before into the cache.

Every pass draws all undecided positions and keeps the surest of them, an equal share a pass. With one pass this is
next-block prediction with queries; with blocks of one position it is next-token prediction, which is where block growth
starts (`grow`): the same weights train on blocks of 1, 2, 4, ... positions. `decode="parallel"` makes the same tokens in fewer
forwards (`tokenloom/generators/drafts.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.generators.base import Generator, Run, Step
from tokenloom.generators.conditions import Given
from tokenloom.generators.drafts import Canvas, Forwards, check_drafts, denoise, draft_plan
from tokenloom.generators.orders import Order
from tokenloom.generators.parallel.options import Parallel
from tokenloom.generators.plans import RowPlan, query_plan
from tokenloom.generators.reveal import REVEALS, confidence_score, random_score, surest
from tokenloom.generators.sampling import Sampling

CONTEXTS = ("causal", "block")
DRAFTS = 3


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
    drafts = 0  # guesses a forward
    forwards: Forwards | None = None  # where they are counted

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

    def _block_rows(self, codes: Tensor, shown: Tensor) -> Tensor:
        """Rows (B, m, D) of a block: the tokens of (B, m) where `shown`, a learned vector elsewhere."""
        places = torch.arange(codes.shape[1])
        unknown = self._embed(codes, places[:0], torch.zeros(1, dtype=torch.long), None)
        tokens = self._embed(codes, places, places[:0], None)
        return torch.where(shown[..., None], tokens, unknown)

    def _noisy_inputs(self, codes: Tensor, shown: Tensor, prefix: Tensor) -> Tensor:
        """Embeddings (B, R, D) of all rows, for teacher forcing."""
        position, query = self.plan.position, self.plan.query
        none = torch.zeros(0, dtype=torch.long)
        clean, asked = position[(position >= 0) & ~query], position[query].to(codes.device)
        before = self._embed(codes, clean, none, prefix) if len(clean) else prefix
        return torch.cat((before, self._block_rows(codes[:, asked], shown[:, asked])), dim=1)

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
        self,
        condition: Given | None = None,
        *,
        passes: int | None = None,
        decode: str | Parallel = "auto",
        drafts: int | None = None,
        forwards: Forwards | None = None,
        **options: Any,
    ) -> Tensor:
        """Generates codes; see `Generator.generate`.

        Args:
            condition: Batch of conditions; `None` is the null condition.
            passes: Forwards a block; `None` is `rule_config["passes"]`.
            decode: As for every generator, or "parallel": the passes to come are guessed, and a forward checks several of
                them; the same codes in fewer forwards.
            drafts: Guesses a forward of "parallel"; `None` is 3. A forward computes this many blocks more.
            forwards: Receives how many forwards were made.
            **options: As for every generator.
        """
        if drafts is not None and decode != "parallel":
            raise TokenloomError(f'drafts needs decode="parallel", got decode={decode!r}.')
        other = copy.copy(self)  # the same weights; only the plan differs
        other.forwards = forwards
        if passes is not None:
            other.rule = replace(self.rule, passes=passes)
            other.plan = other.make_plan(
                self.order, self.condition.length, bool(self.config["causal_prefix"])
            )
        if decode == "parallel":
            other.drafts = check_drafts(DRAFTS if drafts is None else drafts)
            other.plan, decode = draft_plan(other.plan, other.drafts), "cached"
        return super(BlockDiffusionGenerator, other).generate(condition, decode=decode, **options)

    def _run(self, run: Run) -> Tensor:
        """Block after block, each by `denoise`."""
        order, visits = self.order, self.plan.visits or ()
        forwards = Forwards() if self.forwards is None else self.forwards
        forwards.reset(run.batch, self.device)
        codes = torch.zeros(run.batch, order.layout.size, dtype=torch.long, device=self.device)
        known, shown = (codes, torch.zeros_like(codes, dtype=torch.bool)) if run.kept is None else run.kept
        for block, place in enumerate(order.slices):
            positions = order.permutation[place].to(codes.device)
            start = Canvas((known * shown)[:, positions], shown[:, positions])
            first, turns = visits.index(block), min(self.rule.passes, len(positions))
            last = first + visits.count(block) - 1

            def forward(turn: int, canvases: list[Canvas], first: int = first, last: int = last) -> Tensor:
                return self._pass(run, min(first + turn, last), codes, canvases)

            reveal = self._revealer(run, block, start, turns)
            codes[:, positions] = denoise(start, turns, self.drafts, forward, reveal, forwards).codes
            if run.on_step is not None:
                run.on_step(Step(block, order.num_steps, codes, order.step <= block))
        return codes

    def _pass(self, run: Run, index: int, codes: Tensor, canvases: list[Canvas]) -> Tensor:
        """Guided logits (B, c m, V) of c canvases of the block of a feed; `codes` (B, N) hold the blocks before."""
        step, order = self.plan.steps[index], self.order
        block = (self.plan.visits or ())[index]
        rows = [self._block_rows(run.both(canvas.codes), run.both(canvas.shown)) for canvas in canvases]
        if len(step.tokens) or not index:
            none = torch.zeros(0, dtype=torch.long)
            rows.insert(0, self._embed(run.both(codes), step.tokens, none, None if index else run.prefix))
        taps = run.stepper(torch.cat(rows, dim=1), index)
        place = order.slices[block]
        scale = run.guidance.at(
            block / max(1, order.num_steps - 1),
            step=block,
            made=place.start,
            count=place.stop - place.start,
        )
        hidden = self._guide(self._collect(taps, step.sources, step.weights), scale, run.batch)
        return self._head(hidden, step.weights, self._table())

    def _revealer(
        self, run: Run, block: int, start: Canvas, turns: int
    ) -> Callable[[Canvas, Tensor, Tensor], Canvas]:
        """What a pass does to a canvas. The noise is that of (seed, position + N pass), so that every draw is a new one."""
        order = self.order
        positions = order.permutation[order.slices[block]].to(start.codes.device)
        sampling = run.sampling.at(block / max(1, order.num_steps - 1))
        unknown = (~start.shown).sum(1, keepdim=True)

        def reveal(canvas: Canvas, logits: Tensor, turn: Tensor) -> Canvas:
            counter = positions + order.layout.size * turn
            ids = self._sample(logits, run.seeds, counter, sampling, block)
            score = self._score(logits, ids, run, counter, sampling, 1 - (turn + 1) / turns)
            chosen = surest(score, ~canvas.shown, unknown * (turns - 1 - turn) // turns)
            return Canvas(torch.where(chosen, ids, canvas.codes), canvas.shown | chosen)

        return reveal

    def _score(
        self, logits: Tensor, ids: Tensor, run: Run, counter: Tensor, sampling: Sampling, fading: Tensor
    ) -> Tensor:
        """How early a drawn id (B, m) shall stay, (B, m)."""
        if self.rule.reveal == "order":
            return -torch.arange(ids.shape[1], device=ids.device).expand_as(ids).float()
        if self.rule.reveal == "random":
            return random_score(run.seeds, counter % self.order.layout.size)
        noisy = self.rule.choice_temperature != 0 and sampling.temperature != 0
        strength = self.rule.choice_temperature * fading if noisy else 0.0
        return confidence_score(logits, ids + self.special, run.seeds, counter, strength)
