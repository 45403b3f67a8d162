"""NBP's video tokenizer: causal 3-D convolutions and scalar quantization with the earlier of its two published bounds.

Official arguments read: fsq_levels, norm_groups, image_size, frames. Widths, strides and depths follow from the order of the
weights and their shapes: the official network is two flat lists of layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload, unwrap
from tokenloom.checkpoints.files import strip
from tokenloom.checkpoints.image_cnn import PUBLISHED_GROUPS
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.video import VideoTokenizer
from tokenloom.tokenizers.video_layers import CausalConv3d, Upsample3d, VideoUnit

_UNIT = {
    "norm1": "fn.0",
    "swish1": "fn.1",
    "conv1": "fn.2.conv",
    "norm2": "fn.3",
    "swish2": "fn.4",
    "conv2": "fn.5.conv",
    "shortcut": "residual_fn.0.conv",
}
_PUBLISHED_SIZE, _PUBLISHED_FRAMES = 128, 17


def _layers(state: Mapping[str, Tensor], side: str) -> list[str]:
    """What each layer of a side is: "unit", "conv", "norm", "swish", or "" where it has no weights."""
    kinds: dict[int, str] = {}
    signs = (
        (r"fn\.", "unit"),
        (r"residual_fn\.", "unit"),
        (r"conv\.", "conv"),
        (r"beta", "swish"),
        (r"", "norm"),
    )
    for name in state:
        if found := re.match(rf"{side}_layers\.(\d+)\.", name):
            rest = name[found.end() :]
            kinds[int(found[1])] = next(kind for sign, kind in signs if re.match(sign, rest))
    return [kinds.get(index, "") for index in range(max(kinds, default=-1) + 1)]


def _stride(family: str, factor: int) -> tuple[int, int, int]:
    """How far a convolution with `factor` times as many channels as it takes spreads them: space, or time and space."""
    strides = {1: (1, 1, 1), 2: (2, 1, 1), 4: (1, 2, 2), 8: (2, 2, 2)}
    if factor not in strides:
        raise TokenloomError(
            f"A layer of a {family!r} checkpoint makes 4 or 8 places of each, but one of these weights makes {factor}."
        )
    return strides[factor]


def _shape(family: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `VideoTokenizer` that follow from the decoder's weights."""
    widths: list[int] = []
    blocks: list[int] = []
    strides: list[tuple[int, int, int]] = []
    last, factor = "", 1
    for index, kind in enumerate(_layers(state, "decoder")):
        layer = f"decoder_layers.{index}"
        if kind == "conv":
            after, before = tensor(family, state, f"{layer}.conv.weight").shape[:2]
            factor = after // before
        elif kind == "unit":
            if last != "unit":
                strides += [_stride(family, factor)] if widths else []
                widths.append(tensor(family, state, f"{layer}.fn.5.conv.weight").shape[0])
                blocks.append(0)
            blocks[-1] += 1
        last = kind or last
    return {"widths": widths[::-1], "blocks": blocks[::-1], "strides": strides[::-1]}


def _renames(module: VideoTokenizer) -> list[Rename]:
    """Our names beside the official ones, which count the layers of each side."""
    renames: list[Rename] = []
    for side, network, steps in (
        ("encoder", module.encoder, module.encoder.down),
        ("decoder", module.decoder, module.decoder.up),
    ):
        flat: list[tuple[str, nn.Module | None]] = [("conv_in", network.conv_in)]
        for level, units in enumerate(network.levels):
            flat += [
                (f"levels.{level}.{index}", unit) for index, unit in enumerate(cast("nn.ModuleList", units))
            ]
            if level < len(steps):
                step = "down" if side == "encoder" else "up"
                flat.append((f"{step}.{level}", steps[level]))
                flat += [("", None)] if side == "decoder" else []  # the spreading itself has no weights
        flat += [("norm_out", network.norm_out), ("swish_out", network.swish_out)]
        flat.append(("conv_out", network.conv_out))
        for index, (name, layer) in enumerate(flat):
            for inner in layer.state_dict() if layer is not None else ():
                official = _official(side, name, inner, layer)
                leading = 1 if inner.endswith("beta") else 0
                renames.append(
                    Rename.of(f"{side}.{name}.{inner}", f"{side}_layers.{index}.{official}", leading=leading)
                )
    return renames


def _official(side: str, name: str, inner: str, layer: nn.Module | None) -> str:
    """The official name of a tensor inside a layer."""
    if isinstance(layer, VideoUnit):
        part, _, kind = inner.partition(".")
        return f"{_UNIT[part]}.{kind}"
    if isinstance(layer, Upsample3d):
        return inner
    causal = isinstance(layer, CausalConv3d) and (side, name) != ("encoder", "conv_out")
    return f"conv.{inner}" if causal else inner


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> VideoTokenizer:
    """Builds the tokenizer; its `decode` does not clamp, as published. The weights may lie in published containers."""
    published = unwrap(state)
    state = strip(published)[0]
    options = {"levels": [int(level) for level in setting(family, config, "fsq_levels")], "bound": "tan"}
    frames = int(config.get("frames") or _PUBLISHED_FRAMES)
    shape = _shape(family, state)
    if not shape["widths"]:
        tensor(family, state, "decoder_layers.1.fn.5.conv.weight")
    stride = math.prod(one[0] for one in shape["strides"])
    module = VideoTokenizer(
        config.get("image_size") or _PUBLISHED_SIZE,
        num_frames=1 + math.ceil((frames - 1) / stride) * stride,
        patch=1,
        up_kernel=3,
        norm_groups=int(config.get("norm_groups") or PUBLISHED_GROUPS),
        quantizer_type="fsq",
        quantizer_options=options,
        pixel_range=(0.0, 1.0),
        clamp=False,
        **shape,
    )
    load(module, family, state, _renames(module))
    kept: Any = module  # what a wrapper put before all names, as in the published files
    kept.official_prefix = next(iter(published)).removesuffix(next(iter(state)))
    return module


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the names that it came with."""
    assert isinstance(
        module, VideoTokenizer
    )  # only `from_official` of this file marks a module with its family
    prefix = getattr(module, "official_prefix", "")
    return {prefix + name: value for name, value in unload(module, _renames(module)).items()}
