"""PAR: regions of a grid side by side, with n-1 learned rows that start the first parallel group.

Official constructor arguments read: those of LlamaGen and ar_token_num (the regions n). Codes are in layout order here;
the official arrays hold them in decode order (`codes[:, order.permutation]`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints import _llama
from tokenloom.checkpoints._renames import Rename, check_keys, load, setting, square_side, unload
from tokenloom.generators import NextBlockGenerator, orders
from tokenloom.generators.conditions import FeatureCondition
from tokenloom.layouts import Layout


def _renames(depth: int, captions: bool) -> list[Rename]:
    learned = Rename.of("query", "spe_tok_embeddings.special_embeddings.weight")
    return [*_llama.renames(depth, captions, {"norm": "output"}), learned]


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> NextBlockGenerator:
    """Builds the generator."""
    depth = setting(family, config, "n_layer")
    captions = config.get("model_type", "c2i") == "t2i"
    table = _renames(depth, captions)
    check_keys(family, state, table)
    layout = Layout.grid(*(square_side(family, config),) * 2)
    order = orders.regions(layout, setting(family, config, "ar_token_num"))
    options = _llama.generator_options(family, state, config, (depth,))
    model = NextBlockGenerator(order.to_config(), **options, rule_config={"plan": "groups"})
    return load(model, family, state, table)


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    captions = isinstance(module.get_submodule("condition"), FeatureCondition)
    return unload(module, _renames(len(module.get_submodule("transformer.blocks")), captions))  # type: ignore[arg-type]
