"""Distances of two sounds: SI-SDR, mel and Fourier spectra, and perceptual scores where their packages are installed.

Knows samples alone. Shapes: (S,) samples at one rate.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.training.audio_losses import MelLoss, stft_loss

_TINY = 1e-8


def si_sdr(output: Tensor, target: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019); higher is better, sensitive to delay.

    Means are removed, and the target is scaled to the output before the two are compared.

    Raises:
        TokenloomError: If the two are not of one length.
    """
    _check(output, target)
    x, y = target.double() - target.double().mean(), output.double() - output.double().mean()
    part = (x @ y) / (x @ x).clamp(min=_TINY) * x
    return float(10 * torch.log10((part @ part + _TINY) / ((y - part).square().sum() + _TINY)))


@functools.lru_cache(maxsize=8)
def _mel_loss(sample_rate: int) -> MelLoss:
    return MelLoss(sample_rate)


@torch.no_grad()
def mel_distance(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """Multi-scale mel distance (Kumar et al. 2023): the sum over seven windows of mean differences of log10 mel spectra."""
    _check(output, target)
    return float(_mel_loss(sample_rate)(output[None, None], target[None, None]))


@torch.no_grad()
def stft_distance(output: Tensor, target: Tensor) -> float:
    """Spectral convergence plus log-magnitude distance, mean of windows of 512 and 2,048 samples."""
    _check(output, target)
    return float(stft_loss(output[None, None], target[None, None]))


def _pesq(output: Tensor, target: Tensor, sample_rate: int) -> float:
    pesq = importlib.import_module("pesq")
    try:
        mode = "wb" if sample_rate == 16000 else "nb"
        return float(pesq.pesq(sample_rate, target.numpy(), output.numpy(), mode))
    except pesq.PesqError:  # it found no speech
        return math.nan


def _stoi(output: Tensor, target: Tensor, sample_rate: int) -> float:
    return float(importlib.import_module("pystoi").stoi(target.numpy(), output.numpy(), sample_rate))


_PACKAGES: dict[str, tuple[str, tuple[int, ...] | None, Callable[[Tensor, Tensor, int], float]]] = {
    "PESQ": ("pesq", (8000, 16000), _pesq),
    "STOI": ("pystoi", None, _stoi),
}


def perceptual_scores(output: Tensor, target: Tensor, sample_rate: int) -> dict[str, float]:
    """PESQ (wide band at 16 kHz, narrow at 8 kHz) and STOI, as far as `pesq` and `pystoi` are installed.

    Both are made for speech; PESQ is NaN where it finds none.
    """
    _check(output, target)
    return {
        name: score(output, target, sample_rate)
        for name, (package, rates, score) in _PACKAGES.items()
        if importlib.util.find_spec(package) is not None and (rates is None or sample_rate in rates)
    }


def _check(output: Tensor, target: Tensor) -> None:
    if output.ndim != 1 or output.shape != target.shape or not len(output):
        raise TokenloomError(
            f"Expected two sounds (S,) of one length, got {tuple(output.shape)} and {tuple(target.shape)}."
        )
