"""Hi-MAR: masked prediction of a small grid of continuous tokens, then of the large grid, whose head sees the whole map.

Official constructor arguments read: those of MAR, `head` (attention heads of the large head), cond_scale, and, where
given, the settings of training. The codes are latents (B, n + N, C), the small grid before the large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.checkpoints import mar
from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload
from tokenloom.generators import MaskedLatentGenerator, orders
from tokenloom.layouts import Layout

_MAP = "cond_diffloss.net"
_UNUSED = f"{_MAP}.c_pos_embed"
_GLOBAL_STEPS = 250  # fixed in the released code


def _side(side: str, depth: int) -> list[Rename]:
    ours = f"network.{side}_stages"
    renames = [Rename.of(f"{ours}.table.weight", f"{side}_task_emb.weight")]
    renames += mar.pairs(f"{ours}.project", f"{side}_blocks_ada.1")
    for index in range(depth):
        for own, name in (("slopes", "adaLN_scale"), ("offsets", "adaLN_shift")):
            renames.append(Rename.of(f"{ours}.{own}.{index}", f"{side}_blocks.{index}.{name}"))
    return renames


def _map_head(ours: str, depth: int) -> list[Rename]:
    """The transformer head; its modulations name shift, scale and gate in another sequence than ours."""
    renames = [Rename.of(f"{ours}.places", f"{_MAP}.pos_embed", leading=1)]
    for own, name in (("condition", "c_embedder.proj"), ("embed", "x_embedder.proj")):
        renames.append(Rename.of(f"{ours}.{own}.weight", f"{_MAP}.{name}.weight", trailing=2))
        renames.append(Rename.of(f"{ours}.{own}.bias", f"{_MAP}.{name}.bias"))
    for own, name in (
        ("time.up", "t_embedder.mlp.0"),
        ("time.down", "t_embedder.mlp.2"),
        ("out", "final_layer.linear"),
    ):
        renames += mar.pairs(f"{ours}.{own}", f"{_MAP}.{name}")
    final = f"{_MAP}.final_layer.adaLN_modulation.1"
    renames += mar.pairs(f"{ours}.transformer.final_modulation", final, blocks=(1, 0))
    for index in range(depth):
        own, official = f"{ours}.transformer.blocks.{index}", f"{_MAP}.blocks.{index}"
        for part, name in (
            ("attention.qkv", "attn.qkv"),
            ("attention.out", "attn.proj"),
            ("mlp.up", "mlp.fc1"),
            ("mlp.down", "mlp.fc2"),
        ):
            renames += mar.pairs(f"{own}.{part}", f"{official}.{name}")
        renames += mar.pairs(f"{own}.modulation", f"{official}.adaLN_modulation.1", blocks=(2, 5, 1, 4, 0, 3))
    return renames


def _renames(module: nn.Module) -> list[Rename]:
    renames = [
        *mar.trunk_renames(module, 2),
        *mar.pairs("network.embeds.0", "cond_proj"),
        *mar.pairs("network.embeds.1", "z_proj"),
        *mar.pairs("network.contexts.0", "cond_z_proj"),
        Rename.of("network.absent", "cond_tokens", leading=1),
        *mar.row_head_renames("heads.0.network", "diffloss.net", mar.blocks_of(module, "heads.0.network")),
        *_map_head("heads.1.network", mar.blocks_of(module, "heads.1.network.transformer")),
    ]
    for side in ("encoder", "decoder"):
        renames += _side(side, mar.blocks_of(module, f"network.{side}"))
    return renames


def _map_options(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, width = tensor(family, state, f"{_MAP}.blocks.0.mlp.fc1.weight").shape
    return {
        "kind": "map",
        "width": width,
        "depth": mar.depth_of(state, f"{_MAP}.blocks."),
        "heads": config.get("head", 8),
        "mlp_width": hidden,
        "steps": _GLOBAL_STEPS,
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> MaskedLatentGenerator:
    """Builds the generator of "himar" weights."""
    small, side = setting(family, config, "cond_scale"), mar.grid_side(family, config)
    layout = Layout.scales([small, side])
    cosine = "cosine" if config.get("cos", True) else "truncnorm"
    model = MaskedLatentGenerator(
        orders.scales(layout).to_config(),
        tensor(family, state, "z_proj.weight").shape[1],
        mar.side_options(family, state, config, "encoder"),
        mar.side_options(family, state, config, "decoder"),
        [mar.row_head_options(family, state, config), _map_options(family, state, config)],
        rule_config={
            "visits": [4 * small, 4],
            "mask_schedules": ["truncnorm", cosine],
            "context_drop": 1 - config.get("step_stage2_rate", 0.5),
            "loss_weights": [2.0, 0.75],
            **mar.training_rule(config),
        },
        **mar.condition_options(family, state, 2, layout.size),
    )
    kept: Any = load(model, family, state, _renames(model), (_UNUSED.replace(".", r"\."),))
    kept.official_unused = state.get(_UNUSED)  # a table that no tensor of ours holds
    return model


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the position table that no official code reads."""
    model: Any = module
    official = unload(module, _renames(module))
    unused = model.official_unused
    official[_UNUSED] = torch.zeros_like(official[f"{_MAP}.pos_embed"]) if unused is None else unused
    return official
