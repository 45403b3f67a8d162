"""Typed configs of training on clips: a video tokenizer, and the generator of its codes.

As in `tokenloom.training.config`, every key is a field, and an unknown key is an error with the closest match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenloom.training.config import (
    GeneratorLossConfig,
    LoopConfig,
    TextConfig,
    TokenizerLossConfig,
    check_range,
)


@dataclass(kw_only=True)
class ClipsConfig:
    """Which clips are trained on.

    Attributes:
        root: Folder of a pool (`tokenloom data video` or `data referring`), from which clips are made on line, or any folder of
            clips, with or without a captions.jsonl.
        split: Value of "split" to keep; `None` keeps all clips of a folder.
        length: Clips an epoch where they are made on line.
        options: Options of `tokenloom.data.moving.MotionConfig` but the size and the frames; only where clips are made.
        licences: Values of "licence" to keep of a folder of clips; `None` keeps all.
    """

    root: str
    split: str | None = "train"
    length: int = 20000
    options: dict[str, Any] = field(default_factory=dict)
    licences: list[str] | None = None

    def __post_init__(self) -> None:
        check_range("data.length", self.length, 1)


@dataclass(kw_only=True)
class VideoTokenizerConfig:
    """A training run of a video tokenizer: `tokenloom train-video-tokenizer CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the model.
        data: Training clips.
        frames: Frames of a training clip; `None` takes the model's `num_frames`.
        model: Options of `VideoTokenizer`.
        loss: Loss weights; a frame counts as a picture.
        motion: Weight of the mean absolute error of the differences between frames, which flicker shows in.
        loop: Optimisation.
        init_from: Folder of a `VideoTokenizer` that training starts from; its own options count, not those above.
        freeze: Parts that stay as they are: "encoder", "quantizer", "decoder", or what names of parameters begin with.
    """

    output: str
    data: ClipsConfig
    frames: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    motion: float = 0.0
    loop: LoopConfig = field(default_factory=LoopConfig)
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_range("motion", self.motion, 0)
        if self.frames is not None:
            check_range("frames", self.frames, 1)


@dataclass(kw_only=True)
class VideoConfig:
    """A training run of a generator of clips: `tokenloom train-video CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the pipeline.
        tokenizer: Folder of the video tokenizer (as `train-video-tokenizer` writes it).
        data: Training clips.
        frames: Frames of a clip, one more than a multiple of the tokenizer's stride; `None` takes its `num_frames`.
        generator: Name of the generator, one of `tokenloom.training.families.FAMILIES`, for instance "next_block".
        model: Options of the generator: "order", "order_options", "transformer", and its arguments.
        loss: Published details of training.
        text: Captions; `max_tags` is of no use here. Clips without captions train without a condition.
        code_cache: Folder where the codes of the clips are kept for the next run; `None` keeps them in memory alone.
        held_out: Split whose loss is logged as "held_out" with every sample; `None` = none.
        sample_prompts: Prompts of the samples.
        sampling: Preset stored with the model, as `VideoPipeline` takes it.
        fps: Frames a second that clips are written with.
        loop: Optimisation.
        init_from: Folder of a pipeline whose generator training starts from.
    """

    output: str
    tokenizer: str
    data: ClipsConfig
    frames: int | None = None
    generator: str = "next_block"
    model: dict[str, Any] = field(default_factory=dict)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    text: TextConfig = field(default_factory=TextConfig)
    code_cache: str | None = None
    held_out: str | None = None
    sample_prompts: list[str] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    fps: float = 8.0
    loop: LoopConfig = field(default_factory=LoopConfig)
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_range("fps", self.fps, 0.1, 50)
        if self.frames is not None:
            check_range("frames", self.frames, 2)
