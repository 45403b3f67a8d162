"""Pictures of sound: log-mel spectrograms as pixels, and as a labelled figure where matplotlib is installed.

Knows samples and pictures. Knows nothing of codes or models. Shapes: S samples, L columns.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.media import write_atomically

_WINDOW = 1024
_HOP = 256
_MELS = 128
_FLOOR_DB = -80.0
_COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], float)


def log_mel(wave: Tensor, sample_rate: int) -> Tensor:
    """Mel spectrogram in dB below the loudest place.

    Args:
        wave: Float samples (S,).
        sample_rate: Samples a second.

    Returns:
        float32 (128, L) in [-80, 0], low frequencies first; a column a 256 samples. Silence is -80 everywhere.
    """
    from torchaudio.transforms import MelSpectrogram

    wave = torch.nn.functional.pad(wave.float(), (0, max(0, _WINDOW - wave.shape[0])))
    with warnings.catch_warnings():  # about empty bands at low rates
        warnings.simplefilter("ignore")
        mel = MelSpectrogram(sample_rate, _WINDOW, hop_length=_HOP, n_mels=_MELS, power=2.0)(wave)
    decibel = 10 * mel.clamp(min=1e-10).log10()
    loudest = decibel.max() if bool((mel > 1e-10).any()) else decibel.max() - _FLOOR_DB
    return (decibel - loudest).clamp(_FLOOR_DB, 0)


def spectrogram_picture(waves: Sequence[Tensor], sample_rate: int) -> Image.Image:
    """Spectrograms of sounds (S,), one below the other, time to the right and low frequencies at the bottom."""
    rows = [_pixels(log_mel(wave, sample_rate)) for wave in waves]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 8), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return Image.fromarray(np.concatenate(rows)[:-8])


def _pixels(decibel: Tensor) -> np.ndarray:
    """uint8 (128, L, 3)."""
    level = (1 - decibel.flip(0).numpy() / _FLOOR_DB) * (len(_COLOURS) - 1)
    places = np.arange(len(_COLOURS))
    return np.stack([np.interp(level, places, _COLOURS[:, c]) for c in range(3)], -1).astype(np.uint8)


def plot_spectrograms(
    waves: Mapping[str, Tensor], sample_rate: int, path: str | os.PathLike[str], mark: float | None = None
) -> Path:
    """Writes a figure of spectrograms with axes, one below the other.

    Args:
        waves: Title -> samples (S,).
        sample_rate: Samples a second.
        path: A .png, .svg or .pdf file.
        mark: Second at which a line is drawn, for instance where a continuation begins.

    Raises:
        TokenloomError: If matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TokenloomError(
            "Figures need matplotlib, which is not installed: pip install tokenloom[figures]"
        ) from error
    figure = Figure(figsize=(10, 3 * len(waves)), layout="constrained")
    for index, (title, wave) in enumerate(waves.items(), start=1):
        axes = figure.add_subplot(len(waves), 1, index)
        seconds, top = wave.shape[0] / sample_rate, sample_rate / 2000
        image = log_mel(wave, sample_rate).numpy()
        axes.imshow(image, origin="lower", aspect="auto", cmap="magma", extent=(0.0, seconds, 0.0, _MELS))
        places = np.linspace(0, _MELS, 5)
        axes.set_yticks(places, [f"{_mel_to_khz(place / _MELS, top):.1f}" for place in places])
        axes.set(title=title, xlabel="s", ylabel="kHz")
        if mark is not None:
            axes.axvline(mark, color="white", linestyle="--")
    buffer, target = io.BytesIO(), Path(path)
    try:
        figure.savefig(buffer, format=target.suffix.lstrip(".") or "png", dpi=120)
    except ValueError as error:
        raise TokenloomError(
            f"{target.name!r} is no figure that can be written: {error}. Use .png."
        ) from error
    return write_atomically(target, buffer.getvalue())


def _mel_to_khz(share: float, top: float) -> float:
    """Frequency at a share of the mel scale (HTK) from 0 to `top` kHz."""
    highest = 2595 * np.log10(1 + top / 0.7)
    return 0.7 * (10 ** (share * highest / 2595) - 1)
