"""Splits: the same everywhere, never overlapping, and fair to the model."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.data.splits import SPLITS, assign_splits, concept_id, is_unseen_concept, is_unseen_pair

STYLES = ("3d", "flat", "detailed", "blob", "muted", "simple", "glossy")
PAIRS = [(f"{point:x}", style) for point in range(0x1F300, 0x1F300 + 1200) for style in STYLES]

concepts = st.integers(0x1F300, 0x1F6FF).map(lambda point: f"{point:x}")
pair_lists = st.lists(st.tuples(concepts, st.sampled_from(STYLES)), max_size=120)


def test_concept_ids_have_one_spelling() -> None:
    assert concept_id("0023-FE0F-20E3") == "23-20e3"
    assert concept_id("1F3C3-200D-2640-FE0F") == "1f3c3-200d-2640"
    assert concept_id("00A9") == "a9"


def test_the_hash_is_sha1_and_never_changes() -> None:
    for concept in ("1f600", "1f9c5", "23-20e3", "1f34e", "1f697"):
        digest = hashlib.sha1(concept.encode()).digest()
        assert is_unseen_concept(concept) == (int.from_bytes(digest[:8], "big") < 0.05 * 2**64)
    known = [
        concept
        for concept in (f"{point:x}" for point in range(0x1F600, 0x1F680))
        if is_unseen_concept(concept)
    ]
    assert known == ["1f62b", "1f634", "1f66b"]


@settings(max_examples=60, deadline=None)
@given(pair_lists)
def test_val_concepts_are_never_trained_and_val_style_concepts_are(pairs: list[tuple[str, str]]) -> None:
    splits = assign_splits(pairs)
    assert set(splits) == set(pairs)
    assert set(splits.values()) <= set(SPLITS)
    trained = defaultdict(set)
    for (concept, style), split in splits.items():
        if split == "train":
            trained[concept].add(style)
    for (concept, style), split in splits.items():
        assert (split == "val") == is_unseen_concept(concept)
        if split == "val":
            assert concept not in trained
        if split == "val_style":
            assert is_unseen_pair(concept, style)
            assert len(trained[concept] - {style}) >= 2


@settings(max_examples=40, deadline=None)
@given(pair_lists, st.randoms(use_true_random=False))
def test_order_and_repeats_do_not_matter(pairs: list[tuple[str, str]], rng: object) -> None:
    shuffled = [*pairs, *pairs[:5]]
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign_splits(shuffled) == assign_splits(pairs)


def test_shares_are_about_five_percent() -> None:
    splits = list(assign_splits(PAIRS).values())
    assert 0.03 < splits.count("val") / len(splits) < 0.07
    assert 0.035 < splits.count("val_style") / len(splits) < 0.06


def test_a_rarely_drawn_concept_stays_in_training() -> None:
    held = [
        (concept, style)
        for concept, style in PAIRS
        if is_unseen_pair(concept, style) and not is_unseen_concept(concept)
    ]
    assert held
    for concept, style in held[:40]:
        other = next(name for name in STYLES if name != style and not is_unseen_pair(concept, name))
        assert assign_splits([(concept, style), (concept, other)])[concept, style] == "train"
