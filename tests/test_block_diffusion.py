"""Block diffusion: rungs agree over passes, one pass is next-block prediction, likelihoods add up, blocks grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_generators import CONDITIONS, VOCAB, conditions, make, random_codes

from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    BlockDiffusionGenerator,
    Guidance,
    NextBlockGenerator,
    NextTokenGenerator,
    Sampling,
    Step,
    orders,
)
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout

LINE = orders.blocks(Layout.line(12), 4)
ORDERS = {
    "line": LINE,
    "cells": orders.blocks(Layout.grid(4, 4), (2, 2)),
    "frames": orders.blocks(Layout.frames(4, 2), (1, 2)),
    "uneven": orders.random(Layout.grid(3, 3), 4, 7),
    "diagonals": orders.neighbors(Layout.grid(3, 4)),
}
RULES: list[dict[str, Any]] = [
    {"passes": 3},
    {"passes": 2, "context": "block", "reveal": "random"},
    {"passes": 9, "choice_temperature": 3.0},
    {"passes": 3, "reveal": "order", "context": "block"},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_reference_equals_cached(order: Order, rule: dict[str, Any]) -> None:
    """Over sampling, guidance, kept positions, batch size and seeds."""
    keep = torch.arange(order.layout.size) % 3 == 1
    for batch, guidance, sampling, kept in (
        (1, 1.0, Sampling(), False),
        (5, Guidance(3.0, schedule="linear"), Sampling(temperature=0.8, top_k=6), True),
        (5, 2.0, Sampling(temperature=0), False),
    ):
        model, labels = (
            make(BlockDiffusionGenerator, order, "class", rule_config=rule),
            conditions("class", batch),
        )
        options: dict[str, Any] = {"guidance": guidance, "sampling": sampling}
        options["seeds"] = [40 + i for i in range(batch)]
        known = random_codes(order, batch)
        if kept:
            options |= {"known": known, "keep": keep}
        cached = model.generate(labels, decode="cached", **options)
        assert torch.equal(model.generate(labels, decode="reference", **options), cached)
        assert cached.shape == known.shape and 0 <= int(cached.min()) <= int(cached.max()) < VOCAB
        if kept:
            assert torch.equal(cached[:, keep], known[:, keep])
        alone = model.generate(
            labels[-1:], **(options | {"seeds": [40 + batch - 1]} | ({"known": known[-1:]} if kept else {}))
        )
        assert torch.equal(alone, cached[-1:])


def test_one_pass_is_next_block_prediction() -> None:
    """The same weights give the same tokens and logits as a generator with queries, for any order."""
    for order in ORDERS.values():
        model = make(BlockDiffusionGenerator, order, rule_config={"context": "block"})
        other = make(NextBlockGenerator, order)
        other.load_state_dict(model.state_dict())
        codes, words = random_codes(order, 2), conditions("words", 2)
        torch.testing.assert_close(model.logits(codes, words), other.logits(codes, words))
        torch.testing.assert_close(model.loss(codes, words), other.loss(codes, words))
        assert torch.equal(model.generate(words, seeds=3, passes=1), other.generate(words, seeds=3))
        assert not torch.equal(model.generate(words, seeds=3, passes=4), other.generate(words, seeds=3))


@torch.no_grad()
@pytest.mark.parametrize("context", ["causal", "block"])
def test_what_rows_see(context: str) -> None:
    """A position sees earlier blocks and what is shown of its own, in a causal context no token after another."""
    model = make(BlockDiffusionGenerator, LINE, rule_config={"context": context})
    codes, words = random_codes(LINE, 1), conditions("words", 1)
    shown = torch.zeros(1, 12, dtype=torch.bool)
    shown[:, [1, 5, 9]] = True
    first = model.logits(codes, words, shown)
    for place in range(12):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        moved = (model.logits(changed, words, shown) - first).abs().amax((0, 2)) > 1e-5
        own = torch.arange(12) // 4 == place // 4
        later = torch.arange(12) // 4 > place // 4
        assert torch.equal(moved, later | (own & bool(shown[0, place])))
    token = torch.arange(3, 11)  # the rows of the first eight tokens, behind three words
    seen = model.plan.mask[token][:, token]
    steps = torch.arange(8) // 4
    want = torch.ones(8, 8).tril().bool() if context == "causal" else steps[None] <= steps[:, None]
    assert torch.equal(seen, want)


@torch.no_grad()
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_teacher_forced_loss_is_the_sum_of_the_passes(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sequence of the order, an equal share a pass: logits of a pass are those of its shown positions."""
    model = make(BlockDiffusionGenerator, LINE, "class", rule_config={"passes": passes, "reveal": "order"})
    labels, total, forced = conditions("class", 3), torch.zeros(3), torch.zeros(3)
    recorded: list[Any] = []
    original = model._sample

    def record(logits: torch.Tensor, seeds: Any, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        ids = original(logits, seeds, positions, *rest)
        recorded.append((logits, positions[0] % 12))
        return ids

    monkeypatch.setattr(model, "_sample", record)
    codes = model.generate(labels, seeds=7)
    for index, (logits, positions) in enumerate(recorded):
        turn, share = index % passes, 4 // passes
        made = slice(turn * share, (turn + 1) * share)
        chance = logits.log_softmax(-1).gather(-1, codes[:, positions][..., None]).squeeze(-1)
        total -= chance[:, made].sum(1)
    for turn in range(passes):
        inside = torch.arange(12) % 4
        shown = (inside < turn * (4 // passes)).expand(3, -1)
        decided = inside // (4 // passes) == turn
        chance = -F.cross_entropy(model.logits(codes, labels, shown).transpose(1, 2), codes, reduction="none")
        forced -= chance[:, decided].sum(1)
    torch.testing.assert_close(total, forced, rtol=1e-4, atol=1e-4)
    if passes == 1:
        torch.testing.assert_close(model.loss(codes, labels) * 12, forced.mean(), rtol=1e-4, atol=1e-4)


def test_what_training_shows() -> None:
    """Of every block at least one position is hidden, and every number occurs equally often."""
    torch.manual_seed(0)
    order = ORDERS["cells"]
    model = make(BlockDiffusionGenerator, order)
    hidden = ~model.draw_shown(4000)
    counts = torch.stack([hidden[:, order.step == step].sum(1) for step in range(4)], dim=1)
    assert int(counts.min()) == 1 and int(counts.max()) == 4
    share = counts.flatten().bincount(minlength=5)[1:] / counts.numel()
    assert (share - 0.25).abs().max() < 0.02
    assert (hidden.float().mean(0) - 0.625).abs().max() < 0.04
    weights = model._hidden_share(hidden)
    sums = torch.stack([weights[:, order.step == step].sum(1) for step in range(4)], dim=1)
    torch.testing.assert_close(sums, torch.full_like(sums, 4.0))


def test_the_loss_bounds_the_likelihood_of_random_sequences() -> None:
    """Its expectation over what is shown is the mean negative log-likelihood over all sequences of reveals."""
    order = orders.blocks(Layout.line(2), 2)
    model = make(BlockDiffusionGenerator, order, "none")
    codes = random_codes(order, 1)
    cases = torch.tensor([[False, False], [True, False], [False, True]])
    with torch.no_grad():
        nats = [
            F.cross_entropy(model.logits(codes, None, case[None])[0], codes[0], reduction="none")
            for case in cases
        ]
        sequences = (nats[0][0] + nats[1][1] + nats[0][1] + nats[2][0]) / 2
        expected = (
            model.loss(codes, shown=cases[:1])
            + (model.loss(codes, shown=cases[1:2]) + model.loss(codes, shown=cases[2:])) / 2
        ) / 2
    torch.testing.assert_close(expected, sequences / 2)


def test_blocks_grow_from_a_next_token_model() -> None:
    """Blocks of one position see a causal context alone; growing changes the order, and no weight."""
    torch.manual_seed(0)
    layout = Layout.line(8)
    settings = {"width": 32, "heads": 2, "depth": 2, "learned_positions": 9}
    first = orders.blocks(layout, 1).to_config()
    model = BlockDiffusionGenerator(first, VOCAB, settings, CONDITIONS["class"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    codes, labels = random_codes(model.order, 4, seed=2), torch.arange(4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for block in (1, 2, 4, 8):
        model.grow(orders.blocks(layout, block))
        assert model.plan.order.num_steps == 8 // block == model.order.num_steps
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name])
        for _ in range(100 if block == 8 else 20):
            optimizer.zero_grad()
            model(codes, labels).backward()
            optimizer.step()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    assert model.loss(codes, labels) < 0.3
    for passes in (1, 3, 8):
        assert torch.equal(model.generate(labels, passes=passes, sampling=Sampling(temperature=0)), codes)
    with pytest.raises(TokenloomError, match=r"layout of this generator is line\(8\)"):
        model.grow(orders.raster(Layout.line(4)))


def test_blocks_of_one_are_next_token_prediction() -> None:
    """Both see exactly the earlier tokens: logits change with the same tokens, and one pass a token is made."""
    order = orders.blocks(Layout.line(5), 1)
    model, other = make(BlockDiffusionGenerator, order), make(NextTokenGenerator, order)
    assert len(model.plan.feeds) == len(other.plan.feeds) == 5
    codes, words = random_codes(order, 1), conditions("words", 1)
    for place in range(5):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        with torch.no_grad():
            moved = [
                (net.logits(changed, words) - net.logits(codes, words)).abs().amax((0, 2)) > 1e-6
                for net in (model, other)
            ]
        assert torch.equal(*moved)


def test_save_load_steps_and_special_tokens(tmp_path: Path) -> None:
    model = make(BlockDiffusionGenerator, LINE, rule_config={"passes": 2}, special_tokens=2)
    model.save_pretrained(tmp_path)
    loaded = BlockDiffusionGenerator.from_pretrained(tmp_path)
    seen: list[Step] = []
    words = conditions("words", 2)
    codes = loaded.generate(words, seeds=1, on_step=lambda step: seen.append(step))
    assert torch.equal(codes, model.generate(words, seeds=1))
    assert [step.index for step in seen] == [0, 1, 2] and seen[1].committed.sum() == 8


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"passes": 0}, "passes must be a whole number of at least 1, got 0"),
        ({"context": "casual"}, "Unknown context of block diffusion 'casual'.*'causal'"),
        ({"reveal": "confident"}, "Unknown reveal rule 'confident'.*'confidence'"),
        ({"pases": 2}, "Unknown rule option of BlockDiffusionGenerator 'pases'.*'passes'"),
    ],
)
def test_bad_rules(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        BlockDiffusionGenerator(
            LINE.to_config(), 4, {"width": 8, "heads": 2, "depth": 1}, CONDITIONS["none"], rule_config=rule
        )


def test_bad_arguments() -> None:
    model = make(BlockDiffusionGenerator, LINE, "none")
    with pytest.raises(TokenloomError, match="passes must be a whole number"):
        model.generate(passes=0)
    with pytest.raises(TokenloomError, match=r"shown must be a boolean tensor \(1, 12\)"):
        model.logits(random_codes(LINE, 1), shown=torch.zeros(1, 11, dtype=torch.bool))
