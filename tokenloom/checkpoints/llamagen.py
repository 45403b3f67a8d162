"""LlamaGen and D-AR: next token over a grid with 2-D rotary positions, or over a line with 1-D ones.

Official constructor arguments read: n_layer, n_head, n_kv_head, block_size, model_type, class_dropout_prob, norm_eps,
rope_base, resid_dropout_p; every other size follows from the weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints import _llama
from tokenloom.checkpoints._renames import Rename, check_keys, load, setting, square_side, unload
from tokenloom.generators import NextTokenGenerator, orders
from tokenloom.generators.conditions import FeatureCondition
from tokenloom.layouts import Layout


def _renames(depth: int, captions: bool) -> list[Rename]:
    return _llama.renames(depth, captions, {"norm": "output"})


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> NextTokenGenerator:
    """Builds the generator of "llamagen" or "dar" weights."""
    depth = setting(family, config, "n_layer")
    captions = config.get("model_type", "c2i") == "t2i"
    table = _renames(depth, captions)
    check_keys(family, state, table)
    options = _llama.generator_options(family, state, config, (depth,))
    if family == "dar":  # a line; the prefix stands before its first token
        layout = Layout.line(setting(family, config, "block_size"))
        options["prefix_rope"] = "line"
    else:
        layout = Layout.grid(*(square_side(family, config),) * 2)
    model = NextTokenGenerator(orders.raster(layout).to_config(), **options)
    return load(model, family, state, table)


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    captions = isinstance(module.get_submodule("condition"), FeatureCondition)
    return unload(module, _renames(len(module.get_submodule("transformer.blocks")), captions))  # type: ignore[arg-type]
