"""Official checkpoints to tokenloom modules and back, one small adapter module a family.

`from_official` takes a state dict exactly as published and the official constructor's arguments; `to_official` is the
inverse. An adapter is a file of key renames: it knows one published layout of names and nothing about how it is run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints.guidance import official_guidance as official_guidance
from tokenloom.errors import TokenloomError, unknown_name

_ADAPTERS: dict[str, str] = {
    "dac": "audio_hub",
    "dac_original": "audio_hub",
    "dar": "llamagen",
    "dar_tokenizer": "dar_tokenizer",
    "encodec": "audio_hub",
    "encodec_24k": "audio_hub",
    "encodec_48k": "audio_hub",
    "flextok": "flextok",
    "himtok": "himtok",
    "infinity_bsq": "image_scale",
    "himar": "himar",
    "llamagen": "llamagen",
    "llamagen_vq": "image_cnn",
    "mar": "mar",
    "maskgit_vqgan": "image_cnn",
    "mimi": "audio_hub",
    "mimo_audio_patch": "mimo",
    "mimo_audio_tokenizer": "mimo",
    "mvar": "var",
    "nar": "nar",
    "nar_video": "nar",
    "nbp": "nbp",
    "nbp_video": "nbp_video",
    "par": "par",
    "tatitok": "titok",
    "titok": "titok",
    "var": "var",
    "var_vq": "image_scale",
    "xar": "xar",
    "xcodec": "audio_hub",
}
"""Family name -> module of this package that holds `from_official` and `to_official`."""


def families() -> tuple[str, ...]:
    """Names that `from_official` knows."""
    return tuple(sorted(_ADAPTERS))


def _adapter(family: str) -> ModuleType:
    if family not in _ADAPTERS:
        raise unknown_name("checkpoint family", family, _ADAPTERS)
    return importlib.import_module(f"{__name__}.{_ADAPTERS[family]}")


def from_official(family: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Builds a tokenloom module from official weights.

    Args:
        family: One of `families()`.
        state_dict: Official weights, names unchanged.
        config: The official constructor's arguments.

    Returns:
        The module in evaluation mode, in the dtype of the weights.

    Raises:
        TokenloomError: For an unknown family, missing or unknown keys (all are listed), or shapes that do not fit.
    """
    module = _adapter(family).from_official(family, dict(state_dict), dict(config))
    module.official_family = family
    return module.eval()


def to_official(module: nn.Module) -> dict[str, Tensor]:
    """Official state dict of a module made by `from_official`; exact inverse up to buffers that can be derived.

    Raises:
        TokenloomError: If the module was not made from an official checkpoint.
    """
    family = getattr(module, "official_family", None)
    if family is None:
        raise TokenloomError(
            f"This {type(module).__name__} was not made by from_official, so its official names are unknown."
        )
    return _adapter(family).to_official(family, module)
