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
_PUBLISHED_GROUPS = 32
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


def _official_name(family: str, name: str, levels: int) -> str:
    for pattern, text in _LLAMAGEN if family == "llamagen_vq" else _MASKGIT:
        name = re.sub(pattern, text, name)
    # MaskGIT numbers the decoder's levels from full resolution, we from the lowest
    return re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)


def _renames(family: str, module: nn.Module) -> list[Rename]:
    levels = len(module.get_submodule("encoder.levels"))  # type: ignore[arg-type]
    return [Rename.of(name, _official_name(family, name, levels)) for name in module.state_dict()]


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
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
        for index in range(_count(state, prefix + r"(\d+)\."))
    ]
    return {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": _count(state, prefix + rf"0\.{block}\.(\d+)\."),
        "latent_channels": tensor(family, state, "encoder.conv_out.weight").shape[0],
    }


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
    module = ImageCNNTokenizer(
        image_size=size,
        **_shape(family, state),
        norm_groups=config.get("norm_groups", _PUBLISHED_GROUPS),
        form="taming" if llamagen else "maskgit",
        project=llamagen,
        quantizer_options=quantizer,
        pixel_range=(-1.0, 1.0) if llamagen else (0.0, 1.0),
        clamp=False,
    )
    return load(module, family, state, _renames(family, module), derivable=(re.escape(_USED),))


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict; LlamaGen's history of chosen codes is empty."""
    state = unload(module, _renames(family, module))
    return state | {_USED: torch.zeros(65536)} if family == "llamagen_vq" else state
