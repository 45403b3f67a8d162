"""The nearest training picture of each sample: does a generator draw, or does it recite?

The distance is the root mean squared difference on [0, 1] over all pixels, the smallest over mirrored and
slightly shifted copies of the sample. A sample is called a near-copy if it is nearer to some training picture
than a threshold, and the threshold is calibrated: it is a low quantile of the same distance for real held-out
pictures, which cannot be copies but may be alike. By construction that share of held-out pictures is
"near-copies" too, so only an excess over it says anything. When samples come out of a tokenizer, pass the
training and held-out pictures through it first, or an exact copy would look as far as the tokenizer's error.

Knows nothing of generators. Shapes: B samples, N training pictures; pixels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.judge import Judge
from tokenloom.evaluation.pictures import check_pixels, to_pil
from tokenloom.evaluation.tables import markdown_table
from tokenloom.media import enlarge, sheet


@dataclass(frozen=True)
class Neighbours:
    """The nearest training picture of each sample.

    Attributes:
        index: LongTensor (B,), the place among the training pictures.
        distance: float32 (B,), root mean squared difference on [0, 1].
    """

    index: Tensor
    distance: Tensor


@dataclass(frozen=True)
class NearCopies:
    """How many samples are near-copies.

    Attributes:
        samples: Number of samples.
        quantile: Share of the held-out pictures that lies under the thresholds.
        pixel_threshold: A sample nearer than this is a near-copy.
        feature_threshold: Cosine in the judge's features above which a sample is alike; NaN without a judge.
        near_copies: Samples under the pixel threshold.
        alike: Samples over the feature threshold.
        both: Samples that satisfy both.
        median_distance: Of the samples.
        held_out_median_distance: Of the real held-out pictures.
        neighbours: Of the samples.
    """

    samples: int
    quantile: float
    pixel_threshold: float
    feature_threshold: float
    near_copies: int
    alike: int
    both: int
    median_distance: float
    held_out_median_distance: float
    neighbours: Neighbours = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary, with the distance of every sample."""
        figures = {key: value for key, value in self.__dict__.items() if key != "neighbours"}
        figures["distances"] = [round(value, 5) for value in self.neighbours.distance.tolist()]
        return figures

    def table(self) -> str:
        """One markdown table."""
        header = (
            "samples",
            "threshold (RMS)",
            "near-copies",
            "expected of new pictures",
            "median distance",
            "held-out median",
        )
        row = (
            self.samples,
            f"{self.pixel_threshold:.4f}",
            f"{self.near_copies} ({100 * self.near_copies / self.samples:.1f} %)",
            f"{100 * self.quantile:.0f} %",
            f"{self.median_distance:.4f}",
            f"{self.held_out_median_distance:.4f}",
        )
        return markdown_table(header, [row])


def nearest_training_images(
    samples: Tensor, training: Tensor, *, shift: int = 2, mirror: bool = True, shortlist: int = 64
) -> Neighbours:
    """Finds the nearest training picture of each sample.

    First the `shortlist` nearest at a quarter of the size are taken, then the exact distance to those over
    all shifts of up to `shift` pixels in both directions (edge pixels are repeated) and both mirror images.

    Args:
        samples: uint8 (B, 3, H, W).
        training: uint8 (N, 3, H, W).
        shift: Largest shift, in pixels.
        mirror: Whether mirrored copies count.
        shortlist: Candidates of the coarse search.

    Returns:
        The nearest picture and its distance, for each sample.
    """
    check_pixels(samples)
    check_pixels(training)
    if samples.shape[1:] != training.shape[1:]:
        raise TokenloomError(
            "Expected samples and training pictures of one size, got "
            f"{tuple(samples.shape[2:])} and {tuple(training.shape[2:])}. Load the set at the model's size."
        )
    coarse = _small(training)
    distance = torch.cdist(_small(samples), coarse)
    if mirror:
        distance = torch.minimum(distance, torch.cdist(_small(samples.flip(3)), coarse))
    candidates = distance.topk(min(shortlist, len(training)), largest=False).indices
    indices, distances = [], []
    for sample, places in zip(samples, candidates, strict=True):
        variants = _variants(sample, shift, mirror)
        exact = torch.cdist(variants, training[places].flatten(1).float() / 255).amin(0)
        best = int(exact.argmin())
        difference = float(exact[best]) / variants.shape[1] ** 0.5
        indices.append(int(places[best]))
        distances.append(difference)
    return Neighbours(torch.tensor(indices), torch.tensor(distances))


def count_near_copies(
    samples: Tensor,
    training: Tensor,
    held_out: Tensor,
    judge: Judge | None = None,
    *,
    quantile: float = 0.05,
    **search: Any,
) -> NearCopies:
    """Counts samples that are nearer to a training picture than real new pictures are.

    Args:
        samples: uint8 (B, 3, H, W), generated pictures.
        training: uint8 (N, 3, H, W), the pictures the generator was trained on.
        held_out: uint8 (M, 3, H, W), real pictures it was not trained on; they set the thresholds.
        judge: Adds the comparison in the judge's features.
        quantile: Share of the held-out pictures under the threshold.
        **search: `shift`, `mirror` and `shortlist` of `nearest_training_images`.

    Returns:
        The counts and the neighbours.
    """
    if not 0 < quantile < 1:
        raise TokenloomError(f"Expected a quantile between 0 and 1, got {quantile}.")
    found = nearest_training_images(samples, training, **search)
    real = nearest_training_images(held_out, training, **search)
    threshold = float(torch.quantile(real.distance, quantile))
    near = found.distance < threshold
    alike, feature_threshold = torch.zeros_like(near), float("nan")
    if judge is not None:
        known = judge.look(training).features
        feature_threshold = float(
            torch.quantile((judge.look(held_out).features @ known.T).amax(1), 1 - quantile)
        )
        alike = (judge.look(samples).features @ known.T).amax(1) > feature_threshold
    return NearCopies(
        samples=len(samples),
        quantile=quantile,
        pixel_threshold=threshold,
        feature_threshold=feature_threshold,
        near_copies=int(near.sum()),
        alike=int(alike.sum()),
        both=int((near & alike).sum()),
        median_distance=float(found.distance.median()),
        held_out_median_distance=float(real.distance.median()),
        neighbours=found,
    )


def neighbour_figure(
    samples: Tensor,
    training: Tensor,
    neighbours: Neighbours,
    *,
    pairs: int = 24,
    columns: int = 4,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """Shows the samples that are nearest to a training picture, each beside that picture, nearest first.

    Args:
        samples: uint8 (B, 3, H, W).
        training: uint8 (N, 3, H, W).
        neighbours: Of the samples.
        pairs: How many samples to show.
        columns: Pairs a row.
        names: One text a sample, written under it (a prompt); the distance stands under its neighbour.

    Returns:
        A picture: sample, neighbour, sample, neighbour, ...
    """
    pictures, labels = [], []
    for place in neighbours.distance.argsort()[:pairs].tolist():
        pictures += [to_pil(samples[place]), to_pil(training[int(neighbours.index[place])])]
        labels += [names[place] if names else "sample", f"{float(neighbours.distance[place]):.3f}"]
    return sheet([enlarge(picture, 2) for picture in pictures], 2 * columns, labels)


def _small(pixels: Tensor) -> Tensor:
    """Quarter-size pictures as rows: uint8 (B, 3, H, W) to float (B, 3 H W / 16)."""
    side = max(1, pixels.shape[-1] // 4)
    return F.adaptive_avg_pool2d(pixels.float() / 255, side).flatten(1)


def _variants(sample: Tensor, shift: int, mirror: bool) -> Tensor:
    """All shifted and mirrored copies of uint8 (3, H, W) as rows: float (V, 3 H W)."""
    height, width = sample.shape[1:]
    picture = sample[None].float() / 255
    copies = []
    for source in (picture, picture.flip(3)) if mirror else (picture,):
        padded = F.pad(source, (shift,) * 4, mode="replicate")
        copies += [
            padded[..., row : row + height, column : column + width].flatten(1)
            for row in range(2 * shift + 1)
            for column in range(2 * shift + 1)
        ]
    return torch.cat(copies)
