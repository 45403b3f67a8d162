"""Tokenizers of the sizes that the official constructor's arguments say, by classes of ours: their official names are taken from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokenloom import (
    HubAudioTokenizer,
    ImageCNNTokenizer,
    ImageLineTokenizer,
    ImageScaleTokenizer,
    ImageStepTokenizer,
    MaskTokenizer,
)

Config = Mapping[str, Any]
_WIDTHS = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads of TiTok's sizes."""
_PIXEL = {"channels": 128, "multipliers": [1, 1, 2, 2, 4], "blocks": 2}
"""The second stage of TiTok and HiMTok, which no argument sets."""


def _llamagen(config: Config) -> nn.Module:
    return ImageCNNTokenizer(
        config["image_size"],
        config["ch"],
        config["ch_mult"],
        config["num_res_blocks"],
        config["z_channels"],
        config["norm_groups"],
        quantizer_options={"codebook_size": config["codebook_size"], "dim": config["codebook_embed_dim"]},
    )


def _maskgit(config: Config) -> nn.Module:
    return ImageCNNTokenizer(
        config["image_size"],
        config["ch"],
        config["ch_mult"],
        config["blocks"],
        None,
        config["norm_groups"],
        form="maskgit",
        quantizer_options={"codebook_size": config["codebook"], "dim": config["z"]},
    )


def _var(config: Config) -> nn.Module:
    module: Any = ImageScaleTokenizer(
        config["v_patch_nums"],
        config["ch"],
        config["ch_mult"],
        config["num_res_blocks"],
        config["z_channels"],
        config["norm_groups"],
        quantizer_options={"codebook_size": config["vocab_size"], "dim": config["z_channels"]},
        pyramid_options={"phis": config["share_quant_resi"]},
    )
    module.official_phis = [f"quant_resi.qresi_ls.{index}" for index in range(config["share_quant_resi"])]
    module.official_counts = torch.empty(len(config["v_patch_nums"]), config["vocab_size"], device="meta")
    return module


def _infinity(config: Config) -> nn.Module:
    module: Any = ImageScaleTokenizer(
        [entry[1:] for entry in config["scale_schedule"]],
        config["base_ch"],
        config["ch_mult"],
        config["num_res_blocks"],
        config["codebook_dim"],
        config["norm_groups"],
        form="flux",
        project=0,
        quantizer_type="bsq",
        quantizer_options={"dim": config["codebook_dim"]},
        pyramid_options={"phis": 0, "up": "bilinear"},
    )
    module.official_phis, module.official_bare, module.official_masks = [], [], []
    return module


def _half(config: Config, side: str, patch: int) -> dict[str, int]:
    width, depth, heads = _WIDTHS[config[f"vit_{side}_model_size"]]
    return {"width": width, "depth": depth, "heads": heads, "patch": patch}


def _titok(config: Config) -> nn.Module:
    legacy, vae = config["is_legacy"], config.get("quantize_mode") == "vae"
    options = {"dim": config["token_size"]} | ({} if vae else {"codebook_size": config["codebook_size"]})
    text = (
        {"features": config["text_embed_dim"], "length": config["text_context_length"]}
        if "text_embed_dim" in config
        else None
    )
    module: Any = ImageLineTokenizer(
        config["crop_size"],
        config["num_latent_tokens"],
        _half(config, "enc", config["vit_enc_patch_size"]),
        _half(config, "dec", config["vit_dec_patch_size"]),
        "kl" if vae else "vq",
        options,
        {"codebook_size": 1024, "latent_channels": 256, **_PIXEL} if legacy else None,
        text,
        scrambled=legacy,
    )
    if config.get("clustering_vq"):
        module.official_used = torch.empty(config["codebook_size"], device="meta")
    return module


def _himtok(config: Config) -> nn.Module:
    return MaskTokenizer(
        config["crop_size"],
        config["num_latent_tokens"],
        _half(config, "enc", config["vit_enc_patch_size"]),
        _half(config, "dec", config["vit_dec_patch_size"]),
        {"codebook_size": config["codebook_size"], "dim": config["token_size"], "frozen": False},
        {**_PIXEL, "latent": 1024},
        channels=3,
        blank_codes=False,
    )


def _dar(config: Config) -> nn.Module:
    painter = config["diff_decoder"]
    return ImageStepTokenizer(
        image_size=config["sampling_resolution"],
        registers=config["num_all_queries"],
        steps=config["num_denoising_steps"],
        groups=config["num_query_groups"],
        group_size=config["queries_per_step"],
        encoder_config={
            "width": config["encoder_dim"],
            "depth": config["num_encoder_layers"],
            "heads": config["encoder_dim"] // 64,
            "patch": config["encoder_patch_size"],
            "rank": 8,
        },
        condition_config={
            "width": config["decoder_dim"],
            "depth": config["num_decoder_layers"],
            "heads": config["decoder_dim"] // 64,
        },
        painter_config={
            "width": painter["dim"],
            "depth": painter["depth"],
            "heads": painter["dim"] // 64,
            "patch": painter["patch_size"],
            "align_layer": painter["repa_layer"],
            "align_width": 2048,
            "align_features": 768,
            "shared_time": painter["share_time_encoding"],
            "modulated_head": painter["mlp_head"],
        },
        quantizer_options={"codebook_size": config["vq_codebook_size"], "dim": config["vq_dim"]},
        rows=1024,
    )


def _dac(config: Config) -> nn.Module:
    names = {"encoder_dim": "encoder_hidden_size", "decoder_dim": "decoder_hidden_size"}
    names |= {"encoder_rates": "downsampling_ratios", "sample_rate": "sampling_rate"}
    names |= {"n_codebooks": "n_codebooks", "codebook_size": "codebook_size", "codebook_dim": "codebook_dim"}
    options = {ours: config[name] for name, ours in names.items()}
    return HubAudioTokenizer("dac", options, weight_norm=True)


MAKERS: dict[str, Any] = {
    "dac": lambda config: HubAudioTokenizer("dac", dict(config)),
    "dac_original": _dac,
    "dar_tokenizer": _dar,
    "encodec": lambda config: HubAudioTokenizer("encodec", dict(config)),
    "himtok": _himtok,
    "infinity_bsq": _infinity,
    "llamagen_vq": _llamagen,
    "maskgit_vqgan": _maskgit,
    "mimi": lambda config: HubAudioTokenizer("mimi", dict(config)),
    "tatitok": _titok,
    "titok": _titok,
    "var_vq": _var,
}
"""Family -> a tokenizer of ours of the sizes of official arguments."""
HUB = ("dac", "encodec", "mimi")
"""Families that transformers builds and loads."""
