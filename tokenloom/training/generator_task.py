"""Training of a text-conditional generator on cached codes of captioned pictures."""

from __future__ import annotations

import dataclasses
import inspect
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from tokenloom.data.prompts import caption
from tokenloom.errors import TokenloomError
from tokenloom.generators import orders
from tokenloom.generators.base import Generator
from tokenloom.media import save_image, sheet, to_pil
from tokenloom.pipelines.text_to_image import TextToImagePipeline
from tokenloom.tokenizers.pixels import rescale
from tokenloom.tokenizers.text import WordTokenizer
from tokenloom.training.augment import augment
from tokenloom.training.code_cache import cached_codes, encode_pixels, encode_views
from tokenloom.training.config import GeneratorConfig
from tokenloom.training.data import open_folder, open_tokenizer, square_side, to_float
from tokenloom.training.families import build_generator, family
from tokenloom.training.loop import Task

if TYPE_CHECKING:
    from tokenloom.generators.block_diffusion import BlockDiffusionGenerator


_HELD_OUT, _HELD_OUT_BATCH = 256, 32


class GeneratorTask(Task):
    """Trains a generator of image codes from words."""

    def __init__(self, config: GeneratorConfig) -> None:
        family(config.generator)
        self.config = config
        set_seed(config.loop.seed)
        self.tokenizer = open_tokenizer(config.tokenizer).eval()
        self.tokenizer.to(PartialState().device)
        folder = open_folder(config.data, square_side(self.tokenizer))
        self.captions = folder.captions
        if not any(item.text for item in self.captions):
            raise TokenloomError(
                f'{config.data.root} has no captions; add a captions.jsonl with "file" and "text".'
            )
        every = [
            " ".join((item.text, item.label or "", item.style or "", *item.tags)) for item in self.captions
        ]
        self.words = WordTokenizer.from_captions(every, config.text.max_length, config.text.min_count)
        self.pixels = folder.stack() if config.views == 0 else None
        self.codes = cached_codes(
            self.tokenizer, folder.stack(), config
        )  # with views = 0, of the unchanged pictures
        self.size = len(self.codes)
        self.unseen = self._held_out()
        self.generator = self._build()
        self._check_loss()
        self._grow(0)
        self.module = self.generator.train()

    def _held_out(self) -> list[tuple[Tensor, Tensor | None]]:
        """Batches of codes and words of at most `_HELD_OUT` pictures of the held-out split, evenly spread."""
        if self.config.held_out is None:
            return []
        data = dataclasses.replace(self.config.data, split=self.config.held_out)
        folder = open_folder(data, square_side(self.tokenizer))
        chosen = torch.linspace(0, len(folder) - 1, min(len(folder), _HELD_OUT)).long()
        settings = dataclasses.replace(self.config, views=1, code_cache=None)
        codes = encode_views(self.tokenizer, folder.stack()[chosen], settings)[:, 0].long()
        words = self.words([folder.captions[index].text for index in chosen.tolist()])
        return list(zip(codes.split(_HELD_OUT_BATCH), words.split(_HELD_OUT_BATCH), strict=True))

    def held_out(self) -> dict[str, float]:
        """Mean loss of the held-out pictures, in nats a token."""
        if not self.unseen:
            return {}
        device, total = self.generator.device, 0.0
        for codes, words in self.unseen:
            given = None if words is None else words.to(device)
            total += len(codes) * float(self.generator.loss(codes.to(device), given))
        return {"held_out": total / sum(len(codes) for codes, _ in self.unseen)}

    def _build(self) -> Generator:
        config = self.config
        if config.init_from:
            pipeline = TextToImagePipeline.from_pretrained(config.init_from)
            self.words = pipeline.text_tokenizer
            return pipeline.generator
        words = {"kind": "words", "vocabulary": len(self.words), "length": config.text.max_length}
        return build_generator(config.generator, self.tokenizer, words, config.model)

    def _check_loss(self) -> None:
        """Refuses details of training that this generator does not have."""
        wanted, steps = self.config.loss, self.generator.order.num_steps
        name = type(self.generator).__name__
        weighted = bool(wanted.step_weights or wanted.progressive)
        if weighted and "weights" not in inspect.signature(type(self.generator).loss).parameters:
            raise TokenloomError(
                f"{name} has no weights of steps; remove loss.step_weights and .progressive."
            )
        if wanted.step_weights and len(wanted.step_weights) != steps:
            raise TokenloomError(
                f"loss.step_weights needs one weight for each of the {steps} steps, got {len(wanted.step_weights)}."
            )
        if wanted.growth and weighted:
            raise TokenloomError(
                "loss.growth changes the steps; leave out loss.step_weights and .progressive."
            )
        if wanted.growth and not (hasattr(self.generator, "grow") and self.generator.order.name == "blocks"):
            raise TokenloomError(
                f"loss.growth needs the generator block_diffusion and the order 'blocks', got {name} and "
                f"{self.generator.order.name!r}."
            )

    def _grow(self, step: int) -> None:
        """Brings the blocks to their size at a step of the training."""
        sizes, share = self.config.loss.growth, self.config.loss.growth_share
        if not sizes:
            return
        length = max(1.0, share * self.config.loop.steps / len(sizes))
        size = sizes[min(int(step / length), len(sizes) - 1)]
        options = dict(self.generator.order.options) | {
            "block": tuple(size) if isinstance(size, list) else size
        }
        order = orders.build("blocks", self.generator.order.layout, **options)
        if order != self.generator.order:
            cast("BlockDiffusionGenerator", self.generator).grow(order)

    def _weights(self, step: int) -> Tensor | None:
        """Weights (N,) of the positions in the loss at a step of the training."""
        wanted, order = self.config.loss, self.generator.order
        by_step = torch.tensor(wanted.step_weights or [1.0] * order.num_steps)
        last = wanted.progressive * self.config.loop.steps
        if step < last:
            first = min(wanted.progressive_first, order.num_steps)
            count = first + int((order.num_steps - first) * step / last)
            by_step = by_step * (torch.arange(order.num_steps) < count)
        return by_step[order.step] if wanted.step_weights or step < last else None

    def _caption(self, index: int, rng: random.Random) -> str:
        item = self.captions[index]
        if rng.random() < self.config.text.drop:
            return ""
        if not item.label:
            return item.text
        return caption(item.label, item.tags, item.style, rng, self.config.text.max_tags)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Codes of a random view and ids of a random caption of each picture."""
        if self.pixels is None:
            views = torch.randint(self.codes.shape[1], (len(indices),), generator=generator)
            codes = self.codes[indices, views].long()
        else:
            changed = augment(to_float(self.pixels[indices]), self.config.augment, generator)
            codes = encode_pixels(self.tokenizer, changed).long()
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        texts = [self._caption(int(index), rng) for index in indices]
        return {"codes": codes, "condition": self.words(texts)}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a token."""
        self._grow(step)
        weights = self._weights(step)
        options = {} if weights is None else {"weights": weights}
        return module(batch["codes"], batch["condition"], **options), {}

    def _pipeline(self) -> TextToImagePipeline:
        pipeline = TextToImagePipeline(
            cast(Any, self.tokenizer), self.generator, self.words, dict(self.config.sampling)
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def samples(self, path: Path) -> None:
        """A sheet of the configured prompts with fixed seeds; continuations where a part has to be known."""
        if not bool(self.generator.plan.predicted.all()):
            self._continuations(path)
            return
        written = [item.text for item in self.captions if item.text]
        prompts = self.config.sample_prompts or written[:16]
        images = self._pipeline()(prompts, seed=[0] * len(prompts)).images
        save_image(sheet(cast("list[Image.Image]", images), columns=min(8, len(images))), path)

    def _continuations(self, path: Path) -> None:
        """A sheet: the first pictures above, and what is made of their known parts below."""
        device, count = self.generator.device, min(8, self.size)
        codes = self.codes[:count, 0].long().to(device)
        words = self.words([item.text for item in self.captions[:count]]).to(device)
        keep = ~self.generator.plan.predicted
        made = self.generator.generate(words, seeds=[0] * count, known=codes, keep=keep)
        pixels = torch.cat([self.tokenizer.decode(part.to(self.tokenizer.device)) for part in (codes, made)])
        pixels = rescale(pixels.cpu().float(), self.tokenizer.pixel_range, (-1.0, 1.0))
        save_image(sheet(to_pil(pixels), columns=count), path)

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder with a weight record."""
        self._pipeline().save_pretrained(folder)
