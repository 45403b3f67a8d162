"""Counter-based noise: the randomness of a sample is a pure function of (seed, position, vocabulary id), or, for
continuous tokens, of (seed, position, channel, draw).

There is no stream and no state, so the noise of one sample does not depend on the batch it is drawn in, on the number
of processes, on the device, or on which positions are drawn together. `sampling.py` turns it into tokens, and the
generators of continuous tokens start from it.

How it works: the 64-bit seed and the position are hashed once per row into two 32-bit words, an offset and an odd
multiplier; every vocabulary id of the row becomes ``offset + multiplier * id``, which the finaliser of MurmurHash3
(Austin Appleby, public domain) then mixes. All of it is int32 arithmetic modulo 2**32 (two's-complement wraparound, as
tensor integers do on every device), hence the same bits everywhere. A draw is one more word of the row hash, so that
continuous noise shares no numbers with the noise of codes. Not for cryptography.

This module knows nothing of tokens, logits or models.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError

_WORD = 1 << 32
_SEED_LIMIT = 1 << 64


def _signed(value: int, bits: int = 32) -> int:
    """Reads the low `bits` bits of `value` as a two's-complement number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_FINALISER = ((16, _signed(0x85EBCA6B)), (13, _signed(0xC2B2AE35)))  # MurmurHash3 fmix32
_GOLDEN = _signed(0x9E3779B9)  # 2**32 / golden ratio, so that all-zero words do not map to zero
_CHAINS = (_signed(0x243F6A88), _signed(0x85A308D3))  # first fraction bits of pi: offset and multiplier
_LARGEST_NOISE = 1.0 - 2.0**-24  # the largest float32 below 1


def noise(seed: Tensor | int, position: Tensor | int, vocabulary_id: Tensor | int) -> Tensor:
    """Draws uniform noise for every (seed, position, vocabulary id).

    Args:
        seed: LongTensor or int in [0, 2**64); tensors hold it as int64 two's complement.
        position: LongTensor or int, the layout index; taken modulo 2**32.
        vocabulary_id: LongTensor or int; taken modulo 2**32.
            The three arguments broadcast. Give `seed` and `position` a trailing axis of 1 against the vocabulary axis:
            their part of the hash is then computed once per row.

    Returns:
        float32 in the open interval (0, 1), broadcast shape, with 32 bits of resolution near 0.

    Example:
        >>> noise(0, 0, torch.arange(3)).shape
        torch.Size([3])
    """
    return _uniform(seed, position, vocabulary_id).to(torch.float32).clamp_(max=_LARGEST_NOISE)


def gumbel(seed: Tensor | int, position: Tensor | int, vocabulary_id: Tensor | int) -> Tensor:
    """Draws standard Gumbel noise, ``-log(-log(u))`` of the uniform number u behind `noise`.

    u has 32 bits and the logarithms are taken in float64 before rounding, so that the far tail is resolved (large
    vocabularies have no ties at the top) and devices agree to the last float32 digit.

    Args:
        seed: As for `noise`.
        position: As for `noise`.
        vocabulary_id: As for `noise`.

    Returns:
        float32 in (-3.2, 22.9), broadcast shape.

    Example:
        >>> gumbel(0, 0, torch.arange(3)).isfinite().all().item()
        True
    """
    uniform = _uniform(seed, position, vocabulary_id)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)


def normal(
    seed: Tensor | int, position: Tensor | int, channel: Tensor | int, draw: Tensor | int = 0
) -> Tensor:
    """Draws standard normal noise for every (seed, position, channel) of a draw.

    The inverse of the normal distribution function is taken of a uniform number of 32 bits, in float64 before rounding,
    so that devices agree to the last float32 digit. A solver that needs noise at every step counts its steps in `draw`.

    Args:
        seed: As for `noise`.
        position: As for `noise`.
        channel: LongTensor or int, the channel of a continuous token; taken modulo 2**32.
        draw: LongTensor or int, which draw of this position; taken modulo 2**32. It belongs to the row: give it a
            trailing axis of 1 against the channels, as `seed` and `position`.

    Returns:
        float32 in (-6.4, 6.4), broadcast shape.

    Example:
        >>> normal(0, 0, torch.arange(3), draw=1).shape
        torch.Size([3])
    """
    return torch.special.ndtri(_uniform(seed, position, channel, draw)).to(torch.float32)


def as_seeds(
    seeds: int | Sequence[int] | Tensor | None, batch_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Turns what a user may write as seeds into one seed per sample.

    Args:
        seeds: None takes fresh entropy from the operating system for each sample; an int s gives s, s + 1, ...; a
            sequence gives one int in [0, 2**64) per sample; an integer tensor of shape (B,) (or one element of shape
            ()) is taken as it is, so the result of this function passes through unchanged.
        batch_size: Number of samples B.
        device: Where the result lives; None means the CPU, or where a tensor already is.

    Returns:
        LongTensor (B,), each seed held as int64 two's complement.

    Raises:
        TokenloomError: For a wrong length, a seed outside [0, 2**64), or something that is not an integer.
    """
    if isinstance(seeds, Tensor):
        return _tensor_seeds(seeds, batch_size, device)
    if seeds is None:
        values = [secrets.randbits(64) for _ in range(batch_size)]
    elif isinstance(seeds, Sequence) and not isinstance(seeds, str):
        values = [_seed(value) for value in seeds]
        if len(values) != batch_size:
            raise TokenloomError(_length_message(len(values), batch_size))
    else:
        first = _seed(seeds)
        values = [_seed(value) for value in range(first, first + batch_size)]
    return torch.tensor([_signed(value, 64) for value in values], dtype=torch.int64, device=device or "cpu")


def _tensor_seeds(seeds: Tensor, batch_size: int, device: torch.device | str | None) -> Tensor:
    if seeds.dtype == torch.bool or seeds.is_floating_point() or seeds.is_complex():
        raise TokenloomError(
            f"Seeds must be integers, got a tensor of {seeds.dtype}. Pass seeds.long() instead."
        )
    seeds = seeds.to(device=device or seeds.device, dtype=torch.int64)
    if seeds.ndim == 0:
        return seeds + torch.arange(batch_size, device=seeds.device)
    if seeds.shape != (batch_size,):
        raise TokenloomError(_length_message(tuple(seeds.shape), batch_size))
    return seeds


def _length_message(got: object, batch_size: int) -> str:
    return (
        f"Expected one seed per sample, {batch_size} in all, got {got}. "
        "Pass a list of that length, or one int s to use s, s + 1, and so on."
    )


def _seed(value: object) -> int:
    """Checks one seed given as a Python or numpy integer."""
    fix = "Use whole numbers from 0 to 2**64 - 1."
    if isinstance(value, bool):
        raise TokenloomError(f"A seed must be an integer, got {value!r}. {fix}")
    try:
        seed = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TokenloomError(f"A seed must be an integer, got {value!r}. {fix}") from None
    if not 0 <= seed < _SEED_LIMIT:
        raise TokenloomError(f"A seed must be in [0, 2**64), got {seed}. {fix}")
    return seed


def _uniform(seed: Tensor | int, position: Tensor | int, last: Tensor | int, *more: Tensor | int) -> Tensor:
    """Returns float64 uniform numbers (k + 0.5) / 2**32, broadcast shape, in a fresh tensor.

    `more` are further words of the row; `last` is the word that varies inside a row.
    """
    device = next(
        (a.device for a in (seed, position, last, *more) if isinstance(a, Tensor)), torch.device("cpu")
    )
    if isinstance(seed, Tensor):
        low, high = _low_word(seed, device), _low_word(seed >> 32, device)
    else:
        whole = _seed(seed)
        low, high = _low_word(whole, device), _low_word(whole >> 32, device)
    words = [_low_word(word, device) for word in (position, *more)]
    offset, multiplier = _row_words(low, high, *words)
    hashed = _low_word(last, device) * multiplier
    hashed += offset
    _mix(hashed)
    return hashed.to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)


def _row_words(low: Tensor, high: Tensor, *words: Tensor) -> tuple[Tensor, Tensor]:
    """Hashes seed words and further words (int32, broadcasting) into an offset and an odd multiplier, both int32."""
    word = low + sum(torch.zeros_like(word) for word in words)  # broadcast shape of a row
    chains = torch.stack([word ^ _CHAINS[0], word ^ _CHAINS[1]])  # (2, ...): both chains in one pass
    for following in (high, *words, None):
        chains += _GOLDEN
        _mix(chains)
        if following is not None:
            chains ^= following
    return chains[0], chains[1] | 1


def _mix(word: Tensor) -> None:
    """Applies the 32-bit finaliser of MurmurHash3 in place; `word` is int32."""
    shifted = torch.empty_like(word)
    for shift, multiplier in _FINALISER:
        _fold(word, shift, shifted)
        word *= multiplier
    _fold(word, 16, shifted)


def _fold(word: Tensor, shift: int, shifted: Tensor) -> None:
    """word ^= word >> shift in place, as an unsigned shift; `shifted` is scratch space."""
    torch.bitwise_right_shift(word, shift, out=shifted)
    shifted &= (1 << (32 - shift)) - 1
    word ^= shifted


def _low_word(value: Tensor | int, device: torch.device) -> Tensor:
    """The low 32 bits of an integer tensor or a Python int, as int32."""
    if isinstance(value, Tensor):
        return value.to(torch.int32)
    return torch.tensor(_signed(value), dtype=torch.int32, device=device)
