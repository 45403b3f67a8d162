"""How a check fails, and the bench on which checks run.

Knows tokenizers and media. Knows no single check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.base import Tokenizer

PAINTED = ("image", "video")
"""Modalities whose media are pixels, which have a range."""


class TokenizerCheckError(TokenloomError, AssertionError):
    """Raised when a tokenizer breaks its contract; the message lists every failure with advice.

    Attributes:
        failures: Name of each failed check and what it found.
    """

    def __init__(self, name: str, failures: dict[str, str]) -> None:
        self.failures = failures
        lines = [f"  {check}: {text}" for check, text in failures.items()]
        super().__init__("\n".join([f"{name} fails {len(failures)} of the tokenizer checks:", *lines]))


class Failure(Exception):
    """Raised by a check: what is wrong and what to look at."""


def require(condition: bool, advice: str) -> None:
    """Raises `Failure` with the advice unless the condition holds."""
    if not condition:
        raise Failure(advice)


class Bench:
    """A tokenizer, samples of its medium, and how closely values must agree.

    Attributes:
        tokenizer: In evaluation mode.
        media: (B, ...) different samples, B >= 3.
        low: Lowest value of a sample.
        high: Highest value of a sample.
        limited: Whether decoded media must stay between `low` and `high`.
        codes: LongTensor (B, N) of `media`.
        extremes: (2, ...) samples of the lowest and of the highest value alone.
    """

    def __init__(
        self, tokenizer: Tokenizer, media: Tensor, bounds: tuple[float, float], limited: bool
    ) -> None:
        self.tokenizer, self.media, self.limited = tokenizer, media, limited
        self.low, self.high = bounds
        self.codes = self.encode(media.clone())
        self.extremes = torch.cat([torch.full_like(media[:1], value) for value in bounds])

    @cached_property
    def output(self) -> Tensor:
        """What `codes` decode to."""
        return self.decode(self.codes.clone())

    @property
    def tolerance(self) -> float:
        """Half a level of 255: how far the same media may differ after another summation."""
        return (self.high - self.low) / 510

    def limit(self, media: Tensor) -> Tensor:
        """Media clamped to the range of pixels; other media have none that is known."""
        is_painted = getattr(self.tokenizer, "modality", None) in PAINTED
        return media.clamp(self.low, self.high) if is_painted else media

    def encode(self, media: Tensor) -> Tensor:
        """Codes without a gradient."""
        with torch.no_grad():
            return self.tokenizer.encode(media)

    def encode_prefix(self, count: int) -> Tensor:
        """The first `count` codes of the samples, as `encode` gives them when asked for no more."""
        with torch.no_grad():
            return self.tokenizer.encode(self.media, num_tokens=count)  # type: ignore[call-arg]

    def decode(self, codes: Tensor) -> Tensor:
        """Media without a gradient."""
        with torch.no_grad():
            return self.tokenizer.decode(codes)

    def same_codes(self, got: Tensor, wanted: Tensor) -> float:
        """Fraction of codes that differ, beyond what rounding explains (one in 500)."""
        if got.shape != wanted.shape:
            return 1.0
        different = float((got != wanted).double().mean()) if wanted.numel() else 0.0
        return different if different > 1 / 500 else 0.0

    def far(self, got: Tensor, wanted: Tensor) -> float:
        """Largest difference of media, 0 where it is within the tolerance, infinite where shapes differ."""
        if got.shape != wanted.shape:
            return float("inf")
        if not wanted.numel():
            return 0.0
        largest = float((got.float() - wanted.float()).abs().nan_to_num(float("inf")).max())
        return largest if largest > self.tolerance else 0.0


@contextmanager
def evaluation(tokenizer: Tokenizer) -> Iterator[None]:
    """Puts a tokenizer in evaluation mode, and back when done; keeps the state of the global random numbers."""
    modes = {module: module.training for module in tokenizer.modules()}
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for module, training in modes.items():
            module.training = training


def sample_pictures(size: Sequence[int], count: int, bounds: tuple[float, float], seed: int) -> Tensor:
    """Pictures (count, 3, H, W) float32 with coarse and fine structure, each different in colour and contrast."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    picture = torch.zeros(count, 3, height, width)
    for side, strength in ((2, 1.0), (5, 0.8), (11, 0.6)):
        field = torch.randn(count, 3, side, side, generator=generator)
        picture += strength * F.interpolate(field, (height, width), mode="bilinear", align_corners=False)
    picture += 0.25 * torch.randn(count, 3, height, width, generator=generator)
    contrast = torch.linspace(0.3, 1.2, count).view(-1, 1, 1, 1)
    low, high = bounds
    return low + (high - low) * (contrast * picture).sigmoid()
