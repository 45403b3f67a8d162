"""FlexTok: registers, FSQ and a rectified-flow decoder, with or without the autoencoder whose latents they code.

`config` is the `config.json` that stands beside published weights (nested, with `_target_` entries), or its settings by name:
head_dim, patch, fsq_levels, enc_mask_mode, dec_mask_mode, max_timestep, nested_dropout, scaling_factor, norm_num_groups and
latent_hw or image_size. Every other size follows from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload
from tokenloom.errors import unknown_name
from tokenloom.tokenizers.image_flex import ImageFlexTokenizer

_ENCODER, _DECODER, _VAE = "encoder.module_dict.enc_", "decoder.module_dict.dec_", "vae.vae."
_LINEAR = ("weight", "bias")
_MASKS = {"causal_last": "registers", "causal": "causal", "full": "full"}
_GATES_SCALES_SHIFTS = (
    0,
    1,
    3,
    5,
    2,
    4,
)  # official: gates, shift and scale of attention, shift and scale of the MLP
_NESTED = {  # setting -> where a published config.json holds it
    "head_dim": ("encoder", "module_dict", "enc_transformer", "head_dim"),
    "patch": ("encoder", "module_dict", "enc_patch_emb", "patch_sizes"),
    "fsq_levels": ("regularizer", "levels"),
    "enc_mask_mode": ("encoder", "module_dict", "enc_seq_packer", "mask_mode"),
    "dec_mask_mode": ("decoder", "module_dict", "dec_seq_packer", "mask_mode"),
    "max_timestep": ("decoder", "module_dict", "dec_time_embedder", "max_timestep"),
    "nested_dropout": ("decoder", "module_dict", "dec_nested_dropout", "size_sampling_mode"),
    "scaling_factor": ("vae", "scaling_factor"),
}


def _pairs(ours: str, official: str, **options: Any) -> list[Rename]:
    return [Rename.of(f"{ours}.{name}", f"{official}.{name}", **options) for name in _LINEAR]


def _blocks(side: str, official: str, depth: int) -> list[Rename]:
    renames = []
    for index in range(depth):
        ours, theirs = f"{side}.blocks.{index}", f"{official}transformer.blocks.{index}"
        heads = [f"{theirs}.attn.w{letter}.weight" for letter in "qkv"]
        renames += [
            Rename.of(f"{ours}.attention.qkv.weight", *heads),
            Rename.of(f"{ours}.attention.out.weight", f"{theirs}.attn.proj.weight"),
            Rename.of(f"{ours}.mlp.up.weight", f"{theirs}.mlp.fc1.weight", f"{theirs}.mlp.fc3.weight"),
            Rename.of(f"{ours}.mlp.down.weight", f"{theirs}.mlp.fc2.weight"),
        ]
    return renames


def _modulation_parts(sets: int) -> tuple[int, ...]:
    return tuple(6 * index + part for index in range(sets) for part in _GATES_SCALES_SHIFTS)


def _renames(module: ImageFlexTokenizer) -> list[Rename]:
    encoder, decoder = module.encoder.config, module.decoder.shape
    parts = _modulation_parts(decoder.modulations)
    renames = [
        *_pairs("encoder.patches", f"{_ENCODER}patch_emb.patch_proj"),
        Rename.of("encoder.table", f"{_ENCODER}posemb_module.posembs", leading=1),
        Rename.of("encoder.registers", f"{_ENCODER}register_module.registers"),
        *_pairs("encoder.head", f"{_ENCODER}to_latents.proj"),
        *_blocks("encoder", _ENCODER, encoder.depth),
        *_pairs("decoder.from_code", f"{_DECODER}from_latents.proj"),
        Rename.of("decoder.missing", f"{_DECODER}nested_dropout.dropout_mask_token"),
        *_pairs("decoder.patches", f"{_DECODER}noise_patch_emb.patch_proj"),
        Rename.of("decoder.table", f"{_DECODER}patches_posemb_module.posembs", leading=1),
        *_pairs("decoder.time.up", f"{_DECODER}time_embedder.mlp.0"),
        *_pairs("decoder.time.down", f"{_DECODER}time_embedder.mlp.2"),
        *_blocks("decoder", _DECODER, decoder.depth),
        *_pairs("decoder.head", f"{_DECODER}to_patches.proj"),
    ]
    for index in range(decoder.depth):
        theirs = f"{_DECODER}transformer.blocks.{index}.adaLN_modulation.1"
        renames += _pairs(f"decoder.modulations.{index}", theirs, blocks=parts)
    if decoder.positions:
        renames.append(
            Rename.of("decoder.positions", f"{_DECODER}registers_posemb_module.posembs", leading=2)
        )
    if decoder.null:
        renames.append(Rename.of("decoder.null", f"{_DECODER}latent_dropout.nullcond"))
    if decoder.head_modulation:
        renames += _pairs("decoder.head_modulation", f"{_DECODER}to_patches.adaLN_modulation.1")
    names = [name for name in module.state_dict() if name.startswith("vae.")]
    return renames + [Rename.of(name, f"vae.{name}") for name in names]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, of a nested config.json or of settings by name."""
    settings = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    for name, path in _NESTED.items():
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            settings[name] = value
    return settings


def _mask(settings: Mapping[str, Any], name: str, default: str) -> str:
    mode = settings.get(name) or default
    if mode not in _MASKS:
        raise unknown_name("mask mode of FlexTok", str(mode), _MASKS)
    return _MASKS[mode]


def _stack(
    family: str, state: Mapping[str, Tensor], prefix: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a stack's configuration that follow from the weights."""
    first = f"{prefix}transformer.blocks.0."
    width = tensor(family, state, f"{first}attn.proj.weight").shape[0]
    pattern = re.compile(re.escape(f"{prefix}transformer.blocks.") + r"(\d+)\.")
    return {
        "width": width,
        "depth": 1 + max(int(found[1]) for key in state if (found := pattern.match(key))),
        "heads": width // int(settings.get("head_dim") or 64),
        "mlp_width": tensor(family, state, f"{first}mlp.fc1.weight").shape[0],
    }


def _decoder(family: str, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    options = _stack(family, state, _DECODER, settings)
    modulation = tensor(family, state, f"{_DECODER}transformer.blocks.0.adaLN_modulation.1.weight")
    return options | {
        "mask": _mask(settings, "dec_mask_mode", "full"),
        "kind": "flow",
        "positions": f"{_DECODER}registers_posemb_module.posembs" in state,
        "null": f"{_DECODER}latent_dropout.nullcond" in state,
        "modulations": modulation.shape[0] // (6 * options["width"]),
        "head_modulation": f"{_DECODER}to_patches.adaLN_modulation.1.weight" in state,
        "frequencies": tensor(family, state, f"{_DECODER}time_embedder.mlp.0.weight").shape[1],
        "largest_time": float(settings.get("max_timestep") or 1.0),
    }


def _autoencoder(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of `AutoencoderKL`, or `None` if the weights hold none."""
    if f"{_VAE}decoder.conv_in.weight" not in state:
        return None
    pattern = re.compile(re.escape(_VAE) + r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    found = [(int(match[1]), int(match[2]), state[key]) for key in state if (match := pattern.fullmatch(key))]
    widths = {level: weight.shape[0] for level, _, weight in found}
    count = len(widths)
    return {
        "block_out_channels": [widths[level] for level in range(count)],
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": 1 + max(index for _, index, _ in found),
        "latent_channels": state[f"{_VAE}decoder.conv_in.weight"].shape[1],
        "norm_num_groups": int(settings.get("norm_num_groups") or 32),
        "scaling_factor": float(setting("flextok", settings, "scaling_factor")),
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> ImageFlexTokenizer:
    """Builds the tokenizer of "flextok" weights; its media are latents where the weights hold no autoencoder.

    Its `decode` does not clamp, as published.
    """
    settings = _flat(config)
    patch = setting(family, settings, "patch")
    patch = int(patch if isinstance(patch, (int, float)) else patch[0])
    table = tensor(family, state, f"{_ENCODER}posemb_module.posembs").shape[-1]
    vae = _autoencoder(state, settings)
    factor = 1 if vae is None else 2 ** (len(vae["block_out_channels"]) - 1)
    latent = settings.get("latent_hw")
    size = settings.get("image_size") or (
        [factor * side for side in latent] if latent else table * patch * factor
    )
    inputs = tensor(family, state, f"{_ENCODER}patch_emb.patch_proj.weight").shape[1]
    module = ImageFlexTokenizer(
        image_size=size,
        registers=tensor(family, state, f"{_ENCODER}register_module.registers").shape[0],
        patch=patch,
        channels=3 if vae else inputs // (patch * patch),
        table=table,
        encoder_config=_stack(family, state, _ENCODER, settings)
        | {"mask": _mask(settings, "enc_mask_mode", "causal_last")},
        decoder_config=_decoder(family, state, settings),
        quantizer_options={"levels": list(setting(family, settings, "fsq_levels"))},
        nested=settings.get("nested_dropout") or "uniform",
        sampling={"clamp": False},
        vae_config=vae,
    )
    return load(module, family, state, _renames(module))


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    tokenizer: Any = module
    return unload(tokenizer, _renames(tokenizer))
