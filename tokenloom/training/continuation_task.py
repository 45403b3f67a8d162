"""Training of a generator that continues sound, on cached codes of a codec.

Knows codes, the generator by its `loss`, and the pipeline that is saved. Knows nothing of samples beyond a sheet of
spectrograms.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.media import save_image
from tokenloom.media_audio import save_audio
from tokenloom.media_spectrogram import spectrogram_picture
from tokenloom.pipelines.audio_continuation import AudioContinuationPipeline
from tokenloom.tokenizers.audio import AudioTokenizer
from tokenloom.tokenizers.text import WordTokenizer
from tokenloom.training.audio_config import ContinuationConfig
from tokenloom.training.codec_task import open_sounds
from tokenloom.training.data import open_model
from tokenloom.training.frame_families import Frames, build_frames
from tokenloom.training.loop import Task
from tokenloom.training.sound_codes import sound_codes

_SHOWN = 2  # continuations in a sheet of samples


class ContinuationTask(Task):
    """Trains a generator of codec frames on random windows of the sounds of a folder."""

    def __init__(self, config: ContinuationConfig) -> None:
        self.config = config
        set_seed(config.loop.seed)
        self.codec = open_model(config.codec, AudioTokenizer).eval()
        self.codec.to(PartialState().device)
        self.sounds = open_sounds(config.data, self.codec.sample_rate)
        self.codes = sound_codes(self.codec, self.sounds, config.codebooks, config.code_cache)
        self.windows = self.codes.windows(config.frames)
        self.size = len(self.windows)
        self.words = self._vocabulary()
        self.generator = self._build()
        self.module = self.generator.train()

    def _vocabulary(self) -> WordTokenizer | None:
        text = self.config.text
        if text is None:
            return None
        texts = [caption.text for caption in self.sounds.captions if caption.text]
        if not texts:
            raise TokenloomError(
                f'{self.config.data.root} has no captions; add a captions.jsonl with "file" and "text", or take `text` away.'
            )
        return WordTokenizer.from_captions(texts, text.max_length, text.min_count)

    def _build(self) -> Any:
        config = self.config
        if config.init_from:
            pipeline = AudioContinuationPipeline.from_pretrained(config.init_from)
            if (pipeline.text_tokenizer is None) != (config.text is None):
                raise TokenloomError(
                    f"The model {config.init_from!r} reads {'no ' if config.text else ''}words; set `text` as it was trained."
                )
            self.words = pipeline.text_tokenizer
            return pipeline.generator
        layout = self.codec.layout_for(config.frames, config.codebooks)
        sizes = self.codec.codebook_sizes[: self.codec.count_codebooks(config.codebooks)]
        condition = None
        if self.words is not None:
            condition = {"kind": "words", "vocabulary": len(self.words), "length": self.words.max_length}
        return build_frames(config.generator, Frames(layout, sizes), config.model, condition)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Codes (B, N) of random windows, and with words the ids of their captions, some of which are dropped."""
        batch = {"codes": self.codes.crops(self.windows[indices], self.config.frames, generator)}
        if self.words is not None and self.config.text is not None:
            rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
            drop, captions = self.config.text.drop, self.sounds.captions
            sounds = self.windows[indices, 0].tolist()
            batch["condition"] = self.words(
                ["" if rng.random() < drop else captions[sound].text for sound in sounds]
            )
        return batch

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a code."""
        return module(batch["codes"], batch.get("condition")), {}

    def _pipeline(self) -> AudioContinuationPipeline:
        pipeline = AudioContinuationPipeline(
            self.codec, self.generator, dict(self.config.sampling), self.words
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def samples(self, path: Path) -> None:
        """Spectrograms of the first sounds, each above a continuation of its first third; the continuations as WAV."""
        rate, hop = self.codec.sample_rate, self.codec.hop_length
        whole = self.config.frames * hop
        start = max(1, self.config.frames // 3) * hop
        rows = []
        for index in self.windows[:, 0].unique().tolist()[:_SHOWN]:
            audio = self.sounds.sound(index)[:, :whole]
            text = self.sounds.captions[index].text or None if self.words is not None else None
            made = self._pipeline()(
                audio[:, :start], rate, prompt=text, seconds=(whole - start) / rate, seed=0
            ).audios
            rows += [audio[0], torch.as_tensor(made)[0, 0]]
        save_image(spectrogram_picture(rows, rate), path)
        save_audio(torch.cat(rows[1::2]), path.with_suffix(".wav"), rate)

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder with a weight record."""
        self._pipeline().save_pretrained(folder)
