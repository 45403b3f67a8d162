"""NAR: next neighbor over images (two directional heads) and videos (three, learned positions, no rotary ones).

Official constructor arguments read: those of LlamaGen, medusa_attention_num (layers between the two heads of an image
model), latent_shape of a video model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints import _llama
from tokenloom.checkpoints._renames import Rename, check_keys, load, setting, square_side, unload
from tokenloom.generators import NextNeighborGenerator, orders
from tokenloom.generators.conditions import FeatureCondition
from tokenloom.layouts import Layout

_HEADS = {
    "nar": {"norm": "output", "medusa_norm": "medusa_output"},
    "nar_video": {"norm_R": "output_R", "norm_D": "output_D", "norm_B": "output_B"},
}
"""Right, below and, for videos, the next frame."""


def _renames(family: str, depth: int, captions: bool) -> list[Rename]:
    table = _llama.renames(depth, captions, _HEADS[family])
    if family == "nar_video":
        table.append(Rename.of("transformer.positions.weight", "abs_pe", leading=1))
    return table


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> NextNeighborGenerator:
    """Builds the generator of "nar" or "nar_video" weights."""
    first = setting(family, config, "n_layer")
    captions = config.get("model_type", "c2i") == "t2i"
    if family == "nar_video":
        layout = Layout.clip(*setting(family, config, "latent_shape"))
        taps: tuple[int, ...] = (first, first + 1, first + 2)
    else:
        layout = Layout.grid(*(square_side(family, config),) * 2)
        taps = (first, first + config.get("medusa_attention_num", 1))
    table = _renames(family, taps[-1], captions)
    check_keys(family, state, table)
    options = _llama.generator_options(family, state, config, taps)
    if family == "nar_video":
        places = state["abs_pe"].shape[1]
        options["transformer_config"] |= {"rope": False, "learned_positions": places}
    model = NextNeighborGenerator(orders.neighbors(layout).to_config(), **options)
    return load(model, family, state, table)


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    captions = isinstance(module.get_submodule("condition"), FeatureCondition)
    depth = len(module.get_submodule("transformer.blocks"))  # type: ignore[arg-type]
    return unload(module, _renames(family, depth, captions))
