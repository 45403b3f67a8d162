"""How much memory a generation takes, before it is taken.

Counts what follows from shapes: weights, keys and values, the rows of the largest step, its logits and their noise. What an
allocator rounds up or keeps is not counted. Knows plans and shapes; knows nothing of orders or of decoding to media.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenloom.errors import TokenloomError

_NOISE_BYTES = 20  # a logit in float32, its copy, its noise in float64, and the hash behind it


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a generation.

    Attributes:
        weights: Parameters and buffers, which are there already.
        cache: Keys and values.
        step: Hidden states and logits of the largest step.
    """

    weights: int
    cache: int
    step: int

    @property
    def new(self) -> int:
        """What a generation adds to the weights."""
        return self.cache + self.step

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.new

    def __str__(self) -> str:
        return (
            f"{_readable(self.total)}: weights {_readable(self.weights)}, keys and values {_readable(self.cache)}, "
            f"largest step {_readable(self.step)}"
        )


def estimate_memory(
    generator: Any, batch_size: int = 1, *, guided: bool = True, kv_dtype: torch.dtype | None = None
) -> MemoryEstimate:
    """Estimates the memory of `generator.generate`.

    Args:
        generator: A generator of codes.
        batch_size: Samples B.
        guided: Whether the null half runs as well.
        kv_dtype: Number format of keys and values; `None` is what the transformer is set to (`cache_dtype`).

    Returns:
        Bytes of weights, keys and values, and the largest step.

    Raises:
        TokenloomError: If there is no sample.

    Example:
        >>> from tokenloom import Layout, NextTokenGenerator, orders
        >>> order = orders.raster(Layout.grid(2, 2)).to_config()
        >>> small = NextTokenGenerator(order, 8, {"width": 8, "heads": 1, "depth": 1})
        >>> estimate_memory(small, 2).cache == 2 * estimate_memory(small, 1).cache
        True
    """
    if batch_size < 1:
        raise TokenloomError(f"Expected at least 1 sample, got {batch_size}.")
    transformer, plan = generator.transformer, generator.plan
    config, tensors = transformer.config, [*generator.parameters(), *generator.buffers()]
    size = transformer.blocks[0].get_parameter("attention.out.weight").element_size()
    kv_dtype = kv_dtype or transformer.cache_dtype
    kv_size = size if kv_dtype is None else torch.empty(0, dtype=kv_dtype).element_size()
    samples, kv = batch_size * (2 if guided else 1), config.num_kv_heads * config.head_size
    widest = max(len(feed) for feed in plan.feeds)
    drawn = max(len(step.positions) for step in plan.steps)
    gate = 2 if config.mlp in ("swiglu", "geglu") else 1
    row = 4 * config.width + config.heads * config.head_size + 2 * kv + (gate + 1) * config.hidden
    vocabulary = generator.vocab_size + generator.special
    return MemoryEstimate(
        weights=sum(each.numel() * each.element_size() for each in tensors),
        cache=2 * config.depth * samples * kv * plan.capacity * kv_size,
        step=samples * widest * row * size + batch_size * drawn * vocabulary * _NOISE_BYTES,
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device, or `None` where that cannot be told."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def check_memory(generator: Any, batch_size: int, guided: bool) -> None:
    """Raises if a generation does not fit into what is free, and says what would.

    Raises:
        TokenloomError: With the bytes that are needed and free, the largest batch that fits, and other ways out.
    """
    free = available_memory(generator.device)
    if free is None:
        return
    needed = estimate_memory(generator, batch_size, guided=guided)
    if needed.new <= free:
        return
    one = estimate_memory(generator, 1, guided=guided)
    most = int(free // one.new)
    half = estimate_memory(generator, batch_size, guided=guided, kv_dtype=torch.bfloat16)
    ways = [f"a batch of {most} would fit" if most else "not even one sample would fit"]
    if half.new <= free:
        ways.append("so would this one with keys and values in bfloat16 (generator.transformer.cache_dtype)")
    if guided and estimate_memory(generator, batch_size, guided=False).new <= free:
        ways.append("so would this one without guidance")
    raise TokenloomError(
        f"Generating {batch_size} samples needs {_readable(needed.new)} beside the weights (keys and values "
        f"{_readable(needed.cache)}, largest step {_readable(needed.step)}), but {_readable(free)} are free on "
        f"{generator.device}: {'; '.join(ways)}."
    )


def _readable(count: int) -> str:
    """Bytes in the largest unit below."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
