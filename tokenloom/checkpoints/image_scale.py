"""Multi-scale image tokenizers: VAR's VQVAE ("var_vq") and Infinity's bitwise one ("infinity_bsq").

Official arguments read: of "var_vq" v_patch_nums, beta, using_znorm and quant_resi; of "infinity_bsq" scale_schedule or
image_size; of both norm_groups. Everything else follows from the names and shapes of the weights. Infinity's files name
convolutions and norms with or without a wrapper ("conv_in.conv.weight", "conv_in.weight"): both are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, tensor, unload
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.image_scale import ImageScaleTokenizer

_PUBLISHED_GROUPS = 32
_VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_INFINITY_SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
_COUNTS = "quantize.ema_vocab_hit_SV"
_MASKS = ("quantize.lfq.mask", "quantizer.lfq.mask")
_PHI = re.compile(r"quantize\.(quant_resi\.(?:qresi_ls\.\d+|qresi|\d+))\.weight")
_NETWORKS = (
    (r"encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
    (r"decoder\.levels\.(\d+)\.blocks\.", r"decoder.up.\1.block."),
    (r"encoder\.levels\.(\d+)\.attentions\.", r"encoder.down.\1.attn."),
    (r"decoder\.levels\.(\d+)\.attentions\.", r"decoder.up.\1.attn."),
    (r"encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample.conv."),
    (r"decoder\.levels\.(\d+)\.resample\.", r"decoder.up.\1.upsample.conv."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"\.out\.", r".proj_out."),
    (r"^to_code\.", r"quant_conv."),
    (r"^from_code\.", r"post_quant_conv."),
    (r"^quantizer\.inner\.codebook$", r"quantize.embedding.weight"),
)


def _official_name(name: str, levels: int, middle: tuple[str, ...]) -> str:
    for pattern, text in _NETWORKS:
        name = re.sub(pattern, text, name)
    name = re.sub(r"\.middle\.(\d)\.", lambda found: f".mid.{middle[int(found[1])]}.", name)
    # the official decoder's levels are numbered from full resolution, ours from the lowest
    return re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)


def _wrapped(name: str) -> str:
    """Infinity's name of a tensor of a convolution or norm, which lies in a wrapper."""
    kind = "norm" if re.search(r"norm\w*\.(weight|bias)$", name) else "conv"
    return re.sub(r"\.(weight|bias)$", rf".{kind}.\1", name)


def _renames(family: str, module: Any) -> list[Rename]:
    """The table; q, k and v of ours are one official tensor, which `_split` cuts first."""
    levels = len(module.encoder.levels)
    middle = ("block_1", "attn_1", "block_2") if family == "var_vq" else ("block_1", "block_2")
    renames = []
    for name in module.state_dict():
        phi = re.fullmatch(r"quantizer\.pyramid\.phis\.(\d+)\.(weight|bias)", name)
        official = _official_name(name, levels, middle)
        if phi:
            official = f"quantize.{module.official_phis[int(phi[1])]}.{phi[2]}"
        elif family == "infinity_bsq" and official not in module.official_bare:
            official = _wrapped(official)
        renames.append(Rename.of(name, official))
    return renames


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with each fused "qkv" cut into "q", "k" and "v"."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.)qkv(\.(?:weight|bias))", name)
        if not found:
            result[name] = value
            continue
        if value.shape[0] % 3:
            raise TokenloomError(f"{name} must hold three parts of one size, got {tuple(value.shape)}.")
        for part, inner in zip("qkv", value.chunk(3), strict=True):
            result[f"{found[1]}{part}{found[2]}"] = inner
    return result


def _join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split`."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn(?:\.\d+|_1)\.)([qkv])(\.(?:weight|bias))", name)
        if not found:
            result[name] = value
        elif found[2] == "q":
            parts = [state[f"{found[1]}{part}{found[3]}"] for part in "qkv"]
            result[f"{found[1]}qkv{found[3]}"] = torch.cat(parts)
    return result


def _shape(family: str, state: Mapping[str, Tensor], wrapper: str) -> dict[str, Any]:
    """Arguments of `ImageScaleTokenizer` that follow from the weights."""

    def width(name: str) -> int:
        key = f"encoder.{name}.{wrapper}weight"
        return tensor(family, state, key if key in state else f"encoder.{name}.weight").shape[0]

    levels = {int(found[1]) for name in state if (found := re.match(r"encoder\.down\.(\d+)\.", name))}
    blocks = {
        int(found[1]) for name in state if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))
    }
    channels = width("conv_in")
    return {
        "channels": channels,
        "multipliers": [width(f"down.{level}.block.0.conv1") // channels for level in sorted(levels)],
        "blocks": len(blocks),
        "latent_channels": width("conv_out"),
    }


def _phis(state: Mapping[str, Tensor]) -> list[str]:
    """Official names of the pyramid's convolutions, in the order of their numbers."""
    found = [match[1] for match in map(_PHI.fullmatch, state) if match]
    return sorted(found, key=lambda name: int(re.findall(r"\d+$", name)[0]) if name[-1].isdigit() else 0)


def _var(state: dict[str, Tensor], config: Mapping[str, Any]) -> ImageScaleTokenizer:
    codes, dim = tensor("var_vq", state, "quantize.embedding.weight").shape
    phis = _phis(state)
    cosine = bool(config.get("using_znorm", False))
    module = ImageScaleTokenizer(
        config.get("v_patch_nums") or _VAR_SCALES,
        **_shape("var_vq", state, ""),
        norm_groups=config.get("norm_groups", _PUBLISHED_GROUPS),
        project=tensor("var_vq", state, "quant_conv.weight").shape[-1],
        quantizer_options={"codebook_size": codes, "dim": dim, "normalize": "lookup" if cosine else False},
        pyramid_options={
            "phis": len(phis),
            "ratio": abs(config.get("quant_resi", 0.5)),
            "kernel": state[f"quantize.{phis[0]}.weight"].shape[-1] if phis else 3,
            "commitment": float(config.get("beta", 0.25)),
        },
    )
    kept: Any = module  # names and training statistics that no tensor of ours holds
    kept.official_phis, kept.official_counts = phis, state.get(_COUNTS)
    return module


def _infinity_scales(config: Mapping[str, Any], stride: int) -> list[tuple[int, int]]:
    """(height, width) of the scales: the configured ones, or the published ones that fit the picture."""
    if schedule := config.get("scale_schedule"):
        if any(entry[0] != 1 for entry in schedule if len(entry) == 3):
            raise TokenloomError(
                f"scale_schedule must be that of a picture, one frame a scale, got {schedule}."
            )
        return [(entry[-2], entry[-1]) for entry in schedule]
    side = config.get("image_size", 256) // stride
    if side not in _INFINITY_SCALES:
        raise TokenloomError(
            f"There is no published schedule that ends with {side}x{side} places; pass scale_schedule in the config, "
            "for instance [[1, 1, 1], [1, 2, 2], [1, 4, 4]]."
        )
    return [(scale, scale) for scale in _INFINITY_SCALES if scale <= side]


def _infinity(state: dict[str, Tensor], config: Mapping[str, Any]) -> ImageScaleTokenizer:
    shape = _shape("infinity_bsq", state, "conv.")
    stride = 1 << (len(shape["multipliers"]) - 1)
    if config.get("patch_size", stride) != stride:
        raise TokenloomError(
            f"patch_size must be {stride} for {len(shape['multipliers'])} levels, got {config['patch_size']}."
        )
    module = ImageScaleTokenizer(
        _infinity_scales(config, stride),
        **shape,
        norm_groups=config.get("norm_groups", _PUBLISHED_GROUPS),
        form="flux",
        project=0,
        quantizer_type="bsq",
        quantizer_options={"dim": shape["latent_channels"]},
        pyramid_options={"phis": 0, "up": "bilinear"},
    )
    kept: Any = module  # what of the official names no tensor of ours tells
    kept.official_phis = []
    kept.official_bare = sorted(name for name in state if re.search(r"\.(weight|bias)$", name))
    kept.official_masks = [name for name in _MASKS if name in state]
    return module


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> ImageScaleTokenizer:
    """Builds the tokenizer of "var_vq" or "infinity_bsq" weights; those under "vae", as in published files, are taken from there."""
    if isinstance(inside := state.get("vae"), Mapping):
        state = dict(inside)
    if family == "var_vq":
        state = _split(state)
        module = _var(state, config)
        return load(module, family, state, _renames(family, module), (re.escape(_COUNTS),))
    module = _infinity(state, config)
    return load(module, family, state, _renames(family, module), tuple(map(re.escape, _MASKS)))


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the buffers that the weights came with."""
    kept: Any = module
    state = unload(module, _renames(family, module))
    if family == "var_vq":
        state = _join(state)
        return state if kept.official_counts is None else state | {_COUNTS: kept.official_counts.clone()}
    return state | {name: kept.quantizer.inner.powers.clone() for name in kept.official_masks}
