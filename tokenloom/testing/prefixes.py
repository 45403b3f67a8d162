"""The check of tokenizers whose first codes decode alone: prefixes are what they say, and the decoder looks at no more.

Knows the `lengths` of a tokenizer. One whose codes decode only all together has nothing to check, and passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from tokenloom.testing.failures import Bench, require

_MOST_LENGTHS = 6


def prefixes(bench: Bench) -> None:
    """`encode(media, num_tokens=k)` is the first k codes, and `decode` of them depends on them alone."""
    lengths, count = bench.tokenizer.lengths, bench.tokenizer.layout.size
    require(
        len(lengths) > 0 and lengths[-1] == count and all(a < b for a, b in itertools.pairwise(lengths)),
        f"lengths must rise and end with the size of the layout, {count}; got {_shown(lengths)}.",
    )
    if len(lengths) == 1:
        return
    require(lengths[0] >= 1, f"lengths must begin with at least 1, got {lengths[0]}.")
    for length in _some(lengths[:-1]):
        _encode(bench, length)
        _decode(bench, length)
    _refusals(bench)


def _encode(bench: Bench, length: int) -> None:
    try:
        got = bench.encode_prefix(length)
    except TypeError as error:
        require(
            False,
            f"lengths say that {length} codes decode alone, but encode(media, num_tokens={length}) raised {error}; let encode() "
            "take the keyword num_tokens=None.",
        )
    wanted = bench.codes[:, :length]
    require(
        got.shape == wanted.shape,
        f"encode(media, num_tokens={length}) must return codes of shape {tuple(wanted.shape)}, got {tuple(got.shape)}; "
        "it seems to ignore num_tokens: end it with codes[:, :num_tokens].",
    )
    wrong = bench.same_codes(got, wanted)
    require(
        wrong == 0,
        f"encode(media, num_tokens={length}) differs from the first {length} codes of encode(media) ({wrong:.1%}); a prefix "
        "must not depend on how many codes follow it.",
    )


def _decode(bench: Bench, length: int) -> None:
    codes = bench.codes[:, :length].clone()
    bench.decode(bench.codes.flip(1))  # whatever a decoder keeps from an earlier call must not show
    got = bench.decode(codes)
    require(
        got.shape == bench.output.shape and bool(got.isfinite().all()),
        f"decode() of the first {length} codes must give finite media of shape {tuple(bench.output.shape)}, got "
        f"{tuple(got.shape)}; put something neutral in the place of the codes that are missing.",
    )
    bench.decode(bench.codes)
    far = bench.far(bench.decode(codes), got)
    require(
        far == 0,
        f"decode() of the first {length} codes depends on what was decoded before (up to {far:.3g}); keep no state between "
        "calls.",
    )
    require(
        not torch.equal(got, bench.output),
        f"decode() of the first {length} codes gives exactly the media of all {bench.codes.shape[1]}; it seems to ignore how "
        "many codes it was given, or the later codes.",
    )
    with torch.no_grad():
        whole = bench.tokenizer.reconstruct(bench.media, num_tokens=length)  # type: ignore[call-arg]
    far = bench.far(whole, got)
    require(
        far == 0,
        f"reconstruct(media, num_tokens={length}) differs from decode(encode(media, num_tokens={length})) by up to {far:.3g}; "
        "pass num_tokens on to encode().",
    )


def _refusals(bench: Bench) -> None:
    """Numbers of codes that do not decode are refused."""
    lengths, size = bench.tokenizer.lengths, bench.tokenizer.layout.size
    odd = next((count for count in range(1, size) if count not in lengths), None)
    for count in (0, size + 1, *(() if odd is None else (odd,))):
        refused = False
        try:
            bench.encode_prefix(count)
        except ValueError:
            refused = True
        require(
            refused,
            f"encode(media, num_tokens={count}) was accepted, though lengths are {_shown(lengths)}; call "
            "self.check_num_tokens(num_tokens).",
        )


def _some(lengths: Sequence[int]) -> list[int]:
    """A few of the lengths, the first and the last among them."""
    count = min(_MOST_LENGTHS, len(lengths))
    places = torch.linspace(0, len(lengths) - 1, count).long().tolist()
    return [lengths[place] for place in sorted(set(places))]


def _shown(lengths: Sequence[int]) -> str:
    texts = [str(length) for length in lengths]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "...", texts[-1]])
