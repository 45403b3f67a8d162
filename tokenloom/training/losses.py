"""Reconstruction losses: pixel, multi-scale structural, perceptual through timm, and a patch discriminator.

All take pictures (B, 3, H, W) in [-1, 1]. Knows nothing of tokenizers or loops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError


def structural_loss(output: Tensor, target: Tensor, scales: int = 3, window: int = 7) -> Tensor:
    """1 - SSIM with uniform windows, averaged over a pyramid of halved pictures (after Wang et al. 2003).

    Scales at which a picture is smaller than the window are left out, except the first, whose window shrinks.

    Returns:
        A scalar in [0, 2].
    """
    c1, c2 = 0.01**2, 0.03**2
    output, target = (
        (output + 1) / 2,
        (target + 1) / 2,
    )  # means of one sign, or two negatives would look alike
    losses = []
    window = min(window, *output.shape[-2:])
    for scale in range(scales):
        if scale:
            if min(output.shape[-2:]) < 2 * window:
                break
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
        mean_x, mean_y = F.avg_pool2d(output, window, 1), F.avg_pool2d(target, window, 1)
        var_x = F.avg_pool2d(output * output, window, 1) - mean_x * mean_x
        var_y = F.avg_pool2d(target * target, window, 1) - mean_y * mean_y
        covariance = F.avg_pool2d(output * target, window, 1) - mean_x * mean_y
        similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
            (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
        )
        losses.append(1 - similarity.mean())
    return torch.stack(losses).mean()


class PerceptualLoss(nn.Module):
    """Mean squared distance of channel-normalised features of a timm backbone (LPIPS without linear heads).

    Pictures are brought to the mean and standard deviation the backbone was trained with.

    Args:
        backbone: timm name, for instance "vgg16".
        pretrained: Whether timm loads published weights; random features are a weak loss, but need no download.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, pretrained: bool) -> None:
        super().__init__()
        import timm

        try:
            self.net = timm.create_model(backbone, pretrained=pretrained, features_only=True)
        except Exception as error:
            raise TokenloomError(
                f"timm cannot create the perceptual backbone {backbone!r} (pretrained={pretrained}): {error}. "
                "Set loss.perceptual_pretrained to false, name another backbone, or set loss.perceptual to 0."
            ) from error
        self.net.eval().requires_grad_(False)
        settings = timm.data.resolve_model_data_config(self.net)
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, -1, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor(settings["std"]).view(1, -1, 1, 1) * 2)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        return self.net((pixels - self.mean) / self.std)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar; gradients flow into `output`."""
        with torch.no_grad():
            wanted = self._features(target)
        pairs = zip(self._features(output), wanted, strict=True)
        distances = [F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1)) * a.shape[1] for a, b in pairs]
        return torch.stack(distances).mean()


class PatchDiscriminator(nn.Module):
    """A PatchGAN: a few strided convolutions ending in a map of real/fake logits (Isola et al. 2017).

    Args:
        width: Channels of the first layer.
        layers: Strided layers.
    """

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers):
            before, after = width * 2 ** (layer - 1), width * 2**layer
            parts += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*parts, nn.Conv2d(width * 2 ** (layers - 1), 1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1, h, w)."""
        return self.net(pixels)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class LeCam(nn.Module):
    """Holds a discriminator's answers near the averages of earlier ones, which helps with few pictures (Tseng et al. 2021).

    Args:
        decay: Decay of the two averages.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.tensor(0.0))
        self.register_buffer("fake", torch.tensor(0.0))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """A scalar loss of logits of real and decoded pictures, of any shape; updates the averages."""
        with torch.no_grad():
            self.real.lerp_(real.detach().mean(), 1 - self.decay)
            self.fake.lerp_(fake.detach().mean(), 1 - self.decay)
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of gradient norms at the last layer (VQGAN, eq. 7), at most 1e4."""
    (a,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach()
