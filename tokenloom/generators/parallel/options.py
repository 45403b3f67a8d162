"""What a user asks of parallel decoding (`Parallel`), and what came of it (`ParallelStats`). Knows no models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenloom.errors import TokenloomError, unknown_name

DRAFTS = ("random", "neighbor", "repeat", "recycle")
ACCEPTS = ("coupled", "speculative")


@dataclass
class ParallelStats:
    """How parallel decoding went; filled in by the generation it is passed to, several generations add up.

    Attributes:
        steps: Steps that were made, over all samples: what one step a forward would need for each of them alone.
        forwards: Forwards of the batch; it ends when the slowest sample ends.
        gains: For every forward of every sample that was not finished, how many steps became final.
        tested: Guessed steps whose context was right, so that they had a chance.
        accepted: Those of them that were right at every position.
    """

    steps: int = 0
    forwards: int = 0
    gains: list[int] = field(default_factory=list, repr=False)
    tested: int = 0
    accepted: int = 0

    def add(self, gains: list[int], widths: list[int], right: list[int]) -> None:
        """Counts one forward: for every sample the steps gained, the steps in its window, and how many guesses were right."""
        self.forwards += 1
        for gain, width, matched in zip(gains, widths, right, strict=True):
            if width:
                self.steps += gain
                self.gains.append(gain)
                self.tested += min(matched + 1, width)
                self.accepted += matched

    @property
    def compression(self) -> float:
        """Steps a forward, the mean over samples: 1 is sequential decoding."""
        return self.steps / max(1, len(self.gains))

    @property
    def acceptance(self) -> float:
        """Share of the tested steps that were accepted."""
        return self.accepted / max(1, self.tested)

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.steps} steps in {len(self.gains)} sample forwards ({self.forwards} batch forwards): "
            f"{self.compression:.2f} steps a forward, {100 * self.acceptance:.1f} % of tested steps accepted"
        )


@dataclass(frozen=True)
class Parallel:
    """Parallel decoding: several steps of an order are guessed, checked in one forward, and kept while they are right.

    Attributes:
        window: Steps in a forward, at least 2. The first needs no guess, so that every forward makes at least one step.
        draft: What stands at a position when it enters the window; from then on it holds what the last forward drew there
            (Jacobi iteration). "random": any code. "neighbor": the code of the nearest position of an earlier step.
            "repeat": a draw from the newest logits of that nearest position, with the noise of the new one. "recycle": a
            draw from the logits that last followed the code of that nearest position (after Token Recycling, Luo et al.
            2024).
        accept: "coupled": a step counts while its guesses are what sampling with the noise of (seed, position, id) draws,
            so that the codes are those of `decode="cached"`. "speculative": a guess x counts with probability min(1, p(x) /
            q(x)), and a draw from the residual takes its place otherwise (Teng et al. 2024): other codes, the same
            distribution.
        stats: Filled in, if given.

    Raises:
        TokenloomError: For a window below 2 or an unknown name.
    """

    window: int = 8
    draft: Literal["random", "neighbor", "repeat", "recycle"] = "repeat"
    accept: Literal["coupled", "speculative"] = "coupled"
    stats: ParallelStats | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Checks every field."""
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 2:
            raise TokenloomError(f"window must be a whole number of at least 2, got {self.window!r}.")
        if self.draft not in DRAFTS:
            raise unknown_name("draft", self.draft, DRAFTS)
        if self.accept not in ACCEPTS:
            raise unknown_name("acceptance rule", self.accept, ACCEPTS)
        if self.stats is not None and not isinstance(self.stats, ParallelStats):
            raise TokenloomError(f"stats must be a ParallelStats to fill in, got {self.stats!r}.")
