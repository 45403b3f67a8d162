"""Audio codecs that transformers runs: EnCodec, DAC, Mimi and X-Codec, and DAC as its authors publish it.

Official arguments read: of the families that transformers knows the arguments of its configuration class, alone or under
"hf"; of "dac_original" sample_rate and quantizer_dropout, alone or under "dac" (a file's metadata holds them under "kwargs").
Everything else of "dac_original" follows from names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, tensor, unload
from tokenloom.tokenizers.audio_hub import HubAudioTokenizer

_TYPES = {
    "encodec_24k": "encodec",
    "encodec_48k": "encodec",
}  # family -> transformers' model type, where they differ
_UNIT = ("snake1", "conv1", "snake2", "conv2")  # layers of a residual unit, in DAC's order
_WEIGHT = (
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)


def _inside(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The official arguments, which may lie under a key of their own."""
    inside = config.get(key)
    return dict(inside) if isinstance(inside, Mapping) else config


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _dac_name(name: str, levels: int) -> str:
    """DAC's own name of one of our tensors."""
    for ours, official in _WEIGHT:
        name = name.replace(ours, official)
    name = name.removeprefix("model.")
    side, _, rest = name.partition(".")
    if side == "quantizer":
        return name
    stem = "encoder.block" if side == "encoder" else "decoder.model"
    ends = {"conv1": 0, "snake1": levels + 1, "conv2": levels + 2}
    first, _, tail = rest.partition(".")
    if first in ends:
        return f"{stem}.{ends[first]}.{tail}"
    level, layer, tail = rest.removeprefix("block.").split(".", 2)
    prefix = f"{stem}.{int(level) + 1}.block"
    if unit := re.fullmatch(r"res_unit(\d)", layer):
        part, _, tail = tail.partition(".")
        place = int(unit[1]) - 1 + (2 if side == "decoder" else 0)
        return f"{prefix}.{place}.block.{_UNIT.index(part)}.{tail}"
    place = {"snake1": 3, "conv1": 4} if side == "encoder" else {"snake1": 0, "conv_t1": 1}  # type: ignore[assignment]
    return f"{prefix}.{place[layer]}.{tail}"  # type: ignore[index]


def _dac_renames(module: nn.Module) -> list[Rename]:
    levels = len(module.get_submodule("model.encoder.block"))  # type: ignore[arg-type]
    return [Rename.of(name, _dac_name(name, levels)) for name in module.state_dict()]


def _dac_config(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' DacConfig that follow from the weights."""
    family = "dac_original"
    levels = _count(state, r"encoder\.block\.(\d+)\.block\.4\.weight_v")
    books = _count(state, r"quantizer\.quantizers\.(\d+)\.")
    size, dim = tensor(family, state, "quantizer.quantizers.0.codebook.weight").shape

    def strides(side: str, place: int) -> list[int]:  # kernels are twice as long as strides
        names = [f"{side}.{level}.block.{place}.weight_v" for level in range(1, levels + 1)]
        return [tensor(family, state, name).shape[-1] // 2 for name in names]

    return {
        "encoder_hidden_size": tensor(family, state, "encoder.block.0.weight_v").shape[0],
        "decoder_hidden_size": tensor(family, state, "decoder.model.0.weight_v").shape[0],
        "downsampling_ratios": strides("encoder.block", 4),
        "upsampling_ratios": strides("decoder.model", 1),
        "hidden_size": tensor(family, state, f"encoder.block.{levels + 2}.weight_v").shape[0],
        "n_codebooks": books,
        "codebook_size": size,
        "codebook_dim": dim,
        "quantizer_dropout": float(config.get("quantizer_dropout") or 0.0),
        "sampling_rate": config.get("sample_rate", 44100),
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> HubAudioTokenizer:
    """Builds the tokenizer of a codec's weights; those of "dac_original" may lie under "state_dict", as in its files."""
    if family != "dac_original":
        return HubAudioTokenizer.from_weights(state, _TYPES.get(family, family), _inside(config, "hf"))
    if isinstance(inside := state.get("state_dict"), Mapping):
        metadata: Any = state.get("metadata", {})
        state, config = dict(inside), {**metadata.get("kwargs", {}), **config}
    settings = _dac_config(state, _inside(config, "dac"))
    module = HubAudioTokenizer("dac", settings, weight_norm=True)
    return load(module, family, state, _dac_renames(module))


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    if family == "dac_original":
        return unload(module, _dac_renames(module))
    weights: Any = module
    return {name: value.detach().clone() for name, value in weights.weights().items()}
