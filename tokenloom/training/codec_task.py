"""Training of an `AudioTokenizer`: spectral losses, an optional discriminator, figures of every codebook.

Knows sounds, the codec by its `forward`, and losses. Knows no architecture.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from tokenloom.data.sounds import SoundFolder
from tokenloom.errors import check_options
from tokenloom.media import save_image
from tokenloom.media_audio import save_audio
from tokenloom.media_spectrogram import spectrogram_picture
from tokenloom.tokenizers.audio import AudioTokenizer
from tokenloom.training.audio_config import CodecConfig, SoundConfig
from tokenloom.training.audio_losses import MelLoss, SpectrumDiscriminator, feature_loss, stft_loss
from tokenloom.training.data import open_model
from tokenloom.training.loop import Task
from tokenloom.training.losses import hinge_loss
from tokenloom.training.statistics import CodeStatistics

_SHOWN_SECONDS = 4.0


class CodecTask(Task):
    """Trains a codec on random pieces of the sounds of a folder."""

    def __init__(self, config: CodecConfig) -> None:
        self.config = config
        set_seed(config.loop.seed)
        self.codec = open_model(config.init_from, AudioTokenizer) if config.init_from else _new(config.model)
        self.module = self.codec.train()
        self.sounds = open_sounds(config.data, self.codec.sample_rate)
        hop = self.codec.hop_length
        self.crop = max(1, round(config.crop_seconds * self.codec.sample_rate / hop)) * hop
        self.windows = self.sounds.windows(self.crop)
        self.size = len(self.windows)
        self.mel = MelLoss(self.codec.sample_rate)
        self.discriminator = SpectrumDiscriminator() if config.loss.adversarial else None
        self.critic: nn.Module | None = None  # the discriminator, as accelerate wraps it
        self.statistics = CodeStatistics(self.codec.layout_for(self.crop // hop), self.codec.vocab_size)
        self.outputs: Tensor | None = None
        self.usage: dict[str, Tensor] = {}

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves the mel filters and prepares the discriminator's optimizer."""
        self.mel.to(accelerator.device)
        if self.discriminator is not None:
            optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=self.config.loop.learning_rate / 2, betas=(0.5, 0.9)
            )
            self.critic, self.critic_optimizer = accelerator.prepare(self.discriminator, optimizer)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Random pieces (B, 1, S), each turned down at random."""
        audio = self.sounds.crops(self.windows[indices], self.crop, generator)
        loss = self.config.quieter * torch.rand(len(audio), 1, 1, generator=generator)
        return {"audio": audio * 10 ** (-loss / 20)}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the configured losses."""
        weights, audio = self.config.loss, batch["audio"]
        output, quantized = module(audio)
        output = output.float()
        self.outputs = output.detach()
        logs = {"mel": self.mel(output, audio), "wave": F.l1_loss(output, audio)}
        total = weights.mel * logs["mel"] + weights.wave * logs["wave"]
        if weights.stft:
            logs["stft"] = stft_loss(output, audio)
            total = total + weights.stft * logs["stft"]
        if self.discriminator is not None and step >= weights.adversarial_start:
            logs["adversarial"], logs["features"] = self._judged(output, audio)
            total = total + weights.adversarial * (logs["adversarial"] + weights.features * logs["features"])
        for name, value in quantized.losses.items():
            logs[name] = value
            total = total + value
        self._count(quantized.codes, step)
        return total, {key: value.detach() for key, value in logs.items()} | self.usage

    def _judged(self, output: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator says of the output, and how far its features are from those of the sound."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)  # this loss trains the codec alone
        ours, wanted = self.discriminator.features(output), self.discriminator.features(audio)
        self.discriminator.requires_grad_(True)
        return -torch.stack([maps[-1].float().mean() for maps in ours]).mean(), feature_loss(ours, wanted)

    def _count(self, codes: Tensor, step: int) -> None:
        if step % self.config.loop.log_every == 0:
            self.statistics.clear()
        self.statistics.update(codes.flatten(1))
        self.usage = {}
        if (step + 1) % self.config.loop.log_every == 0:
            counts = self.statistics.total(codes.device)
            self.usage = {key: torch.tensor(value) for key, value in self.statistics.figures(counts).items()}

    def after_step(self, accelerator: Accelerator, batch: Any, step: int) -> dict[str, Tensor]:
        """Trains the discriminator."""
        if self.critic is None or self.outputs is None or step < self.config.loss.adversarial_start:
            return {}
        with accelerator.autocast():
            real, fake = self.critic(torch.cat((batch["audio"], self.outputs))).chunk(2)
            loss = hinge_loss(real.float(), fake.float())
        self.critic_optimizer.zero_grad()
        accelerator.backward(loss)
        self.critic_optimizer.step()
        return {"critic": loss.detach()}

    def samples(self, path: Path) -> None:
        """Spectrograms of a sound, and below it what comes back with half and all codebooks; the sound as WAV."""
        rate, device = self.codec.sample_rate, self.codec.device
        audio = self.sounds.sound(0)[None, :, : round(_SHOWN_SECONDS * rate)]
        counts = sorted({math.ceil(self.codec.num_codebooks / 2), self.codec.num_codebooks})
        made = [self.codec.reconstruct(audio.to(device), num_codebooks=count).cpu() for count in counts]
        rows = [audio, *made]
        save_image(spectrogram_picture([row[0, 0] for row in rows], rate), path)
        save_audio(torch.cat(rows, dim=2), path.with_suffix(".wav"), rate)

    def save(self, folder: Path) -> None:
        """Writes the codec in diffusers' layout."""
        self.codec.save_pretrained(folder)


def open_sounds(config: SoundConfig, sample_rate: int) -> SoundFolder:
    """The configured part of a folder of sounds."""
    return SoundFolder(
        config.root,
        config.split,
        sample_rate,
        groups=config.groups,
        licences=config.licences,
        cache=config.cache,
    )


def _new(options: dict[str, Any]) -> AudioTokenizer:
    check_options(AudioTokenizer, options, "model option")
    return AudioTokenizer(**options)
