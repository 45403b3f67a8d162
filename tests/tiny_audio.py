"""A tiny codec, generator and pipeline of sound, and a folder of tones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from tokenloom import AudioContinuationPipeline, AudioTokenizer, TwoLevelGenerator

RATE, HOP = 8000, 40
CODEC: dict[str, Any] = {
    "sample_rate": RATE,
    "strides": [4, 10],
    "widths": [4, 6, 8],
    "latent_channels": 8,
    "codebooks": 3,
    "codebook_size": 16,
    "quantizer_options": {"options": {}},
}
SHAPE = {"width": 16, "heads": 2, "depth": 1}
FRAMES = 12


def tiny_codec() -> AudioTokenizer:
    """8 kHz, frames of 40 samples, three codebooks of 16 codes that differ from sound to sound."""
    torch.manual_seed(0)
    codec = AudioTokenizer(**CODEC)
    with torch.no_grad():
        for name, value in codec.named_parameters():
            if name.startswith("encoder") and value.ndim == 3 and name.endswith("weight"):
                value.mul_(2)
    return codec.eval()


def tiny_pipeline(patch: int = 2, **sampling: Any) -> AudioContinuationPipeline:
    """A pipeline of random components with a window of 12 frames and two of the three codebooks."""
    torch.manual_seed(1)
    generator = TwoLevelGenerator(FRAMES, patch, [16, 16], SHAPE, SHAPE, SHAPE)
    pipe = AudioContinuationPipeline(tiny_codec(), generator.eval(), sampling)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tone(seconds: float, hertz: float = 300.0, rate: int = RATE) -> np.ndarray:
    """Float32 samples (S,)."""
    return (0.2 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype("float32")


def write_tones(folder: Path, count: int = 3, seconds: float = 0.5) -> Path:
    """A folder of WAV files at 16 kHz."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        soundfile.write(folder / f"{index}.wav", tone(seconds, 200.0 * (index + 1), 16000), 16000)
    return folder
