"""The judge of clips: which of many things moves in a clip, and how. A small network, trained on real clips alone.

It shares nothing with tokenizers or generators, so it can say whether a generated clip follows its prompt; its features are
what Frechet distances of clips are measured in. Knows clips, names of things and of motions.

Shapes: B clips, T frames, S side in pixels, O things, M motions, F features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tokenloom.data.moving import MOTIONS, MotionConfig, MotionMaker
from tokenloom.data.referring_pool import Pool
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.judge_network import ResidualBlock
from tokenloom.media import write_atomically

FILE_NAME = "video-judge.safetensors"
_FRAMES = 9  # that the network looks at, evenly spread
_SIDE = 64
_PLACES = 8  # channels a place of the maps that motion is read off


@dataclass(frozen=True)
class ClipJudgement:
    """What the judge sees in clips.

    Attributes:
        things: Log-probabilities (B, O).
        motions: Log-probabilities (B, M).
        features: (B, F): what both are read off.
    """

    things: Tensor
    motions: Tensor
    features: Tensor


class VideoJudgeNetwork(nn.Module):
    """Frames one by one, then their mean for the thing, and maps over time for the motion.

    Beside every frame lies its difference from the mean over time, in which a ground that stands still is gone.

    Args:
        things: Names of things.
        motions: Names of motions.
        widths: Channels at 1/2, 1/4, 1/8 and 1/16 of the size.
        hidden: Channels of the layers over time.
    """

    def __init__(
        self,
        things: Sequence[str],
        motions: Sequence[str],
        widths: Sequence[int] = (16, 32, 64, 96),
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.settings = {
            "things": list(things),
            "motions": list(motions),
            "widths": list(widths),
            "hidden": hidden,
        }
        self.stem = nn.Sequential(
            nn.Conv2d(6, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.middle = nn.Sequential(
            ResidualBlock(widths[0], widths[1], 2), ResidualBlock(widths[1], widths[2], 2)
        )
        self.deep = ResidualBlock(widths[2], widths[3], 2)
        self.places = nn.Conv2d(widths[2], _PLACES, 1)
        side = _SIDE // 8
        self.over_time = nn.Sequential(
            nn.Conv1d(_PLACES * side * side, hidden, 1),
            nn.ReLU(),
            nn.Conv1d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
        )
        self.thing_head = nn.Linear(2 * widths[3], len(things))
        self.motion_head = nn.Linear(hidden, len(motions))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, O), logits (B, M) and features (B, F) of clips (B, T, 3, 64, 64) in [-1, 1]."""
        batch = len(clips)
        moving = clips - clips.mean(dim=1, keepdim=True)
        maps = self.middle(self.stem(torch.cat([clips, moving], dim=2).flatten(0, 1)))
        deep = self.deep(maps).unflatten(0, (batch, -1))  # (B, T, C, h, w)
        seen = torch.cat([deep.mean((1, 3, 4)), deep.amax((3, 4)).mean(1)], dim=1)
        line = self.places(maps).flatten(1).unflatten(0, (batch, -1)).transpose(1, 2)
        moved = self.over_time(line).mean(2)
        dropped = F.dropout(seen, 0.2, self.training)
        return self.thing_head(dropped), self.motion_head(moved), torch.cat([seen, moved], dim=1)


class VideoJudge:
    """A trained judge.

    Attributes:
        network: In evaluation mode.
        card: How it was trained.
    """

    def __init__(self, network: VideoJudgeNetwork, card: dict[str, Any] | None = None) -> None:
        self.network, self.card = network.eval(), card or {}

    @property
    def things(self) -> list[str]:
        """Names of the things it knows."""
        return list(self.network.settings["things"])  # type: ignore[call-overload]

    @property
    def motions(self) -> list[str]:
        """Names of the motions it knows."""
        return list(self.network.settings["motions"])  # type: ignore[call-overload]

    @classmethod
    def load(cls, path: str | Path) -> VideoJudge:
        """Reads a judge from a file, or from `video-judge.safetensors` in a folder.

        Raises:
            TokenloomError: If the file is missing, damaged, or not a judge of clips.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
                state = {key: opened.get_tensor(key) for key in opened.keys()}
            network = VideoJudgeNetwork(**json.loads(metadata["video_judge"]))
            network.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise TokenloomError(
                f"Expected a judge written by tokenloom train-video-judge, got {str(path)!r} ({type(error).__name__}: {error}). "
                "Train it again."
            ) from error
        return cls(network, json.loads(metadata.get("card", "{}")))

    def save(self, path: str | Path) -> Path:
        """Writes the judge to a file, or to `video-judge.safetensors` in a folder; whole or not at all."""
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / FILE_NAME
        state = {key: value.contiguous() for key, value in self.network.state_dict().items()}
        metadata = {"video_judge": json.dumps(self.network.settings), "card": json.dumps(self.card)}
        return write_atomically(path, save(state, metadata=metadata))

    @torch.inference_mode()
    def look(self, clips: Tensor, batch_size: int = 32) -> ClipJudgement:
        """Looks at clips uint8 (B, T, 3, H, W) of any size and length."""
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[2] != 3:
            raise TokenloomError(
                f"Expected clips uint8 (B, T, 3, H, W), got {clips.dtype} {tuple(clips.shape)}."
            )
        parts = [self.network(_prepare(part)) for part in clips.split(batch_size)]
        things, motions, features = (torch.cat([part[place] for part in parts]) for place in range(3))
        return ClipJudgement(things.log_softmax(1), motions.log_softmax(1), features)

    def marks(self, clips: Tensor, things: Sequence[str], motions: Sequence[str]) -> dict[str, float]:
        """Shares of clips in which the judge sees the thing (first, or among the first five) and the motion that was asked for.

        Raises:
            TokenloomError: If none of the things, or a motion, is known to the judge.
        """
        seen = self.look(clips)
        known = [index for index, name in enumerate(things) if name in self.things]
        if not known or set(motions) - set(self.motions):
            raise TokenloomError(
                f"The judge knows {len(self.things)} things and {', '.join(self.motions)}, but none of the things, or another "
                "motion, was asked for. Train a judge on the pool of these clips."
            )
        wanted = torch.tensor([self.things.index(things[index]) for index in known])
        ranked = seen.things[known].argsort(dim=1, descending=True)
        hits = ranked == wanted[:, None]
        moved = [self.motions[index] for index in seen.motions.argmax(1).tolist()]
        right = [found == asked for found, asked in zip(moved, motions, strict=True)]
        return {
            "thing": float(hits[:, :1].any(1).float().mean()),
            "thing_top5": float(hits[:, :5].any(1).float().mean()),
            "motion": sum(right) / len(right),
            "clips": float(len(right)),
            "known_things": float(len(known)),
        }


def _prepare(clips: Tensor) -> Tensor:
    """(B, 9, 3, 64, 64) in [-1, 1] of clips uint8 (B, T, 3, H, W)."""
    chosen = torch.linspace(0, clips.shape[1] - 1, _FRAMES).round().long()
    frames = clips[:, chosen].float() / 127.5 - 1
    if frames.shape[-2:] != (_SIDE, _SIDE):
        flat = F.interpolate(frames.flatten(0, 1), (_SIDE, _SIDE), mode="bilinear", antialias=True)
        frames = flat.unflatten(0, frames.shape[:2])
    return frames


def train_video_judge(
    pool: str | Path,
    *,
    steps: int = 3000,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    config: MotionConfig | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> VideoJudge:
    """Trains a judge on clips made of the training part of a pool; no clip is seen twice.

    Args:
        pool: Folder of a pool.
        steps: Optimizer steps.
        batch_size: Clips a step.
        learning_rate: Peak of a cosine schedule.
        config: How clips are made.
        seed: Decides weights and clips.
        log: Receives a line now and then.

    Raises:
        TokenloomError: For a wrong pool, or fewer than one step.
    """
    if min(steps, batch_size) < 1:
        raise TokenloomError(f"Expected at least one step and one clip a step, got {steps} and {batch_size}.")
    torch.manual_seed(seed)
    maker = MotionMaker(Pool.open(pool), "train", config)
    things, motions = list(maker.things), list(maker.config.motions or MOTIONS)
    network = VideoJudgeNetwork(things, motions).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.4 times as fast on a processor
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        first = (1 << 61) + (seed * steps + step) * batch_size  # far from the seeds of data sets
        clips = [maker.clip(first + index) for index in range(batch_size)]
        pixels = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3)
        seen, moved, _ = network(_prepare(pixels))
        thing = F.cross_entropy(seen, torch.tensor([things.index(clip.thing) for clip in clips]))
        motion = F.cross_entropy(moved, torch.tensor([motions.index(clip.motion) for clip in clips]))
        optimizer.zero_grad()
        (thing + motion).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(f"step {step + 1}/{steps}: thing {thing.item():.3f}, motion {motion.item():.3f}")
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as a judge that is read
    card = {
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "things": len(things),
        "pool": maker.pool.folder.name,
    }
    return VideoJudge(network, card)
