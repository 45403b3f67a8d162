"""Which guesses count: coupled noise (the same codes as one step a forward) or speculative sampling (the same distribution).

Both rules go over the steps of a window in sequence. Up to the first step with a wrong guess everything was computed from
final codes, so the codes of that step are final too; what comes later is the next guess. Knows logits, probabilities and
noise; knows nothing of models or caches.

Legend: B samples, m positions of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.parallel.windows import Window
from tokenloom.generators.sampling import Sampling, sample_tokens
from tokenloom.rng import noise

ACCEPT_NOISE_ID = 0xFFFFFFFC  # vocabulary id reserved for accepting; no code shares its noise


@dataclass(frozen=True)
class Verdict:
    """What a rule says of one window.

    Attributes:
        codes: LongTensor (B, m): final up to the first wrong step, then the next guesses.
        right: LongTensor (B,), how many leading steps of the window were guessed right.
    """

    codes: Tensor
    right: Tensor


class Samplings:
    """The sampling of every step; calls a function once for each that differs."""

    def __init__(self, sampling: Sampling, steps: int, device: torch.device) -> None:
        every = [sampling.at(step / max(1, steps - 1)) for step in range(steps)]
        self.settings = list(dict.fromkeys(every))
        self.index = torch.tensor([self.settings.index(setting) for setting in every], device=device)
        temperatures = [0.0 if callable(one.temperature) else one.temperature for one in every]
        self.temperature = torch.tensor(temperatures, device=device)  # (S,)

    def each(self, window: Window, function: Callable[[Sampling, Tensor], None]) -> None:
        """Calls function(sampling, BoolTensor (B, m) of the positions it is for)."""
        for number, setting in enumerate(self.settings):
            chosen = window.real & (self.index[window.steps] == number)
            if len(self.settings) == 1 or bool(chosen.any()):
                function(setting, chosen)


def leading(wrong: Tensor, window: Window) -> Tensor:
    """How many leading steps (B,) of a window have no wrong position (B, m)."""
    counts = torch.tensor(window.counts, device=wrong.device)
    first = torch.where(wrong & window.real, window.offsets, counts[:, None])
    return first.amin(1)


class Coupled:
    """Gumbel-coupled: a code is a function of logits and noise, and a guess is right if it is that code."""

    def __init__(
        self,
        samplings: Samplings,
        seeds: Tensor,
        draw: Callable[[Tensor, Tensor, Tensor, Sampling, int], Tensor],
    ) -> None:
        self.samplings, self.seeds, self.draw = samplings, seeds, draw

    def __call__(self, logits: Tensor, guesses: Tensor, fixed: Tensor, window: Window) -> Verdict:
        """Draws every position (logits (B, m, V)) with its noise; `fixed` guesses (B, m) are known codes."""
        drawn = guesses.clone()
        seeds = self.seeds[:, None].expand_as(guesses)

        def sample(sampling: Sampling, chosen: Tensor) -> None:
            first = int(window.steps[chosen].amin()) if bool(chosen.any()) else 0
            places = window.positions[chosen][:, None]
            drawn[chosen] = self.draw(logits[chosen][:, None], seeds[chosen], places, sampling, first)[:, 0]

        self.samplings.each(window, sample)
        drawn = torch.where(fixed, guesses, drawn)
        return Verdict(drawn, leading(drawn != guesses, window))


class Speculative:
    """Speculative Jacobi decoding (Teng et al. 2024): a guess was drawn from q and shall be a draw from p.

    q is what the last forward drew the guess from; a guess that is no such draw has all of q. Every forward uses noise of its
    own, because the draws of one must not know those of another.
    """

    def __init__(self, samplings: Samplings, seeds: Tensor, size: int, special: int) -> None:
        self.samplings, self.seeds, self.size, self.special = samplings, seeds, size, special
        self.round = 0
        self.last: tuple[Tensor, Tensor] | None = (
            None  # probabilities (B, m, V) and positions (B, m) of the last window
        )

    def __call__(self, logits: Tensor, guesses: Tensor, fixed: Tensor, window: Window) -> Verdict:
        """As for `Coupled`."""
        target = torch.zeros_like(logits, dtype=torch.float32)

        def weigh(sampling: Sampling, chosen: Tensor) -> None:
            target[chosen] = probabilities(logits[chosen], sampling)

        self.samplings.each(window, weigh)
        proposal = self._proposal(guesses + self.special, window, target)
        self.round += 1
        counter = window.positions + (self.size + 1) * self.round  # the noise of no other forward
        uniform = noise(self.seeds[:, None], counter, ACCEPT_NOISE_ID)
        taken = accept(target, proposal, guesses + self.special, uniform) | fixed
        right = leading(~taken, window)
        first_wrong = window.offsets == right[:, None]
        stays = (window.offsets < right[:, None]) | (first_wrong & taken) | fixed
        rest = torch.where(first_wrong[..., None], residual(target, proposal), target)
        drawn = sample_tokens(rest.log(), self.seeds, counter, check=False) - self.special
        self.last = (target, window.positions)
        return Verdict(torch.where(stays, guesses, drawn), right)

    def _proposal(self, ids: Tensor, window: Window, target: Tensor) -> Tensor:
        """What each guess was drawn from, (B, m, V)."""
        proposal = torch.zeros_like(target).scatter_(-1, ids[..., None], 1.0)
        if self.last is None:
            return proposal
        before, positions = self.last
        same = window.positions[:, :, None] == positions[:, None, :]
        place = same.int().argmax(-1, keepdim=True).expand_as(target)
        return torch.where(same.any(-1, keepdim=True), before.gather(1, place), proposal)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `sample_tokens` draws from: float32 (..., V), temperature and filters applied."""
    kept = sampling.filter(logits)
    temperature = sampling.temperature
    if callable(temperature):
        raise TokenloomError("This Sampling holds a schedule. Resolve it first with sampling.at(progress).")
    best = kept.amax(-1, keepdim=True)
    return ((kept - best) / max(temperature, torch.finfo(torch.float32).tiny)).softmax(-1)


def accept(target: Tensor, proposal: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Whether draws from `proposal` may stand for draws from `target`: with probability min(1, p(x) / q(x)).

    Args:
        target: Probabilities p (..., V).
        proposal: Probabilities q (..., V).
        ids: LongTensor (...), drawn from q.
        uniform: Uniform numbers (...) in (0, 1).

    Returns:
        BoolTensor (...). Where it is false, a draw from `residual` has to take the place (Leviathan et al. 2023, appendix A).
    """
    wanted, offered = (table.gather(-1, ids[..., None]).squeeze(-1) for table in (target, proposal))
    return uniform * offered < wanted


def residual(target: Tensor, proposal: Tensor) -> Tensor:
    """What is left to draw after a rejection: max(p - q, 0), normalised; p itself where nothing is left, (..., V)."""
    left = (target - proposal).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(torch.float32).tiny), target)
