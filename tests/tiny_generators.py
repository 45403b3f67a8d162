"""Tiny random generators for every order, for tests of the generators and their decode rungs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import NextBlockGenerator, NextNeighborGenerator, NextTokenGenerator, orders
from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout

VOCAB = 12
CONDITIONS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "class": {"kind": "class", "num_classes": 4},
    "words": {"kind": "words", "vocabulary": 9, "length": 3, "factor": 8},
}
CLASSES = {"token": NextTokenGenerator, "neighbor": NextNeighborGenerator, "block": NextBlockGenerator}
ORDERS: dict[str, list[Order]] = {
    "raster": [orders.raster(Layout.grid(2, 3)), orders.raster(Layout.frames(3, 2))],
    "scales": [orders.scales(Layout.scales([1, 2, (2, 3)]))],
    "neighbors": [orders.neighbors(Layout.grid(4, 3)), orders.neighbors(Layout.clip(2, 3, 2))],
    "blocks": [
        orders.blocks(Layout.grid(4, 4), (2, 2), sequential_first=True),
        orders.blocks(Layout.line(6), 1),
    ],
    "regions": [orders.regions(Layout.grid(4, 4), 4)],
    "flat": [orders.flat(Layout.frames(3, 2))],
    "parallel": [orders.parallel(Layout.frames(3, 2))],
    "delay": [orders.delay(Layout.frames(4, 3)), orders.delay(Layout.frames(3, 3), (0, 2, 2))],
    "coarse_first": [
        orders.coarse_first(Layout.frames(3, 3)),
        orders.coarse_first(Layout.frames(2, 3), True),
    ],
    "patches": [orders.patches(Layout.frames(4, 2), 2), orders.patches(Layout.frames(4, 2), 2, "flat")],
    "random": [orders.random(Layout.grid(3, 3), 4, 7), orders.random(Layout.line(6), 6, 3, "equal")],
}


def cases() -> Iterator[Any]:
    """(generator class, order) for every order and every generator that accepts it; the label is `cls-order`."""
    for order in (order for group in ORDERS.values() for order in group):
        for name, cls in CLASSES.items():
            try:
                make(cls, order)
            except TokenloomError:
                continue
            yield name, cls, order


def make(
    cls: type[Generator],
    order: Order,
    condition: str = "words",
    transformer: dict[str, Any] | None = None,
    seed: int = 0,
    std: float = 0.4,
    **options: Any,
) -> Generator:
    """A float32 generator of width 24 and depth 2 whose logits depend strongly on everything it sees."""
    torch.manual_seed(seed)
    settings = {"width": 24, "heads": 2, "depth": 2, "mlp_width": 32} | (transformer or {})
    generator = cls(order.to_config(), VOCAB, settings, CONDITIONS[condition], **options)
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return generator.eval()


def conditions(kind: str, batch: int) -> Tensor | None:
    """A condition for each of `batch` samples, different from sample to sample."""
    if kind == "none":
        return None
    if kind == "class":
        return torch.arange(batch) % 4
    return torch.tensor([[2, 3, 0], [4, 0, 0], [5, 6, 7], [8, 1, 2], [3, 3, 3]])[torch.arange(batch) % 5]


def random_codes(order: Order, batch: int, seed: int = 0) -> Tensor:
    """Uniform codes (B, N)."""
    return torch.randint(VOCAB, (batch, order.layout.size), generator=torch.Generator().manual_seed(seed))
