"""Generators: teacher-forced logits, loss, conditions, output matrices, storage and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_generators import CONDITIONS, VOCAB, cases, conditions, make, random_codes
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    Generator,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextTokenGenerator,
    orders,
)
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout

CASES = [pytest.param(cls, order, id=f"{name}-{order}") for name, cls, order in cases()]
GRID = orders.neighbors(Layout.grid(3, 3))
LINE = orders.raster(Layout.line(5))


# ---- teacher forcing ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("cls", "order"), CASES)
def test_causality(cls: type[Generator], order: Order) -> None:
    """A token changes no logits of steps at or before its own, and some later ones."""
    model = make(cls, order, transformer={"modulation": "own"})
    codes, condition = random_codes(order, 2), conditions("words", 2)
    before = model.logits(codes, condition)
    assert before.shape == (2, order.layout.size, VOCAB)
    for position in range(order.layout.size):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        moved = (model.logits(changed, condition) - before).abs().amax((0, 2))
        later = order.step > order.step[position]
        assert moved[~later].max() <= 1e-5
        assert not later.any() or moved[later].max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("groups", orders.regions(Layout.grid(4, 4), 4)),
        ("groups", orders.blocks(Layout.line(9), 3, sequential_first=True)),
        ("shift", orders.blocks(Layout.grid(4, 2), (1, 2))),
    ],
    ids=lambda value: str(value),
)
def test_blocks_from_the_block_before(kind: str, order: Order) -> None:
    """With any condition: causal, the same on both rungs, and blind where a plan predicts nothing."""
    model = make(NextBlockGenerator, order, rule_config={"plan": kind}, transformer={"rope": False})
    codes, condition = random_codes(order, 2), conditions("words", 2)
    before, predicted = model.logits(codes, condition), model.plan.predicted
    assert predicted.all() == (kind == "groups") and not before[:, ~predicted].any()
    for position in range(order.layout.size):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        moved = (model.logits(changed, condition) - before).abs().amax((0, 2))
        later = order.step > order.step[position]
        assert moved[~later].max() <= 1e-5
        assert not later.any() or moved[later].max() > 1e-3
    kept = {} if kind == "groups" else {"known": codes, "keep": ~predicted}
    made = [model.generate(condition, seeds=5, decode=name, **kept) for name in ("reference", "cached")]
    assert torch.equal(*made)


@torch.no_grad()
@pytest.mark.parametrize(("cls", "order"), CASES)
def test_the_condition_reaches_every_position(cls: type[Generator], order: Order) -> None:
    for kind in ("class", "words"):
        model = make(cls, order, kind)
        codes, condition = random_codes(order, 2), conditions(kind, 3)
        moved = (model.logits(codes, condition[:2]) - model.logits(codes, condition[1:])).abs()
        assert moved.amax(-1).min() > 1e-4


@torch.no_grad()
def test_no_condition_is_the_null_condition() -> None:
    codes = random_codes(GRID, 2)
    for kind, null in (("class", torch.full((2,), 4)), ("words", torch.zeros(2, 3, dtype=torch.long))):
        model = make(NextNeighborGenerator, GRID, kind)
        assert torch.equal(model.logits(codes), model.logits(codes, null))


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy() -> None:
    model, codes, words = make(NextBlockGenerator, GRID), random_codes(GRID, 3), conditions("words", 3)
    chances = model.logits(codes, words).softmax(-1)
    want = -chances.gather(-1, codes[..., None]).log().mean()
    torch.testing.assert_close(model.loss(codes, words), want)
    torch.testing.assert_close(model(codes, words), want)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_causal_prefix(causal: bool) -> None:
    """The first tap at the first word does not see the second word of a causal prefix."""
    model = make(NextTokenGenerator, LINE, causal_prefix=causal)
    codes, words = random_codes(LINE, 1), torch.tensor([[2, 3, 4]])
    prefix = model.condition(words, 1, codes.device)
    other = model.condition(torch.tensor([[2, 3, 5]]), 1, codes.device)
    rows = torch.arange(3)
    first, second = (model.run_rows(x, rows, mask=model.plan.mask[:3, :3])[0][0, 0] for x in (prefix, other))
    assert torch.equal(first, second) == causal


@torch.no_grad()
def test_prefix_rope() -> None:
    """ "zero" makes queries and keys of prefix rows vanish, "identity" leaves them as they are."""
    codes, labels, outputs = random_codes(LINE, 2), torch.tensor([0, 1]), []
    for mode, value in (("zero", 0), ("identity", 1)):
        model = make(NextTokenGenerator, LINE, "class", prefix_rope=mode)
        assert bool((model.rope_cos[0] == value).all()) and not model.rope_sin[0].any()
        assert bool((model.rope_cos[1] == 1).all()) and bool((model.rope_sin[2] != 0).all())
        outputs.append(model.logits(codes, labels))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_learned_positions_tell_prefix_and_tokens_apart() -> None:
    model = make(NextBlockGenerator, GRID, transformer={"rope": False, "learned_positions": 12})
    assert model.row_position[:3].tolist() == [0, 1, 2]
    assert (model.row_position[3:] == 3 + model.plan.position[3:]).all()
    codes = random_codes(GRID, 1)
    before = model.logits(codes)
    model.transformer.positions.weight[3 + 8] += 1  # the last position of the grid: its token is never fed
    moved = (model.logits(codes) - before).abs().amax((0, 2))
    assert moved[:8].max() == 0 and moved[8] > 1e-3


# ---- output matrices ---------------------------------------------------------------------------------------------


def digits_table(model: Generator, levels: list[int]) -> Tensor:
    """Code vectors plus one vector a digit, counted out code by code."""
    rows = []
    for code in range(VOCAB):
        row, rest, offset = model.tokens.codes.weight[code], code, 0
        for level in levels:
            row = row + model.tokens.digits[offset + rest % level]
            rest, offset = rest // level, offset + level
        rows.append(row)
    return torch.stack(rows)


def last_hidden(model: Generator, codes: Tensor) -> Tensor:
    """Mean over heads (with the plan's weights) of the tapped states, (B, N, D) in layout order."""
    seen: list[Any] = []
    handle = model.transformer.register_forward_hook(lambda *args: seen.append(args[2]))
    model.logits(codes)
    handle.remove()
    taps, plan = seen[0], model.plan
    heads = [taps[min(j, len(taps) - 1)][:, plan.sources[j]] for j in range(len(plan.sources))]
    return torch.stack(heads)[:, :, model.order.inverse]  # (J, B, N, D)


@torch.no_grad()
@pytest.mark.parametrize("taps", [(2,), (1, 2)])
def test_tied_digits_equal_the_explicit_computation(taps: tuple[int, ...]) -> None:
    levels = [3, 2, 2]
    model = make(
        NextNeighborGenerator, GRID, transformer={"taps": taps}, tie_embeddings=True, code_levels=levels
    )
    table, codes = digits_table(model, levels), random_codes(GRID, 2)
    torch.testing.assert_close(model.tokens.weight, table)
    torch.testing.assert_close(model.tokens(codes), table[codes])
    weights = model.plan.weights[:, GRID.inverse]
    hidden = (last_hidden(model, codes) * weights[:, None, :, None]).sum(0)
    torch.testing.assert_close(model.logits(codes), hidden @ table.T, rtol=1e-4, atol=1e-4)
    assert len(model.heads) == 0


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_heads_average_predictions(share: bool, bias: bool) -> None:
    """Logits are the mean of the logits of the heads that have a neighbour, biases included."""
    model = make(NextNeighborGenerator, GRID, transformer={"taps": (1, 2)}, share_head=share, head_bias=bias)
    assert len(model.heads) == (1 if share else 2)
    if bias:
        for index, head in enumerate(model.heads):
            head.bias.copy_(torch.randn(VOCAB, generator=torch.Generator().manual_seed(index)))
    codes = random_codes(GRID, 2)
    hidden, weights = last_hidden(model, codes), model.plan.weights[:, GRID.inverse]
    outputs = [model.heads[0 if share else j](hidden[j]) for j in range(2)]
    want = sum(weights[j, :, None] * outputs[j] for j in range(2))
    torch.testing.assert_close(model.logits(codes), want, rtol=1e-4, atol=1e-4)
    right, below = outputs
    torch.testing.assert_close(model.logits(codes)[:, 4], (right + below)[:, 4] / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(codes)[:, 1], right[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(codes)[:, 3], below[:, 3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tied_plain_table() -> None:
    model = make(NextTokenGenerator, LINE, tie_embeddings=True)
    codes = random_codes(LINE, 2)
    assert torch.equal(model.tokens.weight, model.tokens.codes.weight)
    want = last_hidden(model, codes)[0] @ model.tokens.codes.weight.T
    torch.testing.assert_close(model.logits(codes), want, rtol=1e-4, atol=1e-4)


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "order", "options"),
    [
        (NextTokenGenerator, orders.raster(Layout.grid(3, 3)), {}),
        (NextNeighborGenerator, GRID, {"tie_embeddings": True, "code_levels": [3, 4]}),
        (NextBlockGenerator, orders.random(Layout.grid(3, 3), 4, 0), {"share_head": True}),
    ],
    ids=["token", "neighbor", "block"],
)
def test_thirty_steps_overfit_four_sequences(
    cls: type[Generator], order: Order, options: dict[str, Any]
) -> None:
    """From ln 12 = 2.48 nats to below 0.5, and every parameter takes part."""
    torch.manual_seed(0)
    settings = {"width": 24, "heads": 2, "depth": 2, "modulation": "shared"}
    model = cls(order.to_config(), VOCAB, settings, CONDITIONS["class"], **options)
    codes, labels = random_codes(order, 4, seed=5), torch.arange(4)
    assert 2.2 < model.loss(codes, labels).item() < 2.8
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        model(codes, labels).backward()
        optimizer.step()
    assert model.loss(codes, labels).item() < 0.5
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


# ---- storage -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("cls", "order", "options"),
    [
        (NextTokenGenerator, orders.raster(Layout.frames(3, 2)), {"prefix_rope": "zero", "head_bias": True}),
        (NextNeighborGenerator, GRID, {"share_head": False, "transformer": {"taps": [1, 2]}}),
        (NextNeighborGenerator, GRID, {"tie_embeddings": True, "code_levels": [3, 4]}),
        (NextBlockGenerator, orders.random(Layout.grid(3, 3), 4, 7), {"causal_prefix": True}),
        (NextBlockGenerator, orders.scales(Layout.scales([1, (2, 3)])), {"transformer": {"qk_norm": "l2"}}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_save_and_load_are_exact(
    cls: type[Generator], order: Order, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make(cls, order, **options)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == cls.__name__ and config["vocab_size"] == VOCAB
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.order == order and not loaded.training
    assert loaded.transformer.config == model.transformer.config
    states = loaded.state_dict()
    assert states.keys() == model.state_dict().keys()
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    codes, words = random_codes(order, 2), conditions("words", 2)
    assert torch.equal(loaded.logits(codes, words), model.logits(codes, words))
    assert torch.equal(loaded.generate(words, seeds=3), model.generate(words, seeds=3))


# ---- errors ------------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "order_config": GRID.to_config(),
    "vocab_size": VOCAB,
    "transformer_config": {"width": 8, "heads": 2, "depth": 2},
}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (NextTokenGenerator, {}, "needs one position a step"),
        (NextNeighborGenerator, {"order_config": LINE.to_config()}, "needs the order 'neighbors'"),
        (
            NextBlockGenerator,
            {"condition_config": {"kind": "klass"}},
            "Unknown condition kind 'klass'.*'class'",
        ),
        (NextBlockGenerator, {"condition_config": {"kind": "class"}}, "condition 'class'.*num_classes"),
        (
            NextBlockGenerator,
            {"condition_config": {"kind": "words", "vocabulary": 3, "lenght": 2}},
            "condition 'words'.*length",
        ),
        (NextBlockGenerator, {"prefix_rope": "zeros"}, "Unknown prefix_rope 'zeros'.*'zero'"),
        (
            NextBlockGenerator,
            {"rule_config": {"plan": "group"}},
            "Unknown plan of NextBlockGenerator.*'groups'",
        ),
        (
            NextNeighborGenerator,
            {"rule_config": {"plan": "groups"}},
            "Unknown rule option of NextNeighborGenerator",
        ),
        (NextBlockGenerator, {"condition_config": {"kind": "none", "length": 2}}, "0 or 1 rows, got 2"),
        (
            NextBlockGenerator,
            {"tie_embeddings": True, "share_head": False},
            "tie_embeddings needs share_head",
        ),
        (NextBlockGenerator, {"code_levels": [3, 3]}, r"code_levels \[3, 3\] multiply to 9, not to 12"),
        (
            NextBlockGenerator,
            {"transformer_config": {"width": 8, "heads": 2, "depth": 2, "taps": [1, 2]}},
            "reads 1 hidden states, but taps are",
        ),
        (
            NextBlockGenerator,
            {"transformer_config": {"width": 8, "heads": 2, "depth": 2, "learned_positions": 9}},
            "learned_positions is 9, but 1 prefix rows and 9 tokens need 10",
        ),
        (
            NextBlockGenerator,
            {"transformer_config": {"width": 6, "heads": 1, "depth": 1}},
            "over 2 axes need a head width divisible by 4, got 6",
        ),
        (
            NextBlockGenerator,
            {"order_config": {"name": "rastr", "layout": Layout.line(2).to_config()}},
            "raster",
        ),
        (Generator, {}, "does not define make_plan"),
    ],
)
def test_bad_configurations(cls: type[Generator], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        cls(**(BASE | options))


CODES = random_codes(GRID, 2)
KEEP = torch.zeros(9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "class",
            {"decode": "cache", "condition": torch.tensor([1])},
            "Unknown decode rung 'cache'.*'cached'",
        ),
        ("class", {"condition": torch.tensor([[1]])}, r"shape \(B,\), got torch.int64 \(1, 1\)"),
        ("class", {"condition": torch.tensor([1.0])}, "integer tensor.*got torch.float32"),
        ("class", {"condition": [1, 2]}, r"integer tensor.*got \[1, 2\]"),
        ("class", {"condition": torch.tensor([0, 5])}, r"must lie in 0..3 \(4 = no class\), got 0..5"),
        ("class", {"condition": torch.tensor([-1])}, "got -1..-1"),
        ("words", {"condition": torch.tensor([1, 2, 3])}, r"shape \(B, 3\), got torch.int64 \(3,\)"),
        (
            "words",
            {"condition": torch.zeros(1, 4, dtype=torch.long)},
            r"shape \(B, 3\), got torch.int64 \(1, 4\)",
        ),
        ("words", {"condition": torch.zeros(1, 3)}, "got torch.float32"),
        ("words", {"condition": "a red apple"}, "got 'a red apple'"),
        ("words", {"condition": torch.tensor([[1, 2, 9]])}, "must lie in 0..8"),
        ("none", {"condition": torch.tensor([1])}, "unconditional"),
        ("none", {"batch_size": 0}, "positive integer, got 0"),
        ("none", {"batch_size": 2.0}, "positive integer, got 2.0"),
        (
            "class",
            {"condition": torch.tensor([1, 2]), "batch_size": 3},
            "batch_size is 3, but the condition holds 2",
        ),
        ("none", {"batch_size": 2, "seeds": [1, 2, 3]}, "one seed per sample, 2 in all, got 3"),
        ("none", {"batch_size": 2, "seeds": torch.tensor([1])}, "one seed per sample"),
        ("none", {"batch_size": 2, "seeds": -1}, "seed must be in"),
        ("none", {"batch_size": 2, "known": CODES}, "known and keep belong together"),
        ("none", {"batch_size": 2, "keep": KEEP}, "known and keep belong together"),
        ("none", {"batch_size": 2, "known": CODES.tolist(), "keep": KEEP}, "known and keep belong together"),
        ("none", {"batch_size": 2, "known": CODES[:, :8], "keep": KEEP}, r"known must be.*\(B, 9\)"),
        ("none", {"batch_size": 2, "known": CODES.float(), "keep": KEEP}, "known must be an integer"),
        ("none", {"batch_size": 2, "known": CODES + VOCAB, "keep": KEEP}, "known must lie in 0..11"),
        ("none", {"batch_size": 3, "known": CODES, "keep": KEEP}, r"known must be \(3, 9\)"),
        ("none", {"batch_size": 2, "known": CODES, "keep": KEEP[:8]}, "boolean"),
        ("none", {"batch_size": 2, "known": CODES, "keep": KEEP.long()}, "boolean"),
        ("none", {"guidance": float("nan")}, "guidance scale must be finite"),
        ("none", {"guidance": "3"}, "guidance scale must be a number"),
    ],
)
def test_bad_generate_arguments(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        make(NextNeighborGenerator, GRID, kind).generate(**options)
