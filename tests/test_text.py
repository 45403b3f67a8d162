"""WordTokenizer: words, unknown words, plurals, lengths, files, and bad input."""

from __future__ import annotations

import json

import pytest
import torch

from tokenloom import TokenloomError, WordTokenizer
from tokenloom.tokenizers.text import split_words

WORDS = ["red", "apple", "boxes", "cherry", "dress", "café"]


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer(WORDS, max_length=4)


def test_known_words_get_their_ids_in_order(words):
    assert words("a picture of the Red, APPLE!").tolist() == [[2, 3, 0, 0]]
    assert words("apple red").tolist() == [[3, 2, 0, 0]]
    assert words("café").tolist() == [[7, 0, 0, 0]]
    assert words(["red"]).dtype == torch.long
    assert len(words) == len(WORDS) + 2


def test_unknown_words_degrade(words):
    assert words("red zeppelin apple").tolist() == [[2, 1, 3, 0]]
    assert words.unknown("a red zeppelin of apples and qwertz") == ["zeppelin", "qwertz"]


@pytest.mark.parametrize(
    ("text", "word"), [("apples", "apple"), ("dresses", "dress"), ("box", None), ("cherries", "cherry")]
)
def test_plurals_fall_back_to_the_singular(words, text, word):
    assert words(text)[0, 0] == (1 if word is None else WORDS.index(word) + 2)


def test_a_singular_falls_back_to_a_known_plural():
    assert WordTokenizer(["shoes"])("shoe")[0, 0] == 2


def test_an_exact_word_wins_over_its_singular():
    assert WordTokenizer(["glass", "glas"])("glass")[0, 0] == 2


def test_fillers_punctuation_and_case_vanish():
    assert split_words("The photo, of a Picture-with 3 o'clock  KITTENS_and") == ["3", "o'clock", "kittens"]


@pytest.mark.parametrize("text", ["", "   ", "a picture of the", "?!,.", "\n\t"])
def test_texts_without_words_are_the_null_condition(words, text):
    assert words(text).tolist() == [[0, 0, 0, 0]]
    assert words.unknown(text) == []


def test_long_texts_are_cut(words):
    assert words("red apple red apple cherry").tolist() == [[2, 3, 2, 3]]
    assert words("x" * 10_000).tolist() == [[1, 0, 0, 0]]
    assert words("red apple " * 1_000).tolist() == [[2, 3, 2, 3]]


def test_batches(words):
    assert words(["red", "", "apple dress"]).tolist() == [[2, 0, 0, 0], [0, 0, 0, 0], [3, 6, 0, 0]]
    assert words([]).shape == (0, 4)
    with pytest.raises(TokenloomError, match="place 1 of the list, got 3"):
        words(["red", 3])


def test_vocabulary_of_captions_is_sorted_by_captions_not_by_mentions():
    captions = ["a red apple", "red red red lion", "the red apple", "lion apple", "zebra zebra"]
    assert WordTokenizer.from_captions(captions).vocabulary == ["apple", "red", "lion", "zebra"]
    assert WordTokenizer.from_captions(captions, min_count=2).vocabulary == ["apple", "red", "lion"]


def test_saved_vocabulary_is_the_same(words, tmp_path):
    words.save_pretrained(tmp_path / "new" / "folder")
    loaded = WordTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.vocabulary == WORDS
    assert loaded.max_length == 4
    text = "red zeppelin cafés"
    assert torch.equal(loaded(text), words(text))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"words"',
        b"\xff\xfe\x00\x80",
        b'{"words": ["red"]}',
        b'{"max_length": 3}',
        b'{"words": "red", "max_length": 3}',
        b'{"words": [1, 2], "max_length": 3}',
        b'{"words": ["red"], "max_length": "three"}',
        b'{"words": ["red"], "max_length": 0}',
        b'{"words": null, "max_length": 3}',
    ],
)
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / "vocabulary.json").write_bytes(content)
    with pytest.raises(TokenloomError, match=r"vocabulary\.json is not a vocabulary file"):
        WordTokenizer.from_pretrained(tmp_path)


def test_a_truncated_file_is_named(words, tmp_path):
    words.save_pretrained(tmp_path)
    path = tmp_path / "vocabulary.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(TokenloomError, match="save it again"):
        WordTokenizer.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenloomError, match=r"Cannot read .*vocabulary"):
        WordTokenizer.from_pretrained(tmp_path)


def test_the_file_is_plain_json(words, tmp_path):
    words.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8"))
    assert content == {"max_length": 4, "words": WORDS}


def test_a_length_below_one_is_refused():
    with pytest.raises(TokenloomError, match="at least 1, got 0"):
        WordTokenizer(WORDS, max_length=0)
