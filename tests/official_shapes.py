"""Official state dicts of any size without values: names and shapes that follow from the official constructor's arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from official_latents import himar, mar, xar
from official_tokenizers import HUB, MAKERS
from torch import Tensor, nn

from tokenloom.checkpoints import from_official, to_official
from tokenloom.tokenizers.video import VideoTokenizer

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def _llama(config: Config, norms: Mapping[str, str] = {"norm": "output"}, extra: int = 0) -> Shapes:
    width, vocabulary, multiple = config["dim"], config["vocab_size"], config["multiple_of"]
    hidden = -(-int(8 * width / 3) // multiple) * multiple
    shapes: Shapes = {"tok_embeddings.weight": (vocabulary, width)}
    if config["model_type"] == "t2i":
        shapes["cls_embedding.uncond_embedding"] = (config["cls_token_num"], config["caption_dim"])
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, config["caption_dim"])
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
    else:
        shapes["cls_embedding.embedding_table.weight"] = (config["num_classes"] + 1, width)
    for index in range(config["n_layer"] + extra):
        layer = f"layers.{index}"
        shapes[f"{layer}.attention.wqkv.weight"] = (3 * width, width)
        shapes[f"{layer}.attention.wo.weight"] = (width, width)
        shapes[f"{layer}.feed_forward.w1.weight"] = shapes[f"{layer}.feed_forward.w3.weight"] = (
            hidden,
            width,
        )
        shapes[f"{layer}.feed_forward.w2.weight"] = (width, hidden)
        shapes[f"{layer}.attention_norm.weight"] = shapes[f"{layer}.ffn_norm.weight"] = (width,)
    for norm, output in norms.items():
        shapes[f"{norm}.weight"], shapes[f"{output}.weight"] = (width,), (vocabulary, width)
    return shapes


def _nar(config: Config) -> Shapes:
    return _llama(config, {"norm": "output", "medusa_norm": "medusa_output"}, config["medusa_attention_num"])


def _nar_video(config: Config) -> Shapes:
    shapes = _llama(config, {f"norm_{axis}": f"output_{axis}" for axis in "RDB"}, 2)
    return shapes | {"abs_pe": (1, config["max_seq_len"] + 1, config["dim"])}


def _par(config: Config) -> Shapes:
    learned = (config["spe_token_num"], config["dim"])
    return _llama(config) | {"spe_tok_embeddings.special_embeddings.weight": learned}


def _nbp(config: Config) -> Shapes:
    width, ids, root = config["n_embd"], config["cond_token_num"], "transformer."
    special = config["token_number_per_step"] + config["class_cond_dim"] if config["hybrid"] else 0
    rows = special + config["first_stage_vocab_size"]
    shapes: Shapes = {
        f"{root}tok_emb.weight": (rows, width),
        f"{root}head.weight": (rows, width),
        f"{root}pos_emb": (1, config["block_size"], width),
        f"{root}uncond_embedding": (ids, width),
    }
    linear = {"key": (width, width), "query": (width, width), "value": (width, width), "proj": (width, width)}
    parts: Shapes = {f"attn.{name}": shape for name, shape in linear.items()}
    parts |= {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width), "ln1": (width,), "ln2": (width,)}
    names = {
        f"blocks.{index}.{name}": part for index in range(config["n_layer"]) for name, part in parts.items()
    }
    for name, shape in {**names, "ln_f": (width,)}.items():
        shapes[f"{root}{name}.weight"], shapes[f"{root}{name}.bias"] = shape, shape[:1]
    return shapes


def _var(config: Config) -> Shapes:
    width, heads, channels, sides = (config[key] for key in ("embed_dim", "num_heads", "Cvae", "patch_nums"))
    size, hidden = sum(side * side for side in sides), int(width * config["mlp_ratio"])
    linear: Shapes = {"word_embed": (width, channels), "head_nm.ada_lin.1": (2 * width, width)}
    linear |= {"head": (config["vocab_size"], width)}
    if config["shared_aln"]:
        linear["shared_ada_lin.1"] = (6 * width, width)
    shapes: Shapes = {
        "class_emb.weight": (config["num_classes"] + 1, width),
        "pos_start": (1, 1, width),
        "pos_1LC": (1, size, width),
        "lvl_embed.weight": (len(sides), width),
        "vae.quantize.embedding.weight": (config["vocab_size"], channels),
    }
    for index in range(config["share_quant_resi"]):
        name = f"vae.quantize.quant_resi.qresi_ls.{index}"
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (channels, channels, 3, 3), (channels,)
    for index in range(config["depth"]):
        block = f"blocks.{index}"
        linear |= {f"{block}.attn.proj": (width, width), f"{block}.ffn.fc1": (hidden, width)}
        linear |= {f"{block}.ffn.fc2": (width, hidden)}
        shapes[f"{block}.attn.scale_mul_1H11"] = (1, heads, 1, 1)
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (width,)
        shapes[f"{block}.attn.mat_qkv.weight"] = (3 * width, width)
        if config["shared_aln"]:
            shapes[f"{block}.ada_gss"] = (1, 1, 6, width)
        else:
            linear[f"{block}.ada_lin.1"] = (6 * width, width)
    for name, shape in linear.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def _tokenizer(family: str, config: Config) -> Shapes:
    """Names by way of a tokenizer of this size, as the names alone do not follow from the arguments."""
    tokenizer = MAKERS[family](config)
    tokenizer.official_family = family
    return {name: tuple(value.shape) for name, value in to_official(tokenizer).items()}


def _video(config: Config) -> Shapes:
    """Names by way of a tokenizer of this size, as those of `_cnn`."""
    blocks = config["blocks"]
    tokenizer = VideoTokenizer(
        config["image_size"],
        config["frames"],
        patch=1,
        widths=[width // config["width_divisor"] for width in (128, 256, 256, 512)],
        strides=[(1, 2, 2), (2, 2, 2), (2, 2, 2)],
        blocks=[blocks, blocks, blocks, 2 * blocks],
        up_kernel=3,
        norm_groups=config["norm_groups"],
        quantizer_options={"levels": config["fsq_levels"], "bound": "tan"},
    )
    tokenizer.official_family = "nbp_video"  # type: ignore[assignment]
    return {name: tuple(value.shape) for name, value in to_official(tokenizer).items()}


_SHAPES: dict[str, Any] = {
    "dar": _llama,
    "llamagen": _llama,
    "himar": himar,
    "mar": mar,
    "mvar": _var,
    "nar": _nar,
    "nar_video": _nar_video,
    "nbp": _nbp,
    "nbp_video": _video,
    "par": _par,
    "var": _var,
    "xar": xar,
    **{family: partial(_tokenizer, family) for family in MAKERS},
}
FAMILIES = frozenset(_SHAPES)


@contextmanager
def no_values() -> Iterator[None]:
    """Modules made inside have parameters on the meta device and are not initialised."""
    fillers = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with (
        init_empty_weights(include_buffers=False),
        patch.multiple(nn.init, **dict.fromkeys(fillers, _as_it_is)),
    ):
        yield


def _as_it_is(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return tensor


def model_of(family: str, config: Config) -> nn.Module:
    """The module that an official checkpoint of these arguments becomes, without values."""
    with no_values():
        if family in HUB:  # transformers copies weights when it loads them, and there are none to copy
            return MAKERS[family](config)
        shapes: Shapes = _SHAPES[family](config)
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return from_official(family, state, config)
