"""Training of a video tokenizer with the losses of an image tokenizer: every frame counts as a picture.

Knows clips and `VideoTokenizer`. What the losses are, and how codes are counted, is in `tokenizer_task`.

Shapes: B clips, T frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from tokenloom.errors import check_options
from tokenloom.media import save_image, sheet, to_pil
from tokenloom.media_video import save_clip
from tokenloom.tokenizers.pixels import rescale
from tokenloom.tokenizers.quantizers import Quantized
from tokenloom.tokenizers.video import VideoTokenizer
from tokenloom.training.clip_source import open_clips
from tokenloom.training.data import open_model, square_side, to_float
from tokenloom.training.tokenizer_task import TokenizerTask
from tokenloom.training.video_config import VideoTokenizerConfig

_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 9


class VideoTokenizerTask(TokenizerTask):
    """Trains a video tokenizer on clips that are made on line or lie in a folder."""

    config: VideoTokenizerConfig  # type: ignore[assignment]
    tokenizer: VideoTokenizer

    def _tokenizer(self) -> VideoTokenizer:
        config = self.config
        if config.init_from:
            return open_model(config.init_from, VideoTokenizer)
        check_options(VideoTokenizer, config.model, "model option")
        return VideoTokenizer(**config.model)

    def _open_data(self) -> int:
        frames = self.config.frames or self.tokenizer.num_frames
        self.clips = open_clips(self.config.data, square_side(self.tokenizer), frames)
        return self.clips.size

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Clips (B, T, 3, S, S) in [-1, 1]."""
        return {"clips": to_float(self.clips.drawn(indices, generator))}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the configured losses."""
        clips, made = batch["clips"], {}
        count = clips.shape[1]

        def frame_by_frame(pixels: Tensor) -> tuple[Tensor, Quantized]:
            made["clips"], quantized = module(pixels.unflatten(0, (-1, count)))
            return made["clips"].flatten(0, 1), quantized

        total, logs = super().loss(frame_by_frame, {"pixels": clips.flatten(0, 1)}, step)  # type: ignore[arg-type]
        if self.config.motion and count > 1:
            output = rescale(made["clips"].float(), self.tokenizer.pixel_range, (-1.0, 1.0))
            logs["motion"] = F.l1_loss(output.diff(dim=1), clips.diff(dim=1))
            total = total + self.config.motion * logs["motion"]
            logs["motion"] = logs["motion"].detach()
        return total, logs

    def after_step(self, accelerator: Accelerator, batch: Any, step: int) -> dict[str, Tensor]:
        """Trains the discriminator."""
        return super().after_step(accelerator, {"pixels": batch["clips"].flatten(0, 1)}, step)

    def samples(self, path: Path) -> None:
        """A sheet: frames of some clips, below them what comes back of them; and both as an animation."""
        count = min(_SHOWN_CLIPS, self.size)
        clips = to_float(self.clips.fixed(torch.linspace(0, self.size - 1, count).long())[0])
        bounds = self.tokenizer.pixel_range
        given = rescale(clips.to(self.tokenizer.device), (-1.0, 1.0), bounds)
        made = rescale(self.tokenizer.reconstruct(given).float().cpu(), bounds, (-1.0, 1.0))
        shown = torch.linspace(0, clips.shape[1] - 1, min(_SHOWN_FRAMES, clips.shape[1])).long()
        rows = torch.stack([clips[:, shown], made[:, shown]], dim=1).flatten(0, 2)
        save_image(sheet(to_pil(rows), columns=len(shown)), path)
        pairs = torch.cat([torch.cat([*clips], dim=-1), torch.cat([*made], dim=-1)], dim=-2)
        save_clip(to_pil(pairs), path.with_suffix(".webp"))
