"""VAR and MVAR: next scale over the residual pyramid of their tokenizer.

Official constructor arguments read: patch_nums, num_heads (where the weights do not tell), norm_eps, quant_resi, and for
MVAR kernel_size and refine_step; every other size follows from the weights. The published generator files hold no
codebook: the tokenizer's `quantize.*` belong beside them as `vae.quantize.*`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload
from tokenloom.errors import TokenloomError
from tokenloom.generators import NextScaleGenerator, orders
from tokenloom.layouts import Layout

_VAE = "vae.quantize."
_PHI = re.compile(re.escape(_VAE) + r"(quant_resi\.(?:qresi_ls\.\d+|qresi|\d+))\.weight")
_COUNTS = _VAE + "ema_vocab_hit_SV"
_DERIVABLE = ("attn_bias_for_masking", "lvl_1L", re.escape(_COUNTS))
_LINEAR = ("weight", "bias")


def _pairs(ours: str, official: str) -> list[Rename]:
    return [Rename.of(f"{ours}.{name}", f"{official}.{name}") for name in _LINEAR]


def _block(index: int, shared: bool, unit_keys: bool) -> list[Rename]:
    ours, official = f"transformer.blocks.{index}", f"blocks.{index}"
    biases = [f"{official}.attn.{name}" for name in ("q_bias", "zero_k_bias", "v_bias")]
    renames = [
        Rename.of(f"{ours}.attention.qkv.weight", f"{official}.attn.mat_qkv.weight"),
        Rename.of(f"{ours}.attention.qkv.bias", *biases),
        *_pairs(f"{ours}.attention.out", f"{official}.attn.proj"),
        *_pairs(f"{ours}.mlp.up", f"{official}.ffn.fc1"),
        *_pairs(f"{ours}.mlp.down", f"{official}.ffn.fc2"),
    ]
    if unit_keys:
        renames.append(Rename.of(f"{ours}.attention.log_scale", f"{official}.attn.scale_mul_1H11", leading=1))
    if shared:
        renames.append(Rename.of(f"{ours}.modulation_offset", f"{official}.ada_gss", leading=2))
    else:
        renames += _pairs(f"{ours}.modulation", f"{official}.ada_lin.1")
    return renames


def _renames(depth: int, shared: bool, unit_keys: bool, phis: list[str]) -> list[Rename]:
    """The whole table; `phis` are the official names of the pyramid's convolutions."""
    renames = [
        Rename.of("condition.table.weight", "class_emb.weight"),
        Rename.of("tokens.start", "pos_start", leading=1),
        Rename.of("tokens.places", "pos_1LC", leading=1),
        Rename.of("tokens.levels.weight", "lvl_embed.weight"),
        *_pairs("tokens.project", "word_embed"),
        Rename.of("tokens.pyramid.codes.weight", f"{_VAE}embedding.weight"),
        *_pairs("transformer.final_modulation", "head_nm.ada_lin.1"),
        *_pairs("heads.0", "head"),
    ]
    for index, name in enumerate(phis):
        renames += _pairs(f"tokens.pyramid.phis.{index}", _VAE + name)
    if shared:
        renames += _pairs("transformer.modulation", "shared_ada_lin.1")
    for index in range(depth):
        renames += _block(index, shared, unit_keys)
    return renames


def _phis(state: dict[str, Tensor]) -> list[str]:
    """Official names of the convolutions, in the order of their numbers."""
    found = [match.group(1) for match in map(_PHI.fullmatch, state) if match]
    return sorted(found, key=lambda name: int(re.findall(r"\d+$", name)[0]) if name[-1].isdigit() else 0)


def _transformer(
    family: str, state: dict[str, Tensor], config: dict[str, Any], depth: int, shared: bool
) -> dict[str, Any]:
    width = tensor(family, state, "class_emb.weight").shape[1]
    scales = state.get("blocks.0.attn.scale_mul_1H11")
    heads = setting(family, config, "num_heads") if scales is None else scales.shape[1]
    return {
        "width": width,
        "heads": heads,
        "depth": depth,
        "mlp": "gelu_tanh",
        "mlp_width": tensor(family, state, "blocks.0.ffn.fc1.weight").shape[0],
        "norm": "layer",
        "norm_affine": False,
        "norm_eps": config.get("norm_eps", 1e-6),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "qk_norm": None if scales is None else "l2",
        "attention_scale": 0.25 / (width // heads) ** 0.5 if scales is None else None,
        "modulation": "shared" if shared else "own",
        "final_modulation": True,
        "rope": False,
    }


def _rule(family: str, state: dict[str, Tensor], config: dict[str, Any], phis: list[str]) -> dict[str, Any]:
    own = family == "mvar"
    return {
        "channels": state[f"{_VAE}embedding.weight"].shape[1],
        "phis": len(phis),
        "ratio": abs(config.get("quant_resi", 0.5)),
        "kernel": state[f"{_VAE}{phis[0]}.weight"].shape[-1] if phis else 3,
        "own_scale": own,
        "window": config.get("kernel_size", 7) if own else 0,
        "window_from": config.get("refine_step", 8) if own else 0,
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> NextScaleGenerator:
    """Builds the generator of "var" or "mvar" weights."""
    if f"{_VAE}embedding.weight" not in state:
        raise TokenloomError(
            f"A {family!r} generator feeds back what its tokenizer reconstructs, but these weights hold no codebook "
            f"({_VAE}embedding.weight). Add every key 'quantize.*' of the tokenizer (vae_ch160v4096z32.pth) as '{_VAE}*'."
        )
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    shared, phis = "shared_ada_lin.1.weight" in state, _phis(state)
    transformer = _transformer(family, state, config, depth, shared)
    for index in range(depth):  # a buffer of zeros
        state.setdefault(
            f"blocks.{index}.attn.zero_k_bias",
            torch.zeros_like(tensor(family, state, f"blocks.{index}.attn.q_bias")),
        )
    table = state["class_emb.weight"]
    model = NextScaleGenerator(
        orders.scales(Layout.scales(setting(family, config, "patch_nums"))).to_config(),
        state[f"{_VAE}embedding.weight"].shape[0],
        transformer,
        {"kind": "class", "num_classes": table.shape[0] - 1},
        head_bias=True,
        rule_config=_rule(family, state, config, phis),
    )
    load(model, family, state, _renames(depth, shared, transformer["qk_norm"] == "l2", phis), _DERIVABLE)
    kept: Any = model  # names and training statistics that no tensor of ours holds
    kept.official_phis = phis
    kept.official_counts = state.get(_COUNTS)
    return model


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the buffers that official code stores."""
    model: Any = module
    settings = model.transformer.config
    renames = _renames(
        settings.depth, settings.modulation == "shared", settings.qk_norm == "l2", model.official_phis
    )
    official = unload(module, renames)
    scale = model.order.step
    seen = scale[:, None] == scale if family == "mvar" else scale[:, None] >= scale
    hidden = torch.zeros(seen.shape, dtype=official["head.weight"].dtype).masked_fill(~seen, -torch.inf)
    official["lvl_1L"] = scale[None].clone()
    official["attn_bias_for_masking"] = hidden[None, None]
    if model.official_counts is not None:
        official[_COUNTS] = model.official_counts
    return official
