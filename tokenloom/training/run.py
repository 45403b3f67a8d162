"""Entry points of the command line: one a kind of training."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenloom.training.audio_config import CodecConfig, ContinuationConfig
from tokenloom.training.config import GeneratorConfig, LoopConfig, TokenizerConfig, load_config
from tokenloom.training.loop import Task, Trainer
from tokenloom.training.segmentation_config import MaskTokenizerConfig, SegmentationConfig
from tokenloom.training.video_config import VideoConfig, VideoTokenizerConfig


def run_task(task: Task, loop: LoopConfig, output: str, resume: str | None) -> Path:
    """Runs a task to its end, from a checkpoint if `resume` names one; returns the folder of the model."""
    trainer = Trainer(task, loop, output)
    if resume:
        trainer.resume(resume)
    trainer.run()
    return Path(output) / "model"


@dataclass(frozen=True)
class Training:
    """A kind of training, called with the YAML file of a run.

    Attributes:
        config: Class of its settings, which names every key.
        task: "module:function" in `tokenloom.training` that makes the task of them; imported when it is called.
    """

    config: type[Any]
    task: str

    def __call__(
        self, config: str | Path, *, resume: str | None = None, overrides: list[str] | None = None
    ) -> Path:
        """Trains what a YAML file describes.

        Args:
            config: Path of the file.
            resume: "latest" or a checkpoint folder.
            overrides: Changes such as "loop.steps=200".

        Returns:
            Folder of the trained model.

        Raises:
            TokenloomError: For an unknown key or a value out of range, data that is missing, or a loss that is not finite.
        """
        settings = load_config(self.config, config, overrides)
        module, name = self.task.split(":")
        make = getattr(import_module(f"tokenloom.training.{module}"), name)
        return run_task(make(settings), settings.loop, settings.output, resume)


train_tokenizer = Training(TokenizerConfig, "tokenizer_task:TokenizerTask")
"""Trains an image tokenizer."""
train_generator = Training(GeneratorConfig, "generator_task:GeneratorTask")
"""Trains a generator of the codes of captioned pictures; gives a pipeline."""
train_mask_tokenizer = Training(MaskTokenizerConfig, "mask_tokenizer_task:MaskTokenizerTask")
"""Trains a mask tokenizer."""
train_segmentation = Training(SegmentationConfig, "segmentation_task:make_task")
"""Trains a model that segments by phrase; gives a pipeline, or the baseline."""
train_codec = Training(CodecConfig, "codec_task:CodecTask")
"""Trains an audio codec."""
train_continuation = Training(ContinuationConfig, "continuation_task:ContinuationTask")
"""Trains a generator of the codes of a codec; gives a pipeline."""
train_video_tokenizer = Training(VideoTokenizerConfig, "video_tokenizer_task:VideoTokenizerTask")
"""Trains a video tokenizer."""
train_video = Training(VideoConfig, "video_task:VideoTask")
"""Trains a generator of the codes of clips; gives a pipeline."""
