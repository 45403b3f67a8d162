"""xAR: next cell over continuous tokens, an encoder and a decoder of equal width.

Official constructor arguments read: img_size, vae_stride, patch_size, clusters, encoder_num_heads, decoder_num_heads,
label_drop_prob and proj_dropout; every other size follows from the weights. Learned positions are stored in the sequence
of the cells, as ours. Latents are the autoencoder's times 0.2325, channels last: `latents.flatten(2).transpose(1, 2)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, tensor, unload
from tokenloom.errors import TokenloomError
from tokenloom.generators import NextCellGenerator, orders
from tokenloom.layouts import Layout

_DERIVABLE = (r"mask", r"(en|de)coder_blocks\.\d+\.attn\.rope\.(freqs|freqs_cos|freqs_sin)")
_STAGES = ("encoder", "decoder")
_PROJECTIONS = {"encoder": "z_proj", "decoder": "decoder_embed"}


def _pairs(ours: str, official: str) -> list[Rename]:
    return [Rename.of(f"{ours}.{name}", f"{official}.{name}") for name in ("weight", "bias")]


def _block(ours: str, official: str) -> list[Rename]:
    gates = [
        Rename.of(f"{ours}.mlp.up.{name}", f"{official}.mlp.fc1_g.{name}", f"{official}.mlp.fc1_x.{name}")
        for name in ("weight", "bias")
    ]
    return [
        *_pairs(f"{ours}.attention.qkv", f"{official}.attn.qkv"),
        *_pairs(f"{ours}.attention.out", f"{official}.attn.proj"),
        *gates,
        *_pairs(f"{ours}.mlp.down", f"{official}.mlp.fc2"),
        *_pairs(f"{ours}.modulation", f"{official}.ada_lin.1"),
    ]


def _renames(depths: dict[str, int]) -> list[Rename]:
    """The whole table; `depths` are the blocks of each stage."""
    renames = [
        Rename.of("condition.table.weight", "class_emb.weight"),
        *_pairs("time.up", "time_embed.mlp.0"),
        *_pairs("time.down", "time_embed.mlp.2"),
        Rename.of("transformer.parts.0.norm.weight", "z_proj_ln.weight"),
        *_pairs("head", "pred"),
    ]
    for index, stage in enumerate(_STAGES):
        part = f"transformer.parts.{index}"
        renames += [
            *_pairs(f"{part}.project", _PROJECTIONS[stage]),
            Rename.of(f"{part}.places.weight", f"{stage}_pos_embed_learned", leading=1),
            Rename.of(f"{part}.transformer.norms.0.weight", f"{stage}_norm.weight"),
        ]
        for block in range(depths[stage]):
            renames += _block(f"{part}.transformer.blocks.{block}", f"{stage}_blocks.{block}")
    return renames


def _transformer(state: dict[str, Tensor], config: dict[str, Any], stage: str, depth: int) -> dict[str, Any]:
    hidden, width = tensor("xar", state, f"{stage}_blocks.0.mlp.fc1_g.weight").shape
    return {
        "width": width,
        "heads": config.get(f"{stage}_num_heads", 16),
        "depth": depth,
        "mlp": "geglu",
        "mlp_width": hidden,
        "norm_affine": False,
        "norm_eps": 1e-6,
        "final_norm_affine": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "modulation": "own",
        "dropout": config.get("proj_dropout", 0.0),
    }


def _order(config: dict[str, Any]) -> orders.Order:
    """Square cells of a square grid."""
    side = config.get("img_size", 256) // config.get("vae_stride", 16) // config.get("patch_size", 1)
    clusters = config.get("clusters", 4)
    across = math.isqrt(clusters)
    if across * across != clusters or side % across:
        raise TokenloomError(
            f"clusters of an 'xar' checkpoint must be a square number whose root divides the side {side}, got {clusters}."
        )
    return orders.blocks(Layout.grid(side, side), (side // across, side // across))


def _depths(state: dict[str, Tensor]) -> dict[str, int]:
    return {
        stage: len({key.split(".")[1] for key in state if key.startswith(f"{stage}_blocks.")})
        for stage in _STAGES
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> NextCellGenerator:
    """Builds the generator of "xar" weights."""
    depths = _depths(state)
    encoder, decoder = (_transformer(state, config, stage, depths[stage]) for stage in _STAGES)
    frequencies = tensor(family, state, "time_embed.mlp.0.weight").shape[1]
    model = NextCellGenerator(
        _order(config).to_config(),
        tensor(family, state, "z_proj.weight").shape[1],
        encoder,
        {"kind": "class", "num_classes": tensor(family, state, "class_emb.weight").shape[0] - 1},
        decoder_config=decoder,
        rule_config={"label_drop": config.get("label_drop_prob", 0.1), "frequencies": frequencies},
    )
    return load(model, family, state, _renames(depths), _DERIVABLE)


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the buffers that official code stores."""
    model: Any = module
    stages = dict(zip(_STAGES, model.transformer.parts, strict=True))
    official = unload(module, _renames({name: len(part.transformer.blocks) for name, part in stages.items()}))
    hidden = torch.zeros(model.plan.mask.shape).masked_fill(~model.plan.mask, -torch.inf)
    official["mask"] = hidden[None, None]
    places = model.order.layout.coords[model.order.permutation]
    for name, part in stages.items():
        for index in range(len(part.transformer.blocks)):
            for key, value in _rotary(places, part.transformer.config.head_size).items():
                official[f"{name}_blocks.{index}.attn.rope.{key}"] = value
    return official


def _rotary(places: Tensor, head: int) -> dict[str, Tensor]:
    """The official rotary tables of places (N, 2): rows in the first half of a head, columns in the second."""
    freqs = 1.0 / (10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2)))
    angles = (places[:, :, None] * freqs).flatten(1).repeat_interleave(2, dim=1)
    return {"freqs": freqs, "freqs_cos": angles.cos(), "freqs_sin": angles.sin()}
