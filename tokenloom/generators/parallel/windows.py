"""Windows: the rows, cache slots, masks and sources of several consecutive steps, for samples at different steps.

Rows stand in the order in which they are fed, so a window is a contiguous piece of that list for each sample, filled up to
the longest piece of the batch. Rows that stay have a slot of their own in the cache for ever: a row that was fed with a
wrong guess is written again when its step is fed again, and until then no row that sees it is believed. Knows plans;
knows nothing of codes, logits or guesses.

Legend: B samples, N positions, R rows, K rows that stay, S steps, J heads, n rows and m positions of a window, L cache slots.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.generators.cache import Cache
from tokenloom.generators.plans import RowPlan


@dataclass(frozen=True, eq=False)
class Window:
    """The steps that each sample works on in one forward; pieces are filled up to the longest one of the batch.

    Attributes:
        rows: LongTensor (B, n), row ids; fillers repeat a row.
        slots: LongTensor (B, n), where the rows are written in the cache.
        mask: BoolTensor (B, n, L), who sees whom.
        positions: LongTensor (B, m), layout indices predicted; N for fillers.
        steps: LongTensor (B, m), the step of each.
        offsets: LongTensor (B, m), the same counted from the first step of the window.
        real: BoolTensor (B, m), false for fillers.
        sources: LongTensor (J, B, m), the place among the rows that predicts each position at each head.
        weights: float32 (J, B, m).
        counts: Steps in the window of each sample; 0 for samples that are finished.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor
    positions: Tensor
    steps: Tensor
    offsets: Tensor
    real: Tensor
    sources: Tensor
    weights: Tensor
    counts: list[int]


class Windows:
    """Makes the windows of a plan.

    Args:
        plan: The plan; every row is fed once.
        width: Most steps in a window.
        device: Where the tables live.
    """

    def __init__(self, plan: RowPlan, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        order = plan.order
        rows = torch.cat(plan.feeds)
        stays = torch.cat([torch.arange(len(f)) < k for f, k in zip(plan.feeds, plan.committed, strict=True)])
        self.feed_start = _starts([len(feed) for feed in plan.feeds])
        self.kept_start = _starts(plan.committed)
        self.asking_start = [a - k for a, k in zip(self.feed_start, self.kept_start, strict=True)]
        self.place_start = _starts([part.stop - part.start for part in order.slices])
        ends = [min(step + width, order.num_steps) for step in range(order.num_steps)]
        asking = self.asking_start
        # Slots: rows that only ask share the first ones, then one for every row that stays, then one for fillers.
        self.scratch = max(asking[end] - asking[step] for step, end in enumerate(ends))
        self.slots = int(stays.sum()) + self.scratch + 1
        slot = torch.where(stays, self.scratch + stays.cumsum(0) - 1, (~stays).cumsum(0) - 1)
        index = torch.full((plan.rows,), 0)
        index[rows] = torch.arange(len(rows))
        sees = torch.ones(len(rows) + 1, len(rows) + 1, dtype=torch.bool)  # a filler sees all, nobody sees it
        sees[:-1, :-1] = plan.mask[rows][:, rows]
        sees[:-1, -1] = False
        self.rows = torch.cat((rows, rows[:1])).to(device)
        self.stays = torch.cat((stays, torch.tensor([True]))).to(device)
        self.slot = torch.cat((slot, torch.tensor([self.slots - 1]))).to(device)
        self.sees_kept = sees[:, :-1][:, stays].to(device)  # (R + 1, K)
        asks = torch.cat(((~stays).nonzero().squeeze(1), torch.full((self.scratch,), len(rows))))
        self.asks, self.sees_asking = asks.to(device), sees.to(device) if self.scratch else None
        self.position = torch.cat((order.permutation, torch.tensor([order.layout.size]))).to(device)
        self.step = torch.cat((order.step[order.permutation], torch.tensor([0]))).to(device)
        self.source = torch.nn.functional.pad(index[plan.sources], (0, 1)).to(device)  # (J, N + 1)
        self.weight = torch.nn.functional.pad(plan.weights, (0, 1), value=1.0).to(device)

    def positions_of(self, steps: list[int]) -> Tensor:
        """Layout indices (B, m) of one step a sample, filled up with N; a step of -1 has no positions."""
        starts = [self.place_start[step] for step in steps]
        stops = [
            self.place_start[step + 1] if step >= 0 else start
            for step, start in zip(steps, starts, strict=True)
        ]
        return self.position[self._pieces(starts, stops, len(self.position) - 1)]

    def at(self, starts: list[int]) -> Window:
        """The window of samples whose steps before `starts` are final."""
        steps = len(self.feed_start) - 1
        stops = [min(start + self.width, steps) for start in starts]
        filler, nothing = len(self.rows) - 1, len(self.position) - 1
        fed = self._pieces([self.feed_start[s] for s in starts], [self.feed_start[s] for s in stops], filler)
        places = self._pieces(
            [self.place_start[s] for s in starts], [self.place_start[s] for s in stops], nothing
        )
        first_fed = self._column([self.feed_start[s] for s in starts])
        first_ask = self._column([self.asking_start[s] for s in starts])
        used = self.kept_start[max(stops)]
        slots = torch.where(self.stays[fed], self.slot[fed], self.slot[fed] - first_ask)
        mask = self.sees_kept[fed][:, :, :used]
        if self.sees_asking is not None:
            asks = self.asks[
                self._pieces(
                    [self.asking_start[s] for s in starts],
                    [self.asking_start[s] for s in stops],
                    -1,
                    self.scratch,
                )
            ]
            mask = torch.cat((self.sees_asking[fed[:, :, None], asks[:, None, :]], mask), dim=2)
        real = places < nothing
        return Window(
            rows=self.rows[fed],
            slots=slots,
            mask=mask,
            positions=self.position[places],
            steps=self.step[places],
            offsets=torch.where(real, self.step[places] - self._column(starts), 0),
            real=real,
            sources=(self.source[:, places] - first_fed).clamp(0, fed.shape[1] - 1),
            weights=self.weight[:, places],
            counts=[stop - start for start, stop in zip(starts, stops, strict=True)],
        )

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]

    def _pieces(self, starts: list[int], stops: list[int], filler: int, length: int = 0) -> Tensor:
        """The numbers from start up to stop of each sample, (B, longest), filled up with `filler`."""
        longest = max(length, *(stop - start for start, stop in zip(starts, stops, strict=True)))
        numbers = self._column(starts) + torch.arange(longest, device=self.device)
        return numbers.masked_fill(numbers >= self._column(stops), filler)


class WindowCache:
    """Keys and values at slots; each sample writes its own.

    Args:
        cache: Buffers with as many rows as there are slots.
    """

    def __init__(self, cache: Cache) -> None:
        self.layers = [WindowLayer(self, layer.keys, layer.values) for layer in cache.layers]
        self.slots = torch.zeros(0, 0, dtype=torch.long)
        self.used = 0

    def aim(self, slots: Tensor, used: int) -> None:
        """Sets where the rows of the next forward are written, (B, n), and how many slots they look at."""
        self.slots, self.used = slots, used


class WindowLayer:
    """Keys and values of one layer, (B, h, L, d) each."""

    def __init__(self, cache: WindowCache, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, h, n, d) at the slots of their rows and returns the slots in use."""
        slots = self.cache.slots[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, slots, keys.to(self.keys.dtype))
        self.values.scatter_(2, slots, values.to(self.values.dtype))
        return self.keys[:, :, : self.cache.used], self.values[:, :, : self.cache.used]


def _starts(sizes: list[int] | tuple[int, ...]) -> list[int]:
    """Where each of the pieces begins, and the end of the last."""
    return [0, *itertools.accumulate(sizes)]
