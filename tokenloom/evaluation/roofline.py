"""How fast a generation could be: what a machine can read and multiply, and what a plan makes it read and multiply.

A lower bound of the time is the sum over steps of max(bytes / bandwidth, operations / (operations a second)): perfect overlap
and no cost of starting anything. Bandwidth and operations a second are measured in the run that uses them. Knows plans and
numbers of parameters; knows nothing of decode rungs or of official code.

Legend: B samples, g rows a position (2 B with guidance), n rows of a step, L rows in the cache, D width, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from tokenloom.errors import TokenloomError
from tokenloom.generators.base import Generator

_READ_BYTES = 256 << 20  # far beyond any cache
_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Machine:
    """What a machine reached.

    Attributes:
        bandwidth: Bytes read a second.
        flops: Floating-point operations a second in a square matrix product.
    """

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class StepCost:
    """What one step must read and compute, summed over the samples."""

    bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        """Lower bound of the time."""
        return max(self.bytes / machine.bandwidth, self.flops / machine.flops)


def _best(work: torch.nn.Module | object, device: torch.device, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        clock = time.process_time if device.type == "cpu" else time.perf_counter  # other processes take turns
        start = clock()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (clock() - start) / (torch.get_num_threads() if device.type == "cpu" else 1))
    return best


@torch.no_grad()
def measure_machine(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    read_bytes: int = _READ_BYTES,
    side: int | None = None,
) -> Machine:
    """Reads a large buffer and multiplies two square matrices; the best of some rounds of each.

    On a processor time is that of the process over the number of threads, so that other processes count little.

    Args:
        device: Where.
        dtype: Of the matrices.
        rounds: Rounds of each.
        read_bytes: Size of the buffer.
        side: Side of the matrices; by default one that keeps the device busy.
    """
    if rounds < 1:
        raise TokenloomError(f"Expected at least 1 round, got {rounds}.")
    device = torch.device(device)
    buffer = torch.ones(read_bytes // 4, device=device)
    side = side or _SIDE.get(device.type, 1024)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    reading = _best(buffer.sum, device, rounds + 1)
    product = _best(lambda: left @ right, device, rounds + 1)
    return Machine(buffer.numel() * 4 / reading, 2 * side**3 / product)


def decode_costs(generator: Generator, batch: int = 1, guided: bool = True) -> list[StepCost]:
    """The cost of every step of the decode rung `cached`, in the dtype of the weights.

    Weights of adaLN are left out, since a generation reads them once. Guidance acts before the output matrix, so that the
    output matrix works on B rows a position.
    """
    config, plan = generator.transformer.config, generator.plan
    weight = next(generator.transformer.parameters())
    size = weight.element_size()
    blocks = sum(
        value.numel()
        for name, value in generator.transformer.blocks.named_parameters()
        if "modulation" not in name
    )
    table = generator._table()
    heads = sum(value.numel() for value in generator.heads.parameters())
    heads = table.numel() if table is not None else heads
    rows, kv = (2 if guided else 1) * batch, config.num_kv_heads * config.head_size
    inner = config.heads * config.head_size
    costs, kept = [], 0
    for step in plan.steps:
        count, made = len(step.rows), len(step.positions) if bool(step.weights.any()) else 0
        length = kept + count
        cached = 2 * rows * kv * config.depth * size * (length + count)
        logits = 4.0 * batch * made * (generator.vocab_size + generator.special)
        read = (blocks if count else 0) * size + (heads if made else 0) * size + cached + logits
        work = 2 * blocks * rows * count + 2 * heads * batch * made
        costs.append(StepCost(read, work + 4.0 * inner * count * length * config.depth * rows))
        kept += step.committed
    return costs


def lower_bound(costs: list[StepCost], machine: Machine) -> dict[str, float]:
    """Seconds of the whole schedule, its bytes and operations, and the share of the time bound by reading."""
    seconds = [cost.seconds(machine) for cost in costs]
    reading = sum(
        second
        for second, cost in zip(seconds, costs, strict=True)
        if cost.bytes / machine.bandwidth >= cost.flops / machine.flops
    )
    return {
        "seconds": sum(seconds),
        "bytes": sum(cost.bytes for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "bound_by_reading": reading / max(sum(seconds), 1e-30),
        **{f"machine_{name}": value for name, value in asdict(machine).items()},
    }
