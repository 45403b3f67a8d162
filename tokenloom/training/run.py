"""Entry points of the command line: one function a kind of training."""

from __future__ import annotations

from pathlib import Path

from tokenloom.training.audio_config import CodecConfig, ContinuationConfig
from tokenloom.training.config import GeneratorConfig, LoopConfig, TokenizerConfig, load_config
from tokenloom.training.loop import Task, Trainer
from tokenloom.training.segmentation_config import MaskTokenizerConfig, SegmentationConfig


def run_task(task: Task, loop: LoopConfig, output: str, resume: str | None) -> Path:
    """Runs a task to its end, from a checkpoint if `resume` names one; returns the folder of the model."""
    trainer = Trainer(task, loop, output)
    if resume:
        trainer.resume(resume)
    trainer.run()
    return Path(output) / "model"


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

    settings = load_config(TokenizerConfig, config, overrides)
    return run_task(TokenizerTask(settings), settings.loop, settings.output, resume)


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

    settings = load_config(GeneratorConfig, config, overrides)
    return run_task(GeneratorTask(settings), settings.loop, settings.output, resume)


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

    settings = load_config(MaskTokenizerConfig, config, overrides)
    return run_task(MaskTokenizerTask(settings), settings.loop, settings.output, resume)


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

    settings = load_config(SegmentationConfig, config, overrides)
    return run_task(make_task(settings), settings.loop, settings.output, resume)


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

    settings = load_config(CodecConfig, config, overrides)
    return run_task(CodecTask(settings), settings.loop, settings.output, resume)


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

    settings = load_config(ContinuationConfig, config, overrides)
    return run_task(ContinuationTask(settings), settings.loop, settings.output, resume)
