"""Distances of two sounds: SI-SDR, mel and Fourier spectra, and perceptual scores where their packages are installed.

Knows samples alone. Shapes: (S,) samples at one rate.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media_audio import resample
from tokenloom.training.audio_losses import MelLoss, stft_loss

_TINY = 1e-8
_VISQOL_RATE = 48000


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


@functools.lru_cache(maxsize=1)
def _visqol_api() -> Any:
    api = importlib.import_module("visqol").VisqolApi()
    api.create(mode="audio")
    return api


def _visqol(output: Tensor, target: Tensor, sample_rate: int) -> float:
    sounds = [resample(sound.double(), sample_rate, _VISQOL_RATE).numpy() for sound in (target, output)]
    try:
        return float(_visqol_api().measure_from_arrays(*sounds, _VISQOL_RATE).moslqo)
    except ValueError:  # a sound too short for a patch of its spectrogram
        return math.nan


@dataclass(frozen=True)
class Score:
    """A perceptual score of another package.

    Attributes:
        modules: What is imported.
        install: What pip is told.
        rates: Samples a second that it takes; `None` for any.
        measure: (output, target, samples a second) -> score.
    """

    modules: tuple[str, ...]
    install: str
    rates: tuple[int, ...] | None
    measure: Callable[[Tensor, Tensor, int], float]

    @property
    def present(self) -> bool:
        """Whether its packages are installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.modules)


SCORES = {
    "PESQ": Score(("pesq",), "pesq", (8000, 16000), _pesq),
    "STOI": Score(("pystoi",), "pystoi", None, _stoi),
    "ViSQOL": Score(("visqol", "libsvm"), "visqol-python libsvm-official", None, _visqol),
}


def perceptual_scores(
    output: Tensor, target: Tensor, sample_rate: int, names: Sequence[str] | None = None
) -> dict[str, float]:
    """PESQ (wide band at 16 kHz, narrow at 8 kHz), STOI and ViSQOL, as far as their packages are installed.

    PESQ and STOI are made for speech; PESQ is NaN where it finds none. ViSQOL (Chinen et al. 2020) runs in audio mode at
    48 kHz, 1 to 4.73; it takes longer than the sound, and is NaN for less than a second.

    Args:
        output: Samples (S,).
        target: Samples (S,).
        sample_rate: Samples a second.
        names: Of `SCORES`; `None` for all.

    Raises:
        TokenloomError: For an unknown name, or sounds that are not of one length.
    """
    _check(output, target)
    return {
        name: score.measure(output, target, sample_rate)
        for name, score in _chosen(names).items()
        if score.present and (score.rates is None or sample_rate in score.rates)
    }


def missing_scores(sample_rate: int, names: Sequence[str] | None = None) -> list[str]:
    """A line for each score that is not measured, which says why."""
    lines = []
    for name, score in _chosen(names).items():
        if score.rates is not None and sample_rate not in score.rates:
            lines.append(
                f"{name} is not defined at {sample_rate} Hz, but at {' and '.join(map(str, score.rates))} Hz."
            )
        elif not score.present:
            lines.append(f"{name} is not measured: pip install {score.install}.")
    return lines


def _chosen(names: Sequence[str] | None) -> dict[str, Score]:
    for name in names or ():
        if name not in SCORES:
            raise unknown_name("perceptual score", name, SCORES)
    return {name: score for name, score in SCORES.items() if names is None or name in names}


def _check(output: Tensor, target: Tensor) -> None:
    if output.ndim != 1 or output.shape != target.shape or not len(output):
        raise TokenloomError(
            f"Expected two sounds (S,) of one length, got {tuple(output.shape)} and {tuple(target.shape)}."
        )
