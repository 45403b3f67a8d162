"""Number formats that pay on this machine. Knows processors and the size of modules; knows nothing of models."""

from __future__ import annotations

import torch
from torch import nn

LARGE = 25_000_000
"""Weights from which a module is read from memory at every step, 100 MB in float32: half the bytes are half the time there.
Smaller ones stay in caches, and the kernels of `decode="compiled"` run them in float32."""


def computes_bf16() -> bool:
    """Whether the processor multiplies matrices in bfloat16; one that does not is a hundred times slower in it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pays_in_bf16(module: nn.Module) -> bool:
    """Whether a module shall run in bfloat16 unasked: the processor computes it and the module is large."""
    return computes_bf16() and sum(weight.numel() for weight in module.parameters()) >= LARGE
