"""The conformance suite of tokenizers: what every tokenizer promises, checked from outside.

Runs the checks of `checks`, `places` and `prefixes` on samples and reports all failures at once. Knows nothing of how a tokenizer works.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.testing import checks, places, prefixes
from tokenloom.testing.failures import (
    PAINTED,
    Bench,
    Failure,
    TokenizerCheckError,
    evaluation,
    sample_pictures,
)
from tokenloom.tokenizers.base import Tokenizer

CHECKS: dict[str, Callable[[Bench], None]] = {
    "attributes": checks.attributes,
    "codes": checks.codes,
    "media": checks.media,
    "diversity": checks.diversity,
    "determinism": checks.determinism,
    "random numbers": checks.rng_state,
    "inputs": checks.inputs,
    "round trip": checks.round_trip,
    "batch": checks.batch,
    "batch order": checks.batch_order,
    "code order": places.code_order,
    "prefixes": prefixes.prefixes,
    "bad codes": checks.bad_codes,
    "gradient": checks.gradient,
    "save and load": checks.save_and_load,
    "dtype": checks.dtype,
    "device": checks.device,
}
"""Name -> check, in the order in which they run."""

_FIRST = ("attributes", "codes")  # without these the others cannot say anything


def check_tokenizer(
    tokenizer: Tokenizer, media: Tensor | None = None, *, seed: int = 0, batch_size: int = 6
) -> tuple[str, ...]:
    """Checks that a tokenizer keeps the contract of `tokenloom.Tokenizer`.

    The suite runs in evaluation mode, on the device and in the dtype of the weights, and leaves the tokenizer as it was.

    Args:
        tokenizer: Any subclass of `Tokenizer`, trained or not.
        media: (B, ...) at least 3 different samples; `None` = generated pictures, for image tokenizers that say
            `image_size`, in their `pixel_range` ((-1, 1) if they have none).
        seed: Seed of generated pictures and of what is changed in them.
        batch_size: Number of generated pictures, at least 3.

    Returns:
        The names of the checks that ran.

    Raises:
        TokenizerCheckError: If a check fails; every failure is listed with advice. It is also an `AssertionError`.
        TokenloomError: If the suite has nothing to run on.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise TokenloomError(f"check_tokenizer expects a tokenloom.Tokenizer, got {type(tokenizer)}.")
    with evaluation(tokenizer):
        tokenizer.eval()
        torch.manual_seed(seed)
        samples, bounds = _samples(tokenizer, media, seed, batch_size)
        # a tokenizer may say with clamp=False that its output is not limited
        limited = getattr(tokenizer, "modality", None) in PAINTED and getattr(tokenizer, "clamp", True)
        failures, ran = _run(tokenizer, samples, bounds, bool(limited))
    if failures:
        raise TokenizerCheckError(type(tokenizer).__name__, failures)
    return ran


def _run(
    tokenizer: Tokenizer, samples: Tensor, bounds: tuple[float, float], limited: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    try:
        bench = Bench(tokenizer, samples, bounds, limited)
    except Exception as error:
        return {"start": f"encode() of {len(samples)} samples raised {error!r}."}, ()
    failures: dict[str, str] = {}
    ran = []
    for name, check in CHECKS.items():
        ran.append(name)
        try:
            check(bench)
        except Failure as failure:
            failures[name] = str(failure)
        except Exception as error:
            failures[name] = f"raised {error!r}; the check expects it to run."
        if name in _FIRST and failures:
            break
    return failures, tuple(ran)


def _samples(
    tokenizer: Tokenizer, media: Tensor | None, seed: int, batch_size: int
) -> tuple[Tensor, tuple[float, float]]:
    """Samples on the tokenizer's device in its dtype, and their lowest and highest value."""
    bounds = getattr(tokenizer, "pixel_range", None)
    if bounds is None and getattr(tokenizer, "modality", None) == "image":
        bounds = (-1.0, 1.0)
    if media is None:
        size = getattr(tokenizer, "image_size", None)
        if size is None:
            raise TokenloomError(
                f"{type(tokenizer).__name__} has no image_size, so no samples can be made for it; pass media=... "
                "with at least 3 different samples."
            )
        bounds = bounds or (-1.0, 1.0)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        media = sample_pictures(sides, batch_size, (float(bounds[0]), float(bounds[1])), seed)
    low, high = bounds if bounds is not None else media.aminmax()
    if len(media) < 3:
        raise TokenloomError(f"check_tokenizer needs at least 3 different samples, got {len(media)}.")
    weight = next((value for value in tokenizer.parameters() if value.is_floating_point()), media)
    return media.to(weight.device, weight.dtype), (float(low), float(high))
