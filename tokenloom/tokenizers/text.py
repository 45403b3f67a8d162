"""Words to ids: a small vocabulary trained with the model.

Lower-cases, strips punctuation, drops filler words, and falls back from an unknown word to its singular. Knows nothing
of pictures or models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError

FILLERS = frozenset(
    {"a", "an", "the", "of", "picture", "image", "photo", "with", "and", "in", "on", "for", "to", "is"}
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_FILE = "vocabulary.json"


def split_words(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation and filler words."""
    return [word for word in _WORD.findall(text.lower()) if word not in FILLERS]


class WordTokenizer:
    """Captions to word ids.

    Args:
        vocabulary: Words; the id of word i is i + 2. Id 0 is "no word", id 1 is "unknown word".
        max_length: Words kept of a caption T; the rest is dropped.
    """

    def __init__(self, vocabulary: Sequence[str], max_length: int = 12) -> None:
        if max_length < 1:
            raise TokenloomError(f"max_length must be at least 1, got {max_length}.")
        if isinstance(vocabulary, str) or not all(isinstance(word, str) for word in vocabulary):
            raise TokenloomError("The vocabulary must be a list of words, each a text.")
        self.vocabulary = list(vocabulary)
        self.max_length = max_length
        self._ids = {word: index + 2 for index, word in enumerate(self.vocabulary)}

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], max_length: int = 12, min_count: int = 1
    ) -> WordTokenizer:
        """A vocabulary of all words that appear in at least `min_count` captions, most frequent first."""
        counts = Counter(word for caption in captions for word in set(split_words(caption)))
        words = sorted(
            (word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w)
        )
        return cls(words, max_length)

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.vocabulary) + 2

    def _id(self, word: str) -> int:
        forms = [word, word.removesuffix("s"), word.removesuffix("es"), word + "s"]
        if word.endswith("ies"):
            forms.append(word[:-3] + "y")
        for form in forms:
            if form in self._ids:
                return self._ids[form]
        return 1

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids LongTensor (B, T) of texts; missing places are 0.

        Raises:
            TokenloomError: If something in the list is not a text.
        """
        batch = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(batch):
            if not isinstance(text, str):
                raise TokenloomError(f"Expected a text at place {index} of the list, got {text!r}.")
        ids = torch.zeros(len(batch), self.max_length, dtype=torch.long)
        for row, text in enumerate(batch):
            found = [self._id(word) for word in split_words(text)][: self.max_length]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.long)
        return ids

    def unknown(self, text: str) -> list[str]:
        """Words of a text that are not in the vocabulary."""
        return [word for word in split_words(text) if self._id(word) == 1]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Writes vocabulary.json into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"max_length": self.max_length, "words": self.vocabulary}
        (folder / _FILE).write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **_: Any) -> WordTokenizer:
        """Reads vocabulary.json of a folder."""
        path = Path(pretrained_model_name_or_path) / _FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["words"], content["max_length"])
        except OSError as error:
            raise TokenloomError(f"Cannot read {path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise TokenloomError(f"{path} is not a vocabulary file: {error!r}; save it again.") from None
