"""FID and LPIPS, for who has the networks they are defined by.

Both figures mean something only with the published networks, which are not part of tokenloom: the TorchScript files
`inception-2015-12-05.pt` and `vgg16.pt` that come with the metrics of StyleGAN2-ADA and StyleGAN3 (NVIDIA). They take
pixels from 0 to 255 and know their own preparation; the first gives features (`return_features=True`), the second vectors
whose squared distance is LPIPS (`return_lpips=True`). Knows pixels and files; knows nothing of tokenizers.

Shapes: N pictures, D features; pixels are uint8 (N, 3, H, W).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError

FILES = {"FID": "inception-2015-12-05.pt", "LPIPS": "vgg16.pt"}
"""The published network of each metric."""
_OPTIONS = {"FID": "return_features", "LPIPS": "return_lpips"}
_SMALLEST = 32  # pixels: the deepest features of both networks are empty below
_BATCH = 16


class FeatureNetwork:
    """The published network of a metric.

    Args:
        metric: "FID" or "LPIPS".
        path: Its TorchScript file.

    Raises:
        TokenloomError: If there is no such file, or it holds no such network.
    """

    def __init__(self, metric: str, path: str | Path) -> None:
        self.metric, self.path = metric, Path(path)
        if not self.path.is_file():
            raise TokenloomError(
                f"{metric} is defined by a network that does not come with tokenloom, and {path} is no file. Give the "
                f"TorchScript file {FILES[metric]} of StyleGAN3's metrics, or leave {metric} out."
            )
        try:
            self.module = torch.jit.load(str(self.path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise self._wrong("it is no TorchScript file") from error

    def _wrong(self, reason: str) -> TokenloomError:
        return TokenloomError(
            f"{self.path} does not work as the network of {self.metric}: {reason}. Expected {FILES[self.metric]} of "
            "StyleGAN3's metrics."
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (N, D), float64, of pixels uint8 (N, 3, H, W); pictures under 32 pixels are enlarged."""
        side = min(pixels.shape[2:])
        if side < _SMALLEST:
            factor = _SMALLEST / side
            pixels = F.interpolate(pixels.float(), scale_factor=factor, mode="bicubic").clamp(0, 255)
        option = {_OPTIONS[self.metric]: True}
        if self.metric == "LPIPS":
            pixels, option = pixels.float(), {"resize_images": False, **option}
        try:
            parts = [self.module(part, **option).flatten(1).double() for part in pixels.split(_BATCH)]
        except RuntimeError as error:
            raise self._wrong(str(error).strip().splitlines()[-1]) from error
        return torch.cat(parts)


def frechet_distance(left: Tensor, right: Tensor) -> float:
    """Squared Frechet distance of two normal distributions fitted to features (Heusel et al. 2017, eq. 6).

    Args:
        left: (N, D) features.
        right: (M, D) features.

    Raises:
        TokenloomError: For fewer than two rows, which have no covariance.

    Example:
        >>> round(frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])), 6)
        9.0
    """
    if min(len(left), len(right)) < 2:
        raise TokenloomError(
            f"FID needs at least 2 pictures on both sides, got {len(left)} and {len(right)}."
        )
    left, right = left.double(), right.double()
    first, second = left - left.mean(0), right - right.mean(0)
    # The trace of the root of the product of both covariances is the nuclear norm of the cross product of their factors.
    cross = (first / (len(left) - 1) ** 0.5) @ (second / (len(right) - 1) ** 0.5).T
    spread = first.square().sum() / (len(left) - 1) + second.square().sum() / (len(right) - 1)
    shift = (left.mean(0) - right.mean(0)).square().sum()
    return float((shift + spread - 2 * torch.linalg.svdvals(cross).sum()).clamp(min=0))


def lpips(left: Tensor, right: Tensor) -> float:
    """Mean over pictures of the squared distance of LPIPS vectors (N, D)."""
    return float((left - right).square().sum(1).mean())
