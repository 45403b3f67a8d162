"""Which name out of a hundred a picture fits best: the questions, their candidates, and the counting.

The rule, exactly. The pool of a question is the set of different names of all eligible captions: for `"seen"`
the captions of the split "val_style" (the concept was trained on in other styles), for `"unseen"` those of
the split "val" (the concept was never trained on) whose name consists of words that occur in training names;
both within the chosen groups. The candidates are the true name and others drawn without replacement from the
pool by a generator seeded with "{seed}:{name}", so a name always meets the same rivals. A pool with too few
names is filled up with names of training concepts of the same groups, drawn by the same generator. A rival
with the same set of words as the truth is left out. A hit is a strictly larger cosine than every rival's.

Knows nothing of how pictures or names are embedded. Shapes: B pictures, C dimensions, N questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.data.captions import Caption
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.evaluation.pictures import EvaluationSet, in_groups, label_of, prompt_of, split_of, words_of

Kind = Literal["seen", "unseen"]
KINDS = ("seen", "unseen")


@dataclass(frozen=True)
class Question:
    """One prompt with its candidates.

    Attributes:
        index: Place of the picture in the set that the questions were made from.
        prompt: What a generator is asked for.
        name: The true name.
        style: The true style, or None if the picture has none.
        rivals: The other names.
        filled: How many of the rivals are training concepts because the pool was too small.
    """

    index: int
    prompt: str
    name: str
    style: str | None
    rivals: tuple[str, ...]
    filled: int


@dataclass(frozen=True)
class Score:
    """Shares of pictures whose concept and style were recognised, with the standard error of the first.

    `style` is NaN where no picture has a style.
    """

    concept: float
    style: float
    pictures: int
    concept_error: float

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary."""
        return asdict(self)


def questions(
    pictures: EvaluationSet,
    kind: Kind,
    groups: Sequence[str] | None = None,
    candidates: int = 100,
    seed: int = 0,
) -> list[Question]:
    """Makes the questions of a kind from a whole set (its training captions give the known words).

    Args:
        pictures: All splits together.
        kind: "seen" or "unseen" concepts, as defined at the top of this module.
        groups: Only captions of these groups; None for all.
        candidates: Names to choose from, the true one included.
        seed: Chooses the rivals.

    Raises:
        TokenloomError: If the kind is unknown, no picture is eligible, or there are too few names for the
            candidates.
    """
    if kind not in KINDS:
        raise unknown_name("kind of question", kind, KINDS)
    if candidates < 2:
        raise TokenloomError(f"Expected at least 2 candidates to choose from, got {candidates}.")
    eligible = [index for index, caption in enumerate(pictures.captions) if _eligible(caption, kind, groups)]
    trained = [caption for caption in pictures.captions if split_of(caption) == "train"]
    if kind == "unseen":
        known = {word for caption in trained for word in words_of(label_of(caption))}
        eligible = [index for index in eligible if set(words_of(label_of(pictures.captions[index]))) <= known]
    if not eligible:
        raise TokenloomError(
            f"No picture is eligible for {kind!r} questions: expected pictures of the split {_split(kind)!r} "
            f"in {'any group' if groups is None else ', '.join(groups)}. Choose another folder."
        )
    pool = sorted({label_of(pictures.captions[index]) for index in eligible})
    spare = sorted({label_of(caption) for caption in trained if in_groups(caption, groups)} - set(pool))
    made = []
    for index in eligible:
        caption = pictures.captions[index]
        name = label_of(caption)
        rivals, filled = _rivals(name, pool, spare, candidates - 1, seed)
        made.append(Question(index, prompt_of(caption), name, caption.style, rivals, filled))
    return made


def hits(embedding: Tensor, texts: dict[str, Tensor], asked: Sequence[Question]) -> Tensor:
    """Says for each picture whether its true name fits better than every rival.

    Args:
        embedding: float (N, C), unit length, one picture a question.
        texts: Name to unit vector (C,), for all names and rivals.
        asked: The N questions.

    Returns:
        bool (N,).
    """
    if len(embedding) != len(asked):
        raise TokenloomError(
            f"Expected one picture for each of {len(asked)} questions, got {len(embedding)}."
        )
    found = []
    for vector, question in zip(embedding, asked, strict=True):
        names = torch.stack([texts[question.name], *(texts[rival] for rival in question.rivals)])
        fit = names @ vector
        found.append(bool(fit[0] > fit[1:].max()))
    return torch.tensor(found)


def score(concept: Tensor, style: Tensor) -> Score:
    """Averages hits: bool (N,) for concepts and bool (M,) for the styles of those pictures that have one."""
    share = float(concept.double().mean())
    error = (share * (1 - share) / max(1, len(concept))) ** 0.5
    return Score(share, float(style.double().mean()) if len(style) else float("nan"), len(concept), error)


def _split(kind: Kind) -> str:
    return {"seen": "val_style", "unseen": "val"}[kind]


def _eligible(caption: Caption, kind: Kind, groups: Sequence[str] | None) -> bool:
    return split_of(caption) == _split(kind) and in_groups(caption, groups)


def _rivals(
    name: str, pool: list[str], spare: list[str], count: int, seed: int
) -> tuple[tuple[str, ...], int]:
    """Draws the rivals of a name; the second value says how many had to come from the spare names."""
    chance = random.Random(f"{seed}:{name}")
    same = set(words_of(name))

    def allowed(names: list[str]) -> list[str]:
        return [other for other in names if set(words_of(other)) != same]

    first = allowed(pool)
    if len(first) >= count:
        return tuple(chance.sample(first, count)), 0
    second, missing = allowed(spare), count - len(first)
    if len(second) < missing:
        raise TokenloomError(
            f"Expected at least {count + 1} different names to choose from, got {len(first + second) + 1}. "
            "Lower `candidates` or use a larger set."
        )
    return (*first, *chance.sample(second, missing)), missing
