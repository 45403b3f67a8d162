"""The training loop: accelerate, weight averages, atomic checkpoints, resume, log and sample grids.

A `Task` says what is trained, on which batches, with which loss, and how samples are drawn. The loop knows nothing of
pictures, codes or models beyond that.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.models import replace_folder
from tokenloom.precision import computes_bf16
from tokenloom.training.config import LoopConfig
from tokenloom.training.interrupts import noticed_interrupts
from tokenloom.training.optimizers import make_optimizer

_SETTINGS = (
    "initial_lr",
    "weight_decay",
    "betas",
)  # of the optimizer, taken from the config also after a resume


class Task(ABC):
    """What a training run is about.

    Attributes:
        module: The module that is trained.
        size: Number of training samples.
    """

    module: nn.Module
    size: int

    @abstractmethod
    def batch(self, indices: Tensor, generator: torch.Generator) -> Any:
        """The training batch of the given sample indices (CPU LongTensor); randomness from `generator` only."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalars to log."""

    @abstractmethod
    def samples(self, path: Path) -> None:
        """Writes a picture of what `self.module` does now."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes `self.module` as a loadable model into an empty folder."""

    def held_out(self) -> dict[str, float]:
        """Figures on samples that are not trained on, logged with every sample grid; the averaged weights are in place."""
        return {}

    def prepare(self, accelerator: Accelerator) -> None:  # noqa: B027  (an optional hook)
        """Called once before the first step; may prepare further modules and optimizers."""

    def after_step(self, accelerator: Accelerator, batch: Any, step: int) -> dict[str, Tensor]:
        """Called after each optimizer step; may train a second network. Returns scalars to log."""
        return {}


def learning_rate_factor(step: int, config: LoopConfig) -> float:
    """Factor on the peak learning rate at an optimizer step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return warm
    if config.schedule == "wsd":
        left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
        return warm * max(0.0, min(1.0, left))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))


def epoch_batches(size: int, config: LoopConfig, start: int, rank: int, world: int) -> Iterator[Tensor]:
    """Endless index batches from micro-batch `start` on, the same whatever was resumed.

    Every epoch is one permutation drawn from (seed, epoch); process `rank` takes its slice of each global batch.
    """
    chunk = config.batch_size * world
    per_epoch = max(1, size // chunk)
    number = start
    while True:
        epoch, offset = divmod(number, per_epoch)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
        if size < chunk:  # tiny data sets: repeat
            order = order.repeat(-(-chunk // size))
        for index in range(offset, per_epoch):
            begin = index * chunk + rank * config.batch_size
            yield order[begin : begin + config.batch_size]
            number += 1


def batch_generator(seed: int, step: int, micro: int, rank: int) -> torch.Generator:
    """The source of randomness of one micro-batch, the same whatever was resumed and on every platform."""
    state = np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


def resolve_precision(precision: str) -> str:
    """Turns "auto" into "bf16" where the hardware computes it, else "no"."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if computes_bf16() else "no"


def _row_step(line: str) -> float:
    """The step of a row of the log; infinity if the row is not whole."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def not_finite(values: Mapping[str, Tensor], prefix: str = "", most: int = 8) -> list[str]:
    """Names of the tensors that hold NaN or infinity, with a prefix; at most so many of them."""
    names = (
        name for name, value in values.items() if value.is_floating_point() and not value.isfinite().all()
    )
    return [f"{prefix}{name}" for name in itertools.islice(names, most)]


class Trainer:
    """Runs a task.

    Args:
        task: What is trained.
        config: How.
        output: Folder for `checkpoints/`, `samples/`, `log.jsonl` and `model/`.
    """

    def __init__(self, task: Task, config: LoopConfig, output: str | Path) -> None:
        self.task, self.config, self.output = task, config, Path(output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TokenloomError(
                f"Cannot write to the output folder {self.output}: {error.strerror}."
            ) from None
        if not os.access(self.output, os.W_OK):
            raise TokenloomError(f"Cannot write to the output folder {self.output}: permission denied.")
        for state in (
            AcceleratorState,
            GradientState,
        ):  # an earlier run of this process may have used other settings
            state._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(config.precision),
            gradient_accumulation_steps=config.accumulate,
            dynamo_backend="inductor" if config.compile else None,
            step_scheduler_with_optimizer=False,
        )
        set_seed(config.seed, device_specific=True)
        optimizer = make_optimizer(
            config.optimizer,
            task.module,
            config.learning_rate,
            config.weight_decay,
            (config.betas[0], config.betas[1]),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, config)
        )
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(task.module, optimizer, schedule)
        task.prepare(self.accelerator)
        self.ema = EMAModel(task.module.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
        self.accelerator.register_for_checkpointing(self.ema)
        self.step = 0

    def _checkpoints(self) -> list[Path]:
        """Complete checkpoints, the one written last at the end."""
        found = (self.output / "checkpoints").glob("step-*/progress.json")
        return [path.parent for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))]

    def resume(self, which: str) -> None:
        """Continues from "latest" or from a checkpoint folder."""
        found = self._checkpoints()
        path = found[-1] if which == "latest" and found else Path(which)
        if which == "latest" and not found:
            raise TokenloomError(
                f"There is no checkpoint under {self.output / 'checkpoints'}; run without --resume first."
            )
        if not (path / "progress.json").is_file():
            raise TokenloomError(f"{path} is not a complete checkpoint (progress.json is missing).")
        settings = [{key: group[key] for key in _SETTINGS} for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(path))
        self.ema.to(self.accelerator.device)
        self.ema.decay = self.config.ema
        self.step = json.loads((path / "progress.json").read_text())["step"]
        factor = learning_rate_factor(self.step, self.config)
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(
                values, lr=self.config.learning_rate * factor
            )  # the config rules, not the checkpoint
        self.schedule.scheduler.base_lrs = [self.config.learning_rate] * len(settings)
        if self.accelerator.is_main_process:
            self._rewind_log()
        self.accelerator.print(f"Resumed from {path} at step {self.step}.")

    def _rewind_log(self) -> None:
        """Drops the rows of the log that this run will write again, and a row that a kill cut off."""
        path = self.output / "log.jsonl"
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _row_step(line) <= self.step]
        scratch = path.with_name(f".{path.name}.part")
        scratch.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        scratch.replace(path)

    def _with_average(self, action: Any) -> None:
        parameters = list(self.task.module.parameters())
        self.ema.store(parameters)
        try:
            if self.config.ema:
                self.ema.copy_to(parameters)
            self.task.module.eval()
            with torch.no_grad():
                action()
        finally:
            self.task.module.train()
            self.ema.restore(parameters)

    def checkpoint(self) -> None:
        """Writes a checkpoint and the averaged model, each complete or not at all."""
        root = self.output / "checkpoints"
        target, temporary = root / f"step-{self.step:08d}", root / ".writing"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()  # every process writes its random state into the folder
        if not self.accelerator.is_main_process:
            return
        (temporary / "progress.json").write_text(json.dumps({"step": self.step}))
        replace_folder(temporary, target)
        for old in self._checkpoints()[: -self.config.keep]:
            discarded = old.rename(
                root / f".{old.name}"
            )  # so that a kill leaves no half of it under its name
            shutil.rmtree(discarded, ignore_errors=True)
        model = self.output / ".model"
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        self._with_average(lambda: self.task.save(model))
        replace_folder(model, self.output / "model")

    def _sample(self) -> None:
        if self.accelerator.is_main_process:
            folder = self.output / "samples"
            folder.mkdir(exist_ok=True)
            figures: dict[str, float] = {}

            def look() -> None:
                self.task.samples(folder / f"step-{self.step:08d}.png")
                figures.update(self.task.held_out())

            self._with_average(look)
            if figures:
                self._write_row({"step": self.step, **figures})
                shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
                self.accelerator.print(f"step {self.step}/{self.config.steps}  {shown}")

    def _write_row(self, row: dict[str, float]) -> None:
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "time": round(time.time(), 1)}) + "\n")

    def _train_step(self, batches: Iterator[Tensor], rank: int) -> dict[str, Tensor]:
        config, device = self.config, self.accelerator.device
        logs: dict[str, Tensor] = {}
        for micro in range(config.accumulate):
            generator = batch_generator(config.seed, self.step, micro, rank)
            batch = self.task.batch(next(batches), generator)
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, logs = self.task.loss(self.model, batch, self.step)
                if not torch.isfinite(loss):
                    bad = not_finite({**logs, **{f"batch {key}": value for key, value in batch.items()}})
                    bad += not_finite(dict(self.task.module.named_parameters()), "weight ")
                    raise TokenloomError(
                        f"The loss is {loss.item()} at step {self.step} (not finite: {', '.join(bad) or 'loss'}); "
                        "lower the learning rate or resume from the last checkpoint with another seed."
                    )
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.task.module.parameters(), config.clip)
                    logs = {**logs, "gradient_norm": torch.as_tensor(norm)}
                    self._check_norm(logs["gradient_norm"])
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.step(self.task.module.parameters())
        return {"loss": loss.detach(), **logs, **self.task.after_step(self.accelerator, batch, self.step)}

    def _check_norm(self, norm: Tensor) -> None:
        """Stops before gradients that are not finite reach the weights; fp16 scaling skips such steps itself."""
        if self.accelerator.mixed_precision != "fp16" and not torch.isfinite(norm):
            named = self.task.module.named_parameters()
            bad = not_finite({name: value.grad for name, value in named if value.grad is not None})
            raise TokenloomError(
                f"The gradient norm is {float(norm)} at step {self.step} (not finite: {', '.join(bad) or 'norm'}); lower the learning rate or resume from the "
                "last checkpoint with another seed."
            )

    def run(self) -> None:
        """Trains to `config.steps`; Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.

        Raises:
            TokenloomError: The output folder holds checkpoints of another run, or the loss is not finite.
        """
        if self.step == 0 and (old := self._checkpoints()):
            raise TokenloomError(
                f"{self.output} already holds a run ({old[-1].name}). Continue it with --resume latest, or choose "
                "another output folder."
            )
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = epoch_batches(self.task.size, config, self.step * config.accumulate, rank, world)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.task.module.train()
        with (
            Progress(*columns, disable=not accelerator.is_main_process, refresh_per_second=2) as progress,
            noticed_interrupts() as interrupted,
        ):
            bar = progress.add_task("starting", total=config.steps, completed=self.step)
            if self.step == 0:
                self._sample()
            clock, counted = time.perf_counter(), self.step
            while self.step < config.steps:
                logs = self._train_step(batches, rank)
                self.step += 1
                progress.advance(bar)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    seconds, clock = time.perf_counter() - clock, time.perf_counter()
                    done, counted = self.step - counted, self.step
                    rate = done * config.batch_size * config.accumulate * world / seconds
                    self._log(logs, rate, progress, bar)
                if self.step % config.sample_every == 0 or self.step == config.steps:
                    self._sample()
                stop = self._any_process(interrupted.is_set())
                if stop or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.checkpoint()
                if stop:
                    progress.console.print(
                        f"Interrupted: wrote a checkpoint at step {self.step}; continue with --resume latest."
                    )
                    raise KeyboardInterrupt
        accelerator.end_training()

    def _any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all of them stop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        if flag:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _log(self, logs: dict[str, Tensor], rate: float, progress: Progress, bar: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        row: dict[str, float] = {"step": self.step, "samples_per_second": round(rate, 1)}
        row["learning_rate"] = self.schedule.get_last_lr()[0]
        row.update({key: float(f"{float(value):.5g}") for key, value in logs.items()})
        self._write_row(row)
        text = f"loss {row['loss']:.4f}  {rate:.0f} samples/s"
        progress.update(bar, description=text)
        if not progress.console.is_terminal:
            progress.console.print(f"step {self.step}/{self.config.steps}  {text}")
