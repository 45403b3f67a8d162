"""Training of an image tokenizer: reconstruction, optional perceptual and adversarial losses, codebook figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from tokenloom.errors import check_options
from tokenloom.media import save_image, sheet, to_pil
from tokenloom.tokenizers.image_vq import ImageVQTokenizer
from tokenloom.tokenizers.quantizers import codebook_usage
from tokenloom.training.augment import augment
from tokenloom.training.config import TokenizerConfig
from tokenloom.training.data import open_folder, open_tokenizer, to_float
from tokenloom.training.loop import Task
from tokenloom.training.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    hinge_loss,
    structural_loss,
)


class TokenizerTask(Task):
    """Trains `ImageVQTokenizer` on the pictures of a folder."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config
        set_seed(config.loop.seed)
        if config.init_from:
            self.tokenizer = open_tokenizer(config.init_from)
        else:
            check_options(ImageVQTokenizer, config.model, "model option")
            self.tokenizer = ImageVQTokenizer(**config.model)
        self.module = self.tokenizer.train()
        self.pixels = open_folder(config.data, self.tokenizer.image_size).stack()
        self.size = len(self.pixels)
        self.counts = torch.zeros(self.tokenizer.vocab_size, dtype=torch.long)
        loss = config.loss
        self.perceptual = (
            PerceptualLoss(loss.perceptual_backbone, loss.perceptual_pretrained) if loss.perceptual else None
        )
        self.discriminator = PatchDiscriminator() if loss.adversarial else None
        self.critic: nn.Module | None = None  # the discriminator, as accelerate wraps it
        self.outputs: Tensor | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves the extra networks and prepares the discriminator's optimizer."""
        if self.perceptual is not None:
            self.perceptual.to(accelerator.device)
        if self.discriminator is not None:
            optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=self.config.loop.learning_rate / 2, betas=(0.5, 0.9)
            )
            self.critic, self.critic_optimizer = accelerator.prepare(self.discriminator, optimizer)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Augmented pixels of the given pictures."""
        return {"pixels": augment(to_float(self.pixels[indices]), self.config.augment, generator)}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the configured losses."""
        weights, pixels = self.config.loss, batch["pixels"]
        output, quantized = module(pixels)
        output = output.float()
        logs = {"l1": F.l1_loss(output, pixels), "l2": F.mse_loss(output, pixels)}
        total = weights.l1 * logs["l1"] + weights.l2 * logs["l2"]
        if weights.structure:
            logs["structure"] = structural_loss(output, pixels)
            total = total + weights.structure * logs["structure"]
        if self.perceptual is not None:
            logs["perceptual"] = self.perceptual(output, pixels)
            total = total + weights.perceptual * logs["perceptual"]
        if self.discriminator is not None and step >= weights.adversarial_start:
            self.discriminator.requires_grad_(False)  # this loss trains the tokenizer alone
            logs["adversarial"] = -self.discriminator(output).float().mean()
            self.discriminator.requires_grad_(True)
            weight = adaptive_weight(total, logs["adversarial"], self.tokenizer.paint.weight)
            total = total + weights.adversarial * weight * logs["adversarial"]
        self.outputs = output.detach()
        for name, value in quantized.losses.items():
            logs[name] = value
            total = total + value
        self._count(quantized.codes, step)
        logs.update(quantized.stats)
        logs["psnr"] = 10 * torch.log10(4 / logs["l2"].detach())
        return total, {key: value.detach() for key, value in logs.items()} | self.usage

    def _count(self, codes: Tensor, step: int) -> None:
        if step % self.config.loop.log_every == 0:
            self.counts.zero_()
        self.counts += torch.bincount(codes.flatten().cpu(), minlength=self.counts.numel())
        due = (step + 1) % self.config.loop.log_every == 0
        figures = codebook_usage(self.counts) if due else {}
        self.usage = {key: torch.tensor(value) for key, value in figures.items()}

    def after_step(self, accelerator: Accelerator, batch: Any, step: int) -> dict[str, Tensor]:
        """Trains the discriminator."""
        if self.critic is None or self.outputs is None or step < self.config.loss.adversarial_start:
            return {}
        with accelerator.autocast():
            real, fake = self.critic(torch.cat((batch["pixels"], self.outputs))).chunk(2)
            loss = hinge_loss(real.float(), fake.float())
        self.critic_optimizer.zero_grad()
        accelerator.backward(loss)
        self.critic_optimizer.step()
        return {"critic": loss.detach()}

    def samples(self, path: Path) -> None:
        """A grid: pictures above, their reconstructions below."""
        count = min(16, self.size)
        pixels = to_float(self.pixels[torch.linspace(0, self.size - 1, count).long()])
        device = next(self.tokenizer.parameters()).device
        output = self.tokenizer.reconstruct(pixels.to(device)).cpu()
        save_image(sheet(to_pil(torch.cat((pixels, output))), columns=count), path)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer in diffusers' layout."""
        self.tokenizer.save_pretrained(folder)
