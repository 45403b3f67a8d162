"""Reads published checkpoint files and takes the state dict out of what it is wrapped in.

Pickles are read with `weights_only=True` alone, so that no code of a file is run. Knows containers and prefixes; knows no
family and no configuration.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.models import check_safetensors

_AVERAGES = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")
_WEIGHTS = (
    "model",
    "module",
    "state_dict",
    "model_state_dict",
    "sd",
    "vae",
    "trainer",
    "var_wo_ddp",
    "mvar_wo_ddp",
)
_BESIDE = "vae_local"  # where a training checkpoint of next-scale models keeps their tokenizer
_PREFIXES = ("module.", "_forward_module.", "model.")
_COMPILED = "_orig_mod."
_HARMLESS: list[Any] = [argparse.Namespace]  # plain data that many official files hold beside their weights
_CODEBOOK = "quantize."
_SCALES = "word_embed.weight"  # a next-scale generator, which is published without its codebook


@dataclass
class Weights:
    """A state dict and how it was found.

    Attributes:
        state: Official names to tensors.
        containers: Names of the containers it lay in, outermost first.
        notes: What was done, in sentences.
    """

    state: dict[str, Tensor]
    containers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path, ema: bool = True) -> Weights:
    """Reads a file of weights: safetensors, or a pickle of PyTorch.

    Args:
        path: The file.
        ema: Whether averaged weights are preferred where a file holds both.

    Raises:
        TokenloomError: If the file cannot be read, is damaged, holds objects other than data, or no weights.
    """
    if not path.is_file():
        kind = "a folder; give the files in it" if path.is_dir() else "not there"
        raise TokenloomError(f"Expected a file of weights, but {path} is {kind}.")
    found = unwrap(_load(path), ema, path.name)
    found.notes.insert(0, f"{path.name}: {len(found.state)} tensors")
    return found


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        check_safetensors(path)
        return load_file(path)
    if not path.stat().st_size:
        raise _damaged(path, "it is empty")
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise TokenloomError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        classes = _foreign(path, str(error))
        if classes:
            raise TokenloomError(
                f"{path} holds more than weights: {', '.join(classes)}. Objects are built by running code, so they are "
                "refused. If you trust its source, open it in an environment that holds nothing of value "
                "(torch.load(path, weights_only=False)), save the state dict alone (safetensors.torch.save_file), and "
                "convert that file."
            ) from None
        raise _damaged(path, str(error).strip().partition("\n")[0][:120]) from None


def _foreign(path: Path, message: str) -> list[str]:
    """Names of the classes and functions in a pickle that are not plain data."""
    named = re.findall(r"GLOBAL (\S+) was not an allowed|Trying to (?:load|instantiate) (\S+)", message)
    found = {name.rstrip(".,") for pair in named for name in pair if name}
    if zipfile.is_zipfile(path):
        try:
            found |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError):
            return sorted(found)  # the rest cannot be read either
    return sorted(found - {"argparse.Namespace"})


def _damaged(path: Path, reason: str) -> TokenloomError:
    return TokenloomError(
        f"{path} is damaged or no file of weights ({reason}). Download it again and compare its size; expected are "
        "safetensors, or a pickle that torch.save wrote (.pth, .pt, .ckpt, .bin)."
    )


def _holds_tensors(tree: Any, depth: int = 3) -> bool:
    if not isinstance(tree, Mapping) or depth == 0:
        return False
    return any(isinstance(value, Tensor) or _holds_tensors(value, depth - 1) for value in tree.values())


def unwrap(tree: Any, ema: bool = True, name: str = "the file") -> Weights:
    """Takes the state dict out of containers, and prefixes off its names.

    Args:
        tree: What a file holds.
        ema: Whether averaged weights are preferred where there are both.
        name: What messages call it.

    Raises:
        TokenloomError: If there is no state dict in it; lists what there is.
    """
    order = (*_AVERAGES, *_WEIGHTS) if ema else (*_WEIGHTS, *_AVERAGES)
    containers, notes = [], []
    beside: dict[str, Tensor] = {}
    while isinstance(tree, Mapping) and (options := [key for key in order if _holds_tensors(tree.get(key))]):
        others = sorted(str(key) for key in tree if key != options[0])
        notes.append(f"took {options[0]!r}" + (f"; beside it: {_some(others)}" if others else ""))
        if _holds_tensors(tree.get(_BESIDE)):
            beside = unwrap(tree[_BESIDE], ema, name).state
        containers.append(options[0])
        tree = tree[options[0]]
    if not _holds_tensors(tree, 1):
        keys = _some(sorted(map(str, tree))) if isinstance(tree, Mapping) else type(tree).__name__
        raise TokenloomError(
            f"There is no state dict in {name}: it holds {keys}. Expected tensors by name, bare or under one of "
            f"{', '.join((*_WEIGHTS, *_AVERAGES))}."
        )
    state = {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}
    if dropped := sorted(str(key) for key in tree if str(key) not in state):
        notes.append(f"left out what is no tensor: {_some(dropped)}")
    state, stripped = strip(state)
    if stripped:
        notes.append(f"took off {', '.join(stripped)}")
    if beside:
        state, taken = join([state, beside])
        notes += taken
    return Weights(state, containers, notes)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def strip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Takes off prefixes that wrappers put before all names; returns the state dict and what was taken off."""
    taken = []
    result = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    if result.keys() != state.keys():
        taken.append(_COMPILED)
    while result:
        prefix = next((one for one in _PREFIXES if all(key.startswith(one) for key in result)), None)
        if prefix is None:
            break
        taken.append(prefix)
        result = {key[len(prefix) :]: value for key, value in result.items()}
    return result, taken


def join(parts: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """Joins the state dicts of a model that is published in parts; returns it and what was done.

    Of the tokenizer beside a next-scale generator only the codebook and its convolutions are taken, as `vae.quantize.*`.

    Raises:
        TokenloomError: If two parts hold the same name.
    """
    scales = any(_SCALES in part for part in parts)
    joined: dict[str, Tensor] = {}
    notes = []
    for part in parts:
        if scales and f"{_CODEBOOK}embedding.weight" in part:
            part = {f"vae.{key}": value for key, value in part.items() if key.startswith(_CODEBOOK)}
            notes.append(f"took {len(part)} tensors of the tokenizer as vae.{_CODEBOOK}*")
        if twice := sorted(joined.keys() & part.keys()):
            raise TokenloomError(
                f"Two of the files hold the same tensors ({_some(twice)}); give the parts of one model, each once."
            )
        joined |= part
    return joined, notes


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it and without what wrappers put before their names."""
    inside = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return strip(inside)[0]
