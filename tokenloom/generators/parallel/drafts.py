"""Drafts: what stands at a position when it enters the window. A draft decides how fast decoding is, never what it gives.

A draft of a position looks at its neighbour: the nearest position of an earlier step in the layout (next to it in a grid,
the frame before in sound), among equally near ones the latest. The neighbour may itself be a draft. Knows codes, logits and
layouts; knows nothing of windows, caches or acceptance.

Legend: B samples, m positions, N positions of the layout, V vocabulary, k candidates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from tokenloom.generators.orders import Order
from tokenloom.rng import gumbel, noise

CANDIDATES = 64
DRAFT_NOISE_ID = 0xFFFFFFFD  # vocabulary id reserved for random drafts; no code shares its noise


class Draft(Protocol):
    """Guesses codes."""

    def guess(self, codes: Tensor, positions: Tensor, temperatures: Tensor) -> Tensor:
        """Codes for positions of one step.

        Args:
            codes: LongTensor (B, N + 1), drafts of earlier steps included; the last column is a filler.
            positions: LongTensor (B, m); N for fillers.
            temperatures: float32 (B, m) of the sampling there.

        Returns:
            LongTensor (B, m); anything at fillers.
        """
        ...

    def observe(self, codes: Tensor, positions: Tensor, logits: Tensor) -> None:
        """Learns from a forward: `codes` that it was fed, and the logits (B, m, V) at `positions`."""
        ...


class RandomDraft:
    """Any code, from noise of its own."""

    def __init__(self, order: Order, seeds: Tensor, vocabulary: int, special: int) -> None:
        self.seeds, self.vocabulary = seeds[:, None], vocabulary - special

    def guess(self, codes: Tensor, positions: Tensor, temperatures: Tensor) -> Tensor:
        """Uniform codes."""
        return (noise(self.seeds, positions, DRAFT_NOISE_ID) * self.vocabulary).long()

    def observe(self, codes: Tensor, positions: Tensor, logits: Tensor) -> None:
        """Learns nothing."""


class NeighborDraft(RandomDraft):
    """The code of the neighbour; positions of the first step, which have none, are random."""

    def __init__(self, order: Order, seeds: Tensor, vocabulary: int, special: int) -> None:
        super().__init__(order, seeds, vocabulary, special)
        self.neighbor = nearest_earlier(order).to(seeds.device)

    def guess(self, codes: Tensor, positions: Tensor, temperatures: Tensor) -> Tensor:
        """Codes of neighbours."""
        neighbor = self.neighbor[positions]
        drawn = super().guess(codes, positions, temperatures)
        return torch.where(neighbor == codes.shape[1] - 1, drawn, codes.gather(1, neighbor))


class RepeatDraft(NeighborDraft):
    """A draw from the newest logits of the neighbour, with the noise of the new position.

    If both positions have about the same distribution, this is what sampling draws, because it uses the same noise.
    """

    def __init__(self, order: Order, seeds: Tensor, vocabulary: int, special: int) -> None:
        super().__init__(order, seeds, vocabulary, special)
        self.special, self.batch = special, torch.arange(len(seeds), device=seeds.device)[:, None]
        shape = (len(seeds), self.entries(order, vocabulary), min(CANDIDATES, vocabulary))
        self.scores = torch.full(shape, -torch.inf, device=seeds.device)
        self.ids = torch.zeros(shape, dtype=torch.long, device=seeds.device)

    def entries(self, order: Order, vocabulary: int) -> int:
        """Rows of the table: one a position, and one for fillers."""
        return order.layout.size + 1

    def entry(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Where a forward notes the logits of positions (B, m)."""
        return positions

    def wanted(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Where the candidates for positions (B, m) are looked up."""
        return self.neighbor[positions]

    def guess(self, codes: Tensor, positions: Tensor, temperatures: Tensor) -> Tensor:
        """Draws from the candidates; where none was noted, the code of the neighbour."""
        wanted = self.wanted(codes, positions)
        scores, ids = self.scores[self.batch, wanted], self.ids[self.batch, wanted]
        drawn = gumbel(self.seeds[:, :, None], positions[:, :, None], ids)
        choice = (scores + temperatures[:, :, None] * drawn).argmax(-1, keepdim=True)
        guesses = ids.gather(-1, choice).squeeze(-1) - self.special
        self.pass_on(positions, scores, ids)
        return torch.where(scores[..., 0].isinf(), super().guess(codes, positions, temperatures), guesses)

    def pass_on(self, positions: Tensor, scores: Tensor, ids: Tensor) -> None:
        """A position that was guessed has the candidates of its neighbour until it is fed."""
        self.scores[self.batch, positions], self.ids[self.batch, positions] = scores, ids

    def observe(self, codes: Tensor, positions: Tensor, logits: Tensor) -> None:
        """Notes the best candidates."""
        best = logits.float().topk(self.scores.shape[-1])
        entry = self.entry(codes, positions)
        self.scores[self.batch, entry], self.ids[self.batch, entry] = best.values, best.indices


class RecycleDraft(RepeatDraft):
    """A draw from the logits that last followed the code of the neighbour, with the noise of the new position.

    An adjacency table from codes to candidates, a row a code, as in Token Recycling (Luo et al. 2024), but a draw in place of
    a tree of the best ones.
    """

    def entries(self, order: Order, vocabulary: int) -> int:
        """One a code and one for positions without a neighbour."""
        return vocabulary + 1

    def entry(self, codes: Tensor, positions: Tensor) -> Tensor:
        """The code of the neighbour."""
        neighbor = self.neighbor[positions]
        code = codes.gather(1, neighbor) + self.special
        return code.masked_fill(neighbor == codes.shape[1] - 1, self.scores.shape[1] - 1)

    def wanted(self, codes: Tensor, positions: Tensor) -> Tensor:
        """The same."""
        return self.entry(codes, positions)

    def pass_on(self, positions: Tensor, scores: Tensor, ids: Tensor) -> None:
        """Rows belong to codes, so that nothing has to be passed on."""


SOURCES: dict[str, type[RandomDraft]] = {
    "random": RandomDraft,
    "neighbor": NeighborDraft,
    "repeat": RepeatDraft,
    "recycle": RecycleDraft,
}


@lru_cache(maxsize=16)
def nearest_earlier(order: Order) -> Tensor:
    """LongTensor (N + 1,): the nearest position of an earlier step, by the sum of the distances along the axes.

    Among equally near ones that of the latest step; N for positions of the first step, and for the filler N itself.
    """
    coords, step = order.layout.coords.float(), order.step
    size = order.layout.size
    nearest = torch.full((size + 1,), size)
    for some in torch.arange(size).split(256):
        distance = torch.cdist(coords[some], coords, p=1) - step / (order.num_steps + 1)
        earlier = step[None, :] < step[some, None]
        found = distance.masked_fill(~earlier, torch.inf).argmin(1)
        nearest[some] = torch.where(earlier.any(1), found, size)
    return nearest
