"""Entry points of the command line for clips: one function a kind of training."""

from __future__ import annotations

from pathlib import Path

from tokenloom.training.config import load_config
from tokenloom.training.run import run_task
from tokenloom.training.video_config import VideoConfig, VideoTokenizerConfig


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

    settings = load_config(VideoTokenizerConfig, config, overrides)
    return run_task(VideoTokenizerTask(settings), settings.loop, settings.output, resume)


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

    settings = load_config(VideoConfig, config, overrides)
    return run_task(VideoTask(settings), settings.loop, settings.output, resume)
