"""Typed configs of training on sound: a codec, and the generator that continues it.

As in `tokenloom.training.config`, every key is a field, and an unknown key is an error with the closest match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenloom.training.config import LoopConfig, TextConfig, check_range


@dataclass(kw_only=True)
class SoundConfig:
    """Which sounds are trained on.

    Attributes:
        root: Folder with sound files, and perhaps a captions.jsonl.
        split: Value of "split" to keep; `None` keeps all.
        groups: Values of "group" to keep; `None` keeps all.
        licences: Values of "licence" to keep; `None` keeps all.
        cache: Folder where the resampled sound is kept for the next run; `None` keeps it in memory alone.
    """

    root: str
    split: str | None = "train"
    groups: list[str] | None = None
    licences: list[str] | None = None
    cache: str | None = None


@dataclass(kw_only=True)
class CodecLossConfig:
    """Weights of the losses of a codec; zero switches a loss off. Those of the quantizer come on top.

    Attributes:
        mel: Multi-scale mel distance.
        stft: Multi-scale Fourier distance.
        wave: Mean absolute error of the samples.
        adversarial: Hinge loss against a discriminator over spectrograms.
        features: Distance of the discriminator's features.
        adversarial_start: First step of these two.
    """

    mel: float = 1.0
    stft: float = 0.0
    wave: float = 0.1
    adversarial: float = 0.0
    features: float = 2.0
    adversarial_start: int = 5000

    def __post_init__(self) -> None:
        for key in ("mel", "stft", "wave", "adversarial", "features", "adversarial_start"):
            check_range(f"loss.{key}", getattr(self, key), 0)


@dataclass(kw_only=True)
class CodecConfig:
    """A training run of a codec: `tokenloom train-codec CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the model.
        data: Training sounds.
        crop_seconds: Length of a training sample.
        quieter: Training samples are turned down by a random 0 to so many dB.
        model: Options of `AudioTokenizer`.
        loss: Loss weights.
        loop: Optimisation.
        init_from: Folder of an `AudioTokenizer` that training starts from; its own options count, not those above.
    """

    output: str
    data: SoundConfig
    crop_seconds: float = 1.0
    quieter: float = 10.0
    model: dict[str, Any] = field(default_factory=dict)
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_range("crop_seconds", self.crop_seconds, 0.05, 60)
        check_range("quieter", self.quieter, 0, 60)


@dataclass(kw_only=True)
class ContinuationConfig:
    """A training run of the generator behind a codec: `tokenloom train-continuation CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the pipeline.
        codec: Folder of the codec (as `train-codec` writes it).
        data: Training sounds.
        frames: Frames of a training sample; a generation looks back and ahead so far and slides on.
        codebooks: Codebooks that are modelled, the first ones; `None` for all.
        generator: One of `tokenloom.training.frame_families.FRAME_FAMILIES`: "two_level", "next_block" or "next_token".
        model: Options of the generator.
        text: How captions become words that the generator reads before the sound (`max_tags` is of no use here); `None`
            trains on sound alone.
        code_cache: Folder where the codes of the sounds are kept for the next run; `None` keeps them in memory alone.
        sampling: Preset stored with the model, as `AudioContinuationPipeline` takes it.
        loop: Optimisation.
        init_from: Folder of a pipeline whose generator training starts from.
    """

    output: str
    codec: str
    data: SoundConfig
    frames: int = 300
    codebooks: int | None = None
    generator: str = "two_level"
    model: dict[str, Any] = field(default_factory=dict)
    text: TextConfig | None = None
    code_cache: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    loop: LoopConfig = field(default_factory=LoopConfig)
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_range("frames", self.frames, 2)
