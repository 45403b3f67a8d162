"""Training of models that segment by phrase: mask tokens by next-token prediction, or the baseline, a U-Net with FiLM.

Both see the same scenes, phrases and loop. Knows the scenes and the two models; knows nothing of evaluation's figures.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from tokenloom.data.referring_phrases import vocabulary_texts
from tokenloom.data.referring_pool import Pool
from tokenloom.errors import TokenloomError, check_options
from tokenloom.evaluation.film_unet import FilmUNet
from tokenloom.generators import orders
from tokenloom.generators.conditions import PictureWords
from tokenloom.generators.picture_condition import PictureCondition
from tokenloom.generators.ranged import RangedTokenGenerator
from tokenloom.layouts import Layout
from tokenloom.media import save_image, sheet
from tokenloom.pipelines.segmentation import SegmentationPipeline, overlay
from tokenloom.tokenizers.answer_codes import BOX, AnswerCodes
from tokenloom.tokenizers.boxes import masks_to_boxes
from tokenloom.tokenizers.mask import MaskTokenizer
from tokenloom.tokenizers.picture_encoder import PictureEncoder
from tokenloom.tokenizers.registry import load_tokenizer
from tokenloom.tokenizers.text import WordTokenizer
from tokenloom.training.loop import Task
from tokenloom.training.mask_losses import bce_loss, dice_loss, draw_levels, hierarchical_loss
from tokenloom.training.phrase_rows import shared_logits
from tokenloom.training.place_losses import PlaceHeads, box_loss, name_loss, outline_loss, shown_objects
from tokenloom.training.scenes import SceneSource, draw_seeds
from tokenloom.training.segmentation_config import SegmentationConfig

_SAMPLE_SEEDS = range(10**6, 10**6 + 8)


class PhraseTask(Task):
    """What both kinds of models share: scenes, words, batches and sample sheets."""

    scenes: SceneSource
    words: WordTokenizer

    def __init__(self, config: SegmentationConfig, size: int) -> None:
        self.config, self.size = config, config.scenes.length
        self.scenes = SceneSource(config.scenes, size)
        self.words = WordTokenizer.from_captions(
            vocabulary_texts(self.scenes.pool.of(self.scenes.settings.categories)), config.max_length
        )

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """New scenes: "pixels" uint8 (B, S, S, 3), "words" (B n, T) and "masks" bool (B n, S, S) of phrases; "instances"
        uint8 (B, S, S) and the words "things" (B, M, T) of all objects.
        """
        seeds = draw_seeds(len(indices), generator)
        made = self.scenes.samples(seeds, self.config.phrases)
        words = self.words([text for sample in made for text in sample.texts])
        most = max(len(sample.things) for sample in made)
        things = [text for sample in made for text in (sample.things + [""] * most)[:most]]
        dropped = torch.rand(len(words), generator=generator) < self.config.drop
        return {
            "pixels": torch.from_numpy(np.stack([sample.picture for sample in made])),
            "words": words.masked_fill(dropped[:, None], 0),
            "masks": torch.from_numpy(np.concatenate([sample.masks for sample in made])),
            "instances": torch.from_numpy(np.stack([sample.instances for sample in made])),
            "things": self.words(things).view(len(made), most, -1),
        }

    @abstractmethod
    def predict(self, picture: Image.Image, phrase: str) -> np.ndarray:
        """Bool (H, W) of one phrase."""

    def samples(self, path: Path) -> None:
        """A sheet of scenes: what is meant above, what is predicted below, with the phrases."""
        made = self.scenes.samples(list(_SAMPLE_SEEDS), 1)
        wanted, got, labels = [], [], []
        for sample in made:
            picture, text = Image.fromarray(sample.picture), sample.texts[0]
            wanted.append(overlay(picture, sample.masks))
            got.append(overlay(picture, self.predict(picture, text)[None]))
            labels.append(text)
        save_image(sheet([*wanted, *got], columns=len(made), labels=labels * 2), path)


def training_pictures(pool: Pool) -> str:
    """What a card says of the pictures of a pool: how many under which licence."""
    counts = ", ".join(f"{count:,} under {name}" for name, count in pool.licences().items())
    return f"Scenes of cut-outs on photographs: {counts}; SOURCES.md of the pool credits each work."


def to_unit(pixels: Tensor) -> Tensor:
    """Float (B, 3, S, S) in [-1, 1] of pixels uint8 (B, S, S, 3)."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class PhraseModel(nn.Module):
    """Picture encoder and generator behind one forward; each picture is encoded once for all its phrases.

    Args:
        encoder: Of pictures.
        generator: Of answers.
        share: Whether all phrases of a picture share its rows in the generator, too.
        heads: Of places, for the losses of `tokenloom.training.place_losses`; `None` = without these.
    """

    def __init__(
        self,
        encoder: PictureEncoder,
        generator: RangedTokenGenerator,
        share: bool,
        heads: PlaceHeads | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.generator, self.share, self.heads = encoder, generator, share, heads

    def forward(
        self, pixels: Tensor, words: Tensor, answers: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
        """Logits (B n, N, V) of answers (B n, N) to words (B n, T) about pictures (B, 3, S, S), and what places say.

        Places say words, outlines and boxes (`PictureCondition.named`, `PlaceHeads`) where there are heads. Without answers
        there are no logits.
        """
        features, said = self.encoder(pixels), None
        if self.heads is not None:
            named = cast(PictureCondition, self.generator.condition).named(features)
            said = (named, *self.heads(features))
        if answers is None:
            return None, said
        if self.share:
            return shared_logits(self.generator, features, words, answers), said
        features = features.repeat_interleave(len(words) // len(pixels), dim=0)
        return self.generator.logits(answers, PictureWords(features, words)), said


def side_loss(logits: Tensor, codes: Tensor, answers: AnswerCodes, blur: float) -> Tensor:
    """Cross-entropy (B, 4) in nats of the sides of boxes, whose targets spread to the next steps of the scale.

    Steps are numbers in order, and a side that is a step off is nearly right.

    Args:
        logits: (B, 4, V), of which only the steps of the scale are possible.
        codes: LongTensor (B, 4) of sides.
        answers: Says where the scale lies.
        blur: Standard deviation of the targets in steps; 0 = each side is one step.
    """
    scale = torch.arange(answers.masks, answers.there, device=logits.device)
    far = (scale - codes[..., None]).float()
    wanted = (-far.square() / (2 * max(blur, 1e-2) ** 2)).softmax(-1)
    return -(wanted * logits[..., answers.masks : answers.there].log_softmax(-1)).sum(-1)


class SegmentationTask(PhraseTask):
    """Trains picture encoder and generator on the codes of a fixed mask tokenizer."""

    def __init__(self, config: SegmentationConfig) -> None:
        set_seed(config.loop.seed)
        tokenizer = load_tokenizer(str(config.tokenizer))
        if not isinstance(tokenizer, MaskTokenizer):
            raise TokenloomError(
                f"{config.tokenizer!r} holds a {type(tokenizer).__name__}, which is no mask tokenizer; train one with "
                "tokenloom train-mask-tokenizer."
            )
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        super().__init__(config, tokenizer.image_size)
        check_options(PictureEncoder, config.encoder, "option of encoder")
        self.encoder = PictureEncoder(**{"image_size": tokenizer.image_size, **config.encoder})
        if self.encoder.image_size != tokenizer.image_size:
            raise TokenloomError(
                f"encoder.image_size must be that of the mask tokenizer, {tokenizer.image_size}, got {self.encoder.image_size}."
            )
        self.answers = AnswerCodes.of(tokenizer, config.bins)
        self.generator = RangedTokenGenerator(
            order_config=orders.raster(Layout.line(self.answers.length)).to_config(),
            vocab_size=self.answers.vocabulary,
            transformer_config=dict(config.transformer),
            condition_config={
                "kind": "picture",
                "rows": self.encoder.rows,
                "features": self.encoder.features,
                "vocabulary": len(self.words),
                "words": config.max_length,
                "pointing": config.place_loss > 0,
            },
            rule_config={"ranges": self.answers.ranges},
            causal_prefix=config.share_picture,
        )
        stride = self.encoder.image_size // round(self.encoder.rows**0.5)
        heads = PlaceHeads(self.encoder.features, stride) if config.place_loss else None
        self.module = PhraseModel(self.encoder, self.generator, config.share_picture, heads).train()

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves the mask tokenizer, which is not trained."""
        self.tokenizer.to(accelerator.device)

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a code; losses of places and the hierarchical mask loss if they are weighted."""
        if step < self.config.places_until * self.config.loop.steps:
            _, said = module(to_unit(batch["pixels"]), batch["words"], None)
            total, logs = self._places(said, batch)
            return total, {key: value.detach() for key, value in logs.items()}
        masks, side = batch["masks"], (self.tokenizer.image_size,) * 2
        with torch.no_grad():
            codes = self.tokenizer.encode(masks)
            answers = self.answers.join(masks_to_boxes(masks), side, codes)
        logits, said = module(to_unit(batch["pixels"]), batch["words"], answers)
        logits = logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
        losses[:, 1:BOX] = side_loss(logits[:, 1:BOX], answers[:, 1:BOX], self.answers, self.config.box_blur)
        logs = {
            "there": losses[:, 0].mean(),
            "box": losses[:, 1:BOX].mean(),
            "mask": losses[:, BOX:].mean(),
        }
        total = losses.mean()
        if said is not None:
            places, told = self._places(said, batch)
            total, logs = total + self.config.place_loss * places, logs | told
        if self.config.mask_loss:
            generator = torch.Generator().manual_seed(step)
            levels = draw_levels(
                self.tokenizer.levels, min(self.config.mask_levels, self.tokenizer.levels), generator
            )
            chances = logits[:, BOX:, : self.answers.masks].softmax(-1)
            frames = F.one_hot(codes[:, : self.answers.framing], self.answers.masks).to(chances)
            chances = torch.cat((frames, chances), dim=1)
            logs["decoded"] = hierarchical_loss(self.tokenizer, chances, masks.float(), levels)
            total = total + self.config.mask_loss * logs["decoded"]
        return total, {key: value.detach() for key, value in logs.items()}

    def _places(self, said: tuple[Tensor, ...], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses of places, and its parts."""
        named, outline, boxes = said
        shown = shown_objects(batch["instances"], batch["things"].shape[1])
        logs = {
            "names": name_loss(named, shown, batch["things"]),
            "outlines": outline_loss(outline, shown),
            "sides": box_loss(boxes, shown),
        }
        return torch.stack(list(logs.values())).sum(), logs

    def _pipeline(self) -> SegmentationPipeline:
        pipeline = SegmentationPipeline(
            self.tokenizer,
            self.generator,
            self.encoder,
            self.words,
            self.config.bins,
            dict(self.config.sampling),
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.card = {"training_pictures": training_pictures(self.scenes.pool)}
        return pipeline

    def predict(self, picture: Image.Image, phrase: str) -> np.ndarray:
        """Bool (H, W) of one phrase."""
        return cast("np.ndarray", self._pipeline()(picture, phrase, output_type="np").masks)[0]

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder."""
        self._pipeline().save_pretrained(folder)


class UNetTask(PhraseTask):
    """Trains the baseline with cross-entropy and Dice loss a pixel."""

    def __init__(self, config: SegmentationConfig) -> None:
        set_seed(config.loop.seed)
        check_options(FilmUNet, config.unet, "option of unet")
        size = int(config.unet.get("image_size", 128))
        super().__init__(config, size)
        self.network = FilmUNet(**{**config.unet, "vocabulary": len(self.words), "words": config.max_length})
        self.module = self.network.train()

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of pixels in nats, and Dice loss."""
        masks, words, pixels = batch["masks"].float(), batch["words"], to_unit(batch["pixels"])
        soft = module(pixels.repeat_interleave(len(words) // len(pixels), dim=0), words).float().sigmoid()
        logs = {"bce": bce_loss(soft, masks), "dice": dice_loss(soft, masks)}
        return logs["bce"] + logs["dice"], {key: value.detach() for key, value in logs.items()}

    def predict(self, picture: Image.Image, phrase: str) -> np.ndarray:
        """Bool (H, W) of one phrase."""
        return self.network.segment(picture, [phrase], self.words)[0]

    def save(self, folder: Path) -> None:
        """Writes the network and its vocabulary."""
        self.network.save_pretrained(folder)
        self.words.save_pretrained(folder)


def make_task(config: SegmentationConfig) -> Task:
    """The task of a config."""
    return UNetTask(config) if config.segmenter == "unet" else SegmentationTask(config)
