"""A static key/value cache in decode order.

Rows are stored in the order in which they are computed, so every stored row is visible to every later one and attention
needs no mask. Rows written but not committed (queries that only ask) are overwritten by the next call. Knows nothing of
positions, steps or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError


class CacheLayer:
    """Keys and values of one layer, (B, h, L, d) each."""

    def __init__(self, cache: Cache, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (b, h, n, d) behind the committed rows and returns all rows up to them, without a copy.

        b may be less than B: the first samples alone, for calls that commit nothing.
        """
        start, batch = self.cache.length, keys.shape[0]
        stop = start + keys.shape[2]
        self.check(stop)
        self.keys[:batch, :, start:stop] = keys
        self.values[:batch, :, start:stop] = values
        return self.keys[:batch, :, :stop], self.values[:batch, :, :stop]

    def check(self, rows: int) -> None:
        """Raises unless there is room for `rows` rows."""
        if rows > self.keys.shape[2]:
            raise TokenloomError(
                f"The cache holds {self.keys.shape[2]} rows, but row {rows} was written; make it larger."
            )


class Cache:
    """One `CacheLayer` a block and the number of committed rows.

    Args:
        depth: Number of layers.
        batch: Batch size B.
        heads: Key/value heads h.
        rows: Capacity L.
        size: Head width d.
        device: Where the buffers live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        heads: int,
        rows: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (depth, 2, batch, heads, rows, size)
        buffers = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = [CacheLayer(self, keys, values) for keys, values in buffers]
        self.length = 0

    def reset(self) -> None:
        """Forgets every row; the buffers stay."""
        self.length = 0

    def commit(self, rows: int) -> None:
        """Keeps the first `rows` of the rows written last."""
        self.length += rows
