"""Quantizers: continuous vectors to integer codes and back.

A quantizer is a pure module over (B, N, d) vectors. It knows nothing of pictures, sound or layouts. `encode` returns
codes, straight-through quantized vectors, losses and statistics; `decode` turns codes into the same vectors.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenloom.errors import check_options, unknown_name
from tokenloom.tokenizers.quantizers.base import Quantized, Quantizer, codebook_usage
from tokenloom.tokenizers.quantizers.binary import BSQ, LFQ
from tokenloom.tokenizers.quantizers.projected import Projected, SimVQ
from tokenloom.tokenizers.quantizers.residual import Residual, ResidualFSQ, ResidualLFQ, ResidualVQ
from tokenloom.tokenizers.quantizers.scalar import FSQ
from tokenloom.tokenizers.quantizers.scales import MultiScale
from tokenloom.tokenizers.quantizers.vq import VQ

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "VQ",
    "MultiScale",
    "Projected",
    "Quantized",
    "Quantizer",
    "Residual",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualVQ",
    "SimVQ",
    "codebook_usage",
    "make_quantizer",
]

KINDS: dict[str, Callable[..., Quantizer]] = {
    "bsq": BSQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "residual_fsq": ResidualFSQ,
    "residual_lfq": ResidualLFQ,
    "residual_vq": ResidualVQ,
    "simvq": SimVQ,
    "vq": VQ,
}
"""Name -> class of every quantizer that `make_quantizer` knows."""


def make_quantizer(kind: str, options: dict[str, object]) -> Quantizer:
    """Builds a quantizer from its name (a key of `KINDS`, for instance "fsq") and keyword options.

    Raises:
        TokenloomError: For an unknown name, an unknown or missing option, or values that do not work.
    """
    if kind not in KINDS:
        raise unknown_name("quantizer", kind, KINDS)
    check_options(KINDS[kind], options, f"option of the {kind} quantizer")
    return KINDS[kind](**options)
