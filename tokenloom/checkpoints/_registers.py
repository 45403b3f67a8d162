"""What the checkpoints of register tokenizers share: shapes, names, and configurations of both published forms.

Knows the official names of TiTok's encoder and decoder; knows nothing of quantizers or pixel decoders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, tensor
from tokenloom.checkpoints.image_cnn import count
from tokenloom.errors import TokenloomError

_NAMES = (
    (r"^encoder\.registers$", r"latent_tokens"),
    (r"\.class_token$", r".class_embedding"),
    (r"\.positions$", r".positional_embedding"),
    (r"\.register_positions$", r".latent_token_positional_embedding"),
    (r"\.norm_in\.", r".ln_pre."),
    (r"\.norm_out\.", r".ln_post."),
    (r"\.blocks\.(\d+)\.", r".transformer.\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attention\.qkv\.", r".attn.in_proj_"),
    (r"\.attention\.out\.", r".attn.out_proj."),
    (r"\.mlp\.up\.", r".mlp.c_fc."),
    (r"\.mlp\.down\.", r".mlp.c_proj."),
    (r"^encoder\.head\.", r"encoder.conv_out."),
    (r"^decoder\.embed\.", r"decoder.decoder_embed."),
    (r"^decoder\.text_embed\.", r"decoder.text_guidance_proj."),
    (r"^decoder\.text_positions$", r"decoder.text_guidance_positional_embedding"),
    (r"^decoder\.head\.to_pixels\.", r"decoder.ffn.0."),
    (r"^decoder\.head\.smooth\.", r"decoder.conv_out."),
    (r"^decoder\.head\.(\d)\.", r"decoder.ffn.\1."),
)
_MODEL_HEADS = {"small": 8, "base": 12, "large": 16, "xlarge": 16}
_WIDTH_HEADS = {512: 8, 768: 12, 1024: 16}


def register_renames(module: nn.Module) -> list[Rename]:
    """Renames of every tensor under "encoder" and "decoder"."""
    renames = []
    for name in module.state_dict():
        if name.startswith(("encoder.", "decoder.")):
            official = name
            for pattern, text in _NAMES:
                official = re.sub(pattern, text, official)
            renames.append(Rename.of(name, official))
    return renames


def unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a published file: those under "model", and names without "module." before them."""
    inside = state.get("model")
    inside = inside if isinstance(inside, Mapping) else state
    return {name.removeprefix("module."): value for name, value in inside.items()}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, flat or nested as in the published files (model.vq_model, crop_size)."""
    flat = dict(config)
    model = flat.get("model")
    nested = model.get("vq_model", {}) if isinstance(model, Mapping) else {}
    return flat | dict(nested)


def _heads(part: str, width: int, settings: Mapping[str, Any]) -> int:
    """Attention heads, which no tensor shows: as configured, or those of the published size of this width."""
    short = "vit_enc_model_size" if part == "encoder" else "vit_dec_model_size"
    size = settings.get(short) or settings.get(part) or settings.get("model_size")
    heads = settings.get(f"{part}_heads") or settings.get("heads")
    heads = heads or _MODEL_HEADS.get(str(size)) or _WIDTH_HEADS.get(width)
    if heads is None:
        raise TokenloomError(
            f"The weights do not show the number of attention heads of a {part} of width {width}; add 'heads' to config."
        )
    return int(heads)


def transformer_shape(
    family: str, state: Mapping[str, Tensor], part: str, patch: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of `RegisterConfig` for "encoder" or "decoder"."""
    width = tensor(family, state, f"{part}.class_embedding").shape[1]
    return {
        "width": width,
        "depth": count(state, rf"{part}\.transformer\.(\d+)\."),
        "heads": _heads(part, width, settings),
        "patch": patch,
        "mlp_width": tensor(family, state, f"{part}.transformer.0.mlp.c_fc.weight").shape[0],
    }


def grid_of(family: str, state: Mapping[str, Tensor], part: str) -> int:
    """Patches a side, from the learned positions."""
    patches = tensor(family, state, f"{part}.positional_embedding").shape[0] - 1
    side = round(patches**0.5)
    if side * side != patches or not side:
        raise TokenloomError(
            f"The {part} of a {family!r} checkpoint needs a square grid, got {patches} patches."
        )
    return side
