"""Training of a text-conditional generator on cached codes of captioned pictures."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from tokenloom.data.prompts import caption
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators import (
    MaskedGenerator,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextTokenGenerator,
    orders,
)
from tokenloom.generators.base import Generator
from tokenloom.media import save_image, sheet
from tokenloom.pipelines.text_to_image import TextToImagePipeline
from tokenloom.tokenizers.image_vq import ImageVQTokenizer
from tokenloom.tokenizers.text import WordTokenizer
from tokenloom.training.augment import augment
from tokenloom.training.config import GeneratorConfig
from tokenloom.training.data import open_folder, open_tokenizer, to_float
from tokenloom.training.loop import Task

GENERATORS: dict[str, type[Generator]] = {
    "masked": MaskedGenerator,
    "next_token": NextTokenGenerator,
    "next_neighbor": NextNeighborGenerator,
    "next_block": NextBlockGenerator,
}
_DEFAULT_ORDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("random", {"steps": 8, "seed": 0}),
    "next_token": ("raster", {}),
    "next_neighbor": ("neighbors", {}),
    "next_block": ("raster", {}),
}


@torch.no_grad()
def cache_codes(
    tokenizer: ImageVQTokenizer, pixels: Tensor, config: GeneratorConfig, batch_size: int = 256
) -> Tensor:
    """Codes of all pictures, `config.views` copies each.

    Args:
        tokenizer: The trained tokenizer.
        pixels: uint8 (M, 3, S, S).
        config: How many views and how they are changed; view 0 is the unchanged picture.
        batch_size: Pictures encoded at once.

    Returns:
        int32 (M, views, N).
    """
    generator = torch.Generator().manual_seed(config.loop.seed)
    views = []
    for view in range(max(1, config.views)):
        parts = []
        for batch in pixels.split(batch_size):
            values = to_float(batch)
            values = augment(values, config.augment, generator) if view else values
            parts.append(tokenizer.encode(values.to(tokenizer.device)).int().cpu())
        views.append(torch.cat(parts))
    return torch.stack(views, dim=1)


class GeneratorTask(Task):
    """Trains a generator of image codes from words."""

    def __init__(self, config: GeneratorConfig) -> None:
        if config.generator not in GENERATORS:
            raise unknown_name("generator", config.generator, GENERATORS)
        self.config = config
        set_seed(config.loop.seed)
        self.tokenizer = open_tokenizer(config.tokenizer).eval()
        self.tokenizer.to(PartialState().device)
        folder = open_folder(config.data, self.tokenizer.image_size)
        self.captions = folder.captions
        if not any(item.text for item in self.captions):
            raise TokenloomError(
                f'{config.data.root} has no captions; add a captions.jsonl with "file" and "text".'
            )
        every = [
            " ".join((item.text, item.label or "", item.style or "", *item.tags)) for item in self.captions
        ]
        self.words = WordTokenizer.from_captions(every, config.text.max_length, config.text.min_count)
        self.codes = cache_codes(self.tokenizer, folder.stack(), config)
        self.size = len(self.codes)
        self.generator = self._build()
        self.module = self.generator.train()

    def _build(self) -> Generator:
        config = self.config
        if config.init_from:
            pipeline = TextToImagePipeline.from_pretrained(config.init_from)
            self.words = pipeline.text_tokenizer
            return pipeline.generator
        options = dict(config.model)
        name, order_options = _DEFAULT_ORDERS[config.generator]
        if "order" in options:
            name, order_options = options.pop("order"), {}
        kind = GENERATORS[config.generator]
        order = orders.build(name, self.tokenizer.layout, **options.pop("order_options", order_options))
        fixed: dict[str, Any] = {
            "order_config": order.to_config(),
            "vocab_size": self.tokenizer.vocab_size,
            "transformer_config": options.pop("transformer", {}),
            "condition_config": {
                "kind": "words",
                "vocabulary": len(self.words),
                "length": config.text.max_length,
            },
        }
        for key in options:
            allowed = inspect.signature(kind).parameters.keys() - fixed.keys()
            if key not in allowed:
                raise unknown_name("model option", key, [*allowed, "order", "order_options", "transformer"])
        return kind(**fixed, **options)

    def _caption(self, index: int, rng: random.Random) -> str:
        item = self.captions[index]
        if rng.random() < self.config.text.drop:
            return ""
        if not item.label:
            return item.text
        return caption(item.label, item.tags, item.style, rng, self.config.text.max_tags)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Codes of a random view and ids of a random caption of each picture."""
        views = torch.randint(self.codes.shape[1], (len(indices),), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        texts = [self._caption(int(index), rng) for index in indices]
        return {"codes": self.codes[indices, views].long(), "condition": self.words(texts)}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a token."""
        return module(batch["codes"], batch["condition"]), {}

    def _pipeline(self) -> TextToImagePipeline:
        pipeline = TextToImagePipeline(self.tokenizer, self.generator, self.words, dict(self.config.sampling))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def samples(self, path: Path) -> None:
        """A sheet of the configured prompts with fixed seeds."""
        written = [item.text for item in self.captions if item.text]
        prompts = self.config.sample_prompts or written[:16]
        images = self._pipeline()(prompts, seed=[0] * len(prompts)).images
        save_image(sheet(cast("list[Image.Image]", images), columns=min(8, len(images))), path)

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder with a weight record."""
        self._pipeline().save_pretrained(folder)
