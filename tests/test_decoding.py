"""Decoding: all rungs give the same tokens, and those tokens are what the teacher-forced logits say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_generators import CONDITIONS, VOCAB, cases, conditions, make, random_codes
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    Generator,
    Guidance,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextTokenGenerator,
    Sampling,
    Step,
    base,
    decoding,
    guide,
    orders,
    sample_tokens,
)
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout

ALL = list(cases())
CASES = [pytest.param(cls, order, id=f"{name}-{order}") for name, cls, order in ALL]
GRID = orders.neighbors(Layout.grid(3, 3))
GREEDY = Sampling(temperature=0)
GUIDANCES: dict[str, Any] = {
    "plain": 1.0,
    "guided": 3.0,
    "schedule": Guidance(4.0, schedule="linear", interval=(0.2, 1.0)),
}
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_k=5),
    Sampling(top_p=0.8),
    Sampling(temperature=lambda progress: 1.5 - progress, top_k=7, top_p=0.9, nucleus="ascending"),
    GREEDY,
]
FLAVOURS: list[dict[str, Any]] = [
    {},
    {"transformer": {"modulation": "own", "final_modulation": True}, "causal_prefix": True},
    {"transformer": {"kv_heads": 1, "qk_norm": "l2", "norm": "layer"}, "prefix_rope": "zero"},
    {"transformer": {"rope": False, "learned_positions": 30}, "tie_embeddings": True, "code_levels": [3, 4]},
    {"transformer": {"modulation": "shared"}, "head_bias": True, "share_head": False},
]


def keep_mask(order: Order) -> Tensor:
    """Every third position."""
    return torch.arange(order.layout.size) % 3 == 1


def setting(case: int, batch: int, guidance: int) -> tuple[str, Sampling, bool]:
    """Condition, sampling and whether positions are kept: spread so that all pairs occur in few runs."""
    turn = case + batch + guidance
    return list(CONDITIONS)[turn % 3], SAMPLINGS[(turn + 2 * batch) % 5], (case + batch * guidance) % 2 == 0


def test_the_settings_cover_all_pairs() -> None:
    seen = [
        (batch, guidance, *setting(case, batch, guidance))
        for case in range(len(ALL))
        for batch in range(3)
        for guidance in range(3)
    ]
    assert len({(b, g, kind, kept) for b, g, kind, _, kept in seen}) == 3 * 3 * 3 * 2
    assert len({(g, kind, id(sampling)) for _, g, kind, sampling, _ in seen}) == 3 * 3 * 5


@pytest.mark.parametrize("case", range(len(ALL)), ids=[f"{name}-{order}" for name, _, order in ALL])
def test_reference_equals_cached(case: int) -> None:
    """Token for token, for every order, batch size and guidance, over conditions, filters and kept positions."""
    _, cls, order = ALL[case]
    models = {kind: make(cls, order, kind, **FLAVOURS[case % len(FLAVOURS)]) for kind in CONDITIONS}
    for b, batch in enumerate((1, 2, 5)):
        for g, guidance in enumerate(GUIDANCES.values()):
            kind, sampling, kept = setting(case, b, g)
            model, condition = models[kind], conditions(kind, batch)
            options: dict[str, Any] = {
                "batch_size": batch if condition is None else None,
                "guidance": guidance,
                "sampling": sampling,
                "seeds": [100 + i for i in range(batch)],
            }
            if kept:
                options |= {"known": random_codes(order, batch), "keep": keep_mask(order)}
            reference = model.generate(condition, decode="reference", **options)
            cached = model.generate(condition, decode="cached", **options)
            assert reference.shape == (batch, order.layout.size) and reference.dtype == torch.long
            assert torch.equal(reference, cached), (batch, guidance, kind, sampling, kept)
            assert 0 <= int(cached.min()) <= int(cached.max()) < VOCAB
            if kept:
                assert torch.equal(cached[:, keep_mask(order)], options["known"][:, keep_mask(order)])


@pytest.mark.parametrize(("cls", "order"), CASES)
def test_samples_are_the_teacher_forced_logits_sampled(cls: type[Generator], order: Order) -> None:
    """Sampling the logits of the finished codes again gives the codes: greedy, and with every filter and guidance."""
    model, condition = make(cls, order, head_bias=True), conditions("words", 3)
    seeds = torch.tensor([4, 9, 2])
    for guidance, sampling in ((1.0, GREEDY), (1.0, Sampling()), (2.5, GREEDY), (2.5, SAMPLINGS[1])):
        codes = model.generate(condition, guidance=guidance, sampling=sampling, seeds=seeds)
        with torch.no_grad():
            logits = guide(model.logits(codes, condition), model.logits(codes), guidance)
        if sampling is GREEDY:
            assert torch.equal(logits.argmax(-1), codes)
        assert torch.equal(sample_tokens(logits, seeds, torch.arange(order.layout.size), sampling), codes)


@torch.no_grad()
@pytest.mark.parametrize("decode", ["reference", "cached"])
@pytest.mark.parametrize(("cls", "order"), CASES)
def test_step_logits_are_the_teacher_forced_logits(
    cls: type[Generator], order: Order, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With guidance that changes from step to step, at every position."""
    model, condition = make(cls, order, transformer={"modulation": "own"}), conditions("words", 2)
    recorded = torch.full((2, order.layout.size, VOCAB), torch.nan)

    def record(logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling) -> Tensor:
        recorded[:, positions] = logits
        return sample_tokens(logits, seeds, positions, sampling)

    monkeypatch.setattr(base.Generator, "draw", staticmethod(record))
    guidance = Guidance(3.0, schedule="linear")
    codes = model.generate(condition, guidance=guidance, seeds=1, decode=decode)
    progress = order.step / max(1, order.num_steps - 1)
    scale = torch.tensor([guidance.at(float(value)) for value in progress])[:, None]
    given, null = model.logits(codes, condition), model.logits(codes)
    torch.testing.assert_close(recorded, null + scale * (given - null), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cls", "order"), CASES)
def test_batch_composition(cls: type[Generator], order: Order) -> None:
    """A sample depends on its own seed and condition, not on its neighbours or its place."""
    model, condition = make(cls, order), conditions("words", 5)
    options: dict[str, Any] = {"guidance": 2.0, "sampling": Sampling(top_k=8)}
    seeds = [31, 2**63 + 5, 0, 7, 31]
    together = model.generate(condition, seeds=seeds, **options)
    places = [3, 0, 4, 1, 2]
    mixed = model.generate(condition[places], seeds=[seeds[place] for place in places], **options)
    assert torch.equal(mixed, together[places])
    alone = model.generate(condition[3:4], seeds=[seeds[3]], **options)
    assert torch.equal(alone[0], together[3])
    other = model.generate(condition, seeds=[seed + 1 for seed in seeds], **options)
    assert (other != together).any(1).sum() >= 4


def test_seeds() -> None:
    model = make(NextNeighborGenerator, GRID, "none")
    assert torch.equal(model.generate(batch_size=3, seeds=5), model.generate(batch_size=3, seeds=[5, 6, 7]))
    fresh = [model.generate(batch_size=2) for _ in range(3)]
    assert not torch.equal(fresh[0], fresh[1]) or not torch.equal(fresh[1], fresh[2])
    assert model.generate(seeds=5).shape == (1, 9)


# ---- kept positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "order"), CASES)
def test_kept_positions_influence_later_steps_alone(cls: type[Generator], order: Order) -> None:
    model, known = make(cls, order, "none"), random_codes(order, 4)
    position = int(order.permutation[0])
    keep = torch.zeros(order.layout.size, dtype=torch.bool)
    keep[position] = True
    other = known.clone()
    other[:, position] = (other[:, position] + 5) % VOCAB
    first = model.generate(batch_size=4, known=known, keep=keep, seeds=3)
    second = model.generate(batch_size=4, known=other, keep=keep, seeds=3)
    assert torch.equal(first[:, position], known[:, position])
    assert torch.equal(second[:, position], other[:, position])
    same_step = (order.step == 0) & ~keep
    assert torch.equal(first[:, same_step], second[:, same_step])
    if order.num_steps > 1:
        assert (first != second)[:, order.step > 0].any()


@pytest.mark.parametrize(("cls", "order"), CASES)
def test_continuation_and_full_keep(cls: type[Generator], order: Order) -> None:
    """Keeping what was generated gives it again; keeping everything returns it; codes not kept do not matter."""
    model, condition = make(cls, order), conditions("words", 2)
    codes = model.generate(condition, seeds=8, guidance=2.0)
    keep = torch.stack((order.step < order.num_steps // 2, order.step % 2 == 0))  # one mask a sample
    noise = torch.where(keep, codes, random_codes(order, 2, 99))
    again = model.generate(condition, seeds=8, guidance=2.0, known=noise, keep=keep)
    assert torch.equal(again, codes)
    known = random_codes(order, 2, 5)
    assert torch.equal(model.generate(condition, known=known, keep=torch.ones_like(keep)), known)
    shared = model.generate(condition, seeds=1, known=known[:1], keep=keep[:1])
    repeated = model.generate(condition, seeds=1, known=known[[0, 0]], keep=keep[[0, 0]])
    assert torch.equal(shared, repeated)


# ---- progress ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "order"), CASES)
def test_on_step(cls: type[Generator], order: Order) -> None:
    model, seen = make(cls, order, "none"), []
    codes = model.generate(batch_size=2, seeds=0, on_step=lambda step: seen.append(copy.deepcopy(step)))
    assert [step.index for step in seen] == list(range(order.num_steps))
    for step in seen:
        assert isinstance(step, Step) and step.num_steps == order.num_steps
        assert torch.equal(step.committed, order.step <= step.index)
        assert torch.equal(step.codes[:, step.committed], codes[:, step.committed])
        assert not step.codes[:, ~step.committed].any()


def test_schedules_see_progress_from_zero_to_one() -> None:
    seen: dict[str, list[float]] = {"guidance": [], "temperature": []}

    def guidance(progress: float) -> float:
        seen["guidance"].append(progress)
        return 1.0

    def temperature(progress: float) -> float:
        seen["temperature"].append(progress)
        return 1.0

    model = make(NextNeighborGenerator, GRID)
    plain = model.generate(conditions("words", 2), seeds=0)
    scheduled = model.generate(
        conditions("words", 2), seeds=0, guidance=guidance, sampling=Sampling(temperature=temperature)
    )
    assert seen["guidance"] == seen["temperature"] == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(plain, scheduled)


def test_guidance_one_runs_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make(NextBlockGenerator, GRID), []
    run = model.run_rows
    monkeypatch.setattr(
        model, "run_rows", lambda x, *args, **kw: batches.append(len(x)) or run(x, *args, **kw)
    )
    model.generate(conditions("words", 2), guidance=1.0)
    assert set(batches) == {2}
    model.generate(conditions("words", 2), guidance=1.5)
    assert set(batches) == {2, 4}


# ---- the rungs themselves ----------------------------------------------------------------------------------------


def test_the_reference_rung_feeds_everything_and_the_cached_one_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make(NextTokenGenerator, orders.raster(Layout.line(4)), "words")
    run, counts = model.run_rows, []
    monkeypatch.setattr(
        model, "run_rows", lambda x, *args, **kw: counts.append(x.shape[1]) or run(x, *args, **kw)
    )
    model.generate(decode="reference")
    model.generate(decode="cached")
    assert counts == [3, 4, 5, 6, 3, 1, 1, 1]


@torch.no_grad()
def test_auto_is_the_cached_rung_and_capacity_is_exact() -> None:
    model = make(NextBlockGenerator, GRID, "none")
    prefix = model.condition(None, 1, torch.device("cpu"))
    stepper = decoding.make("auto", model, prefix)
    assert type(stepper) is type(decoding.make("cached", model, prefix))
    assert stepper.cache.layers[0].keys.shape[2] == model.plan.capacity
    stepper.cache.commit(model.plan.capacity)
    with pytest.raises(TokenloomError, match=f"holds {model.plan.capacity} rows"):
        stepper(prefix, 0)
    with pytest.raises(TokenloomError, match=r"Unknown decode rung 'referense'.*'reference'"):
        decoding.make("referense", model, prefix)


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["reference", "cached"])
@pytest.mark.parametrize("name", ["token", "neighbor", "block"])
def test_bfloat16_with_guidance(name: str, decode: str) -> None:
    _, cls, order = next(case for case in ALL if case[0] == name)
    model = make(cls, order, transformer={"modulation": "own", "qk_norm": "l2"}, std=0.2).bfloat16()
    codes = model.generate(conditions("words", 2), guidance=3.0, seeds=0, decode=decode)
    assert codes.shape == (2, order.layout.size) and 0 <= int(codes.min()) <= int(codes.max()) < VOCAB
    with torch.no_grad():
        exact = copy.deepcopy(model).float().logits(codes, conditions("words", 2))
        rough = model.logits(codes, conditions("words", 2))
    assert rough.dtype == torch.bfloat16 and (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_autocast_uses_a_cache_of_its_dtype() -> None:
    """Under CPU autocast the two rungs see the same numbers up to the rounding of different kernels."""
    model, condition = (
        make(NextTokenGenerator, orders.raster(Layout.line(6)), std=0.2),
        conditions("words", 2),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prefix = model.condition(condition, 2, torch.device("cpu"))
        outputs = [decoding.make(name, model, prefix)(prefix, 0)[0] for name in ("reference", "cached")]
        codes = model.generate(condition, seeds=0, guidance=2.0)
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    assert codes.shape == (2, 6)


@pytest.mark.parametrize("decode", ["reference", "cached"])
def test_broken_weights_are_named(decode: str) -> None:
    model = make(NextNeighborGenerator, GRID)
    model.transformer.blocks[1].mlp.down.weight.data[0, 0] = torch.nan
    message = r"Step 0 of 5: .*NaN.*transformer\.blocks\.1\.mlp\.down\.weight are not finite"
    with pytest.raises(TokenloomError, match=message):
        model.generate(conditions("words", 1), decode=decode)
    model = make(NextNeighborGenerator, GRID, "none")
    model.tokens.codes.weight.data.fill_(torch.inf)  # first read at the second step
    with pytest.raises(TokenloomError, match=r"Step 1 of 5: .*tokens\.codes\.weight are not finite"):
        model.generate(decode=decode)


def test_overflow_is_told_from_damage() -> None:
    model = make(NextNeighborGenerator, GRID, "none")
    model.heads[0].weight.data.fill_(3e38)
    with pytest.raises(TokenloomError, match=r"All weights are finite.*overflowed in torch\.float32"):
        model.generate()
