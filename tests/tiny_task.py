"""A tiny task for the training loop: a linear map learns another one. Run as a script it trains in its own process.

python tiny_task.py OUTPUT '{"steps": 9, ...}' [latest]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.training.config import LoopConfig
from tokenloom.training.loop import Task, Trainer


class TinyTask(Task):
    """Learns y = W x from `size` samples; dropout and noise make every source of randomness count."""

    def __init__(self, size: int = 16, dropout: float = 0.1, noise: float = 0.05, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = self.x @ torch.randn(4, 2, generator=generator)
        self.size, self.noise, self.pause = size, noise, pause
        self.seen: list[list[int]] = []
        self.sampled: list[str] = []
        self.bad_step = -1

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Samples with noise."""
        self.seen.append(indices.tolist())
        noise = torch.randn(len(indices), 4, generator=generator) * self.noise
        return {"x": self.x[indices] + noise, "y": self.y[indices]}

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error; not finite at `bad_step`."""
        time.sleep(self.pause)
        loss = (module(batch["x"]) - batch["y"]).square().mean()
        if step == self.bad_step:
            loss = loss * float("nan")
        return loss, {"error": loss.detach()}

    def samples(self, path: Path) -> None:
        """Notes the call."""
        self.sampled.append(path.name)
        path.write_text("sample")

    def save(self, folder: Path) -> None:
        """Writes the weights."""
        torch.save(self.module.state_dict(), folder / "weights.pt")


def main(output: str, options: str, resume: str = "") -> None:
    """Trains in this process; writes the weights of each process beside the checkpoints."""
    values = json.loads(options)
    task = TinyTask(pause=values.pop("pause", 0.0))
    trainer = Trainer(task, LoopConfig(**values), output)
    if resume:
        trainer.resume(resume)
    rank = trainer.accelerator.process_index
    trainer.run()
    torch.save(task.module.state_dict(), Path(output) / f"rank-{rank}.pt")
    (Path(output) / f"seen-{rank}.json").write_text(json.dumps(task.seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
