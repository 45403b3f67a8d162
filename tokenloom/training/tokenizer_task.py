"""Training of an image tokenizer: reconstruction, optional perceptual and adversarial losses, codebook figures.

Knows any `ImageTokenizer` by its `forward`, `pixel_range`, `last_layer` and `parts`. Knows no architecture.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.media import save_image, sheet, to_pil
from tokenloom.tokenizers.pixels import rescale
from tokenloom.tokenizers.registry import tokenizer_class
from tokenloom.training.augment import augment
from tokenloom.training.config import TokenizerConfig
from tokenloom.training.data import open_folder, open_tokenizer, square_side, to_float
from tokenloom.training.freezing import freeze
from tokenloom.training.loop import Task
from tokenloom.training.losses import (
    LeCam,
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    hinge_loss,
    structural_loss,
)
from tokenloom.training.statistics import CodeStatistics

_RANGE = (-1.0, 1.0)  # of pixels outside the tokenizer
_MOST_PREFIXES = 6  # in a sample grid


class TokenizerTask(Task):
    """Trains an image tokenizer on the pictures of a folder."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config
        set_seed(config.loop.seed)
        self.tokenizer = self._tokenizer()
        _weigh_entropy(self.tokenizer, config.loss.entropy)
        self.frozen = freeze(self.tokenizer, config.freeze, self.tokenizer.parts)
        self.module = self.tokenizer.train()
        self.size = self._open_data()
        self.statistics = CodeStatistics(self.tokenizer.layout, self.tokenizer.vocab_size)
        loss = config.loss
        self.perceptual = (
            PerceptualLoss(loss.perceptual_backbone, loss.perceptual_pretrained) if loss.perceptual else None
        )
        self.discriminator = PatchDiscriminator() if loss.adversarial else None
        self.lecam = LeCam() if loss.lecam else None
        self.critic: nn.Module | None = None  # the discriminator, as accelerate wraps it
        self.outputs: Tensor | None = None

    def _tokenizer(self) -> Any:
        """The tokenizer of the config, new or from a folder."""
        config = self.config
        if config.init_from:
            return open_tokenizer(config.init_from)
        kind = tokenizer_class(config.tokenizer)
        check_options(kind, config.model, "model option")
        return kind(**config.model)

    def _open_data(self) -> int:
        """Reads the training pictures and returns how many there are."""
        self.pixels = open_folder(self.config.data, square_side(self.tokenizer)).stack()
        return len(self.pixels)

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves the extra networks and prepares the discriminator's optimizer."""
        if self.perceptual is not None:
            self.perceptual.to(accelerator.device)
        if self.discriminator is not None:
            optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=self.config.loop.learning_rate / 2, betas=(0.5, 0.9)
            )
            self.critic, self.critic_optimizer = accelerator.prepare(self.discriminator, optimizer)
            if self.lecam is not None:
                self.lecam.to(accelerator.device)
                accelerator.register_for_checkpointing(self.lecam)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Augmented pixels of the given pictures."""
        return {"pixels": augment(to_float(self.pixels[indices]), self.config.augment, generator)}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the configured losses."""
        for part in self.frozen:  # the loop sets the whole module to training
            part.eval()
        weights, pixels, bounds = self.config.loss, batch["pixels"], self.tokenizer.pixel_range
        output, quantized = module(rescale(pixels, _RANGE, bounds))
        output = rescale(output.float(), bounds, _RANGE)
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
            weight = adaptive_weight(total, logs["adversarial"], self.tokenizer.last_layer)
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
            self.statistics.clear()
        self.statistics.update(codes)
        self.usage: dict[str, Tensor] = {}
        if (step + 1) % self.config.loop.log_every == 0:
            counts = self.statistics.total(codes.device)
            self.usage = {key: torch.tensor(value) for key, value in self.statistics.figures(counts).items()}
            for concern in self.statistics.concerns(counts):
                warnings.warn(f"Step {step + 1}: {concern}", stacklevel=2)

    def after_step(self, accelerator: Accelerator, batch: Any, step: int) -> dict[str, Tensor]:
        """Trains the discriminator."""
        if self.critic is None or self.outputs is None or step < self.config.loss.adversarial_start:
            return {}
        with accelerator.autocast():
            real, fake = self.critic(torch.cat((batch["pixels"], self.outputs))).chunk(2)
            loss = hinge_loss(real.float(), fake.float())
            if self.lecam is not None:
                loss = loss + self.config.loss.lecam * self.lecam(real.float(), fake.float())
        self.critic_optimizer.zero_grad()
        accelerator.backward(loss)
        self.critic_optimizer.step()
        return {"critic": loss.detach()}

    def samples(self, path: Path) -> None:
        """A grid: pictures above, below them their reconstructions, from the fewest codes to all of them."""
        count = min(16, self.size)
        pixels = to_float(self.pixels[torch.linspace(0, self.size - 1, count).long()])
        bounds = self.tokenizer.pixel_range
        given = rescale(pixels.to(next(self.tokenizer.parameters()).device), _RANGE, bounds)
        lengths, rows = self.tokenizer.lengths, [pixels]
        places = torch.linspace(0, len(lengths) - 1, min(_MOST_PREFIXES, len(lengths))).long().tolist()
        for length in (lengths[place] for place in places):
            options = {} if length == lengths[-1] else {"num_tokens": length}
            output = self.tokenizer.reconstruct(given, **options).float().cpu()
            rows.append(rescale(output, bounds, _RANGE))
        save_image(sheet(to_pil(torch.cat(rows)), columns=count), path)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer in diffusers' layout."""
        self.tokenizer.save_pretrained(folder)


def _weigh_entropy(tokenizer: Any, weight: float | None) -> None:
    """Puts a weight in the place of that of the quantizer's entropy loss, unless it is `None`."""
    if weight is None:
        return
    owners: list[Any] = [part for part in tokenizer.quantizer.modules() if hasattr(part, "entropy_weight")]
    if not owners:
        raise TokenloomError(
            f"loss.entropy needs a quantizer with an entropy loss (vq, lfq, bsq), not "
            f"{type(tokenizer.quantizer).__name__}; take the key away."
        )
    for part in owners:
        part.entropy_weight = weight
