"""Parallel decoding gives the tokens of one step a forward: every order, sampling, guidance, kept positions, trained models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_decoding import ALL, FLAVOURS, GUIDANCES, SAMPLINGS, keep_mask
from tiny_generators import CONDITIONS, VOCAB, conditions, make, random_codes
from torch import Tensor

from tokenloom import TextToImagePipeline
from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    BlockDiffusionGenerator,
    Generator,
    Guidance,
    MaskedGenerator,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextScaleGenerator,
    NextTokenGenerator,
    Parallel,
    ParallelStats,
    RangedTokenGenerator,
    Sampling,
    Step,
    orders,
)
from tokenloom.generators.arguments import Run
from tokenloom.generators.orders import Order
from tokenloom.generators.parallel import ParallelStepper, acceptance
from tokenloom.generators.parallel.drafts import SOURCES, nearest_earlier
from tokenloom.generators.parallel.windows import Windows
from tokenloom.layouts import Layout

DRAFTS = list(SOURCES)
LINE = orders.raster(Layout.line(12))


def same(
    model: Generator, condition: Tensor | None, window: int, draft: Any, **options: Any
) -> ParallelStats:
    """Asserts equal tokens, and says how it went."""
    stats = ParallelStats()
    cached = model.generate(condition, decode="cached", **options)
    found = model.generate(condition, decode=Parallel(window, draft, stats=stats), **options)
    assert found.shape == cached.shape and found.dtype == torch.long
    assert torch.equal(found, cached), (window, draft, options)
    return stats


@pytest.mark.parametrize("case", range(len(ALL)), ids=[f"{name}-{order}" for name, _, order in ALL])
def test_equals_cached(case: int) -> None:
    """For every order and flavour; conditions, filters, guidance, windows, drafts and kept positions take turns."""
    _, cls, order = ALL[case]
    steps = order.num_steps
    for turn, guidance in enumerate([*GUIDANCES.values(), 2.0]):
        count = case + turn
        model = make(cls, order, kind := list(CONDITIONS)[count % 3], **FLAVOURS[count % len(FLAVOURS)])
        batch = 1 + count % 3
        options: dict[str, Any] = {
            "batch_size": batch if kind == "none" else None,
            "guidance": guidance,
            "sampling": SAMPLINGS[count % 5],
            "seeds": [100 + i for i in range(batch)],
        }
        if turn % 2:
            options |= {"known": random_codes(order, batch), "keep": keep_mask(order)}
        window = (2, 3, steps + 5, 4)[turn]
        stats = same(model, conditions(kind, batch), window, DRAFTS[turn], **options)
        assert stats.steps == steps * batch and sum(stats.gains) == stats.steps
        assert -(-steps // window) <= stats.forwards <= steps


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_every_draft_with_every_sampling(draft: str, sampling: Sampling) -> None:
    model = make(NextTokenGenerator, LINE, std=0.2)
    for window in (2, 5):
        same(model, conditions("words", 3), window, draft, guidance=2.0, sampling=sampling, seeds=3)


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("groups", orders.regions(Layout.grid(4, 4), 4)),
        ("groups", orders.blocks(Layout.line(9), 3, sequential_first=True)),
        ("shift", orders.blocks(Layout.grid(4, 2), (1, 2))),
    ],
    ids=str,
)
def test_blocks_from_the_block_before(kind: str, order: Order) -> None:
    """Learned rows that stay, a block that has to be known, no prefix, special tokens."""
    for settings in ({}, {"special_tokens": 4, "condition": "none"}):
        model = make(
            NextBlockGenerator, order, rule_config={"plan": kind}, **({"condition": "class"} | settings)
        )
        given = None if settings else conditions("class", 2)
        known = {"known": random_codes(order, 2), "keep": order.step == 0} if kind == "shift" else {}
        for window, draft in ((2, "repeat"), (4, "recycle")):
            batch = {"batch_size": 2} if given is None else {}
            same(model, given, window, draft, seeds=1, guidance=1.5, **known, **batch)


def test_ranges_of_codes() -> None:
    """Codes outside the range of a position are never drawn, and drafts may be such codes."""
    rule = {"ranges": [[4, 0, 3], [8, 3, VOCAB]]}
    model = make(RangedTokenGenerator, LINE, rule_config=rule)
    for draft in DRAFTS:
        same(model, conditions("words", 3), 4, draft, seeds=2)


# ---- trained models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_bundled_picture_model(draft: str) -> None:
    pipeline = TextToImagePipeline.from_pretrained("tokenloom-emoji-64")
    words = pipeline.encode_prompts(["a red apple", "a cat face", "a blue car"])
    for window, sampling in (
        (4, Sampling(temperature=0.7, top_k=256)),
        (3, Sampling(top_p=0.9)),
        (15, Sampling(temperature=lambda progress: 1.0 - progress)),
    ):
        same(pipeline.generator, words, window, draft, guidance=2.0, sampling=sampling, seeds=11)


# ---- samples on their own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [NextTokenGenerator, NextBlockGenerator])
def test_samples_advance_on_their_own(cls: type[Generator]) -> None:
    """Together every sample takes the forwards that it takes alone; a kept sample runs ahead of the others."""
    model, condition = make(cls, LINE, std=0.25), conditions("words", 4)
    known, keep = random_codes(LINE, 4), torch.zeros(4, 12, dtype=torch.bool)
    keep[1] = True
    keep[2, :6] = True
    options: dict[str, Any] = {"sampling": Sampling(temperature=0.8), "guidance": 1.5}
    together = same(model, condition, 4, "neighbor", seeds=5, known=known, keep=keep, **options)
    alone = [
        same(
            model,
            condition[i : i + 1],
            4,
            "neighbor",
            seeds=5 + i,
            known=known[i : i + 1],
            keep=keep[i : i + 1],
            **options,
        )
        for i in range(4)
    ]
    assert alone[1].forwards == 3 < alone[0].forwards
    assert together.forwards == max(one.forwards for one in alone)
    assert sorted(together.gains) == sorted(gain for one in alone for gain in one.gains)
    assert together.accepted == sum(one.accepted for one in alone)


def test_an_optimistic_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one wrong step more counted as right, tokens would differ: the equality above has power."""
    leading = acceptance.leading

    def optimistic(wrong: Tensor, window: Any) -> Tensor:
        return (leading(wrong, window) + 1).clamp(max=window.offsets.shape[1])

    monkeypatch.setattr(acceptance, "leading", optimistic)
    model = make(NextTokenGenerator, LINE)
    with pytest.raises(AssertionError):
        same(model, conditions("words", 4), 4, "random", seeds=0)


def test_rejected_rows_are_written_again() -> None:
    """After a generation the cache holds exactly the keys that a run over the finished codes writes."""
    model = make(NextTokenGenerator, LINE, "none")
    options = Parallel(5, "random")
    caches = []
    for known in (False, True):
        codes = model.generate(seeds=4)
        stepper = _stepper(model, options)
        kept = (codes, torch.ones_like(codes, dtype=torch.bool)) if known else None
        run = Run(1, torch.tensor([4]), Guidance(), Sampling(), stepper.prefix, stepper, kept, None)
        found = stepper.run(model, run)
        assert torch.equal(found, codes)
        caches.append([layer.keys[:, :, :-1] for layer in stepper.cache.layers])
    for wandering, straight in zip(*caches, strict=True):
        torch.testing.assert_close(wandering, straight)


def _stepper(model: Generator, options: Parallel) -> Any:
    with torch.no_grad():
        prefix = model.condition.rows(None, 1, torch.device("cpu"), model.tokens)
    model.requires_grad_(False)
    return ParallelStepper(model, prefix, None, options)


# ---- what users see --------------------------------------------------------------------------------------------------


def test_on_step_is_called_for_every_step() -> None:
    model, seen = make(NextNeighborGenerator, orders.neighbors(Layout.grid(4, 3))), []
    codes = model.generate(
        conditions("words", 2),
        seeds=0,
        decode="parallel",
        on_step=lambda step: seen.append(copy.deepcopy(step)),
    )
    assert [step.index for step in seen] == list(range(6))
    for step in seen:
        assert isinstance(step, Step) and step.num_steps == 6
        assert torch.equal(step.committed, model.order.step <= step.index)
        assert torch.equal(step.codes[:, step.committed], codes[:, step.committed])
        assert not step.codes[:, ~step.committed].any()


def test_stats_add_up() -> None:
    model, stats = make(NextTokenGenerator, LINE), ParallelStats()
    decode = Parallel(window=4, stats=stats)
    everything = {"known": random_codes(LINE, 2), "keep": torch.ones(12, dtype=torch.bool)}
    for times in (1, 2):
        codes = model.generate(conditions("words", 2), decode=decode, **everything)
        assert torch.equal(codes, everything["known"])
        assert (stats.steps, stats.forwards, stats.gains) == (24 * times, 3 * times, [4] * 6 * times)
    assert stats.compression == 4 and stats.acceptance == 1
    assert str(stats) == (
        "48 steps in 12 sample forwards (6 batch forwards): 4.00 steps a forward, 100.0 % of tested steps accepted"
    )
    assert ParallelStats().compression == 0


def test_options_are_checked() -> None:
    with pytest.raises(TokenloomError, match="at least 2, got 1"):
        Parallel(window=1)
    with pytest.raises(TokenloomError, match=r"Unknown draft 'recicle'.*'recycle'"):
        Parallel(draft="recicle")
    with pytest.raises(TokenloomError, match=r"Unknown acceptance rule 'couple'.*'coupled'"):
        Parallel(accept="couple")
    with pytest.raises(TokenloomError, match="must be a ParallelStats"):
        Parallel(stats={})


def test_generators_that_are_more_than_their_plan_refuse() -> None:
    settings = {"width": 24, "heads": 2, "depth": 1}
    grid = orders.random(Layout.grid(3, 3), steps=3, seed=0)
    pyramid = orders.scales(Layout.scales([1, 2]))
    for model in (
        MaskedGenerator(grid.to_config(), VOCAB, settings),
        BlockDiffusionGenerator(orders.blocks(Layout.line(4), 2).to_config(), VOCAB, settings),
        NextScaleGenerator(
            pyramid.to_config(),
            VOCAB,
            settings,
            {"kind": "class", "num_classes": 2},
            rule_config={"channels": 4},
        ),
    ):
        with pytest.raises(
            TokenloomError, match=f"{type(model).__name__} feeds something else.*decode='auto'"
        ):
            model.eval().generate(decode=Parallel())
    ranged = make(RangedTokenGenerator, LINE, rule_config={"ranges": [[12, 0, VOCAB]]})
    with pytest.raises(TokenloomError, match="RangedTokenGenerator draws codes in a way of its own"):
        ranged.generate(decode=Parallel(accept="speculative"))


def test_broken_weights_are_named() -> None:
    model = make(NextNeighborGenerator, orders.neighbors(Layout.grid(3, 3)))
    model.transformer.blocks[1].mlp.down.weight.data[0, 0] = torch.nan
    with pytest.raises(TokenloomError, match=r"Step 0 of 5: .*NaN.*mlp\.down\.weight are not finite"):
        model.generate(conditions("words", 1), decode="parallel")


def test_bfloat16_runs() -> None:
    model = make(NextBlockGenerator, LINE, transformer={"modulation": "own"}, std=0.2).bfloat16()
    codes = model.generate(conditions("words", 2), guidance=3.0, seeds=0, decode="parallel")
    assert codes.shape == (2, 12) and 0 <= int(codes.min()) <= int(codes.max()) < VOCAB


# ---- parts -------------------------------------------------------------------------------------------------------------


def test_neighbours() -> None:
    """The position of an earlier step next to it, the one of the later step first; none in the first step."""
    assert nearest_earlier(orders.raster(Layout.grid(2, 3))).tolist() == [6, 0, 1, 0, 3, 4, 6]
    assert nearest_earlier(orders.neighbors(Layout.grid(2, 2))).tolist() == [4, 0, 0, 1, 4]
    assert nearest_earlier(orders.parallel(Layout.frames(3, 2))).tolist()[2:6] == [0, 1, 2, 3]


def peaked(ids: list[int]) -> Tensor:
    """Logits (1, m, V) that leave one id each."""
    return torch.full((1, len(ids), VOCAB), -50.0).scatter(2, torch.tensor(ids)[None, :, None], 50.0)


def test_drafts_by_hand() -> None:
    """Recycling knows what followed a code, repeating what stood at the neighbour; both copy what they do not know."""
    order, seeds, warm = orders.raster(Layout.line(6)), torch.tensor([0]), torch.ones(1, 1)
    codes, seen = torch.tensor([[3, 4, 5, 3, 7, 0, 0]]), torch.tensor([[1, 2, 6]])
    recycle = SOURCES["recycle"](order, seeds, VOCAB, 0)
    recycle.observe(codes, seen, peaked([4, 5, 9]))
    assert recycle.guess(codes, torch.tensor([[4]]), warm).tolist() == [[4]]  # a 3 stands before it
    assert recycle.guess(codes, torch.tensor([[5]]), warm).tolist() == [[7]]
    repeat = SOURCES["repeat"](order, seeds, VOCAB, 0)
    repeat.observe(codes, seen, peaked([4, 5, 9]))
    assert repeat.guess(codes, torch.tensor([[3]]), warm).tolist() == [[5]]
    assert repeat.guess(codes, torch.tensor([[4]]), warm).tolist() == [[5]]  # passed on
    assert SOURCES["neighbor"](order, seeds, VOCAB, 0).guess(codes, torch.tensor([[5]]), warm).tolist() == [
        [7]
    ]


def test_windows_by_hand() -> None:
    """Queries share the first slots; rows that stay have their own; shorter pieces are filled up."""
    order = orders.blocks(Layout.line(6), 2)
    plan = make(NextBlockGenerator, order, "class").plan  # 1 prefix row, 4 token rows, 6 queries
    windows = Windows(plan, 2, torch.device("cpu"))
    assert windows.scratch == 4 and windows.slots == 4 + 5 + 1
    window = windows.at([0, 2])
    assert window.positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 6]]
    assert window.offsets.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert window.slots.tolist() == [[4, 0, 1, 5, 6, 2, 3], [7, 8, 0, 1, 9, 9, 9]]
    assert window.counts == [2, 1]
    assert window.mask[0, 0].nonzero().flatten().tolist() == [4]  # the prefix sees itself
    assert window.mask[0, 1].nonzero().flatten().tolist() == [
        0,
        1,
        4,
    ]  # a query: its step, and what came before
    assert window.mask[1, 2].nonzero().flatten().tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert window.mask[1, 1].nonzero().flatten().tolist() == [4, 5, 6, 7, 8]
