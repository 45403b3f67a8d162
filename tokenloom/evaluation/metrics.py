"""Picture metrics that need no downloaded weights: PSNR, SSIM and the mean distance between pairs.

Everything is computed in float32 on pictures in [0, 1] and returned for each picture, so that a caller can
average as it likes and say how. Knows nothing of tokenizers, codecs or files.

Shapes: B pictures, C channels, H rows, W columns, K vectors of D numbers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name

SSIM_WINDOWS = ("gaussian11", "uniform7")
_C1, _C2 = 0.01**2, 0.03**2


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB.

    Args:
        image: (B, C, H, W) float in [0, 1].
        reference: The same shape and range.

    Returns:
        (B,) float32, `10 log10(1 / mse)`; infinity where the pictures are equal.

    Raises:
        TokenloomError: If the shapes differ or are not (B, C, H, W).

    Example:
        >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)).round(decimals=3)
        tensor([20.])
    """
    return psnr_of_mse(mean_squared_error(image, reference))


def psnr_of_mse(mse: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors measured on [0, 1]; any shape."""
    return -10.0 * torch.log10(mse)


def mean_squared_error(image: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of each picture: (B, C, H, W) and (B, C, H, W) to (B,) float32."""
    _check_pair(image, reference)
    return (image.float() - reference.float()).square().flatten(1).mean(1)


def ssim(
    image: Tensor, reference: Tensor, window: Literal["gaussian11", "uniform7"] = "gaussian11"
) -> Tensor:
    """Structural similarity of each picture, the mean over channels and over the places where the window
    fits.

    Args:
        image: (B, C, H, W) float in [0, 1], at least as large as the window.
        reference: The same shape and range.
        window: `"gaussian11"`, 11 x 11 with sigma 1.5 and population moments (as pytorch-msssim), or
            `"uniform7"`, 7 x 7 with sample moments (as scikit-image's default). The two differ by 0.01 to
            0.02: always say which was used.

    Returns:
        (B,) float32 in [-1, 1]; 1 where the pictures are equal.

    Raises:
        TokenloomError: If the shapes differ, a picture is smaller than the window, or the window is unknown.

    Example:
        >>> ssim(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16), window="uniform7")
        tensor([1.])
    """
    _check_pair(image, reference)
    taps, correction = _window(window)
    if min(image.shape[-2:]) < taps.numel():
        raise TokenloomError(
            f"SSIM with window {window!r} needs pictures of at least {taps.numel()} x {taps.numel()} pixels, "
            f"got {image.shape[-2]} x {image.shape[-1]}. Resize both pictures first."
        )
    channels = image.shape[1]
    taps = taps.to(image.device)
    row = taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    column = taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, row, groups=channels), column, groups=channels)

    x, y = image.float(), reference.float()
    mean_x, mean_y = blur(x), blur(y)
    var_x = (blur(x * x) - mean_x * mean_x) * correction
    var_y = (blur(y * y) - mean_y * mean_y) * correction
    cov = (blur(x * y) - mean_x * mean_y) * correction
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * cov + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).flatten(1).mean(1)


def mean_pairwise_distance(vectors: Tensor, kind: Literal["rms", "cosine"] = "rms") -> float:
    """Mean distance over all pairs of K vectors: how varied a set is (0 when all its members are equal).

    Args:
        vectors: (K, ...) float; everything after the first axis is flattened. Pictures should be in [0, 1].
        kind: `"rms"`, the root of the mean squared difference, in the units of the data; or `"cosine"`, 1 -
            cosine similarity.

    Returns:
        The mean over the K (K - 1) / 2 unordered pairs.

    Raises:
        TokenloomError: If there are fewer than two vectors or the kind is unknown.

    Example:
        >>> mean_pairwise_distance(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        1.0
    """
    if vectors.ndim < 1 or vectors.shape[0] < 2:
        raise TokenloomError(
            f"Expected at least two vectors to compare, got shape {tuple(vectors.shape)}. Draw more samples."
        )
    flat = vectors.flatten(1).double()
    first, second = torch.triu_indices(flat.shape[0], flat.shape[0], offset=1)
    if kind == "rms":
        distances = (flat[first] - flat[second]).square().mean(1).sqrt()
    elif kind == "cosine":
        distances = 1.0 - F.cosine_similarity(flat[first], flat[second], dim=1)
    else:
        raise unknown_name("distance", kind, ("rms", "cosine"))
    return float(distances.mean())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two normal distributions fitted to vectors (Dowson & Landau 1982; what FID takes of features).

    It is biased upwards for few vectors: compare only figures of equally many.

    Args:
        first: (K, D) float, at least two vectors.
        second: (L, D) float, at least two vectors.

    Raises:
        TokenloomError: For other shapes.

    Example:
        >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        9.0
    """
    if (
        min(first.ndim, second.ndim) != 2
        or first.shape[1:] != second.shape[1:]
        or min(len(first), len(second)) < 2
    ):
        raise TokenloomError(
            f"Expected two sets of at least two vectors of one size, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    x, y = first.double(), second.double()
    cov_x, cov_y = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float((shift + cov_x.trace() + cov_y.trace() - 2 * mixed).clamp(min=0))


def _window(name: str) -> tuple[Tensor, float]:
    """Taps of a separable window (they sum to 1) and the factor that turns population into sample moments."""
    if name == "gaussian11":
        offsets = torch.arange(11, dtype=torch.float64) - 5
        taps = torch.exp(-offsets.square() / (2 * 1.5**2))
        return (taps / taps.sum()).float(), 1.0
    if name == "uniform7":
        return torch.full((7,), 1 / 7), 49 / 48
    raise unknown_name("SSIM window", name, SSIM_WINDOWS)


def _check_pair(image: Tensor, reference: Tensor) -> None:
    if image.ndim != 4 or image.shape != reference.shape or math.prod(image.shape) == 0:
        raise TokenloomError(
            f"Expected two non-empty picture batches (B, C, H, W) of one shape, got {tuple(image.shape)} and "
            f"{tuple(reference.shape)}. Add the batch axis, or resize one of them."
        )
