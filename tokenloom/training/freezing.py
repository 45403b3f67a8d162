"""Keeps named parts of a module as they are while the rest trains.

Knows modules and names of parameters. Knows nothing of tokenizers or losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from tokenloom.errors import TokenloomError, unknown_name


def freeze(
    module: nn.Module, names: Sequence[str], parts: Mapping[str, Sequence[str]] | None = None
) -> list[nn.Module]:
    """Takes parameters out of training.

    Args:
        module: What is trained.
        names: Keys of `parts`, or what names of parameters begin with ("decoder.levels.0").
        parts: Names that stand for several beginnings.

    Returns:
        The frozen submodules. They have to be in evaluation mode during training, so that codebooks of averages stay too.

    Raises:
        TokenloomError: For a name that nothing begins with, or if nothing would be left to train.
    """
    parts = parts or {}
    modules = dict(module.named_modules())
    frozen = []
    for name in names:
        found = False
        for prefix in parts.get(name, (name,)):
            values = [
                value
                for key, value in module.named_parameters()
                if key == prefix or key.startswith(f"{prefix}.")
            ]
            for value in values:
                value.requires_grad_(False)
            if prefix in modules:
                frozen.append(modules[prefix])
            found = found or bool(values) or prefix in modules
        if not found or not name:
            known = {*parts, *(child for child, _ in module.named_children())}
            raise unknown_name("part to freeze", name, known)
    if names and not any(value.requires_grad for value in module.parameters()):
        raise TokenloomError(f"Nothing is left to train when {', '.join(names)} are frozen; freeze less.")
    return frozen
