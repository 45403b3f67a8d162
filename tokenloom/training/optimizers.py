"""The optimizers of the training loop: AdamW, and Muon for the matrices between hidden layers.

Muon (Jordan et al. 2024) moves a matrix along its orthogonalised momentum; scaled by 0.2 sqrt(max(rows, columns)) its steps
have AdamW's size (Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both. timm computes it. Knows
modules, not models: what a matrix is for is read off its layer and shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from timm.optim import muon
from torch import Tensor, nn

_WIDEST = 8  # rows a column: a wider matrix is a head over a vocabulary
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _FullMuon(muon.Muon):
    """timm's Muon, orthogonalising in float32; timm's bfloat16 is a hundred times slower where hardware lacks it."""

    def step(self, closure: Any = None) -> Any:
        exact = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with mock.patch.object(muon, "zeropower_via_newtonschulz", exact):
            return super().step(closure)


def _hidden_matrices(module: nn.Module) -> Iterator[Tensor]:
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    for layer in module.modules():
        if isinstance(layer, _LAYERS) and id(layer.weight) not in tables:
            if len(layer.weight) <= _WIDEST * layer.weight[0].numel():
                yield layer.weight


def parameter_groups(module: nn.Module, weight_decay: float, hidden: bool = False) -> list[dict[str, Any]]:
    """Matrices decay; vectors and codebooks, whose length is a position and not a strength, do not.

    Args:
        module: Owner of the parameters; frozen ones are left out.
        weight_decay: Decay of what decays.
        hidden: Whether weights of linear and convolution layers, heads of a vocabulary aside, form a group of their own;
            the others then have "use_fallback" set, which timm's Muon reads as "NAdamW".

    Returns:
        Groups without empty ones.
    """
    inner = {id(weight) for weight in _hidden_matrices(module)} if hidden else set()
    first: list[Tensor] = []
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, value in module.named_parameters():
        if value.requires_grad:
            decays = value.ndim >= 2 and name.rpartition(".")[2] != "codebook"
            (first if id(value) in inner else decayed if decays else kept).append(value)
    fallback = {"use_fallback": True} if hidden else {}
    groups: list[dict[str, Any]] = [
        {"params": first, "weight_decay": weight_decay},
        {"params": decayed, "weight_decay": weight_decay, **fallback},
        {"params": kept, "weight_decay": 0.0, **fallback},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str, module: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimizer "adamw" or "muon" over a module's trainable parameters.

    Args:
        name: "adamw" or "muon".
        module: Owner of the parameters.
        learning_rate: Peak rate of both.
        weight_decay: Decay of matrices.
        betas: AdamW's; with "muon" those of NAdamW, which moves what is no hidden matrix.
    """
    if name == "muon":
        groups = parameter_groups(module, weight_decay, hidden=True)
        return _FullMuon(groups, lr=learning_rate, betas=betas, momentum=0.95, nesterov=True)
    groups = parameter_groups(module, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
