"""Entry points of the command line: train a tokenizer or a generator of pictures, a codec or a continuation of sound."""

from __future__ import annotations

from pathlib import Path

from tokenloom.training.audio_config import CodecConfig, ContinuationConfig
from tokenloom.training.config import GeneratorConfig, LoopConfig, TokenizerConfig, load_config
from tokenloom.training.loop import Task, Trainer


def _train(task: Task, loop: LoopConfig, output: str, resume: str | None) -> Path:
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
    return _train(TokenizerTask(settings), settings.loop, settings.output, resume)


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
    return _train(GeneratorTask(settings), settings.loop, settings.output, resume)


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
    return _train(CodecTask(settings), settings.loop, settings.output, resume)


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
    return _train(ContinuationTask(settings), settings.loop, settings.output, resume)
