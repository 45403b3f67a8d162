"""Rename tables: official tensor names to ours and back, exactly.

An adapter lists one `Rename` a tensor of ours; this module applies the list in both directions and reports every key that
does not fit at once. Knows no family and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError

M = TypeVar("M", bound=nn.Module)

DERIVABLE = (r"(.*\.)?freqs_cis", r"(.*\.)?(causal|group)_mask", r".*\.kv_cache\.[kv]_cache")
"""Patterns of buffers that official checkpoints may hold and that follow from the configuration."""


@dataclass(frozen=True)
class Rename:
    """One tensor of ours and the official tensors it is made of.

    Attributes:
        ours: Name in our state dict.
        official: Official names; several are stacked along axis 0.
        leading: How many axes of length 1 stand before the official tensor and not before ours.
        trailing: How many axes of length 1 stand behind the official tensor and not behind ours (1x1 convolutions).
        sizes: Lengths of the stacked parts; empty means equal parts.
        blocks: Our i-th equal block along axis 0 is the official block `blocks[i]`; empty means the same.
        folded: Length of our first axis, which the official tensor counts on along the second; 0 for none.
    """

    ours: str
    official: tuple[str, ...]
    leading: int = 0
    trailing: int = 0
    sizes: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    folded: int = 0

    @classmethod
    def of(cls, ours: str, *official: str, **options: Any) -> Rename:
        """A rename of one or several official tensors."""
        return cls(ours, official, **options)

    def gather(self, state: Mapping[str, Tensor]) -> Tensor:
        """Our tensor."""
        parts = [self._inner(state[name]) for name in self.official]
        value = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        if self.blocks and len(value) % len(self.blocks) == 0:
            pieces = value.chunk(len(self.blocks))
            value = torch.cat([pieces[index] for index in self.blocks])
        if self.folded and len(value) % self.folded == 0:
            value = value.unflatten(0, (self.folded, -1))
        return value

    def _inner(self, value: Tensor) -> Tensor:
        """An official tensor without its axes of length 1; as it is where they are longer, for `load` to report."""
        shape = value.shape[self.leading : value.ndim - self.trailing]
        return value.reshape(shape) if shape.numel() == value.numel() else value

    def scatter(self, value: Tensor) -> dict[str, Tensor]:
        """The official tensors."""
        value = value.detach()
        value = value.flatten(0, 1) if self.folded else value
        if self.blocks:
            pieces = value.chunk(len(self.blocks))
            value = torch.cat([pieces[self.blocks.index(index)] for index in range(len(pieces))])
        if len(self.official) == 1:
            parts: Sequence[Tensor] = (value,)  # may have no axis to cut
        else:
            parts = value.split(self.sizes) if self.sizes else value.chunk(len(self.official))
        ones = (1,) * self.leading, (1,) * self.trailing
        return {
            name: part.reshape(ones[0] + tuple(part.shape) + ones[1]).clone()
            for name, part in zip(self.official, parts, strict=True)
        }


def unwrap(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights themselves, of a published container that keeps them under "ema", "model", "state_dict" or the like."""
    for key in ("ema", "model", "state_dict", "model_state_dict"):
        if isinstance(inside := state.get(key), Mapping):
            return dict(inside)
    return state


def check_keys(
    family: str, state: Mapping[str, Tensor], renames: Iterable[Rename], derivable: Sequence[str] = DERIVABLE
) -> None:
    """Raises one error that lists every unknown and every missing official key."""
    wanted = {name for rename in renames for name in rename.official}
    unknown = [
        name
        for name in sorted(state.keys() - wanted)
        if not any(re.fullmatch(pattern, name) for pattern in derivable)
    ]
    missing = sorted(wanted - state.keys())
    if unknown or missing:
        parts = [
            f"{label} keys ({len(names)}): {', '.join(names)}."
            for label, names in (("Unknown", unknown), ("Missing", missing))
            if names
        ]
        raise TokenloomError(
            f"These weights are not a {family!r} checkpoint of this configuration. {' '.join(parts)} "
            "Check the family, and that config holds the official constructor's arguments."
        )


def load(
    module: M,
    family: str,
    state: Mapping[str, Tensor],
    renames: Sequence[Rename],
    derivable: Sequence[str] = DERIVABLE,
) -> M:
    """Fills a module with official weights, in their dtype.

    Raises:
        TokenloomError: If keys are unknown or missing, or shapes do not fit; all of them are listed.
    """
    check_keys(family, state, renames, derivable)
    ours = {rename.ours: rename.gather(state) for rename in renames}
    own = module.state_dict()
    if ours.keys() != own.keys():
        odd = sorted(ours.keys() ^ own.keys())
        raise TokenloomError(f"The adapter {family!r} does not cover this configuration: {', '.join(odd)}.")
    wrong = [
        f"{rename.ours} (from {' + '.join(rename.official)}) is {tuple(ours[rename.ours].shape)}, "
        f"expected {tuple(own[rename.ours].shape)}"
        for rename in renames
        if ours[rename.ours].shape != own[rename.ours].shape
    ]
    if wrong:
        raise TokenloomError(
            f"Shapes do not fit the configuration of this {family!r} checkpoint: {'; '.join(wrong)}."
        )
    module.load_state_dict(ours, strict=True, assign=True)
    return module


def unload(module: nn.Module, renames: Sequence[Rename]) -> dict[str, Tensor]:
    """The official state dict, the inverse of `load`."""
    own = module.state_dict()
    official: dict[str, Tensor] = {}
    for rename in renames:
        official |= rename.scatter(own[rename.ours])
    return official


def tensor(family: str, state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that an adapter needs to see before it knows its table of renames."""
    if name not in state:
        raise TokenloomError(f"A {family!r} checkpoint holds {name!r}, but these weights do not.")
    return state[name]


def setting(family: str, config: Mapping[str, Any], name: str) -> Any:
    """An argument of the official constructor that has no default here."""
    if config.get(name) is None:
        raise TokenloomError(
            f"The configuration of a {family!r} checkpoint needs {name!r}; it holds {', '.join(sorted(config)) or 'nothing'}."
        )
    return config[name]


def square_side(family: str, config: Mapping[str, Any]) -> int:
    """Side of the square grid of `block_size` tokens."""
    size = setting(family, config, "block_size")
    side = round(size**0.5)
    if side * side != size:
        raise TokenloomError(f"block_size of a {family!r} checkpoint must be a square number, got {size}.")
    return side
