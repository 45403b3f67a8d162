"""Counter-based noise: known answers, exactness, statistics, invariances; and seeds."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.errors import TokenloomError
from tokenloom.rng import as_seeds, gumbel, noise, normal

WORD = 0xFFFFFFFF
IDS = torch.arange(512)

# (seed, position, id) -> the 32 bits behind the noise, and the Gumbel value; frozen: they must never change, or every
# published seed changes its picture.
KNOWN = [
    ((0, 0, 0), 0x8F97721F, 0.54782784),
    ((0, 0, 1), 0xEF5378F1, 2.6978445),
    ((0, 1, 0), 0x2A623EED, -0.58690399),
    ((1, 0, 0), 0xD07BBC93, 1.5831939),
    ((42, 255, 4095), 0xD883A569, 1.7866459),
    ((2**64 - 1, 5119, 96015), 0x4FB70655, -0.15419676),
    ((2**63, 7, 7), 0x80921D02, 0.37295231),
    ((123456789012345678, 2**31, 2**32 - 1), 0x2E6B202D, -0.53501874),
]


def reference_bits(seed: int, position: int, vocabulary_id: int, *more: int) -> int:
    """The documented hash in plain integers of any size."""

    def finalise(word: int) -> int:
        word ^= word >> 16
        word = word * 0x85EBCA6B & WORD
        word ^= word >> 13
        word = word * 0xC2B2AE35 & WORD
        return word ^ word >> 16

    def chain(start: int) -> int:
        word = start
        for part in (seed & WORD, seed >> 32, position & WORD, *more):
            word = finalise((word ^ part) + 0x9E3779B9 & WORD)
        return word

    offset, multiplier = chain(0x243F6A88), chain(0x85A308D3) | 1
    return finalise(offset + multiplier * (vocabulary_id & WORD) & WORD) ^ 0x80000000


def as_long(seeds: list[int]) -> torch.Tensor:
    """Seeds as a LongTensor (B, 1, 1)."""
    return as_seeds(seeds, len(seeds))[:, None, None]


def rows(seeds: int, positions: int, ids: int) -> torch.Tensor:
    """Noise (seeds, positions, ids) from zero up."""
    return noise(
        torch.arange(seeds)[:, None, None], torch.arange(positions)[None, :, None], torch.arange(ids)
    )


def chi_square(counts: np.ndarray) -> float:
    """Standard score of Pearson's statistic against equal frequencies."""
    freedom = counts.size - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("where", "bits", "value"), KNOWN)
def test_known_answers(where, bits, value):
    assert reference_bits(*where) == bits
    expected = np.float32((bits + 0.5) / 2**32)
    seed, position, vocabulary_id = where
    assert noise(*where).item() == expected
    assert noise(as_long([seed])[0, 0], position, torch.tensor([vocabulary_id])).item() == expected
    assert gumbel(*where).item() == pytest.approx(value, rel=1e-6)
    assert gumbel(*where).item() == np.float32(-math.log(-math.log((bits + 0.5) / 2**32)))


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_equals_the_big_integer_reference(seed, position, ids):
    expected = np.array([(reference_bits(seed, position, i) + 0.5) / 2**32 for i in ids])
    drawn = noise(as_long([seed])[0, 0], torch.tensor(position), torch.tensor(ids)).numpy()
    np.testing.assert_array_equal(drawn, np.minimum(expected.astype(np.float32), np.float32(1 - 2**-24)))


def test_open_interval_and_dtype():
    draws = rows(8, 16, 4096)
    assert draws.dtype == torch.float32
    assert draws.min() > 0
    assert draws.max() < 1
    # The largest hash rounds to 1.0 in float32 and must be held below it: invert the hash to find an id that gives it.
    top = noise(0, 0, inverse_id(WORD ^ 0x80000000))
    assert top.item() == np.float32(1 - 2**-24)
    assert noise(0, 0, inverse_id(0x80000000)).item() == np.float32(2.0**-33)
    assert gumbel(0, 0, inverse_id(WORD ^ 0x80000000)).item() == pytest.approx(-math.log(2.0**-33), rel=1e-6)
    assert gumbel(0, 0, inverse_id(0x80000000)).item() == pytest.approx(-math.log(33 * math.log(2)), rel=1e-6)


def inverse_id(target: int) -> int:
    """The id whose finalised word is `target`, at seed 0 and position 0."""

    def undo_fold(word: int, shift: int) -> int:
        result = word
        for _ in range(32 // shift + 1):
            result = word ^ result >> shift
        return result

    word = undo_fold(target, 16) * pow(0xC2B2AE35, -1, 2**32) & WORD
    word = undo_fold(word, 13) * pow(0x85EBCA6B, -1, 2**32) & WORD
    word = undo_fold(word, 16)
    offset, multiplier = 0x243F6A88, 0x85A308D3
    for _ in range(3):
        offset, multiplier = (forward(offset), forward(multiplier))
    return (word - offset) * pow(multiplier | 1, -1, 2**32) & WORD


def forward(word: int) -> int:
    """One link of the row hash for an all-zero word of seed or position."""
    word = word + 0x9E3779B9 & WORD
    word ^= word >> 16
    word = word * 0x85EBCA6B & WORD
    word ^= word >> 13
    word = word * 0xC2B2AE35 & WORD
    return word ^ word >> 16


@pytest.mark.parametrize("axis", ["seed", "position", "id"])
def test_uniform_along_each_axis(axis):
    counter = torch.arange(1 << 17)
    arguments = {"seed": (counter, 3, 5), "position": (7, counter, 5), "id": (7, 3, counter)}[axis]
    draws = noise(*arguments).numpy()
    assert abs(chi_square(np.bincount((draws * 1024).astype(int), minlength=1024))) < 4
    low_bits = (draws.astype(np.float64) * 2**22 % 256).astype(int)  # below the leading 14 bits
    assert abs(chi_square(np.bincount(low_bits, minlength=256))) < 4


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 16])
def test_neighbouring_counters_are_independent(axis, distance):
    shape = [4, 4, 512]
    shape[axis] = max(shape[axis], 128)
    draws = rows(*shape)
    first = draws.narrow(axis, 0, shape[axis] - distance).flatten().numpy()
    second = draws.narrow(axis, distance, shape[axis] - distance).flatten().numpy()
    assert abs(np.corrcoef(first, second)[0, 1]) * math.sqrt(first.size) < 4
    pairs = (first * 16).astype(int) * 16 + (second * 16).astype(int)
    assert abs(chi_square(np.bincount(pairs, minlength=256))) < 4


def test_the_high_word_of_a_seed_matters():
    near = noise(as_long([5, 5 + 2**32, 5 + 2**63]), torch.zeros(1, 1, dtype=torch.long), IDS).flatten(1)
    assert torch.corrcoef(near).triu(1).abs().max() < 4 / math.sqrt(IDS.numel())


def test_seed_position_and_id_are_not_interchangeable():
    swapped = torch.stack([noise(3, 5, IDS), noise(5, 3, IDS), noise(3, IDS, 5), noise(IDS, 3, 5)])
    assert torch.corrcoef(swapped).triu(1).abs().max() < 4 / math.sqrt(IDS.numel())


def test_no_two_rows_share_their_noise():
    draws = rows(64, 256, 4).flatten(0, 1)
    assert draws.unique(dim=0).shape[0] == draws.shape[0]


@settings(deadline=None)
@given(st.data())
def test_slices_of_a_draw_equal_the_draw_of_slices(data):
    seeds, positions = as_long([0, 9, 2**64 - 1]), torch.arange(5)[None, :, None]
    whole = gumbel(seeds, positions, torch.arange(32))
    b, n = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 4))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 31), min_size=1, max_size=8)))
    assert torch.equal(
        gumbel(seeds[b : b + 1], positions[:, n : n + 1], ids), whole[b : b + 1, n : n + 1, ids]
    )
    assert torch.equal(gumbel(seeds[b, 0, 0], torch.tensor(n), ids[0]), whole[b, n, ids[0]])


def test_noise_is_untouched_by_the_caller():
    first = noise(1, 2, IDS)
    kept = first.clone()
    first.zero_()
    assert torch.equal(noise(1, 2, IDS), kept)
    ids = IDS.clone()
    gumbel(1, 2, ids.to(torch.int32))
    assert torch.equal(ids, IDS)


def test_gumbel_moments():
    draws = gumbel(torch.arange(64)[:, None, None], torch.arange(16)[None, :, None], IDS).double()
    count = draws.numel()
    assert draws.mean().item() == pytest.approx(0.5772156649, abs=4 * math.pi / math.sqrt(6 * count))
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, rel=4 * math.sqrt(4.4 / count))


@settings(deadline=None)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
)
def test_normal_is_the_inverse_distribution_of_the_hash(seed, position, channel, draw):
    uniform = (reference_bits(seed, position, channel, draw) + 0.5) / 2**32
    drawn = normal(as_long([seed])[0, 0], torch.tensor(position), torch.tensor([channel]), draw)
    assert drawn.dtype == torch.float32
    assert drawn.item() == pytest.approx(NormalDist().inv_cdf(uniform), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("axis", ["seed", "position", "channel", "draw"])
def test_normal_along_each_axis(axis):
    counter = torch.arange(1 << 16)
    where = {"seed": 7, "position": 3, "channel": 5, "draw": 2} | {axis: counter}
    draws = normal(**where).double()
    assert abs(draws.mean().item()) * 2**8 < 4
    assert draws.var().item() == pytest.approx(1, abs=4 * math.sqrt(2) / 2**8)
    assert draws.pow(4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96) / 2**8)
    bins = (torch.special.ndtr(draws) * 256).long().clamp(max=255)
    assert abs(chi_square(np.bincount(bins.numpy(), minlength=256))) < 4


def test_normal_of_draws_and_codes_are_independent():
    rows = [normal(3, 5, IDS, draw) for draw in (0, 1, 2, 4096)]
    uniform = torch.special.ndtri(noise(3, 5, IDS).double()).float()
    assert torch.corrcoef(torch.stack([*rows, uniform])).triu(1).abs().max() < 4 / math.sqrt(IDS.numel())
    whole = normal(as_long([4, 9]), torch.arange(5)[:, None], torch.arange(8), draw=3)
    assert torch.equal(normal(as_long([9]), torch.tensor([[2]]), torch.tensor([7]), 3)[0, 0], whole[1, 2, 7:])


def test_scalars_give_a_scalar():
    assert noise(0, 0, 0).shape == ()
    assert normal(0, 0, 0).shape == ()
    assert gumbel(0, torch.arange(3), 0).shape == (3,)


def test_as_seeds_from_an_int_counts_up():
    assert as_seeds(7, 3).tolist() == [7, 8, 9]
    assert as_seeds(2**63 - 1, 2).tolist() == [2**63 - 1, -(2**63)]
    assert as_seeds(np.int64(3), 1).tolist() == [3]
    assert as_seeds(7, 3, "meta").device.type == "meta"


def test_as_seeds_from_a_sequence_or_tensor():
    assert as_seeds([1, 2**64 - 1], 2).tolist() == [1, -1]
    assert as_seeds((4,), 1).tolist() == [4]
    assert as_seeds(torch.tensor([5, 6], dtype=torch.int32), 2).tolist() == [5, 6]
    assert as_seeds(torch.tensor(5), 2).tolist() == [5, 6]
    held = as_seeds([2**64 - 1, 0], 2)
    assert torch.equal(as_seeds(held, 2), held)
    assert held.dtype == torch.int64


def test_as_seeds_none_is_fresh():
    seeds = as_seeds(None, 64)
    assert seeds.shape == (64,)
    assert seeds.unique().numel() == 64
    assert (seeds < 0).any() and (seeds > 0).any()  # all 64 bits are used
    assert not torch.equal(seeds, as_seeds(None, 64))


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1], "one seed per sample, 2 in all, got 1"),
        (torch.tensor([1, 2, 3]), "one seed per sample"),
        (torch.tensor([1.0, 2.0]), r"\.long\(\)"),
        (torch.tensor([True, False]), "integers"),
        (-1, "got -1"),
        ([0, -5], "got -5"),
        (2**64, "got 18446744073709551616"),
        (2**64 - 1, "got 18446744073709551616"),
        ([0, 2**64], "2\\*\\*64"),
        (1.5, "integer, got 1.5"),
        ("12", "integer, got '12'"),
        ([True, False], "integer, got True"),
    ],
)
def test_bad_seeds_are_named(seeds, message):
    with pytest.raises(TokenloomError, match=message):
        as_seeds(seeds, 2)


def test_noise_refuses_a_seed_that_does_not_fit():
    with pytest.raises(TokenloomError, match="got -1"):
        noise(-1, 0, 0)
