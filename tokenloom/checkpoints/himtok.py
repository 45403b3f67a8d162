"""HiMTok's mask tokenizer.

Official arguments read, flat or nested as published: use_l2_norm, commitment_cost, is_legacy, norm_groups, and heads or the
model sizes. Everything else follows from the names and shapes of the weights. Inside the language model's checkpoint the
same tensors lie under "mask_decoder.".
"""

from __future__ import annotations

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
from tokenloom.tokenizers.mask import MaskTokenizer
from tokenloom.tokenizers.registers import causal_registers

_MASK = "encoder.attn_mask"


def _renames(module: nn.Module) -> list[Rename]:
    return [
        *register_renames(module),
        Rename.of("quantizer.codebook", "quantize.embedding.weight"),
        Rename.of("quantizer.transform.weight", "quantize.embedding_proj.weight"),
        *pixel_decoder_renames(module, "painter"),
    ]


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> MaskTokenizer:
    """Builds the tokenizer of "himtok" weights: without codes for blank masks, and with the official way of resampling."""
    state, settings = unwrap(state), settings_of(config)
    codes, dim = tensor(family, state, "quantize.embedding.weight").shape
    patch = tensor(family, state, "encoder.patch_embed.weight").shape[-1]
    pixel_config = pixel_decoder_shape(family, state)
    out_patch = 1 << (len(pixel_config["multipliers"]) - 1)
    size = grid_of(family, state, "encoder") * patch
    if grid_of(family, state, "decoder") * out_patch != size:
        raise TokenloomError(
            f"The encoder of these {family!r} weights reads masks of {size} pixels, but the decoder paints "
            f"{grid_of(family, state, 'decoder') * out_patch}."
        )
    module = MaskTokenizer(
        image_size=size,
        levels=tensor(family, state, "latent_tokens").shape[0],
        encoder_config=transformer_shape(family, state, "encoder", patch, settings),
        decoder_config=transformer_shape(family, state, "decoder", out_patch, settings),
        quantizer_options={
            "codebook_size": codes,
            "dim": dim,
            "normalize": bool(settings.get("use_l2_norm", True)),
            "commitment": float(settings.get("commitment_cost", 0.01)),
            "frozen": False,
        },
        pixel_config=pixel_config | {"groups": settings.get("norm_groups") or PUBLISHED_GROUPS},
        channels=tensor(family, state, "encoder.patch_embed.weight").shape[1],
        scrambled=bool(settings.get("is_legacy", True)),
        blank_codes=False,
        soft_normalized=False,
        antialias=False,
    )
    return load(module, family, state, _renames(module), derivable=(*DERIVABLE, re.escape(_MASK)))


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict; its attention mask is true where a query may not look."""
    state = unload(module, _renames(module))
    patches, registers = (
        state[f"encoder.{name}"].shape[0]
        for name in ("positional_embedding", "latent_token_positional_embedding")
    )
    return state | {_MASK: ~causal_registers(patches, registers)}
