"""Draft and verify in block diffusion: the tokens of one pass a forward, in fewer forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_diffusion import LINE, ORDERS, RULES
from tiny_generators import CONDITIONS, conditions, make, random_codes
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import BlockDiffusionGenerator, Guidance, Sampling, orders
from tokenloom.generators.drafts import Canvas, Forwards, denoise, draft_plan
from tokenloom.generators.order import Order
from tokenloom.layouts import Layout

OPTIONS: list[dict[str, Any]] = [
    {"sampling": Sampling(temperature=0), "drafts": 1},
    {
        "sampling": Sampling(temperature=0.7, top_k=5),
        "guidance": Guidance(2.0, schedule="linear"),
        "drafts": 8,
    },
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_the_tokens_of_one_pass_a_forward(order: Order, rule: dict[str, Any]) -> None:
    """Over orders, rules, sampling, guidance, conditions that hide words, kept positions and steps reported."""
    keep = torch.arange(order.layout.size) % 3 == 1
    for options, kept, tokens in zip(OPTIONS, (True, False), (0, 2), strict=True):
        model = make(BlockDiffusionGenerator, order, rule_config=rule, special_tokens=tokens)
        settings: dict[str, Any] = dict(options, seeds=40)
        drafts = settings.pop("drafts")
        if kept:
            settings |= {"known": random_codes(order, 3), "keep": keep}
        counts = {name: Forwards() for name in ("cached", "parallel")}
        codes, seen = {}, {}
        for name, forwards in counts.items():
            steps: list[Tensor] = []
            codes[name] = model.generate(
                conditions("words", 3),
                decode=name,
                drafts=drafts if name == "parallel" else None,
                forwards=forwards,
                on_step=lambda step, steps=steps: steps.append(step.codes.clone()),
                **settings,
            )
            seen[name] = torch.stack(steps)
        assert torch.equal(codes["cached"], codes["parallel"])
        assert torch.equal(seen["cached"], seen["parallel"]) and len(seen["cached"]) == order.num_steps
        assert counts["cached"].made == counts["cached"].passes == len(model.plan.feeds)
        assert counts["parallel"].passes == counts["cached"].passes
        assert int(counts["parallel"].alone.max()) <= counts["parallel"].made <= counts["cached"].made


def test_copies_do_not_see_one_another() -> None:
    """A copy sees what the rows of a pass see: everything that is kept, and itself."""
    model = make(BlockDiffusionGenerator, LINE, rule_config={"passes": 4})
    plan = draft_plan(model.plan, 7)
    assert plan.copies == (1, 3) * 3 and plan.visits == (0, 0, 1, 1, 2, 2)
    assert [len(feed) for feed in plan.feeds] == [7, 12, 8, 12, 8, 12]
    for index in (1, 3, 5):
        mask, kept = plan.step_mask(index), sum(plan.committed[:index])
        assert mask is not None and mask[:, :kept].all()
        assert torch.equal(mask[:, kept:], torch.block_diag(*torch.ones(3, 4, 4)).bool())
    assert [draft_plan(model.plan, count).copies[1] for count in (0, 1, 2, 3)] == [1, 2, 3, 3]


def _count(turns: int, drafts: int, changing: bool) -> Forwards:
    """Forwards for logits that never change, or that turn every guess down."""

    def forward(index: int, canvases: list[Canvas]) -> Tensor:
        codes = torch.cat([canvas.codes for canvas in canvases], dim=1)
        shown = torch.cat(
            [canvas.shown.sum(1, keepdim=True).expand_as(canvas.shown) for canvas in canvases], 1
        )
        return (shown if changing else codes * 0)[..., None].float()

    def reveal(canvas: Canvas, logits: Tensor, turn: Tensor) -> Canvas:
        chosen = (torch.arange(turns) == turn) & ~canvas.shown
        return Canvas(torch.where(chosen, logits[..., 0].long() + 1, canvas.codes), canvas.shown | chosen)

    start, forwards = Canvas(torch.zeros(2, turns).long(), torch.zeros(2, turns).bool()), Forwards()
    forwards.reset(2, torch.device("cpu"))
    codes = denoise(start, turns, drafts, forward, reveal, forwards).codes
    assert torch.equal(codes, (torch.arange(turns) * changing + 1).expand(2, -1))
    return forwards


@pytest.mark.parametrize("turns", [1, 2, 5, 8])
@pytest.mark.parametrize("drafts", [0, 1, 3, 20])
def test_forwards_at_best_and_at_worst(turns: int, drafts: int) -> None:
    best, worst = _count(turns, drafts, False), _count(turns, drafts, True)
    assert best.passes == worst.passes == worst.made == turns
    assert best.made == 1 + -(-(turns - 1) // (drafts + 1))
    assert best.alone.tolist() == [best.made] * 2 and worst.alone.tolist() == [turns] * 2


def walks(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random walks on a circle of 8 codes."""
    return torch.randint(-1, 2, (count, length), generator=generator).cumsum(1) % 8


@pytest.fixture(scope="module")
def walker() -> BlockDiffusionGenerator:
    """A model of walks, two blocks of 8 positions."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    order = orders.blocks(Layout.line(16), 8).to_config()
    settings = {"width": 32, "heads": 2, "depth": 2}
    model = BlockDiffusionGenerator(order, 8, settings, CONDITIONS["none"], rule_config={"passes": 8})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(walks(32, 16, generator)).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("reveal", ["order", "confidence", "random"])
def test_a_trained_model_needs_fewer_forwards(walker: BlockDiffusionGenerator, reveal: str) -> None:
    """At several temperatures; every sample of a batch gets on as fast as alone."""
    walker.rule = type(walker.rule)(passes=8, reveal=reveal)
    for temperature in (0.7, 1.0):
        options: dict[str, Any] = {"sampling": Sampling(temperature=temperature)}
        counts, one = Forwards(), Forwards()
        plain = walker.generate(batch_size=8, seeds=5, **options)
        codes = walker.generate(batch_size=8, seeds=5, decode="parallel", forwards=counts, **options)
        assert torch.equal(codes, plain)
        assert counts.passes == 16 and counts.alone.float().mean() < 13
        walker.generate(batch_size=1, seeds=7, decode="parallel", forwards=one, **options)
        assert one.made == int(one.alone) == int(counts.alone[2])


def test_guesses_have_to_be_checked(walker: BlockDiffusionGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking every guess gives other tokens, so that equality above shows that they are checked."""
    plain = walker.generate(batch_size=8, seeds=5)
    monkeypatch.setattr(Canvas, "equal", lambda self, other: torch.ones_like(self.shown[:, :1]))
    assert not torch.equal(walker.generate(batch_size=8, seeds=5, decode="parallel"), plain)


def test_bad_arguments() -> None:
    model = make(BlockDiffusionGenerator, LINE, "none")
    with pytest.raises(TokenloomError, match="drafts must be a whole number of at least 0, got -1"):
        model.generate(decode="parallel", drafts=-1)
    with pytest.raises(TokenloomError, match="drafts needs decode=\"parallel\", got decode='auto'"):
        model.generate(drafts=2)
