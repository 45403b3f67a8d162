"""Names and shapes of official generators of continuous tokens, from the official constructor's arguments: xAR, MAR, Hi-MAR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def _linear(layers: Mapping[str, tuple[int, int]]) -> Shapes:
    shapes: Shapes = {}
    for name, shape in layers.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _size(config: Config) -> int:
    return (config["img_size"] // config["vae_stride"] // config["patch_size"]) ** 2


def xar(config: Config) -> Shapes:
    """xAR: blocks with a gated MLP and modulation of their own, without the tables that follow from the sizes."""
    width, channels, size = config["encoder_embed_dim"], config["vae_embed_dim"], _size(config)
    layers = {"time_embed.mlp.0": (width, 256), "time_embed.mlp.2": (width, width)}
    layers |= {"z_proj": (width, channels), "decoder_embed": (width, width), "pred": (channels, width)}
    shapes: Shapes = {"class_emb.weight": (config["class_num"] + 1, width), "z_proj_ln.weight": (width,)}
    hidden = int(width * config["mlp_ratio"] * 2 / 3)
    for half in ("encoder", "decoder"):
        shapes |= {f"{half}_pos_embed_learned": (1, size, width), f"{half}_norm.weight": (width,)}
        for index in range(config[f"{half}_depth"]):
            block = f"{half}_blocks.{index}"
            layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
            layers |= {f"{block}.mlp.fc1_g": (hidden, width), f"{block}.mlp.fc1_x": (hidden, width)}
            layers |= {f"{block}.mlp.fc2": (width, hidden), f"{block}.ada_lin.1": (6 * width, width)}
    return shapes | _linear(layers)


def _row_head(config: Config) -> Shapes:
    width, channels = config["diffloss_w"], config["vae_embed_dim"]
    net = "diffloss.net"
    layers = {
        f"{net}.time_embed.mlp.0": (width, 256),
        f"{net}.time_embed.mlp.2": (width, width),
        f"{net}.cond_embed": (width, config["decoder_embed_dim"]),
        f"{net}.input_proj": (width, channels),
        f"{net}.final_layer.adaLN_modulation.1": (2 * width, width),
        f"{net}.final_layer.linear": (2 * channels, width),
    }
    shapes: Shapes = {}
    for index in range(config["diffloss_d"]):
        block = f"{net}.res_blocks.{index}"
        layers |= {f"{block}.mlp.{place}": (width, width) for place in (0, 2)}
        layers[f"{block}.adaLN_modulation.1"] = (3 * width, width)
        shapes |= _norm(f"{block}.in_ln", width)
    return shapes | _linear(layers)


def mar(config: Config, extra: int = 0) -> Shapes:
    """MAR; with `extra` tokens of a smaller grid, what Hi-MAR has in common with it."""
    inner, outer, rows = config["encoder_embed_dim"], config["decoder_embed_dim"], config["buffer_size"]
    size, stages = _size(config) + extra, 2 if extra else 1
    layers = {"z_proj": (inner, config["vae_embed_dim"]), "decoder_embed": (outer, inner)}
    shapes: Shapes = {
        "class_emb.weight": (config["class_num"], inner),
        "fake_latent": (1, inner),
        "encoder_pos_embed_learned": (1, stages * (size + rows), inner),
        "decoder_pos_embed_learned": (1, stages * (size + rows), outer),
        "diffusion_pos_embed_learned": (1, size, outer),
        "mask_token": (1, 1, outer),
        **_norm("z_proj_ln", inner),
    }
    for half, width in (("encoder", inner), ("decoder", outer)):
        hidden = int(width * config["mlp_ratio"])
        shapes |= _norm(f"{half}_norm", width)
        for index in range(config[f"{half}_depth"]):
            block = f"{half}_blocks.{index}"
            layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
            layers |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
            shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
    return shapes | _linear(layers) | _row_head(config)


def himar(config: Config) -> Shapes:
    """Hi-MAR: two stages that share blocks, and a transformer over the whole map as second head."""
    inner, outer, channels = config["encoder_embed_dim"], config["decoder_embed_dim"], config["vae_embed_dim"]
    small, size, width = config["cond_scale"] ** 2, _size(config), config["gdm_w"]
    net, hidden = "cond_diffloss.net", config["ratio"] * config["gdm_w"]
    layers = {"cond_proj": (inner, config["cond_dim"]), "cond_z_proj": (inner, outer)}
    shapes = mar(config, small) | {
        "mask_token": (1, 2 * (small + size), outer),
        "cond_tokens": (1, small, config["cond_dim"]),
        f"{net}.pos_embed": (1, size, width),
        f"{net}.c_pos_embed": (1, size, width),
        f"{net}.c_embedder.proj.weight": (width, outer, 1, 1),
        f"{net}.c_embedder.proj.bias": (width,),
        f"{net}.x_embedder.proj.weight": (width, channels, 1, 1),
        f"{net}.x_embedder.proj.bias": (width,),
    }
    for half, wide in (("encoder", inner), ("decoder", outer)):
        shapes[f"{half}_task_emb.weight"] = (2, wide)
        layers[f"{half}_blocks_ada.1"] = (4 * wide, wide)
        for index in range(config[f"{half}_depth"]):
            for name in ("adaLN_scale", "adaLN_shift"):
                shapes[f"{half}_blocks.{index}.{name}"] = (2, 1, 1, 4 * wide)
    layers |= {f"{net}.t_embedder.mlp.0": (width, 256), f"{net}.t_embedder.mlp.2": (width, width)}
    layers |= {f"{net}.final_layer.linear": (channels, width)}
    layers |= {f"{net}.final_layer.adaLN_modulation.1": (2 * width, width)}
    for index in range(config["gdm_d"]):
        block = f"{net}.blocks.{index}"
        layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        layers |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        layers[f"{block}.adaLN_modulation.1"] = (6 * width, width)
    return shapes | _linear(layers)
