"""The training loop: schedules, batches, exact resume, kills and interrupts, checkpoints, accumulation, processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import TinyTask
from torch import nn

from tokenloom import TokenloomError
from tokenloom.training.config import LoopConfig
from tokenloom.training.loop import (
    Trainer,
    batch_generator,
    epoch_batches,
    learning_rate_factor,
    resolve_precision,
)

SCRIPT = Path(__file__).parent / "tiny_task.py"
PATHS = [str(SCRIPT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


def settings(**changes: Any) -> LoopConfig:
    values: dict[str, Any] = {"steps": 12, "batch_size": 4, "warmup": 2, "learning_rate": 1e-2, "ema": 0.9}
    values |= {"precision": "no", "checkpoint_every": 4, "log_every": 4, "sample_every": 6}
    return LoopConfig(**values | changes)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(output: Path, task: TinyTask | None = None, resume: str = "", **changes: Any) -> Trainer:
    trainer = Trainer(task or TinyTask(), settings(**changes), output)
    if resume:
        trainer.resume(resume)
    trainer.run()
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# What a run leaves behind


def test_a_run_learns_and_leaves_log_samples_checkpoints_and_a_model(tmp_path):
    task = TinyTask(dropout=0.0, noise=0.0)
    train(tmp_path, task, steps=60, log_every=10, sample_every=20, checkpoint_every=25, learning_rate=3e-2)
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["loss"] < log[0]["loss"] / 4
    assert {"samples_per_second", "learning_rate", "error", "gradient_norm", "time"} <= log[0].keys()
    assert task.sampled == [f"step-{step:08d}.png" for step in (0, 20, 40, 60)]
    assert names(tmp_path) == ["checkpoints", "log.jsonl", "model", "samples"]
    assert names(tmp_path / "checkpoints") == ["step-00000050", "step-00000060"]


def test_the_model_is_the_average_and_training_keeps_its_own_weights(tmp_path):
    task = TinyTask()
    trainer = train(tmp_path, task, ema=0.9)
    saved = torch.load(tmp_path / "model" / "weights.pt")
    assert same(list(saved.values()), trainer.ema.shadow_params)
    assert not same(list(saved.values()), weights(task.module))
    assert task.module.training


def test_without_average_the_model_is_the_weights_themselves(tmp_path):
    task = TinyTask()
    train(tmp_path, task, ema=0.0)
    saved = torch.load(tmp_path / "model" / "weights.pt")
    assert same(list(saved.values()), weights(task.module))


def test_an_action_that_fails_leaves_the_weights_alone(tmp_path):
    task = TinyTask()
    trainer = train(tmp_path, task)
    before = weights(task.module)

    def fail() -> None:
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        trainer._with_average(fail)
    assert same(weights(task.module), before)
    assert task.module.training


# Resume


def test_resumed_training_is_exactly_the_uninterrupted_one(tmp_path):
    class Crashing(TinyTask):
        def loss(self, module: nn.Module, batch: Any, step: int) -> Any:
            if step == 10:
                raise MemoryError
            return super().loss(module, batch, step)

    whole, first, second = TinyTask(), Crashing(), TinyTask()
    reference = train(tmp_path / "a", whole)
    with pytest.raises(MemoryError):
        train(tmp_path / "b", first)
    assert first.seen == whole.seen[:11]
    assert names(tmp_path / "b" / "checkpoints")[-1] == "step-00000008"
    resumed = train(tmp_path / "b", second, resume="latest")
    assert resumed.step == 12
    assert second.seen == whole.seen[8:]
    assert same(weights(second.module), weights(whole.module))
    assert same(resumed.ema.shadow_params, reference.ema.shadow_params)
    assert resumed.schedule.get_last_lr() == reference.schedule.get_last_lr()


def test_the_log_of_a_resumed_run_holds_every_step_once(tmp_path):
    train(tmp_path, steps=11, log_every=1, checkpoint_every=8)
    log = tmp_path / "log.jsonl"
    before = rows(tmp_path)
    with log.open("a") as file:
        file.write('{"step": 12, "lo')  # a kill in the middle of a row
    resumed = Trainer(TinyTask(), settings(steps=12, log_every=1), tmp_path)
    resumed.resume(str(tmp_path / "checkpoints" / "step-00000008"))
    assert rows(tmp_path) == before[:8]
    resumed.run()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert names(tmp_path) == ["checkpoints", "log.jsonl", "model", "samples"]


def test_learning_rate_and_decay_of_a_resumed_run_are_the_configured_ones(tmp_path):
    train(tmp_path, steps=4)
    changed = Trainer(TinyTask(), settings(steps=8, learning_rate=1e-9, weight_decay=0.25), tmp_path)
    changed.resume("latest")
    before = weights(changed.task.module)
    changed.run()
    assert changed.schedule.get_last_lr()[0] <= 1e-9
    assert changed.optimizer.param_groups[0]["weight_decay"] == 0.25
    pairs = zip(before, weights(changed.task.module), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-7


def test_resume_without_checkpoint_or_from_an_incomplete_one_is_explained(tmp_path):
    trainer = Trainer(TinyTask(), settings(), tmp_path)
    with pytest.raises(TokenloomError, match="There is no checkpoint under"):
        trainer.resume("latest")
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(TokenloomError, match="not a complete checkpoint"):
        trainer.resume(str(tmp_path / "checkpoints" / "step-00000004"))
    with pytest.raises(TokenloomError, match="There is no checkpoint under"):
        trainer.resume("latest")


def test_a_half_written_checkpoint_is_ignored_and_cleared(tmp_path):
    train(tmp_path, steps=8)
    leftover = tmp_path / "checkpoints" / ".writing"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".model").mkdir()
    trainer = train(tmp_path, resume="latest", steps=12)
    assert trainer.step == 12
    assert names(tmp_path / "checkpoints") == ["step-00000008", "step-00000012"]
    assert names(tmp_path) == ["checkpoints", "log.jsonl", "model", "samples"]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(TokenloomError, match=r"already holds a run \(step-00000004\).*--resume latest"):
        train(tmp_path, steps=4)


def test_old_checkpoints_are_removed_and_a_branch_keeps_its_own(tmp_path):
    train(tmp_path, steps=12, checkpoint_every=2, keep=3)
    assert names(tmp_path / "checkpoints") == [f"step-{step:08d}" for step in (8, 10, 12)]
    branch = str(tmp_path / "checkpoints" / "step-00000008")
    train(tmp_path, resume=branch, steps=9, keep=3)
    assert "step-00000009" in names(tmp_path / "checkpoints")
    assert train(tmp_path, resume="latest", steps=11, keep=3).step == 11
    assert (tmp_path / "checkpoints" / "step-00000011").is_dir()


def test_a_finished_run_can_be_resumed_and_does_nothing(tmp_path):
    train(tmp_path, steps=4)
    task = TinyTask()
    train(tmp_path, task, resume="latest", steps=4)
    assert task.seen == []


# Kills and interrupts


def start(output: Path, options: dict[str, Any], *extra: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(output), json.dumps(options), *extra]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(output: Path, step: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Waits until a checkpoint of `step` or later is there."""
    end = time.monotonic() + seconds
    while not any(int(path.name[5:]) >= step for path in (output / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.01)


def test_a_killed_process_resumes_from_its_last_checkpoint(tmp_path):
    config = settings(steps=1000, checkpoint_every=2)
    process = start(tmp_path, {**vars(config), "pause": 0.01})
    wait_for(tmp_path, 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = [name for name in names(tmp_path / "checkpoints") if name.startswith("step-")]
    last = int(kept[-1].removeprefix("step-"))
    assert last >= 6
    for name in kept:  # nothing is half-written
        assert json.loads((tmp_path / "checkpoints" / name / "progress.json").read_text())["step"] == int(
            name[5:]
        )
    task = TinyTask()
    trainer = train(tmp_path, task, resume="latest", steps=last + 3, schedule="constant")
    assert trainer.step == last + 3
    batches = epoch_batches(task.size, config, last, 0, 1)
    assert task.seen == [next(batches).tolist() for _ in range(3)]


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(tmp_path):
    class Interrupted(TinyTask):
        def loss(self, module: nn.Module, batch: Any, step: int) -> Any:
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(module, batch, step)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", Interrupted(), checkpoint_every=100)
    assert signal.getsignal(signal.SIGINT) is handler
    assert names(tmp_path / "a" / "checkpoints") == ["step-00000005"]
    assert (tmp_path / "a" / "model" / "weights.pt").is_file()
    whole, rest = TinyTask(), TinyTask()
    train(tmp_path / "b", whole)
    train(tmp_path / "a", rest, resume="latest")
    assert same(weights(rest.module), weights(whole.module))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Impatient(TinyTask):
        def loss(self, module: nn.Module, batch: Any, step: int) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return super().loss(module, batch, step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Impatient())
    assert not (tmp_path / "checkpoints").exists()


# Numbers that are not finite, folders that cannot be written


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    task = TinyTask()
    task.bad_step = 5
    with pytest.raises(TokenloomError, match=r"The loss is nan at step 5 \(not finite: error\)"):
        train(tmp_path, task)
    assert names(tmp_path / "checkpoints") == ["step-00000004"]
    assert all(value.isfinite().all() for value in weights(task.module))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    class Exploding(TinyTask):
        def loss(self, module: nn.Module, batch: Any, step: int) -> Any:
            loss, logs = super().loss(module, batch, step)
            weight = next(iter(self.module.parameters()))
            hidden = (weight - weight.detach()).abs().sum().sqrt()  # 0, with an infinite slope
            return loss + (hidden if step == 3 else 0), logs

    task = Exploding()
    with pytest.raises(TokenloomError, match=r"gradient norm is \w+ at step 3"):
        train(tmp_path, task)
    assert all(value.isfinite().all() for value in weights(task.module))


def test_an_output_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("here")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(TokenloomError, match="Cannot write to the output folder"):
            Trainer(TinyTask(), settings(), output)


def test_an_output_folder_without_permission_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(TokenloomError, match="permission denied"):
        Trainer(TinyTask(), settings(), tmp_path)


# Accumulation, schedules, batches


def test_two_small_batches_make_the_update_of_one_large(tmp_path):
    large, small = (TinyTask(dropout=0.0, noise=0.0) for _ in range(2))
    one = train(tmp_path / "a", large, batch_size=8, steps=5)
    two = train(tmp_path / "b", small, batch_size=4, accumulate=2, steps=5)
    pairs = zip(small.seen[::2], small.seen[1::2], strict=True)
    assert [a + b for a, b in pairs] == large.seen
    for a, b in zip(weights(large.module), weights(small.module), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert one.schedule.get_last_lr() == two.schedule.get_last_lr()


def test_the_schedule_moves_once_an_update(tmp_path):
    config = settings(accumulate=3, steps=5)
    trainer = train(tmp_path, accumulate=3, steps=5)
    assert trainer.schedule.get_last_lr()[0] == pytest.approx(1e-2 * learning_rate_factor(5, config))
    assert rows(tmp_path)[0]["learning_rate"] == pytest.approx(
        1e-2 * learning_rate_factor(4, config), rel=1e-4
    )


def test_schedules():
    options: dict[str, Any] = {"steps": 100, "warmup": 10}
    for name in ("constant", "cosine", "wsd"):
        config = LoopConfig(**options, schedule=name)
        peak = max(learning_rate_factor(step, config) for step in range(100))
        assert 0.95 < peak <= 1
        assert learning_rate_factor(0, config) == pytest.approx(0.1, rel=0.01)
    constant, cosine = (LoopConfig(**options, schedule=name) for name in ("constant", "cosine"))
    wsd = LoopConfig(**options, schedule="wsd", cooldown=0.2)
    assert learning_rate_factor(99, constant) == 1
    assert learning_rate_factor(50, cosine) == pytest.approx(0.5)
    assert learning_rate_factor(75, cosine) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert learning_rate_factor(100, cosine) == pytest.approx(0)
    assert [learning_rate_factor(step, wsd) for step in (20, 80)] == [1, 1]
    assert learning_rate_factor(90, wsd) == pytest.approx(0.5)
    assert 0 < learning_rate_factor(99, wsd) == pytest.approx(0.05)
    assert learning_rate_factor(5, LoopConfig(steps=9, warmup=0, schedule="constant")) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_epoch_covers_every_sample_once_without_overlap(world):
    config = settings(batch_size=4)
    streams = [epoch_batches(24, config, 0, rank, world) for rank in range(world)]
    orders = []
    for _ in range(3):
        seen = [next(stream).tolist() for _ in range(24 // (4 * world)) for stream in streams]
        flat = [index for batch in seen for index in batch]
        assert sorted(flat) == list(range(24))
        orders.append(tuple(flat))
    assert len(set(orders)) == 3


def test_incomplete_batches_are_left_out_and_every_start_is_the_same_stream():
    config = settings(batch_size=4)
    stream = epoch_batches(10, config, 0, 0, 1)
    batches = [next(stream).tolist() for _ in range(8)]
    assert all(
        len(set(first + second)) == 8 for first, second in zip(batches[::2], batches[1::2], strict=True)
    )
    for begin in range(8):
        assert next(epoch_batches(10, config, begin, 0, 1)).tolist() == batches[begin]
    other = epoch_batches(10, settings(batch_size=4, seed=1), 0, 0, 1)
    assert [next(other).tolist() for _ in range(8)] != batches


@pytest.mark.parametrize("size", [1, 3, 7])
def test_data_smaller_than_a_batch_is_repeated(size):
    config = settings(batch_size=8)
    for rank in range(2):
        batch = next(epoch_batches(size, config, 5, rank, 2))
        assert len(batch) == 8
        assert set(batch.tolist()) == set(range(size))


def test_a_data_set_smaller_than_the_batch_trains(tmp_path):
    assert train(tmp_path, TinyTask(size=3), steps=2, batch_size=8).step == 2


def test_batch_randomness_repeats_and_differs():
    def draw(*place: int) -> float:
        return float(torch.rand((), generator=batch_generator(*place)))

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    values = [draw(*place) for place in places]
    assert len(set(values)) == 5
    assert values == [draw(*place) for place in places]


def test_runs_of_one_process_choose_their_own_precision(tmp_path):
    for precision in ("no", "bf16", "no"):
        trainer = Trainer(TinyTask(), settings(precision=precision, accumulate=3), tmp_path)
        assert trainer.accelerator.mixed_precision == precision
        assert trainer.accelerator.gradient_accumulation_steps == 3
    assert Trainer(TinyTask(), settings(), tmp_path).accelerator.gradient_accumulation_steps == 1


def test_precision():
    assert resolve_precision("auto") in ("bf16", "no")
    assert [resolve_precision(name) for name in ("bf16", "fp16", "no")] == ["bf16", "fp16", "no"]


def test_bf16_trains(tmp_path):
    task = TinyTask(dropout=0.0, noise=0.0)
    before = (task.module(task.x) - task.y).square().mean().item()
    train(tmp_path, task, precision="bf16", steps=40, learning_rate=3e-2)
    assert (task.module(task.x) - task.y).square().mean().item() < before / 2
    assert all(value.dtype == torch.float32 for value in weights(task.module))


@pytest.mark.slow
def test_two_processes_share_the_batch_and_keep_equal_weights(tmp_path):
    options = vars(settings(steps=6, batch_size=2, checkpoint_every=3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPT), str(tmp_path), json.dumps(options)]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert same(list(first.values()), list(second.values()))
    assert all(value.isfinite().all() for value in first.values())
    assert math.isfinite(rows(tmp_path)[-1]["loss"])
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    flat = sorted(index for rank in seen for batch in rank[:4] for index in batch)
    assert flat == list(range(16))  # one epoch: 2 processes, 4 batches of 2
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(names(checkpoint))
