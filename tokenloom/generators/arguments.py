"""What a generation is asked for: checks that generators of codes and of continuous tokens share.

Errors say what was expected, what came and how to fix it. Knows nothing of embeddings, plans or sampling.

Legend: B samples, N positions.
"""

from __future__ import annotations

import torch
from torch import nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.conditions import Condition, Given


def check_batch(
    condition: Condition, given: Given | None, batch_size: int | None, device: torch.device
) -> tuple[Given | None, int]:
    """The condition on the device, null where nothing is given, and the number of samples."""
    if given is None:
        batch = 1 if batch_size is None else batch_size
        if not isinstance(batch, int) or batch < 1:
            raise TokenloomError(f"batch_size must be a positive integer, got {batch!r}.")
        return condition.null(batch, device), batch
    condition.check(given)
    if batch_size is not None and batch_size != given.shape[0]:
        raise TokenloomError(
            f"batch_size is {batch_size}, but the condition holds {given.shape[0]} samples; give one of them."
        )
    return given.to(device), given.shape[0]


def diagnose(module: nn.Module) -> str:
    """Why a module gave values that are not finite: the first damaged parameter, or overflowing activations."""
    dtype = torch.float32
    for name, parameter in module.named_parameters():
        dtype = parameter.dtype
        if not torch.isfinite(parameter).all():
            return f"The weights of {name} are not finite; the checkpoint is damaged."
    return f"All weights are finite, so activations overflowed in {dtype}; run the model in float32."
