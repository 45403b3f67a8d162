"""TiTok and TA-TiTok: two stages ("legacy"), one stage with 8,192 codes, and continuous vectors.

Official arguments read, flat or nested as published: quantize_mode, use_l2_norm, commitment_cost, is_legacy, norm_groups,
and heads or the model sizes. Everything else follows from the names and shapes of the weights.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._registers import (
    grid_of,
    register_renames,
    settings_of,
    transformer_shape,
    unwrap,
)
from tokenloom.checkpoints._renames import DERIVABLE, Rename, load, tensor, unload
from tokenloom.checkpoints.image_cnn import PUBLISHED_GROUPS, pixel_decoder_renames, pixel_decoder_shape
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.image_line import ImageLineTokenizer

_MODES = ("vq", "vae")
_USED = "quantize.embed_prob"  # how often codes are used, which training with clustering keeps


def _renames(module: nn.Module) -> list[Rename]:
    renames = register_renames(module)
    own = module.state_dict()
    if "quantizer.codebook" in own:
        renames.append(Rename.of("quantizer.codebook", "quantize.embedding.weight"))
    if "painter.codebook" in own:
        renames.append(Rename.of("painter.codebook", "pixel_quantize.embedding.weight"))
        renames.extend(pixel_decoder_renames(module, "painter.decoder"))
    return renames


def _quantizer(family: str, state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    mode = settings.get("quantize_mode") or "vq"
    if mode not in _MODES:
        raise TokenloomError(f"quantize_mode of a {family!r} checkpoint is one of {_MODES}, got {mode!r}.")
    if mode == "vae":
        dim = tensor(family, state, "decoder.decoder_embed.weight").shape[1]
        return {"quantizer_type": "kl", "quantizer_options": {"dim": dim}}
    codes, dim = tensor(family, state, "quantize.embedding.weight").shape
    options = {
        "codebook_size": codes,
        "dim": dim,
        "normalize": bool(settings.get("use_l2_norm", False)),
        "commitment": float(settings.get("commitment_cost", 0.25)),
    }
    return {"quantizer_type": "vq", "quantizer_options": options}


def _painting(family: str, state: dict[str, Tensor], settings: dict[str, Any]) -> tuple[int, dict | None]:
    """Pixels of a decoder's patch and side, and options of the second stage if there is one."""
    if not settings.get("is_legacy", True):
        head = tensor(family, state, "decoder.ffn.0.weight").shape[0]
        return math.isqrt(head // 3), None
    codebook = tensor(family, state, "pixel_quantize.embedding.weight")
    shape = pixel_decoder_shape(family, state)
    shape["latent_channels"] = shape.pop("latent")
    groups = settings.get("norm_groups") or PUBLISHED_GROUPS
    options = shape | {"codebook_size": codebook.shape[0], "norm_groups": groups}
    return 1 << (len(shape["multipliers"]) - 1), options


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> ImageLineTokenizer:
    """Builds the tokenizer of "titok" or "tatitok" weights for pixels in [0, 1]; `decode` does not clamp, as published.

    The picture's size is that of the encoder's learned positions.
    """
    state, settings = unwrap(state), settings_of(config)
    patch = tensor(family, state, "encoder.patch_embed.weight").shape[-1]
    size = grid_of(family, state, "encoder") * patch
    out_patch, pixel_config = _painting(family, state, settings)
    if grid_of(family, state, "decoder") * out_patch != size:
        raise TokenloomError(
            f"The encoder of these {family!r} weights reads pictures of {size} pixels, but the decoder paints "
            f"{grid_of(family, state, 'decoder') * out_patch}; check is_legacy in config."
        )
    text_config = None
    if family == "tatitok":
        length = tensor(family, state, "decoder.text_guidance_positional_embedding").shape[0]
        features = tensor(family, state, "decoder.text_guidance_proj.weight").shape[1]
        text_config = {"features": features, "length": length}
    module = ImageLineTokenizer(
        image_size=size,
        registers=tensor(family, state, "latent_tokens").shape[0],
        encoder_config=transformer_shape(family, state, "encoder", patch, settings),
        decoder_config=transformer_shape(family, state, "decoder", out_patch, settings),
        **_quantizer(family, state, settings),
        pixel_config=pixel_config,
        text_config=text_config,
        scrambled=bool(settings.get("is_legacy", True)),
        pixel_range=(0.0, 1.0),
        clamp=False,
    )
    kept: Any = load(module, family, state, _renames(module), derivable=(*DERIVABLE, re.escape(_USED)))
    kept.official_used = state.get(_USED)  # a statistic of training that no tensor of ours holds
    return module


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the share of every code that the weights may have come with."""
    used: Tensor | None = getattr(module, "official_used", None)
    return unload(module, _renames(module)) | ({} if used is None else {_USED: used.clone()})
