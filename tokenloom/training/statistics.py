"""How well a codebook is used: counts of codes a window of steps, for all codes, per scale and per codebook.

Knows layouts and codes. Knows nothing of models or losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.layouts import Layout
from tokenloom.tokenizers.quantizers import codebook_usage
from tokenloom.tokenizers.quantizers.base import sum_processes

_MOST_CODES = 1 << 18  # larger vocabularies are counted bit by bit
_LOW_USAGE = 0.5
_COLLAPSE = 0.25  # of the best perplexity so far
_LOW_BITS = 0.5


class CodeStatistics:
    """Counts codes and tells what looks wrong.

    Codes of a layout with an axis "scale" or "codebook" are counted for each of its values as well. A vocabulary of more
    than 2^18 codes is that of binary codes, whose bits are counted instead.

    Args:
        layout: Arrangement of the N codes of a sample.
        vocab_size: Number of codes.

    Attributes:
        counts: LongTensor (groups, vocab_size), or (groups, bits, 2) of a large vocabulary.
    """

    def __init__(self, layout: Layout, vocab_size: int) -> None:
        axis = next((name for name in ("scale", "codebook") if name in layout.axes), None)
        self.group = torch.zeros(layout.size, dtype=torch.long)
        self.names = [""]
        if axis is not None:
            self.group = layout.coords[:, layout.axes.index(axis)].clone()
            self.names = [f"{axis}_{index}" for index in range(int(self.group.max()) + 1)]
        self.vocab_size = vocab_size
        self.bits = math.ceil(math.log2(vocab_size)) if vocab_size > _MOST_CODES else 0
        shape = (self.bits, 2) if self.bits else (vocab_size,)
        self.counts = torch.zeros(len(self.names), *shape, dtype=torch.long)
        self.best: dict[str, float] = {}
        self.told: set[tuple[str, str]] = set()

    def clear(self) -> None:
        """Begins a new window."""
        self.counts.zero_()

    def update(self, codes: Tensor) -> None:
        """Counts LongTensor codes (B, n), n <= N, in layout order; -1 is no code."""
        codes = codes.detach().cpu()
        group = self.group[: codes.shape[1]].expand_as(codes)
        codes, group = codes[codes != -1], group[codes != -1]
        if self.bits:
            ones = (codes[:, None] >> torch.arange(self.bits)) & 1
            index = (group[:, None] * self.bits + torch.arange(self.bits)) * 2 + ones
        else:
            index = group * self.vocab_size + codes
        self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def total(self, device: torch.device) -> Tensor:
        """The counts of all processes, on the CPU; `device` is where processes talk to each other."""
        return sum_processes(self.counts.to(device, copy=True)).cpu()

    def figures(self, counts: Tensor | None = None) -> dict[str, float]:
        """Figures of the window, named "usage" for all codes and "usage.scale_0" for one group.

        Args:
            counts: Like the attribute; `None` = the attribute.

        Returns:
            "usage", "perplexity" and "dead" as in `codebook_usage`; of a large vocabulary "bit_entropy", the mean entropy of
            a bit, 1 where it is set half of the time.
        """
        counts = self.counts if counts is None else counts
        result = self._of(counts.sum(0), "")
        if len(self.names) > 1:
            for name, part in zip(self.names, counts, strict=True):
                result |= self._of(part, f".{name}")
        return result

    def _of(self, counts: Tensor, ending: str) -> dict[str, float]:
        if not self.bits:
            return {f"{name}{ending}": value for name, value in codebook_usage(counts).items()}
        p = counts[:, 1].double() / counts.sum(1).clamp(min=1)
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
        return {f"bit_entropy{ending}": float(entropy.mean())}

    def concerns(self, counts: Tensor | None = None) -> list[str]:
        """What looks wrong in the window: usage under a half, collapsing perplexity, bits that hardly change.

        Usage is compared with what as many codes drawn evenly would reach, once there were as many as the codebook has, so
        that a scale of one code a picture is not blamed for a short window. A concern is told again only after it was gone.
        """
        counts = self.counts if counts is None else counts
        figures = self.figures(counts)
        found = []
        parts = {"": counts.sum(0)}
        if len(self.names) > 1:
            parts |= {f".{name}": part for name, part in zip(self.names, counts, strict=True)}
        for ending, part in parts.items():
            seen, where = int(part[0].sum() if self.bits else part.sum()), ending[1:] or "all codes"
            if not seen:
                continue
            if self.bits:
                entropy = figures[f"bit_entropy{ending}"]
                if entropy < _LOW_BITS and seen >= 32:
                    found.append(
                        (where, "bits", f"a bit carries only {entropy:.2f} bits of information on average")
                    )
                continue
            found += self._codebook(where, seen, figures[f"usage{ending}"], figures[f"perplexity{ending}"])
        fresh = [item for item in found if item[:2] not in self.told]
        self.told = {item[:2] for item in found}
        return [
            f"Codebook, {where}: {text}. Try revival of dead codes (revive_after), an entropy loss (loss.entropy), a smaller "
            "codebook, or a lower learning rate."
            for where, _, text in fresh
        ]

    def _codebook(self, where: str, seen: int, usage: float, perplexity: float) -> list[tuple[str, str, str]]:
        found = []
        reachable = 1 - math.exp(-seen / self.vocab_size)
        if seen >= self.vocab_size and usage < _LOW_USAGE * reachable:
            found.append(
                (
                    where,
                    "usage",
                    f"{usage:.1%} of the codes were used by {seen} tokens, evenly drawn ones reach {reachable:.1%}",
                )
            )
        best = self.best.get(where, 0.0)
        if perplexity < _COLLAPSE * best:
            found.append((where, "collapse", f"the perplexity fell from {best:.1f} to {perplexity:.1f}"))
        self.best[where] = max(best, perplexity)
        return found
