"""Next-scale generators: the plan and its windows, rungs, causality, guidance a scale, training and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_generators import VOCAB, conditions, make, random_codes
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    Guidance,
    NextScaleGenerator,
    Sampling,
    Step,
    base,
    guide,
    orders,
    sample_tokens,
)
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import scale_plan
from tokenloom.layouts import Layout

SQUARE = orders.scales(Layout.scales([1, 2, 3, 4]))
WIDE = orders.scales(Layout.scales([(1, 2), (2, 2), (3, 5)]))
RULES: dict[str, dict[str, Any]] = {
    "earlier": {"channels": 6},
    "own": {"channels": 6, "own_scale": True, "phis": 2},
    "window": {"channels": 6, "own_scale": True, "window": 3, "window_from": 2},
    "window and earlier": {"channels": 6, "window": 3, "phis": 0},
}
ADALN = {"rope": False, "modulation": "own", "final_modulation": True, "qk_norm": "l2", "norm": "layer"}
FLAVOURS: list[dict[str, Any]] = [
    {"transformer": ADALN, "head_bias": True},
    {"transformer": {**ADALN, "modulation": "shared"}, "tie_embeddings": True},
    {"causal_prefix": True, "prefix_rope": "zero"},
]
GREEDY = Sampling(temperature=0)


def build(
    order: Order, rule: str, condition: str = "class", flavour: int = 0, **more: Any
) -> NextScaleGenerator:
    model = make(NextScaleGenerator, order, condition, rule_config=RULES[rule], **FLAVOURS[flavour], **more)
    assert isinstance(model, NextScaleGenerator)
    return model


# ---- the plan ----------------------------------------------------------------------------------------------------


def visible(order: Order, q: int, k: int, own: bool, window: int, start: int) -> bool:
    """Whether position q sees position k, spelled out."""
    scale, other = int(order.step[q]), int(order.step[k])
    if other != scale:
        return other < scale and not own
    if not window or scale < start:
        return True
    inside = []
    for axis, side in enumerate(order.layout.maps[scale]):
        at, to = (int(order.layout.coords[place, 1 + axis]) for place in (q, k))
        first = min(max(at - window // 2, 0), max(side - window, 0))
        inside.append(first <= to < first + window)
    return all(inside)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(
    ("own", "window", "start"), [(False, 0, 0), (True, 0, 0), (True, 3, 2), (False, 3, 1)]
)
@pytest.mark.parametrize("order", [SQUARE, WIDE, orders.scales(Layout.scales([1, 7]))], ids=str)
def test_masks(order: Order, own: bool, window: int, start: int, prefix: int) -> None:
    plan = scale_plan(order, prefix, False, own, window, start)
    size = order.layout.size
    want = [[visible(order, q, k, own, window, start) for k in range(size)] for q in range(size)]
    assert plan.mask[prefix:, prefix:].tolist() == want
    assert plan.mask[:, :prefix].all() and not plan.mask[:prefix, prefix:].any()
    assert torch.cat(plan.feeds).tolist() == list(range(plan.rows))
    for step in plan.steps:  # each row predicts its own place
        assert plan.position[step.rows[step.sources[0]]].tolist() == step.positions.tolist()


def test_windows_stay_inside() -> None:
    """Every row of a large map sees exactly k x k places; the corner sees the k x k corner."""
    mask = scale_plan(orders.scales(Layout.scales([5])), 0, window=3).mask
    assert (mask.sum(1) == 9).all()
    assert mask[0].view(5, 5)[:3, :3].all() and mask[24].view(5, 5)[2:, 2:].all()
    assert mask[7].view(5, 5)[:3, 1:4].all()


def test_the_cache_does_not_grow_with_own_scales() -> None:
    assert scale_plan(SQUARE, 0).capacity == 30
    assert scale_plan(SQUARE, 0, own_scale=True).capacity == 16
    assert scale_plan(SQUARE, 3, own_scale=True).capacity == 19
    assert scale_plan(SQUARE, 3, own_scale=True).committed == (3, 0, 0, 0)
    assert scale_plan(SQUARE, 3).committed == (4, 4, 9, 16)


# ---- logits and codes --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("order", "condition"), [(SQUARE, "class"), (WIDE, "words"), (SQUARE, "none")], ids=str
)
def test_causality(order: Order, condition: str, rule: str) -> None:
    """A code changes no logits of its own and earlier scales, and some of the next."""
    model = build(order, rule, condition)
    codes, given = random_codes(order, 2), conditions(condition, 2)
    before = model.logits(codes, given)
    assert before.shape == (2, order.layout.size, VOCAB)
    for position in range(order.layout.size):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        moved = (model.logits(changed, given) - before).abs().amax((0, 2))
        later = order.step > order.step[position]
        assert moved[~later].max() <= 1e-5
        assert not later.any() or moved[later].max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("flavour", range(len(FLAVOURS)))
def test_words_reach_every_position(flavour: int, rule: str) -> None:
    model, codes, words = build(WIDE, rule, "words", flavour), random_codes(WIDE, 2), conditions("words", 3)
    assert words is not None
    moved = (model.logits(codes, words[:2]) - model.logits(codes, words[1:])).abs()
    assert moved.amax(-1).min() > 1e-5
    assert torch.equal(model.logits(codes), model.logits(codes, torch.zeros(2, 3, dtype=torch.long)))


CASES = [
    (order, rule, condition, flavour)
    for order, condition in ((SQUARE, "class"), (WIDE, "words"), (WIDE, "none"))
    for rule in RULES
    for flavour in range(len(FLAVOURS))
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{c[0]}-{c[1]}-{c[2]}-{c[3]}" for c in CASES])
def test_reference_equals_cached(case: int) -> None:
    """Token for token, over batch sizes, guidance, filters and kept positions."""
    order, rule, condition, flavour = CASES[case]
    model, known = build(order, rule, condition, flavour), random_codes(order, 1, 3)
    keep = torch.arange(order.layout.size) % 3 == 1
    for turn, (batch, guidance) in enumerate(
        [(1, 1.0), (5, 3.0), (2, Guidance(4.0, schedule="linear", interval=(0.2, 1.0)))]
    ):
        sampling = (Sampling(), Sampling(0.7, top_k=5, top_p=0.9, nucleus="ascending"), GREEDY)[
            (case + turn) % 3
        ]
        given: dict[str, Any] = {"batch_size": batch, "guidance": guidance, "sampling": sampling, "seeds": 11}
        if (case + turn) % 2:
            given |= {"known": known, "keep": keep}
        made = [
            model.generate(conditions(condition, batch), decode=decode, **given)
            for decode in ("reference", "cached")
        ]
        assert torch.equal(made[0], made[1])
        if "keep" in given:
            assert torch.equal(made[0][:, keep], known.expand(batch, -1)[:, keep])


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_codes_follow_from_teacher_forced_logits(rule: str) -> None:
    """What was drawn scale by scale is what the logits of one full pass say, guided by another scale each step."""
    model, labels, seeds = build(SQUARE, rule), torch.tensor([1, 3]), torch.tensor([4, 9])
    strength = Guidance(5.0, schedule="linear")
    codes = model.generate(labels, guidance=strength, seeds=seeds)
    plain, null = model.logits(codes, labels), model.logits(codes)
    scales = [strength.at(float(step) / 3) for step in SQUARE.step]
    guided = torch.stack([guide(plain[:, n], null[:, n], scale) for n, scale in enumerate(scales)], dim=1)
    assert torch.equal(sample_tokens(guided, seeds, torch.arange(30), Sampling()), codes)
    assert not torch.equal(model.generate(labels, seeds=seeds), codes)


@torch.no_grad()
@pytest.mark.parametrize("decode", ["reference", "cached"])
@pytest.mark.parametrize("rule", RULES)
def test_loss_is_the_sum_of_the_steps(rule: str, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative log-likelihoods, scale by scale, of codes that a generation is made to keep."""
    model, codes, words = build(WIDE, rule, "words"), random_codes(WIDE, 2), conditions("words", 2)
    total = 0.0

    def record(logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling) -> Tensor:
        nonlocal total
        total += float(F.cross_entropy(logits.flatten(0, 1), codes[:, positions].flatten(), reduction="sum"))
        return sample_tokens(logits, seeds, positions, sampling)

    monkeypatch.setattr(base.Generator, "draw", staticmethod(record))
    keep = torch.ones(WIDE.layout.size, dtype=torch.bool)
    model.generate(words, known=codes, keep=keep, decode=decode, seeds=0)
    assert total / codes.numel() == pytest.approx(float(model.loss(codes, words)), rel=1e-4)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, labels = build(SQUARE, "earlier"), torch.tensor([1, 2, 3])
    together = model.generate(labels, guidance=2.0, seeds=[5, 6, 7])
    assert torch.equal(model.generate(labels[1:2], guidance=2.0, seeds=[6]), together[1:2])


def test_steps_are_scales() -> None:
    seen: list[Step] = []
    model = build(SQUARE, "own")
    codes = model.generate(torch.tensor([1]), seeds=1, on_step=seen.append)
    assert [int(step.committed.sum()) for step in seen] == [1, 5, 14, 30]
    assert torch.equal(model.features(codes), model.tokens.pyramid.decode(codes))


# ---- training and storage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["earlier", "window"])
def test_overfits_and_repeats(rule: str) -> None:
    """Trains everything but the pyramid; sequences learned by heart come back by greedy decoding."""
    transformer = {**ADALN, "width": 32, "modulation": "shared"}
    model = make(
        NextScaleGenerator, SQUARE, "class", transformer, std=0.1, head_bias=True, rule_config=RULES[rule]
    )
    model.train()
    model.tokens.pyramid.codes.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    labels, codes = torch.arange(4), random_codes(SQUARE, 4, 8)
    frozen = {name: value.clone() for name, value in model.tokens.pyramid.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(150):
        loss = model(codes, labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    assert losses[-1] < 0.05 < 1 < losses[0]
    for name, value in model.tokens.pyramid.state_dict().items():
        assert torch.equal(value, frozen[name])
    assert torch.equal(model.eval().generate(labels, sampling=GREEDY, seeds=0), codes)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy() -> None:
    model, codes, labels = build(WIDE, "earlier"), random_codes(WIDE, 3), conditions("class", 3)
    want = F.cross_entropy(model.logits(codes, labels).flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model(codes, labels), want)


@pytest.mark.parametrize("rule", RULES)
def test_storage(rule: str, tmp_path: Path) -> None:
    model, labels = build(SQUARE, rule), torch.tensor([0, 2])
    model.save_pretrained(tmp_path)
    again = NextScaleGenerator.from_pretrained(tmp_path)
    assert again.rule == model.rule and again.order == model.order
    assert torch.equal(again.generate(labels, seeds=1), model.generate(labels, seeds=1))


def test_errors() -> None:
    with pytest.raises(TokenloomError, match="needs the order 'scales'"):
        make(NextScaleGenerator, orders.raster(Layout.grid(2, 2)))
    with pytest.raises(TokenloomError, match="Did you mean 'window'"):
        make(NextScaleGenerator, SQUARE, rule_config={"windo": 3})
    with pytest.raises(TokenloomError, match="odd side"):
        make(NextScaleGenerator, SQUARE, rule_config={"window": 4})
    with pytest.raises(TokenloomError, match="code_levels"):
        make(NextScaleGenerator, SQUARE, code_levels=[3, 4])
    with pytest.raises(TokenloomError, match=r"codes must be an integer tensor of shape \(B, 30\)"):
        build(SQUARE, "own").features(torch.zeros(1, 29, dtype=torch.long))


def test_other_paradigms_have_no_rules() -> None:
    from tokenloom.generators import NextBlockGenerator

    with pytest.raises(TokenloomError, match="rule option of NextBlockGenerator 'window'"):
        make(NextBlockGenerator, SQUARE, rule_config={"window": 3})
