"""Convolutional image tokenizers: LlamaGen's VQ-8 and VQ-16, and the VQGAN of MaskGIT that TiTok and RAR use.

Official arguments read: of "llamagen_vq" commit_loss_beta, entropy_loss_ratio, codebook_l2_norm and norm_groups; of both
families image_hw or image_size. Everything else follows from the names and shapes of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, tensor, unload, unwrap
from tokenloom.tokenizers.image_cnn import ImageCNNTokenizer

_USED = "quantize.codebook_used"  # a history of chosen codes that LlamaGen keeps for its log
_PUBLISHED_SIZE = 256
PUBLISHED_GROUPS = 32
_LLAMAGEN = (
    (r"(encoder|decoder)\.levels\.(\d+)\.blocks\.", r"\1.conv_blocks.\2.res."),
    (r"(encoder|decoder)\.levels\.(\d+)\.attentions\.", r"\1.conv_blocks.\2.attn."),
    (r"encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample.conv."),
    (r"decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample.conv."),
    (r"\.middle\.", r".mid."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"\.out\.", r".proj_out."),
    (r"^to_code\.", r"quant_conv."),
    (r"^from_code\.", r"post_quant_conv."),
    (r"^quantizer\.codebook$", r"quantize.embedding.weight"),
)
_MASKGIT = (
    (r"encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
    (r"decoder\.levels\.(\d+)\.blocks\.", r"decoder.up.\1.block."),
    (r"decoder\.levels\.(\d+)\.resample\.", r"decoder.up.\1.upsample_conv."),
    (r"\.middle\.", r".mid."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"^quantizer\.codebook$", r"quantize.embedding.weight"),
)


def official_name(family: str, name: str, levels: int) -> str:
    """The official name of a tensor of an encoder, decoder or quantizer with so many levels."""
    for pattern, text in _LLAMAGEN if family == "llamagen_vq" else _MASKGIT:
        name = re.sub(pattern, text, name)
    # MaskGIT numbers the decoder's levels from full resolution, we from the lowest
    return re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)


def _renames(family: str, module: nn.Module) -> list[Rename]:
    levels = len(module.get_submodule("encoder.levels"))  # type: ignore[arg-type]
    return [Rename.of(name, official_name(family, name, levels)) for name in module.state_dict()]


def count(names: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the group of `pattern` takes among the names; 1 if there is none."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=0)


def _shape(family: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `ImageCNNTokenizer` that follow from the weights."""
    level = "conv_blocks" if family == "llamagen_vq" else "down"
    block = "res" if family == "llamagen_vq" else "block"
    prefix = rf"encoder\.{level}\."
    channels = tensor(family, state, "encoder.conv_in.weight").shape[0]
    widths = [
        tensor(family, state, f"encoder.{level}.{index}.{block}.0.conv1.weight").shape[0]
        for index in range(count(state, prefix + r"(\d+)\."))
    ]
    return {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": count(state, prefix + rf"0\.{block}\.(\d+)\."),
        "latent_channels": tensor(family, state, "encoder.conv_out.weight").shape[0],
    }


def pixel_decoder_shape(family: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a `CNNDecoder` of the form "maskgit", `latent` among them, from weights named "pixel_decoder.*"."""
    prefix = "pixel_decoder.up."
    channels = tensor(family, state, "pixel_decoder.norm_out.weight").shape[0]
    widths = [
        tensor(family, state, f"{prefix}{index}.block.0.conv1.weight").shape[0]
        for index in range(count(state, re.escape(prefix) + r"(\d+)\."))
    ]
    return {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": count(state, re.escape(prefix) + r"0\.block\.(\d+)\."),
        "latent": tensor(family, state, "pixel_decoder.conv_in.weight").shape[1],
    }


def pixel_decoder_renames(module: nn.Module, ours: str) -> list[Rename]:
    """Renames of the `CNNDecoder` that lies at `ours` in a module and at "pixel_decoder" in official weights."""
    decoder = module.get_submodule(ours)
    levels = len(decoder.get_submodule("levels"))  # type: ignore[arg-type]
    return [
        Rename.of(f"{ours}.{name}", "pixel_" + official_name("maskgit_vqgan", f"decoder.{name}", levels))
        for name in decoder.state_dict()
    ]


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> ImageCNNTokenizer:
    """Builds the tokenizer of "llamagen_vq" or "maskgit_vqgan" weights; its `decode` does not clamp, as published.

    Weights that lie under "ema", "model" or "state_dict", as in published files, are taken from there.
    """
    state = unwrap(state)
    llamagen = family == "llamagen_vq"
    codes, dim = tensor(family, state, "quantize.embedding.weight").shape
    quantizer: dict[str, object] = {"codebook_size": codes, "dim": dim, "normalize": False}
    if llamagen:
        quantizer["normalize"] = bool(config.get("codebook_l2_norm", True))
        quantizer["commitment"] = float(config.get("commit_loss_beta", 0.25))
        quantizer["entropy_weight"] = float(config.get("entropy_loss_ratio", 0.0))
    size = config.get("image_hw") or config.get("image_size") or _PUBLISHED_SIZE
    shape = _shape(family, state)
    if not llamagen:  # the encoder's channels are the codes' width
        shape["latent_channels"] = None
    module = ImageCNNTokenizer(
        image_size=size,
        **shape,
        norm_groups=config.get("norm_groups", PUBLISHED_GROUPS),
        form="taming" if llamagen else "maskgit",
        quantizer_options=quantizer,
        pixel_range=(-1.0, 1.0) if llamagen else (0.0, 1.0),
        clamp=False,
    )
    load(module, family, state, _renames(family, module), derivable=(re.escape(_USED),))
    if llamagen:
        kept: Any = module  # a history that no tensor of ours holds
        kept.official_used = state.get(_USED)
    return module


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict; LlamaGen's history of chosen codes is empty where the weights came without one."""
    state = unload(module, _renames(family, module))
    if family == "llamagen_vq":
        used = getattr(module, "official_used", None)
        state[_USED] = torch.zeros(65536) if used is None else used
    return state
