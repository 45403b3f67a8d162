"""MAR: masked prediction of continuous tokens on one grid, with a perceptron as diffusion head.

Official constructor arguments read: encoder_num_heads, decoder_num_heads, img_size, vae_stride, patch_size, and, where
given, num_sampling_steps, norm_eps and the settings of training; every other size follows from the weights. The codes
are latents (B, N, C), a token for each patch of the autoencoder's map, scaled by 0.2325 as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload
from tokenloom.errors import TokenloomError
from tokenloom.generators import MaskedLatentGenerator, orders
from tokenloom.layouts import Layout

_LINEAR = ("weight", "bias")
_SIDES = ("encoder", "decoder")


def pairs(ours: str, official: str, **options: Any) -> list[Rename]:
    """Weight and bias of one layer."""
    return [Rename.of(f"{ours}.{name}", f"{official}.{name}", **options) for name in _LINEAR]


def depth_of(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules stand under a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def side_renames(side: str, depth: int) -> list[Rename]:
    """Blocks and the last norm of the encoder or the decoder."""
    renames = pairs(f"network.{side}.norms.0", f"{side}_norm")
    for index in range(depth):
        ours, official = f"network.{side}.blocks.{index}", f"{side}_blocks.{index}"
        for own, name in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("attention.qkv", "attn.qkv"),
            ("attention.out", "attn.proj"),
            ("mlp.up", "mlp.fc1"),
            ("mlp.down", "mlp.fc2"),
        ):
            renames += pairs(f"{ours}.{own}", f"{official}.{name}")
    return renames


def row_head_renames(ours: str, official: str, depth: int) -> list[Rename]:
    """A perceptron head."""
    renames: list[Rename] = []
    for own, name in (
        ("time.up", "time_embed.mlp.0"),
        ("time.down", "time_embed.mlp.2"),
        ("condition", "cond_embed"),
        ("embed", "input_proj"),
        ("modulation", "final_layer.adaLN_modulation.1"),
        ("out", "final_layer.linear"),
    ):
        renames += pairs(f"{ours}.{own}", f"{official}.{name}")
    for index in range(depth):
        for own, name in (
            ("norm", "in_ln"),
            ("up", "mlp.0"),
            ("down", "mlp.2"),
            ("modulation", "adaLN_modulation.1"),
        ):
            renames += pairs(f"{ours}.blocks.{index}.{own}", f"{official}.res_blocks.{index}.{name}")
    return renames


def blocks_of(module: nn.Module, name: str) -> int:
    """How many blocks stand in a list of a module."""
    return len(module.get_submodule(f"{name}.blocks"))  # type: ignore[arg-type]


def trunk_renames(module: nn.Module, stages: int) -> list[Rename]:
    """What MAR and Hi-MAR have in common: everything but projections of tokens and heads."""
    classes = len(module.get_parameter("condition.table.weight")) - 1
    renames = [
        Rename.of("condition.table.weight", "class_emb.weight", "fake_latent", sizes=(classes, 1)),
        Rename.of("network.encoder_places", "encoder_pos_embed_learned", leading=1, folded=stages),
        Rename.of("network.decoder_places", "decoder_pos_embed_learned", leading=1, folded=stages),
        Rename.of("network.mask", "mask_token", leading=1, folded=stages),
        Rename.of("network.places", "diffusion_pos_embed_learned", leading=1),
        *pairs("network.norm", "z_proj_ln"),
        *pairs("network.bridge", "decoder_embed"),
    ]
    for side in _SIDES:
        renames += side_renames(side, blocks_of(module, f"network.{side}"))
    return renames


def side_options(
    family: str, state: Mapping[str, Tensor], config: Mapping[str, Any], side: str
) -> dict[str, Any]:
    """Fields of `TransformerConfig` of the encoder or the decoder."""
    hidden, width = tensor(family, state, f"{side}_blocks.0.mlp.fc1.weight").shape
    return {
        "width": width,
        "heads": setting(family, config, f"{side}_num_heads"),
        "depth": depth_of(state, f"{side}_blocks."),
        "mlp": "gelu",
        "mlp_width": hidden,
        "norm": "layer",
        "norm_eps": config.get("norm_eps", 1e-6),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "rope": False,
        "dropout": config.get("proj_dropout", 0.1),
    }


def row_head_options(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `HeadConfig` of a perceptron head."""
    steps = str(config.get("num_sampling_steps", "100"))
    if not steps.isdigit():
        raise TokenloomError(
            f"num_sampling_steps of a {family!r} checkpoint is a number of evenly spaced steps, got {steps!r}."
        )
    return {
        "kind": "rows",
        "width": len(tensor(family, state, "diffloss.net.cond_embed.weight")),
        "depth": depth_of(state, "diffloss.net.res_blocks."),
        "steps": int(steps),
    }


def grid_side(family: str, config: Mapping[str, Any]) -> int:
    """Tokens on a side of the large grid."""
    return setting(family, config, "img_size") // config.get("vae_stride", 16) // config.get("patch_size", 1)


def training_rule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LatentMaskRule` that both families share."""
    return {
        "mask_min": config.get("mask_ratio_min", 0.7),
        "label_drop": config.get("label_drop_prob", 0.1),
        "repeats": config.get("diffusion_batch_mul", 4),
    }


def condition_options(family: str, state: Mapping[str, Tensor], stages: int, size: int) -> dict[str, Any]:
    """Condition and its repeats: the rows of the position table that are no tokens."""
    rows = tensor(family, state, "encoder_pos_embed_learned").shape[1] // stages - size
    if rows < 1:
        raise TokenloomError(
            f"Positions of this {family!r} checkpoint do not leave a row for the condition beside {size} tokens; "
            "check img_size, vae_stride and patch_size."
        )
    classes = len(tensor(family, state, "class_emb.weight"))
    return {"condition_config": {"kind": "class", "num_classes": classes}, "prefix_repeats": rows}


def _renames(module: nn.Module) -> list[Rename]:
    return [
        *trunk_renames(module, 1),
        *pairs("network.embeds.0", "z_proj"),
        *row_head_renames("heads.0.network", "diffloss.net", blocks_of(module, "heads.0.network")),
    ]


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> MaskedLatentGenerator:
    """Builds the generator of "mar" weights."""
    side = grid_side(family, config)
    layout = Layout.grid(side, side)
    model = MaskedLatentGenerator(
        orders.blocks(layout, (side, side)).to_config(),
        tensor(family, state, "z_proj.weight").shape[1],
        side_options(family, state, config, "encoder"),
        side_options(family, state, config, "decoder"),
        [row_head_options(family, state, config)],
        rule_config={
            "visits": [min(256, layout.size)],
            "mask_schedules": ["truncnorm"],
            **training_rule(config),
        },
        **condition_options(family, state, 1, layout.size),
    )
    return load(model, family, state, _renames(model), ())


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    return unload(module, _renames(module))
