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
from tokenloom.generators import (
    Guidance,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextScaleGenerator,
    NextTokenGenerator,
    Sampling,
    orders,
)
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
        decode: Codes (B, N) to pixels, or `None` where tokens alone are measured.
        official: The same weights in official code, if a checkout was given.
        prompt: Word ids (1, T), where the condition is words.
        whole: Whether whole generations are decoded to pixels even without official code.
        audio_seconds: How long a sample sounds.
    """

    name: str
    family: str
    generator: Generator
    guidance: Guidance
    sampling: Sampling
    decode: Callable[[Tensor], Tensor] | None
    official: Official | None = None
    prompt: Tensor | None = None
    whole: bool = False
    audio_seconds: float | None = None

    def labels(self, batch: int) -> Tensor:
        """Classes (B,), different where possible, or one prompt for all; zeros where there is no condition."""
        if self.prompt is not None:
            return self.prompt.expand(batch, -1)
        classes = getattr(self.generator.condition, "num_classes", 1)
        return torch.arange(batch) * 7 % classes


def _picture(overrides: Mapping[str, Any], detokenize: bool) -> Cell:
    """The bundled model, as its pipeline runs it; a call makes a picture."""
    from tokenloom.pipelines.preset import merge_settings
    from tokenloom.pipelines.text_to_image import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained()
    guidance, sampling = merge_settings(pipe.config["sampling"], None)
    decode = pipe.tokenizer.requires_grad_(False).decode if detokenize else None
    generator = pipe.generator.requires_grad_(False)
    words = pipe.encode_prompts(["red apple"])
    return Cell("bundled picture", "picture", generator, guidance, sampling, decode, prompt=words, whole=True)


def _sound(overrides: Mapping[str, Any], detokenize: bool) -> Cell:
    """Two seconds of four codebooks at 50 frames a second, from a model of 25 M parameters with random weights."""
    sizes = {"frames": 100, "codebooks": 4, "width": 512, "depth": 8, "vocab_size": 1024, "frame_rate": 50}
    sizes |= {name: value for name, value in overrides.items() if name in sizes}
    torch.manual_seed(0)
    generator = NextBlockGenerator(
        orders.delay(Layout.frames(sizes["frames"], sizes["codebooks"])).to_config(),
        sizes["vocab_size"],
        {"width": sizes["width"], "heads": 8, "depth": sizes["depth"]},
        {"kind": "class", "num_classes": 10},
    )
    seconds = sizes["frames"] / sizes["frame_rate"]
    made = generator.eval().requires_grad_(False)
    return Cell(
        "sound 4 x 50 Hz", "sound", made, Guidance(), Sampling(top_k=250), None, audio_seconds=seconds
    )


_OWN: dict[str, Callable[[Mapping[str, Any], bool], Cell]] = {"picture": _picture, "sound": _sound}
"""Families without official code."""


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
        raise unknown_name("family of the benchmark", name, [*FAMILIES, *_OWN]) from None
    if found.family not in FAMILIES or found.config.get("model_type", "c2i") != "c2i":
        raise TokenloomError(
            f"The benchmark runs class-conditional models of {', '.join(FAMILIES)}, but {name!r} is {found.family}."
        )
    return name


def make_cell(
    name: str,
    checkouts: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    detokenize: bool = True,
) -> Cell:
    """A model of a published shape.

    Args:
        name: Short name (`FAMILIES`), preset, "picture" (the bundled model) or "sound".
        checkouts: Folder of official repositories; `None` draws the weights here.
        overrides: Official constructor arguments to change, for instance {"n_layer": 2}.
        detokenize: Whether to make a detokenizer as well.

    Raises:
        TokenloomError: For an unknown name, or where a checkout is missing.
    """
    if name in _OWN:
        return _OWN[name](dict(overrides or {}), detokenize)
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
    tokenizer = _tokenizer(family, config, theirs) if detokenize else None
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
        None if tokenizer is None else tokenizer.decode,
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
        made: Any = ImageCNNTokenizer(
            side * 16, 128, (1, 1, 2, 2, 4), 2, 256, quantizer_options=codes, clamp=False
        )
    elif theirs is not None and theirs.tokenizer_state is not None:
        made = from_official("var_vq", theirs.tokenizer_state, {"v_patch_nums": config["patch_nums"]})
    else:
        codes = {"codebook_size": config["vocab_size"], "dim": config["Cvae"], "normalize": False}
        made = ImageScaleTokenizer(
            config["patch_nums"], 160, (1, 1, 2, 2, 4), 2, config["Cvae"], quantizer_options=codes
        )
    return made.eval().requires_grad_(False)
