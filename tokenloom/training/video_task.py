"""Training of a generator of clips on cached codes of a video tokenizer, from words where clips have captions.

Knows codes, captions, the generator by its `loss`, and the pipeline that is saved. What is trained in which order, weights
of steps and growing blocks are those of `generator_task`.

Shapes: M clips, N codes a clip, W words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.base import Generator
from tokenloom.layouts import Layout
from tokenloom.media import save_image, sheet
from tokenloom.media_video import save_clip
from tokenloom.pipelines.video import VideoPipeline
from tokenloom.tokenizers.text import WordTokenizer
from tokenloom.tokenizers.video import VideoTokenizer
from tokenloom.training.clip_source import ClipSource, open_clips
from tokenloom.training.code_cache import weights_digest
from tokenloom.training.data import open_model, square_side
from tokenloom.training.families import build_generator, family
from tokenloom.training.generator_task import GeneratorTask
from tokenloom.training.video_config import VideoConfig

_HELD_OUT, _HELD_OUT_BATCH = 128, 16
_ENCODED_AT_ONCE = 16
_SHOWN_FRAMES = 9


class VideoTask(GeneratorTask):
    """Trains a generator of the codes of clips."""

    config: VideoConfig  # type: ignore[assignment]
    tokenizer: VideoTokenizer  # type: ignore[assignment]
    words: WordTokenizer | None  # type: ignore[assignment]

    def __init__(self, config: VideoConfig) -> None:
        family(config.generator)
        self.config = config
        set_seed(config.loop.seed)
        self.tokenizer = open_model(config.tokenizer, VideoTokenizer).eval()
        self.tokenizer.to(PartialState().device)
        self.frames = config.frames or self.tokenizer.num_frames
        self.layout = self._layout(self.frames)
        self.clips = open_clips(config.data, square_side(self.tokenizer), self.frames)
        self.codes, self.texts = self._cached(self.clips)
        texts = [text for text in self.clips.words() if text]
        self.words = (
            WordTokenizer.from_captions(texts, config.text.max_length, config.text.min_count)
            if texts
            else None
        )
        self.size = len(self.codes)
        self.unseen = self._held_out()
        self.generator = self._build()
        self._check_loss()
        self._grow(0)
        self.module = self.generator.train()

    def _layout(self, frames: int) -> Layout:
        whole = self.tokenizer.frames_of(self.tokenizer.codes_frames(frames))
        if whole != frames or frames < 2:
            raise TokenloomError(
                f"frames must be one more than a multiple of the {self.tokenizer.stride[0]} frames a code, got {frames}; use "
                f"{max(whole, 1 + self.tokenizer.stride[0])}."
            )
        return self.tokenizer.layout_for(frames)

    def _cached(self, clips: ClipSource) -> tuple[Tensor, list[str]]:
        """Codes int32 (M, N) and captions of all clips, from the folder `code_cache` if they are there."""
        if self.config.code_cache is None:
            return self._encode(clips, clips.size)
        name = hashlib.sha256(f"{clips.name()} {weights_digest(self.tokenizer)}".encode()).hexdigest()[:32]
        path = Path(self.config.code_cache) / f"{name}.safetensors"
        if not path.is_file():
            codes, texts = self._encode(clips, clips.size)
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_name(f".{path.stem}-{os.getpid()}")
            save_file({"codes": codes.contiguous()}, scratch, metadata={"texts": json.dumps(texts)})
            scratch.replace(path)
        with safe_open(path, "pt") as opened:
            return opened.get_tensor("codes"), json.loads(opened.metadata()["texts"])

    @torch.no_grad()
    def _encode(self, clips: ClipSource, count: int) -> tuple[Tensor, list[str]]:
        """Codes and captions of `count` clips, evenly spread."""
        codes, texts = [], []
        for chosen in torch.linspace(0, clips.size - 1, count).long().split(_ENCODED_AT_ONCE):
            frames, said = clips.fixed(chosen)
            codes.append(self.tokenizer.encode(frames.to(self.tokenizer.device)).int().cpu())
            texts += said
        return torch.cat(codes), texts

    def _held_out(self) -> list[tuple[Tensor, Any]]:
        """Batches of codes and words of clips of the held-out split."""
        if self.config.held_out is None:
            return []
        data = dataclasses.replace(self.config.data, split=self.config.held_out)
        clips = open_clips(data, square_side(self.tokenizer), self.frames)
        codes, texts = self._encode(clips, min(_HELD_OUT, clips.size))
        batches = codes.long().split(_HELD_OUT_BATCH)
        if self.words is None:
            return [(part, None) for part in batches]
        return list(zip(batches, self.words(texts).split(_HELD_OUT_BATCH), strict=True))

    def _build(self) -> Generator:
        config = self.config
        if config.init_from:
            pipeline = VideoPipeline.from_pretrained(config.init_from)
            self.words = pipeline.text_tokenizer
            return pipeline.generator
        condition: dict[str, Any] = {"kind": "none"}
        if self.words is not None:
            condition = {"kind": "words", "vocabulary": len(self.words), "length": config.text.max_length}
        return build_generator(config.generator, self.tokenizer, condition, config.model, self.layout)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Codes of the clips, and ids of their captions, some of which are dropped."""
        batch = {"codes": self.codes[indices].long()}
        if self.words is not None:
            rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
            drop = self.config.text.drop
            batch["condition"] = self.words(
                ["" if rng.random() < drop else self.texts[index] for index in indices.tolist()]
            )
        return batch

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a token."""
        return super().loss(module, {"condition": None, **batch}, step)

    def _pipeline(self) -> VideoPipeline:  # type: ignore[override]
        config = self.config
        pipeline = VideoPipeline(
            self.tokenizer, self.generator, self.words, dict(config.sampling), config.fps
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def samples(self, path: Path) -> None:
        """A sheet of clips of the configured prompts, a row each, and an animation of them."""
        written = [text for text in self.texts if text]
        prompts = (self.config.sample_prompts or written[:4] or None) if self.words else None
        options: dict[str, Any] = {}
        if not bool(self.generator.plan.predicted.all()):  # a part has to be known
            options = {"video": self.clips.fixed(torch.zeros(1, dtype=torch.long))[0][0, : self.frames // 2]}
        clips = self._pipeline()(prompts, seed=[0] * len(prompts or [0]), **options).frames
        shown = torch.linspace(0, len(clips[0]) - 1, min(_SHOWN_FRAMES, len(clips[0]))).long().tolist()
        rows = [clip[index] for clip in clips for index in shown]
        save_image(sheet(cast("list[Image.Image]", rows), columns=len(shown)), path)
        wide = [sheet([clip[index] for clip in clips], columns=len(clips)) for index in range(len(clips[0]))]
        save_clip(wide, path.with_suffix(".webp"), self.config.fps)
