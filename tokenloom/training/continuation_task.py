"""Training of a generator that continues sound, on cached codes of a codec.

Knows codes, the generator by its `loss`, and the pipeline that is saved. Knows nothing of samples beyond a sheet of
spectrograms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn

from tokenloom.media import save_image
from tokenloom.media_audio import save_audio
from tokenloom.media_spectrogram import spectrogram_picture
from tokenloom.pipelines.audio_continuation import AudioContinuationPipeline
from tokenloom.tokenizers.audio import AudioTokenizer
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
        self.generator = self._build()
        self.module = self.generator.train()

    def _build(self) -> Any:
        config = self.config
        if config.init_from:
            return AudioContinuationPipeline.from_pretrained(config.init_from).generator
        layout = self.codec.layout_for(config.frames, config.codebooks)
        sizes = self.codec.codebook_sizes[: self.codec.count_codebooks(config.codebooks)]
        return build_frames(config.generator, Frames(layout, sizes), config.model)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Codes (B, N) of random windows."""
        return {"codes": self.codes.crops(self.windows[indices], self.config.frames, generator)}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a code."""
        return module(batch["codes"]), {}

    def _pipeline(self) -> AudioContinuationPipeline:
        pipeline = AudioContinuationPipeline(self.codec, self.generator, dict(self.config.sampling))
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
            made = self._pipeline()(audio[:, :start], rate, seconds=(whole - start) / rate, seed=0).audios
            rows += [audio[0], torch.as_tensor(made)[0, 0]]
        save_image(spectrogram_picture(rows, rate), path)
        save_audio(torch.cat(rows[1::2]), path.with_suffix(".wav"), rate)

    def save(self, folder: Path) -> None:
        """Writes a pipeline folder with a weight record."""
        self._pipeline().save_pretrained(folder)
