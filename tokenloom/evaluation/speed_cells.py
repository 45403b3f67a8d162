"""What the speed benchmark runs: generators of published shapes with random weights, each with its detokenizer.

With an official checkout the weights are those of the official model, so that both sides can be compared; without one they are
drawn here. Knows presets and shapes; knows nothing of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenloom.checkpoints import from_official
from tokenloom.checkpoints.guidance import official_guidance
from tokenloom.checkpoints.presets import NUCLEUS, preset
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.evaluation.official_code import Official, official
from tokenloom.generators import Guidance, NextNeighborGenerator, NextScaleGenerator, NextTokenGenerator, Sampling, orders
from tokenloom.generators.base import Generator
from tokenloom.layouts import Layout
from tokenloom.tokenizers.image_cnn import ImageCNNTokenizer
from tokenloom.tokenizers.image_scale import ImageScaleTokenizer

FAMILIES = {"llamagen": "c2i_B_256.pt", "nar": "NAR-B", "var": "var_d16.pth"}
"""Short names of the benchmark -> preset."""
_CFG = {"llamagen": 2.0, "nar": 2.0}


@dataclass(frozen=True)
class Cell:
    """One model to measure.

    Attributes:
        name: Preset.
        family: Family of the preset.
        generator: Ours.
        guidance: As published.
        sampling: As published.
        decode: Codes (B, N) to pixels.
        official: The same weights in official code, if a checkout was given.
    """

    name: str
    family: str
    generator: Generator
    guidance: Guidance
    sampling: Sampling
    decode: Callable[[Tensor], Tensor]
    official: Official | None = None

    def labels(self, batch: int) -> Tensor:
        """Classes (B,), different where possible."""
        condition: Any = self.generator.condition
        return torch.arange(batch) * 7 % condition.num_classes


def resolve_family(name: str) -> str:
    """The preset behind a short name or the name of a preset of the same families.

    Raises:
        TokenloomError: For a name that is neither.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    try:
        found = preset(name)
    except TokenloomError:
        raise unknown_name("family of the benchmark", name, FAMILIES) from None
    if found.family not in FAMILIES or found.config.get("model_type", "c2i") != "c2i":
        raise TokenloomError(
            f"The benchmark runs class-conditional models of {', '.join(FAMILIES)}, but {name!r} is {found.family}."
        )
    return name


def make_cell(name: str, checkouts: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Cell:
    """A model of a published shape.

    Args:
        name: Short name (`FAMILIES`) or preset.
        checkouts: Folder of official repositories; `None` draws the weights here.
        overrides: Official constructor arguments to change, for instance {"n_layer": 2}.

    Raises:
        TokenloomError: For an unknown name, or where a checkout is missing.
    """
    name = resolve_family(name)
    found = preset(name)
    family, config = found.family, {**found.config, **(overrides or {})}
    settings = {**({"cfg_scale": _CFG[family]} if family in _CFG else {}), **found.sampling}
    theirs = None if checkouts is None else official(family, checkouts, config, settings)
    if theirs is None:
        torch.manual_seed(0)
        generator = _RANDOM[family](config)
    else:
        generator = cast("Generator", from_official(family, theirs.state, config))
    tokenizer = _tokenizer(family, config, theirs)
    sampling = Sampling(
        settings.get("temperature", 1.0),
        settings.get("top_k", 0),
        settings.get("top_p", 1.0),
        cast("Any", NUCLEUS.get(family, "descending")),
    )
    return Cell(
        name,
        family,
        generator.eval().requires_grad_(False),
        official_guidance(family, **settings),
        sampling,
        tokenizer.decode,
        theirs,
    )


def _llama_options(config: Mapping[str, Any], taps: tuple[int, ...]) -> dict[str, Any]:
    width, multiple = config["dim"], config["multiple_of"]
    return {
        "vocab_size": config["vocab_size"],
        "transformer_config": {
            "width": width,
            "heads": config["n_head"],
            "depth": taps[-1],
            "taps": list(taps),
            "mlp_width": -(-int(8 * width / 3) // multiple) * multiple,
        },
        "condition_config": {"kind": "class", "num_classes": config["num_classes"]},
        "causal_prefix": True,
        "prefix_rope": "zero",
        "share_head": False,
    }


def _grid(config: Mapping[str, Any]) -> Layout:
    side = round(config["block_size"] ** 0.5)
    return Layout.grid(side, side)


def _next_token(config: Mapping[str, Any]) -> Generator:
    options = _llama_options(config, (config["n_layer"],))
    return NextTokenGenerator(orders.raster(_grid(config)).to_config(), **options)


def _next_neighbor(config: Mapping[str, Any]) -> Generator:
    taps = (config["n_layer"], config["n_layer"] + config["medusa_attention_num"])
    return NextNeighborGenerator(orders.neighbors(_grid(config)).to_config(), **_llama_options(config, taps))


def _next_scale(config: Mapping[str, Any]) -> Generator:
    width = config["embed_dim"]
    transformer = {"width": width, "heads": config["num_heads"], "depth": config["depth"], "mlp": "gelu_tanh"}
    transformer |= {"mlp_width": int(width * config["mlp_ratio"]), "norm": "layer", "norm_affine": False}
    transformer |= {"norm_eps": 1e-6, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": "l2"}
    transformer |= {"modulation": "own", "final_modulation": True, "rope": False}
    generator = NextScaleGenerator(
        orders.scales(Layout.scales(config["patch_nums"])).to_config(),
        config["vocab_size"],
        transformer,
        {"kind": "class", "num_classes": config["num_classes"]},
        head_bias=True,
        rule_config={"channels": config["Cvae"], "phis": config["share_quant_resi"]},
    )
    for name, value in generator.named_parameters():
        if "modulation" in name:  # they start at zero, and every block would be skipped
            nn.init.normal_(value, std=0.02)
    return generator


_RANDOM: dict[str, Callable[[Mapping[str, Any]], Generator]] = {
    "llamagen": _next_token,
    "nar": _next_neighbor,
    "var": _next_scale,
}


def _tokenizer(family: str, config: Mapping[str, Any], theirs: Official | None) -> Any:
    """The detokenizer: VQ-16 of a smaller picture where the grid is smaller, or VAR's."""
    if family != "var":
        side = round(config["block_size"] ** 0.5)
        codes: dict[str, object] = {"codebook_size": config["vocab_size"], "dim": 8}
        made: Any = ImageCNNTokenizer(side * 16, 128, (1, 1, 2, 2, 4), 2, 256, quantizer_options=codes, clamp=False)
    elif theirs is not None and theirs.tokenizer_state is not None:
        made = from_official("var_vq", theirs.tokenizer_state, {"v_patch_nums": config["patch_nums"]})
    else:
        codes = {"codebook_size": config["vocab_size"], "dim": config["Cvae"], "normalize": False}
        made = ImageScaleTokenizer(
            config["patch_nums"], 160, (1, 1, 2, 2, 4), 2, config["Cvae"], quantizer_options=codes
        )
    return made.eval().requires_grad_(False)
