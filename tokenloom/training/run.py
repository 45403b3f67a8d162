"""Entry points of the command line: one function a kind of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from tokenloom.training.audio_config import CodecConfig, ContinuationConfig
from tokenloom.training.config import GeneratorConfig, LoopConfig, TokenizerConfig, load_config
from tokenloom.training.loop import Task, Trainer
from tokenloom.training.segmentation_config import MaskTokenizerConfig, SegmentationConfig
from tokenloom.training.video_config import VideoConfig, VideoTokenizerConfig


class _Settings(Protocol):
    @property
    def loop(self) -> LoopConfig: ...

    @property
    def output(self) -> str: ...


S = TypeVar("S", bound=_Settings)


def run_task(task: Task, loop: LoopConfig, output: str, resume: str | None) -> Path:
    """Runs a task to its end, from a checkpoint if `resume` names one; returns the folder of the model."""
    trainer = Trainer(task, loop, output)
    if resume:
        trainer.resume(resume)
    trainer.run()
    return Path(output) / "model"


def _train(
    kind: type[S],
    make: Callable[[S], Task],
    config: str | Path,
    resume: str | None,
    overrides: list[str] | None,
) -> Path:
    """Reads a config of a kind, makes the task of it and runs that."""
    settings = load_config(kind, config, overrides)
    return run_task(make(settings), settings.loop, settings.output, resume)


def train_tokenizer(
    config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
) -> Path:
    """Trains the image tokenizer of a YAML config.

    Args:
        config: Path of the YAML file (see `TokenizerConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained tokenizer.
    """
    from tokenloom.training.tokenizer_task import TokenizerTask

    return _train(TokenizerConfig, TokenizerTask, config, resume, overrides)


def train_generator(
    config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
) -> Path:
    """Trains the generator of a YAML config.

    Args:
        config: Path of the YAML file (see `GeneratorConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained pipeline.
    """
    from tokenloom.training.generator_task import GeneratorTask

    return _train(GeneratorConfig, GeneratorTask, config, resume, overrides)


def train_mask_tokenizer(
    config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
) -> Path:
    """Trains the mask tokenizer of a YAML config.

    Args:
        config: Path of the YAML file (see `MaskTokenizerConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained tokenizer.
    """
    from tokenloom.training.mask_tokenizer_task import MaskTokenizerTask

    return _train(MaskTokenizerConfig, MaskTokenizerTask, config, resume, overrides)


def train_segmentation(
    config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
) -> Path:
    """Trains the model of a YAML config that segments by phrase.

    Args:
        config: Path of the YAML file (see `SegmentationConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained pipeline, or of the baseline.
    """
    from tokenloom.training.segmentation_task import make_task

    return _train(SegmentationConfig, make_task, config, resume, overrides)


def train_codec(config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None) -> Path:
    """Trains the audio codec of a YAML config.

    Args:
        config: Path of the YAML file (see `CodecConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained codec.
    """
    from tokenloom.training.codec_task import CodecTask

    return _train(CodecConfig, CodecTask, config, resume, overrides)


def train_continuation(
    config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
) -> Path:
    """Trains the generator of a YAML config on the codes of a codec.

    Args:
        config: Path of the YAML file (see `ContinuationConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained pipeline.
    """
    from tokenloom.training.continuation_task import ContinuationTask

    return _train(ContinuationConfig, ContinuationTask, config, resume, overrides)


def train_video_tokenizer(
    config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
) -> Path:
    """Trains the video tokenizer of a YAML config.

    Args:
        config: Path of the YAML file (see `VideoTokenizerConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained tokenizer.
    """
    from tokenloom.training.video_tokenizer_task import VideoTokenizerTask

    return _train(VideoTokenizerConfig, VideoTokenizerTask, config, resume, overrides)  # type: ignore[arg-type]


def train_video(config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None) -> Path:
    """Trains the generator of a YAML config on the codes of clips.

    Args:
        config: Path of the YAML file (see `VideoConfig`).
        resume: "latest" or a checkpoint folder.
        overrides: Changes such as "loop.steps=200".

    Returns:
        Folder of the trained pipeline.
    """
    from tokenloom.training.video_task import VideoTask

    return _train(VideoConfig, VideoTask, config, resume, overrides)
