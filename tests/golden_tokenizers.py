"""Golden fixtures of the published tokenizers: loading and comparing them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"


@lru_cache
def _read(name: str) -> tuple[str, dict[str, Tensor]]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return file.metadata()["config"], {key: file.get_tensor(key) for key in file.keys()}


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, official weights, and all tensors, published inputs and outputs among them."""
    config, values = _read(name)
    state = {key[6:]: value for key, value in values.items() if key.startswith("state.")}
    return json.loads(config), state, dict(values)


def near(got: Tensor, wanted: Tensor, tolerance: float = 2e-4) -> None:
    """Asserts that values agree to a fraction of the largest one."""
    torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
