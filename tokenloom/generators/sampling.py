"""Sampling: from logits to tokens, with filters, guidance, and noise that depends on (seed, position, id) alone.

A token is ``argmax(filtered logits / temperature + gumbel(seed, position, id))``: an exact draw from the softmax, with no
stream of random numbers, so a sample does not change with the batch it is drawn in or with the way it is decoded. This
module does not know models, orders or steps; a caller resolves schedules with `at(progress)` first.

Legend: B samples, n positions drawn together, V vocabulary.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.guidance import Guidance, Schedule, check_progress, finite, guide
from tokenloom.rng import gumbel

__all__ = ["Guidance", "Sampling", "Schedule", "guide", "sample_tokens"]

_NUCLEUS = ("descending", "ascending")
# Masses are summed in float64; differences below this are rounding, so that a sum that equals the threshold in exact
# arithmetic is treated alike everywhere.
_MASS_TOLERANCE = 1e-9
_LATER = threading.local()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits: temperature, then top-k, then top-p.

    Attributes:
        temperature: At least 0; 0 is greedy (the lowest id among equal maxima). A number or a `Schedule`.
        top_k: Keep the k best ids and all that tie with the k-th; 0 keeps all. An int or a `Schedule`.
        top_p: In (0, 1]; 1 keeps all. Applied to the softmax at this temperature of what top-k left. A number or a
            `Schedule`. Among equal logits lower ids count as more probable.
        nucleus: Where top-p cuts. "descending" (Hugging Face, LlamaGen): drop an id when the mass of the better ones
            exceeds top_p, so the first id above the threshold is kept. "ascending" (VAR): drop an id when its own mass
            and that of the worse ones together are at most 1 - top_p. Both keep the best id.

    Raises:
        TokenloomError: For values outside these ranges.

    Example:
        >>> Sampling(temperature=lambda progress: 1.0 - 0.5 * progress, top_k=100).at(1.0).temperature
        0.5
    """

    temperature: float | Schedule = 1.0
    top_k: int | Callable[[float], int] = 0
    top_p: float | Schedule = 1.0
    nucleus: Literal["descending", "ascending"] = "descending"

    def __post_init__(self) -> None:
        """Checks every field that is not a schedule."""
        if self.nucleus not in _NUCLEUS:
            raise unknown_name("nucleus rule", self.nucleus, _NUCLEUS)
        if not callable(self.temperature):
            object.__setattr__(self, "temperature", _temperature(self.temperature))
        if not callable(self.top_k):
            object.__setattr__(self, "top_k", _top_k(self.top_k))
        if not callable(self.top_p):
            object.__setattr__(self, "top_p", _top_p(self.top_p))

    @property
    def resolved(self) -> bool:
        """Whether no field is a schedule."""
        return not (callable(self.temperature) or callable(self.top_k) or callable(self.top_p))

    def at(self, progress: float) -> Sampling:
        """Replaces every schedule by its value.

        Args:
            progress: How far generation has come, in [0, 1]: step / (steps - 1).

        Returns:
            A `Sampling` of plain numbers; itself if it holds no schedule.

        Raises:
            TokenloomError: If progress or a scheduled value is out of range.
        """
        progress = check_progress(progress)
        if self.resolved:
            return self
        temperature = self.temperature(progress) if callable(self.temperature) else self.temperature
        top_k = self.top_k(progress) if callable(self.top_k) else self.top_k
        top_p = self.top_p(progress) if callable(self.top_p) else self.top_p
        return Sampling(temperature, top_k, top_p, self.nucleus)

    def filter(self, logits: Tensor) -> Tensor:
        """Removes the ids that may not be drawn.

        Args:
            logits: (..., V); -inf marks forbidden ids.

        Returns:
            float32 (..., V): the logits, not divided by the temperature, with -inf in place of removed ids. At
            temperature 0 only the best id is left.

        Raises:
            TokenloomError: If a field is a schedule, or the logits are unusable (see `sample_tokens`).
        """
        temperature, top_k, top_p = _numbers(self)
        logits, best = _checked(logits, check=True)
        if temperature == 0:
            keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(
                -1, logits.argmax(-1, keepdim=True), True
            )
            return logits.masked_fill(~keep, -torch.inf)
        if 0 < top_k < logits.shape[-1]:
            threshold = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        return _apply_nucleus(logits, (logits - best).div_(_divisor(temperature)), top_p, self.nucleus)


@contextmanager
def checks_later(flags: list[Tensor]) -> Iterator[None]:
    """Inside, draws of this thread do not wait for the device to look for unusable logits.

    Args:
        flags: Takes one bool tensor () a draw, false where logits were unusable; look at them when all is done.
    """
    _LATER.flags = flags
    try:
        yield
    finally:
        _LATER.flags = None


def checking_later() -> bool:
    """Whether this thread is inside `checks_later`."""
    return getattr(_LATER, "flags", None) is not None


def sample_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling | None = None, *, check: bool = True
) -> Tensor:
    """Draws one token for every sample and position.

    Args:
        logits: (B, n, V), any floating dtype; computed in float32. -inf marks forbidden ids.
        seeds: LongTensor (B,), one seed per sample (`tokenloom.rng.as_seeds`).
        positions: LongTensor (n,), layout index of each position, or (B, n) where samples are at different positions.
        sampling: How to draw, without schedules; None is `Sampling()`.
        check: Whether to look for unusable logits. This reads a flag back from the device: pass False inside a captured
            graph, and check outside.

    Returns:
        LongTensor (B, n), on the device of the logits.

    Raises:
        TokenloomError: If shapes do not fit, a field of `sampling` is a schedule, or logits hold NaN, +inf, or nothing
            but -inf for a position.

    Example:
        >>> sample_tokens(torch.zeros(1, 2, 4), torch.tensor([7]), torch.arange(2)).shape
        torch.Size([1, 2])
    """
    sampling = Sampling() if sampling is None else sampling
    temperature, top_k, top_p = _numbers(sampling)
    _check_shapes(logits, seeds, positions)
    logits, best = _checked(logits, check)
    if temperature == 0:
        return logits.argmax(-1)
    vocabulary = logits.shape[-1]
    ids = None  # (B, n, m) candidates in increasing id order; None is the whole vocabulary
    if 0 < top_k < vocabulary:
        if logits.device.type == "cpu":
            logits, ids = _candidates(logits, top_k)
        else:  # counting ties would wait for the device, so the noise of all ids is drawn; the tokens are the same
            threshold = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < threshold, -torch.inf)
    scaled = (logits - best).div_(_divisor(temperature))
    scaled = _apply_nucleus(scaled, scaled, top_p, sampling.nucleus)
    drawn_ids = torch.arange(vocabulary, device=logits.device) if ids is None else ids
    rows = positions if positions.ndim == 2 else positions[None, :]
    noisy = gumbel(seeds[:, None, None], rows[:, :, None], drawn_ids).add_(scaled)
    choice = noisy.argmax(-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def _candidates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Picks what top-k keeps, ties with the k-th value included.

    Args:
        logits: float32 (B, n, V).
        top_k: k, less than V.

    Returns:
        Logits (B, n, m) with -inf for what is not kept, and their ids (B, n, m), increasing. m > k if values tie.
    """
    values, ids = logits.topk(top_k + 1, sorted=False)
    threshold = values.kthvalue(2, dim=-1, keepdim=True).values  # second smallest of the k + 1 best
    tied = (values.amin(-1, keepdim=True) == threshold) & (threshold > -torch.inf)
    if bool(tied.any()):
        most = int((logits >= threshold).masked_fill_(~tied, False).sum(-1).amax())
        ids = logits.topk(max(most, top_k + 1), sorted=False).indices
    ids = ids.sort(-1).values
    kept = logits.gather(-1, ids)
    return kept.masked_fill_(kept < threshold, -torch.inf), ids


def _apply_nucleus(logits: Tensor, scaled: Tensor, top_p: float, rule: str) -> Tensor:
    """Sets to -inf what top-p drops from `logits`; `scaled` are the logits the masses are computed from, (..., V)."""
    if top_p == 1:
        return logits
    ranked, places = scaled.sort(dim=-1, descending=True, stable=True)  # equal logits: lower id first
    mass = ranked.to(torch.float64).softmax(-1)
    if rule == "descending":
        better = mass.cumsum(-1) - mass
        drop = better > top_p + _MASS_TOLERANCE
    else:
        own_and_worse = mass.flip(-1).cumsum(-1).flip(-1)
        drop = own_and_worse <= 1 - top_p + _MASS_TOLERANCE
    drop[..., 0] = False
    return logits.masked_fill(torch.empty_like(drop).scatter_(-1, places, drop), -torch.inf)


def _checked(logits: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    """Returns float32 logits and the best one of each row (..., 1), after looking for unusable rows."""
    if not logits.is_floating_point() or logits.ndim == 0 or logits.shape[-1] == 0:
        raise TokenloomError(
            f"Expected floating-point logits (..., V), got {logits.dtype} of shape {tuple(logits.shape)}."
        )
    logits = logits.float()
    best = logits.amax(-1, keepdim=True)  # NaN and +inf spread to the maximum of their row
    later = getattr(_LATER, "flags", None)
    if check and later is not None:
        later.append(best.isfinite().all())
        check = False
    if check and not bool(best.isfinite().all()):
        bad = ~best.isfinite()
        row = bad.nonzero()[0, :-1].tolist()
        value = best[bad][0].item()
        what = (
            "only -inf (every id is forbidden)"
            if value == -math.inf
            else ("NaN" if math.isnan(value) else "+inf")
        )
        raise TokenloomError(
            f"Logits must be finite, or -inf for forbidden ids; got {what} in {int(bad.sum())} of {bad.numel()} "
            f"positions, first at index {row}. Check the weights, the input codes and the dtype of the model."
        )
    return logits, best


def _check_shapes(logits: Tensor, seeds: Tensor, positions: Tensor) -> None:
    if logits.ndim != 3:
        raise TokenloomError(f"Expected logits (B, n, V), got shape {tuple(logits.shape)}.")
    batch, count, _ = logits.shape
    if tuple(seeds.shape) != (batch,):
        raise TokenloomError(
            f"Expected seeds ({batch},), one per sample, got {tuple(seeds.shape)}. Use tokenloom.rng.as_seeds."
        )
    if tuple(positions.shape) not in ((count,), (batch, count)):
        raise TokenloomError(
            f"Expected positions ({count},) or ({batch}, {count}), got {tuple(positions.shape)}."
        )


def _numbers(sampling: Sampling) -> tuple[float, int, float]:
    """The three fields of a resolved `Sampling`."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    if callable(temperature) or callable(top_k) or callable(top_p):
        raise TokenloomError("This Sampling holds a schedule. Resolve it first with sampling.at(progress).")
    return temperature, top_k, top_p


def _divisor(temperature: float) -> float:
    """The temperature, kept above what float32 would flush to zero (0 / 0 is NaN)."""
    return max(temperature, torch.finfo(torch.float32).tiny)


def _temperature(value: object) -> float:
    temperature = finite("temperature", value)
    if temperature < 0:
        raise TokenloomError(f"The temperature must be at least 0, got {value!r}. Use 0 for greedy decoding.")
    return temperature


def _top_k(value: object) -> int:
    fix = "Use a whole number from 1 up, or 0 to keep every id."
    try:
        top_k = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TokenloomError(f"top_k must be an integer, got {value!r}. {fix}") from None
    if isinstance(value, bool) or top_k < 0:
        raise TokenloomError(f"top_k must be an integer of at least 0, got {value!r}. {fix}")
    return top_k


def _top_p(value: object) -> float:
    top_p = finite("top_p", value)
    if not 0 < top_p <= 1:
        raise TokenloomError(f"top_p must be in (0, 1], got {value!r}. Use 1 to keep every id.")
    return top_p
