"""Typed configs of mask tokenizers and of models that segment by phrase. Knows nothing of models beyond passing options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.training.config import LoopConfig


@dataclass(kw_only=True)
class ScenesConfig:
    """Which scenes are trained on.

    Attributes:
        pool: Folder that `tokenloom data referring` made.
        split: Split of the pool.
        length: Scenes an epoch; each is new.
        options: Options of `tokenloom.data.referring_scenes.SceneConfig` but the size.
        workers: Processes that make scenes; 0 makes them in the training process.
    """

    pool: str
    split: str = "train"
    length: int = 50000
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.workers < 0:
            raise TokenloomError(
                f"scenes.length must be at least 1 and scenes.workers at least 0, got {self.length} and {self.workers}."
            )


@dataclass(kw_only=True)
class MaskTokenizerConfig:
    """A training run of a mask tokenizer: `tokenloom train-mask-tokenizer CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the model.
        scenes: Where masks come from: objects and groups of objects of scenes.
        model: Options of `MaskTokenizer`.
        losses: Factors of the parts of `tokenloom.training.mask_losses.reconstruction_losses`.
        morphology: Chance that a mask is grown or shrunk by a few pixels.
        whole: Share of masks that are decoded from all their codes.
        soft_until: Share of the training at whose beginning all masks skip the quantizer, and at whose end none does, so that
            vectors learn to differ before they become codes; 0 quantizes from the first step.
        loop: Optimisation.
    """

    output: str
    scenes: ScenesConfig
    model: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    morphology: float = 0.3
    whole: float = 0.25
    soft_until: float = 0.0
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        for key in ("morphology", "whole", "soft_until"):
            if not 0 <= getattr(self, key) <= 1:
                raise TokenloomError(f"{key} must lie between 0 and 1, got {getattr(self, key)}.")


SEGMENTERS = ("tokens", "unet")


@dataclass(kw_only=True)
class SegmentationConfig:
    """A training run of a model that segments by phrase: `tokenloom train-segmentation CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the model.
        scenes: Training scenes.
        tokenizer: Folder of the mask tokenizer; not needed for "unet".
        segmenter: "tokens" (mask tokens by next-token prediction) or "unet" (the baseline: a U-Net with FiLM).
        encoder: Options of `PictureEncoder`.
        transformer: Fields of `TransformerConfig`.
        unet: Options of `FilmUNet`.
        bins: Steps of the scale of boxes.
        phrases: Phrases a scene.
        max_length: Words kept of a phrase.
        drop: Chance that the words are dropped, which trains guidance, and masks from boxes.
        share_picture: Whether rows of the picture do not see the words, so that all phrases of a picture share them
            ("tokens"): a phrase then costs its own rows alone.
        place_loss: Weight of losses of what every place of the picture tells: the words of what is seen there, its outline
            and the box of its object ("tokens"). Scenes know all their objects, and the encoder learns them without waiting
            for a phrase. Words then point at the places that name them (`PictureCondition`); 0 leaves it all out.
        places_until: Share of the training, from its beginning, in which the encoder learns what places tell and the
            generator rests; needs place_loss.
        box_blur: Standard deviation of the targets of a box's sides, in steps of the scale of `bins`; 0 = sides are one step.
        mask_loss: Weight of the hierarchical mask loss, which decodes predicted tokens; 0 turns it off.
        mask_levels: Prefix lengths drawn for it a step.
        sampling: Preset stored with the model: guidance_scale, temperature, top_k, top_p.
        loop: Optimisation.
    """

    output: str
    scenes: ScenesConfig
    tokenizer: str | None = None
    segmenter: str = "tokens"
    encoder: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    bins: int = 64
    phrases: int = 4
    max_length: int = 8
    drop: float = 0.1
    share_picture: bool = True
    place_loss: float = 0.0
    places_until: float = 0.0
    box_blur: float = 0.0
    mask_loss: float = 0.0
    mask_levels: int = 2
    sampling: dict[str, Any] = field(default_factory=dict)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.segmenter not in SEGMENTERS:
            raise unknown_name("segmenter", self.segmenter, SEGMENTERS)
        if self.segmenter == "tokens" and not self.tokenizer:
            raise TokenloomError(
                "segmenter 'tokens' needs the key tokenizer: the folder of a mask tokenizer."
            )
        if min(self.phrases, self.max_length, self.mask_levels) < 1 or self.bins < 2:
            raise TokenloomError(
                "phrases, max_length and mask_levels must be at least 1, and bins at least 2."
            )
        if not 0 <= self.drop <= 1 or min(self.mask_loss, self.place_loss, self.box_blur) < 0:
            raise TokenloomError(
                "drop must lie between 0 and 1, and mask_loss, place_loss and box_blur must not be negative."
            )
        if not 0 <= self.places_until <= (1 if self.place_loss else 0):
            raise TokenloomError(
                f"places_until must lie between 0 and 1, and above 0 needs place_loss; got {self.places_until} with "
                f"place_loss {self.place_loss}."
            )
