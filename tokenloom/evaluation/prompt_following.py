"""Whether pictures show what their prompts asked for, and how different pictures of one prompt are.

A generator is a function from prompts and seeds to pictures, one picture a pair; `pipeline_caller` makes one
of a text-to-image pipeline. The judge answers the questions of `tokenloom.evaluation.retrieval` about
generated pictures and about the real held-out pictures of the same questions; the second is the ceiling.
Knows nothing of tokens or of how pictures are made.

Shapes: Q questions, K seeds a prompt; pixels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.judge import Judge
from tokenloom.evaluation.metrics import mean_pairwise_distance
from tokenloom.evaluation.pictures import EvaluationSet, as_uint8, label_of
from tokenloom.evaluation.retrieval import Kind, Question, Score, questions
from tokenloom.evaluation.tables import markdown_table

Generate = Callable[[list[str], list[int]], Any]
SAME_PICTURE = (
    0.02  # two samples of one prompt nearer than this (root mean square of [0, 1]) count as the same picture
)


@dataclass(frozen=True)
class Following:
    """How well prompts were followed.

    Attributes:
        kind: "seen" concepts in unseen (concept, style) pairs, or "unseen" concepts of known words.
        generated: Marks of the generated pictures.
        ceiling: Marks of the real held-out pictures of the same questions.
        reconstructed: Marks of the same real pictures after the tokenizer, if one was given: what a perfect
            generator could reach.
        candidates: Names to choose from.
        filled: Mean number of candidates that are training concepts because the pool was too small.
        pixels: The generated pictures, uint8 (Q K, 3, H, W), the K pictures of a question together.
        asked: The question of each picture.
    """

    kind: Kind
    generated: Score
    ceiling: Score
    reconstructed: Score | None
    candidates: int
    filled: float
    pixels: Tensor = field(repr=False)
    asked: list[Question] = field(repr=False)

    @property
    def concept_ratio(self) -> float:
        """Concept retrieval as a share of the ceiling."""
        return self.generated.concept / self.ceiling.concept if self.ceiling.concept else math.nan

    @property
    def style_ratio(self) -> float:
        """Style accuracy as a share of the ceiling."""
        return self.generated.style / self.ceiling.style if self.ceiling.style else math.nan

    def as_dict(self) -> dict[str, Any]:
        """The figures (not the pictures) as a JSON-able dictionary."""
        return {
            "kind": self.kind,
            "generated": self.generated.as_dict(),
            "ceiling": self.ceiling.as_dict(),
            "reconstructed": None if self.reconstructed is None else self.reconstructed.as_dict(),
            "concept_ratio": self.concept_ratio,
            "style_ratio": self.style_ratio,
            "candidates": self.candidates,
            "filled": self.filled,
        }


@dataclass(frozen=True)
class Diversity:
    """Mean pairwise distances, in pixels (root mean square of [0, 1]) and in the judge's features (1 -
    cosine).

    Attributes:
        prompts: Prompts that were sampled.
        seeds: Pictures a prompt.
        pixels: Between pictures of one prompt, averaged over prompts.
        features: The same in the judge's features.
        same_picture: Share of pairs of one prompt that are nearer than `SAME_PICTURE`.
        real_styles: (pixels, features) between real training pictures of one concept in different styles.
        real_concepts: (pixels, features) between real training pictures of different concepts in one style.
    """

    prompts: int
    seeds: int
    pixels: float
    features: float
    same_picture: float
    real_styles: tuple[float, float]
    real_concepts: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """The figures and their ratios to real pictures as a JSON-able dictionary."""
        return {
            "prompts": self.prompts,
            "seeds": self.seeds,
            "pixels": self.pixels,
            "features": self.features,
            "same_picture": self.same_picture,
            "real_styles": list(self.real_styles),
            "real_concepts": list(self.real_concepts),
            "to_real_styles": [self.pixels / self.real_styles[0], self.features / self.real_styles[1]],
            "to_real_concepts": [self.pixels / self.real_concepts[0], self.features / self.real_concepts[1]],
        }


def pipeline_caller(pipeline: Any, **options: Any) -> Generate:
    """Makes a generator of a `TextToImagePipeline`; `options` (guidance_scale, temperature, ...) go to every
    call.
    """

    def generate(prompts: list[str], seeds: list[int]) -> Any:
        return pipeline(prompts, seed=seeds, output_type="pt", **options).images

    return generate


def generate_pictures(
    generate: Generate, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 16
) -> Tensor:
    """Calls a generator in batches.

    Args:
        generate: The generator.
        prompts: One prompt a picture.
        seeds: One seed a picture.
        batch_size: Pictures a call.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        TokenloomError: If a call returns another number of pictures than it was asked for.
    """
    made = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        pictures = as_uint8(generate(part, list(seeds[start : start + batch_size])))
        if len(pictures) != len(part):
            raise TokenloomError(f"Expected {len(part)} pictures, one a prompt, got {len(pictures)}.")
        made.append(pictures)
    return torch.cat(made)


def follow_prompts(
    generate: Generate,
    judge: Judge,
    pictures: EvaluationSet,
    kind: Kind = "seen",
    *,
    groups: Sequence[str] | None = None,
    candidates: int = 100,
    seeds_per_prompt: int = 1,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    through: Callable[[Tensor], Tensor] | None = None,
) -> Following:
    """Asks a generator for every held-out (concept, style) pair and lets the judge mark the pictures.

    Args:
        generate: The generator.
        judge: The judge.
        pictures: The whole set, all splits.
        kind: "seen" or "unseen" concepts (see `tokenloom.evaluation.retrieval`).
        groups: Only these groups; None for all.
        candidates: Names to choose from.
        seeds_per_prompt: Pictures a prompt.
        limit: Ask at most so many prompts, drawn with `seed`; the ceiling is measured on the same ones.
        seed: Chooses candidates and prompts; picture j of question i is made with seed `seed + i *
            seeds_per_prompt + j`.
        batch_size: Pictures a call.
        through: Passes uint8 pixels through the tokenizer, to mark real pictures as a perfect generator would
            show them.

    Returns:
        Marks, ceiling, and the pictures.
    """
    asked = questions(pictures, kind, groups, candidates, seed)
    if limit is not None and limit < len(asked):
        chosen = sorted(random.Random(seed).sample(range(len(asked)), limit))
        asked = [asked[index] for index in chosen]
    real = pictures.pixels[[question.index for question in asked]]
    repeated = [question for question in asked for _ in range(seeds_per_prompt)]
    made = generate_pictures(
        generate, [q.prompt for q in repeated], [seed + i for i in range(len(repeated))], batch_size
    )
    marks = judge.mark(made, repeated)
    # several pictures of one prompt are not independent: the error counts prompts
    marks = replace(marks, concept_error=math.sqrt(marks.concept * (1 - marks.concept) / len(asked)))
    return Following(
        kind=kind,
        generated=marks,
        ceiling=judge.mark(real, asked),
        reconstructed=None if through is None else judge.mark(through(real), asked),
        candidates=candidates,
        filled=sum(question.filled for question in asked) / len(asked),
        pixels=made,
        asked=repeated,
    )


def measure_diversity(
    generate: Generate,
    judge: Judge,
    pictures: EvaluationSet,
    *,
    groups: Sequence[str] | None = None,
    prompts: int = 32,
    seeds_per_prompt: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> Diversity:
    """Makes several pictures of each of some unseen (concept, style) pairs and measures how far apart they
    are.

    The prompts are drawn from the "seen" questions. Real pictures of the training split give the scale: one
    concept in different styles, and different concepts in one style (groups of at most `seeds_per_prompt`
    pictures, so that both are averages of the same kind).

    Args:
        generate: The generator.
        judge: The judge, for distances between what pictures show.
        pictures: The whole set, all splits.
        groups: Only these groups; None for all.
        prompts: How many prompts.
        seeds_per_prompt: Pictures a prompt, at least 2.
        seed: Chooses prompts and seeds.
        batch_size: Pictures a call.
    """
    if seeds_per_prompt < 2:
        raise TokenloomError(f"Diversity needs at least 2 seeds a prompt, got {seeds_per_prompt}.")
    asked = questions(pictures, "seen", groups, 2, seed)
    asked = random.Random(seed).sample(asked, min(prompts, len(asked)))
    texts = [question.prompt for question in asked for _ in range(seeds_per_prompt)]
    made = generate_pictures(generate, texts, [seed + index for index in range(len(texts))], batch_size)
    sets = list(torch.arange(len(texts)).split(seeds_per_prompt))
    pixels, features = _mean_distances(judge, made, sets)
    same = [_share_below(made[chosen].float() / 255, SAME_PICTURE) for chosen in sets]
    train = pictures.split("train").groups(groups)
    draw = random.Random(seed)
    return Diversity(
        prompts=len(asked),
        seeds=seeds_per_prompt,
        pixels=pixels,
        features=features,
        same_picture=sum(same) / len(same),
        real_styles=_mean_distances(
            judge, train.pixels, _sets(train, label_of, prompts, seeds_per_prompt, draw)
        ),
        real_concepts=_mean_distances(
            judge, train.pixels, _sets(train, lambda c: c.style, prompts, seeds_per_prompt, draw)
        ),
    )


def following_table(results: Sequence[Following]) -> str:
    """One markdown table; shares in percent, with the standard error of concept retrieval."""
    header = ("prompts", "pictures", "concept, top 1", "ceiling", "ratio", "style", "ceiling", "ratio")
    title = {
        "seen": "seen concepts, unseen (concept, style) pairs",
        "unseen": "unseen concepts of known words",
    }
    rows = []
    for result in results:
        made, real = result.generated, result.ceiling
        rows.append(
            (
                f"{title[result.kind]}, {result.candidates} candidates",
                made.pictures,
                f"{100 * made.concept:.1f} ± {100 * made.concept_error:.1f} %",
                f"{100 * real.concept:.1f} %",
                f"{result.concept_ratio:.2f}",
                f"{100 * made.style:.1f} %",
                f"{100 * real.style:.1f} %",
                f"{result.style_ratio:.2f}",
            )
        )
    return markdown_table(header, rows)


def _mean_distances(judge: Judge, pixels: Tensor, sets: Sequence[Tensor]) -> tuple[float, float]:
    """Mean pairwise distances within sets of pictures, averaged over the sets: in pixels and in features."""
    near = [mean_pairwise_distance(pixels[chosen].float() / 255) for chosen in sets]
    seen = [mean_pairwise_distance(judge.look(pixels[chosen]).features, "cosine") for chosen in sets]
    return sum(near) / len(near), sum(seen) / len(seen)


def _share_below(pictures: Tensor, distance: float) -> float:
    """Share of the pairs of pictures, float (K, 3, H, W), that are nearer than a distance."""
    flat = pictures.flatten(1)
    pairs = torch.triu_indices(len(flat), len(flat), offset=1)
    return float(((flat[pairs[0]] - flat[pairs[1]]).square().mean(1).sqrt() < distance).double().mean())


def _sets(
    train: EvaluationSet, key: Callable[[Any], str | None], count: int, size: int, draw: random.Random
) -> list[Tensor]:
    """Draws sets of 2 to `size` pictures that share a key."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, caption in enumerate(train.captions):
        value = key(caption)
        if value is not None:
            members[value].append(index)
    rich = [places for _, places in sorted(members.items()) if len(places) > 1]
    if not rich:
        raise TokenloomError(
            "Expected training pictures that share a name or a style, found none. Use a set with labels."
        )
    return [
        torch.tensor(draw.sample(places, min(size, len(places)))) for places in draw.choices(rich, k=count)
    ]
