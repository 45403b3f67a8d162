"""Sampling: distribution, filters against slow references and golden outputs, invariances, guidance, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tokenloom.errors import TokenloomError
from tokenloom.generators import sampling as module
from tokenloom.generators.sampling import Guidance, Sampling, guide, sample_tokens
from tokenloom.rng import as_seeds, gumbel

GOLDEN = Path(__file__).parent / "fixtures" / "filter_probs.safetensors"
RULES = ["descending", "ascending"]


def slow_filter(logits: np.ndarray, temperature: float, top_k: int, top_p: float, nucleus: str) -> np.ndarray:
    """Which ids of one row of logits are kept, id by id, in plain Python; the meaning of the filters."""
    ranked = sorted(
        range(len(logits)), key=lambda i: (-logits[i], i)
    )  # best first, lower id first among equals
    kept = [i for i in ranked if logits[i] > -math.inf]
    if top_k:
        kept = [i for i in kept if sum(logits[j] > logits[i] for j in kept) < top_k]
    weights = [math.exp((logits[i] - logits[kept[0]]) / temperature) for i in kept]
    mass = [weight / math.fsum(weights) for weight in weights]
    result = np.zeros(len(logits), dtype=bool)
    for rank, i in enumerate(kept):
        if top_p == 1:
            result[i] = True
        elif nucleus == "descending":
            result[i] = math.fsum(mass[:rank]) <= top_p + 1e-9
        else:
            result[i] = math.fsum(mass[rank:]) > 1 - top_p + 1e-9
        result[i] |= rank == 0
    return result


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    """One row (V,): smooth, tied, one-hot, all equal, with forbidden ids."""
    size = draw(st.integers(1, 24))
    values = draw(
        st.sampled_from(
            [
                st.integers(-8192, 8192).map(lambda value: value / 1024),  # apart by more than rounding
                st.integers(-2, 2).map(float),  # many ties
                st.sampled_from([0.0, 30.0]),  # one-hot and several-hot
                st.just(1.5),  # all equal
                st.sampled_from([0.0, 1.0, -math.inf]),  # forbidden ids
            ]
        )
    )
    row = draw(st.lists(values, min_size=size, max_size=size))
    if max(row) == -math.inf:
        row[draw(st.integers(0, size - 1))] = 0.0
    return torch.tensor(row)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1e-12, 0.25, 0.5, 0.8, 0.9, 0.999, 1.0]),
    nucleus=st.sampled_from(RULES),
)


def draws(row: torch.Tensor, count: int, sampling: Sampling) -> np.ndarray:
    """Frequencies of `count` draws (4 samples, many positions) from one row of logits."""
    logits = row.expand(4, count // 4, -1)
    tokens = sample_tokens(logits, as_seeds(11, 4), torch.arange(count // 4), sampling)
    return tokens.flatten().bincount(minlength=row.numel()).double().numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_follow_the_softmax(temperature):
    row = torch.tensor([2.0, -1.0, 0.0, 0.5, 1.9, -math.inf, 0.0, -3.0])
    count = 20000
    expected = (row / temperature).softmax(0).double().numpy() * count
    observed = draws(row, count, Sampling(temperature))
    assert observed[5] == 0
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    assert statistic < 24.3  # 6 degrees of freedom, p = 0.0005


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=3), Sampling(top_p=0.7), Sampling(2.0, 5, 0.8, "ascending")]
)
def test_tokens_follow_the_filtered_softmax(sampling):
    row = torch.tensor([2.0, -1.0, 0.0, 0.5, 1.9, -math.inf, 0.0, -3.0])
    count = 20000
    expected = (sampling.filter(row) / sampling.temperature).softmax(0).double().numpy() * count
    observed = draws(row, count, sampling)
    used = expected > 0
    assert observed[~used].sum() == 0
    assert 1 < used.sum() < 7
    assert ((observed - expected)[used] ** 2 / expected[used]).sum() < 20.5  # at most 4 degrees, p = 0.0004


@settings(max_examples=150, deadline=None)
@given(rows_of_logits(), SAMPLINGS)
def test_filter_equals_the_slow_reference(row, sampling):
    filtered = sampling.filter(row)
    expected = slow_filter(
        row.double().numpy(), sampling.temperature, sampling.top_k, sampling.top_p, sampling.nucleus
    )
    np.testing.assert_array_equal((filtered > -math.inf).numpy(), expected)
    assert torch.equal(filtered[expected], row[expected])


@pytest.mark.parametrize(("family", "nucleus"), [("var", "ascending"), ("llamagen", "descending")])
@pytest.mark.parametrize(
    ("name", "top_k", "top_p"), [("k20", 20, 1.0), ("k20_p80", 20, 0.8), ("p90", 0, 0.9)]
)
def test_filters_equal_the_official_ones(family, nucleus, name, top_k, top_p):
    golden = load_file(GOLDEN)
    expected = golden[f"{family}.probs_{name}"]
    found = Sampling(top_k=top_k, top_p=top_p, nucleus=nucleus).filter(golden[f"{family}.logits"]).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(found > 0, expected > 0)


def test_the_two_nucleus_rules_differ_where_they_should():
    quarters = torch.zeros(4)  # four ids of mass 1/4
    kept = {
        (rule, p): int((Sampling(top_p=p, nucleus=rule).filter(quarters) > -math.inf).sum())
        for rule in RULES
        for p in (0.4, 0.5, 0.6)
    }
    assert kept["descending", 0.5] == 3  # the two before the third id hold 0.5, which does not exceed 0.5
    assert kept["ascending", 0.5] == 2  # the last two together are at most 0.5
    assert kept["descending", 0.4] == kept["ascending", 0.4] == 2
    assert kept["descending", 0.6] == kept["ascending", 0.6] == 3


@pytest.mark.parametrize("size", [3, 7, 10, 48])
def test_a_mass_that_equals_the_threshold_is_not_left_to_rounding(size):
    equal = torch.full((size,), 1.5)
    for share in range(1, size):
        descending = Sampling(top_p=share / size).filter(equal) > -math.inf
        ascending = Sampling(top_p=share / size, nucleus="ascending").filter(equal) > -math.inf
        assert descending.tolist() == [i <= share for i in range(size)]
        assert ascending.tolist() == [i < share for i in range(size)]


def test_top_k_keeps_ties_and_comes_before_top_p():
    row = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 0.0])
    assert (Sampling(top_k=3).filter(row) > -math.inf).tolist() == [True, True, True, True, True, False]
    row = torch.tensor([0.4, 0.3, 0.3]).log()
    # Of the two best (renormalised: 4/7 and 3/7) the first passes 0.5 alone; of all three it does not.
    assert (Sampling(top_k=1, top_p=0.5).filter(row) > -math.inf).tolist() == [True, False, False]
    row = torch.tensor([0.4, 0.35, 0.25]).log()
    assert (Sampling(top_k=2, top_p=0.5).filter(row) > -math.inf).tolist() == [True, False, False]
    assert (Sampling(top_p=0.5).filter(row) > -math.inf).tolist() == [True, True, False]


@settings(max_examples=200, deadline=None)
@given(st.data(), SAMPLINGS)
def test_drawing_equals_the_formula_on_the_whole_vocabulary(data, sampling):
    """The noise of kept ids alone gives what the noise of all ids gives, ties at the k-th value included."""
    size = data.draw(st.integers(2, 24))
    ties = data.draw(st.sampled_from([1, 2, 8]))  # logits on a coarse grid tie often
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = (torch.randn(3, 4, size, generator=generator) * ties).round() / ties
    if data.draw(st.booleans()):
        logits[:, :, 1:].masked_fill_(torch.rand(3, 4, size - 1, generator=generator) < 0.5, -math.inf)
    seeds, positions = as_seeds([3, 2**63, 2**64 - 1], 3), torch.tensor([5, 0, 77, 6])
    noise = gumbel(seeds[:, None, None], positions[None, :, None], torch.arange(size))
    best = logits.amax(-1, keepdim=True)
    expected = ((sampling.filter(logits) - best) / sampling.temperature + noise).argmax(-1)
    assert torch.equal(sample_tokens(logits, seeds, positions, sampling), expected)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=40), Sampling(0.7, 40, 0.9), Sampling(top_p=0.9)]
)
def test_bfloat16_ties_draw_like_the_whole_vocabulary(sampling):
    logits = torch.randn(2, 16, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    at_the_edge = (logits >= logits.topk(40).values[..., -1:]).sum(-1)
    assert at_the_edge.max() > 40  # the case that matters does occur
    seeds, positions = as_seeds(0, 2), torch.arange(16)
    filtered, best = sampling.filter(logits), logits.float().amax(-1, keepdim=True)
    noise = gumbel(seeds[:, None, None], positions[None, :, None], torch.arange(512))
    expected = ((filtered - best) / sampling.temperature + noise).argmax(-1)
    assert torch.equal(sample_tokens(logits, seeds, positions, sampling), expected)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=9), Sampling(0.8, 20, 0.9, "ascending")])
def test_a_token_depends_on_its_own_seed_position_and_logits_alone(sampling):
    logits = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))
    seeds, positions = as_seeds(5, 4), torch.tensor([0, 9, 4, 31, 2, 8])
    whole = sample_tokens(logits, seeds, positions, sampling)
    for b in range(4):
        for n in range(6):
            one = sample_tokens(
                logits[b : b + 1, n : n + 1], seeds[b : b + 1], positions[n : n + 1], sampling
            )
            assert one.item() == whole[b, n]
    shuffle = torch.tensor([2, 0, 3, 1])
    assert torch.equal(sample_tokens(logits[shuffle], seeds[shuffle], positions, sampling), whole[shuffle])
    per_sample = positions.expand(4, -1).clone()
    assert torch.equal(sample_tokens(logits, seeds, per_sample, sampling), whole)
    per_sample[1] += 100
    assert torch.equal(sample_tokens(logits, seeds, per_sample, sampling)[[0, 2, 3]], whole[[0, 2, 3]])


def test_seeds_and_positions_change_the_tokens():
    logits = torch.zeros(1, 64, 256)
    first = sample_tokens(logits, as_seeds(0, 1), torch.arange(64))
    assert (first == sample_tokens(logits, as_seeds(1, 1), torch.arange(64))).float().mean() < 0.1
    assert (first == sample_tokens(logits, as_seeds(0, 1), torch.arange(64) + 64)).float().mean() < 0.1
    assert first.unique().numel() > 32


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-math.inf, 0.0, -1.0, 0.0]]])
    for sampling in (Sampling(0), Sampling(0.0, top_k=2), Sampling(0, top_p=0.1)):
        assert sample_tokens(logits, as_seeds(0, 1), torch.arange(3), sampling).tolist() == [[1, 0, 1]]
        assert (sampling.filter(logits) > -math.inf).sum(-1).tolist() == [[1, 1, 1]]
        assert (sampling.filter(logits) > -math.inf).float().argmax(-1).tolist() == [[1, 0, 1]]


def test_a_tiny_temperature_is_greedy_where_the_maximum_is_unique():
    logits = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    for temperature in (1e-12, 1e-44, 5e-324):
        tokens = sample_tokens(logits, as_seeds(0, 2), torch.arange(5), Sampling(temperature))
        assert torch.equal(tokens, logits.argmax(-1))


def test_top_k_of_one_is_greedy_and_a_large_one_is_no_filter():
    logits = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    seeds, positions = as_seeds(0, 2), torch.arange(5)
    assert torch.equal(sample_tokens(logits, seeds, positions, Sampling(top_k=1)), logits.argmax(-1))
    free = sample_tokens(logits, seeds, positions)
    for top_k in (0, 32, 999):
        assert torch.equal(sample_tokens(logits, seeds, positions, Sampling(top_k=top_k)), free)


def test_inputs_are_left_alone():
    logits = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    kept = logits.clone()
    for sampling in (Sampling(), Sampling(2.0, 7, 0.8), Sampling(top_p=0.5), Sampling(0)):
        sample_tokens(logits, as_seeds(0, 2), torch.arange(5), sampling)
        sampling.filter(logits)
        assert torch.equal(logits, kept)


def test_noise_is_drawn_for_the_kept_ids_only(monkeypatch):
    asked = []

    def spy(seed, position, ids):
        asked.append(ids.shape[-1])
        return gumbel(seed, position, ids)

    monkeypatch.setattr(module, "gumbel", spy)
    logits = torch.randn(2, 5, 4096, generator=torch.Generator().manual_seed(5))
    sample_tokens(logits, as_seeds(0, 2), torch.arange(5), Sampling(top_k=100))
    assert asked == [101]


@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "only -inf.*forbidden")]
)
def test_unusable_logits_are_named(value, word):
    logits = torch.zeros(2, 3, 4)
    logits[1, 2] = value
    for sampling in (Sampling(), Sampling(0), Sampling(top_k=2)):
        with pytest.raises(TokenloomError, match=rf"{word}.*in 1 of 6 positions, first at index \[1, 2\]"):
            sample_tokens(logits, as_seeds(0, 2), torch.arange(3), sampling)
        with pytest.raises(TokenloomError, match=word):
            sampling.filter(logits)
    logits[1, 2] = 0
    logits[1, 2, 0] = value
    if value == -math.inf:
        assert sample_tokens(logits, as_seeds(0, 2), torch.arange(3))[1, 2] != 0
    else:
        with pytest.raises(TokenloomError, match=word):
            sample_tokens(logits, as_seeds(0, 2), torch.arange(3))


def test_the_check_can_be_left_out():
    logits = torch.full((1, 1, 4), math.nan)
    assert sample_tokens(logits, as_seeds(0, 1), torch.arange(1), check=False).shape == (1, 1)


def test_schedules_are_resolved_by_progress():
    sampling = Sampling(
        lambda r: 2 - r, top_k=lambda r: 1 + round(9 * r), top_p=lambda r: 1 - r / 2, nucleus="ascending"
    )
    assert not sampling.resolved
    assert sampling.at(0) == Sampling(2.0, 1, 1.0, "ascending")
    assert sampling.at(1) == Sampling(1.0, 10, 0.5, "ascending")
    plain = Sampling(0.5, 3)
    assert plain.at(0.3) is plain
    assert len({Sampling(), Sampling(1), Sampling(1.0, 0, 1.0)}) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sampling(-0.1), "at least 0, got -0.1. Use 0 for greedy"),
        (lambda: Sampling(math.nan), "finite"),
        (lambda: Sampling("hot"), "must be a number, got 'hot'"),
        (lambda: Sampling(top_k=1.5), "integer, got 1.5"),
        (lambda: Sampling(top_k=-1), "at least 0, got -1"),
        (lambda: Sampling(top_k=True), "got True"),
        (lambda: Sampling(top_p=0), r"\(0, 1\], got 0. Use 1"),
        (lambda: Sampling(top_p=1.01), "got 1.01"),
        (lambda: Sampling(top_p=math.nan), "finite"),
        (lambda: Sampling(nucleus="decending"), "Did you mean 'descending'"),
        (lambda: Sampling(lambda r: -1.0).at(0.5), "at least 0, got -1.0"),
        (lambda: Sampling(top_k=lambda r: 2.5).at(0.5), "integer, got 2.5"),
        (lambda: Sampling().at(1.5), r"Progress must be in \[0, 1\], got 1.5"),
        (
            lambda: Sampling(lambda r: 1.0).filter(torch.zeros(3)),
            r"Resolve it first with sampling.at\(progress\)",
        ),
        (lambda: Sampling().filter(torch.zeros(3).long()), "floating-point"),
        (lambda: sample(torch.zeros(3, 4)), r"\(B, n, V\), got shape \(3, 4\)"),
        (lambda: sample(torch.zeros(3, 2, 4)), r"Expected seeds \(3,\)"),
        (lambda: sample(torch.zeros(2, 5, 4)), r"Expected positions \(5,\) or \(2, 5\), got \(3,\)"),
        (lambda: sample(torch.zeros(2, 3, 4).int()), "floating-point logits"),
        (lambda: sample(torch.zeros(2, 3, 0)), "floating-point logits"),
        (lambda: sample(torch.zeros(2, 3, 4), Sampling(top_k=lambda r: 3)), "Resolve it first"),
    ],
)
def test_mistakes_are_named_with_the_fix(build, message):
    with pytest.raises(TokenloomError, match=message):
        build()


def sample(logits: torch.Tensor, sampling: Sampling | None = None) -> torch.Tensor:
    return sample_tokens(logits, as_seeds(0, 2), torch.arange(3), sampling)


def test_guidance_schedules():
    assert Guidance().at(0.5) == 1.0
    assert Guidance(3.0).at(0.0) == Guidance(3.0).at(1.0) == 3.0
    ramp = Guidance(2.5, "linear")  # VAR's cfg = 1.5
    assert [ramp.at(step / 4) for step in range(5)] == [1.0, 1.375, 1.75, 2.125, 2.5]
    assert Guidance(8.0, "linear", start=1.2).at(0) == 1.2
    assert Guidance(8.0, "linear", start=1.2).at(1) == 8.0
    assert Guidance(schedule=lambda r: 1 + 3 * r**2).at(0.5) == 1.75
    late = Guidance(3.0, interval=(0.25, 0.5))
    assert [late.at(r) for r in (0.0, 0.25, 0.5, 0.51)] == [1.0, 3.0, 3.0, 1.0]


def test_guidance_of_and_enabled():
    assert Guidance.of(2) == Guidance(2.0)
    assert Guidance.of(Guidance(2.0)) == Guidance(2.0)
    square = math.sqrt
    assert Guidance.of(square) == Guidance(schedule=square)
    assert hash(Guidance(2, interval=[0, 1])) == hash(Guidance(2.0))
    assert not Guidance().enabled
    assert not Guidance(schedule="linear").enabled
    assert (
        Guidance(2.0).enabled and Guidance(1.0, "linear", start=3.0).enabled and Guidance.of(square).enabled
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Guidance(math.inf), "finite"),
        (lambda: Guidance("4"), "number, got '4'"),
        (lambda: Guidance(2.0, "linaer"), "'linear'"),
        (lambda: Guidance(2.0, math.sqrt), "Leave both out"),
        (lambda: Guidance(2.0, interval=(0.5, 0.2)), "low <= high"),
        (lambda: Guidance(2.0, interval=(0.5, 1.2)), "low <= high"),
        (lambda: Guidance(2.0, interval=0.5), "pair"),
        (lambda: Guidance(2.0).at(-0.1), "Progress"),
        (lambda: Guidance.of(lambda r: math.nan).at(0.5), "finite"),
    ],
)
def test_bad_guidance_is_named(build, message):
    with pytest.raises(TokenloomError, match=message):
        build()


def test_guide_is_the_one_formula():
    cond, uncond = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 2.0, 1.0])
    assert guide(cond, uncond, 3.0).tolist() == [3.0, 2.0, -5.0]
    assert guide(cond, uncond, 0.0).tolist() == uncond.tolist()
    assert torch.equal(guide(cond, uncond, 1.0), cond)
    scale = 1.7  # VAR writes (1 + t) c - t u with t = scale - 1
    torch.testing.assert_close(guide(cond, uncond, scale), scale * cond - (scale - 1) * uncond)
    half = guide(cond.bfloat16(), uncond.bfloat16(), 1.7)
    assert half.dtype == torch.float32
    assert guide(cond.double(), uncond.double(), 2.0).dtype == torch.float64
