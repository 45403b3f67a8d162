"""Published checkpoint files: family, official constructor arguments, sampling settings, licence.

A preset is found by the official file name, or by the name of the repository or folder where files are called
`model.safetensors` or the like. Settings are those of the official scripts, in their own terms. Data only: knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenloom.errors import unknown_name

Config = dict[str, Any]

_UNSTATED = "none stated by the publisher: ask before you use or pass on these weights"
_APPLE = "Apple Machine Learning Research Model licence: research only"
_SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_VAR_VAE = "vae_ch160v4096z32.pth"
_PLAIN = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
_SIGNED, _UNSIGNED = (-1.0, 1.0), (0.0, 1.0)


NUCLEUS = {"mvar": "ascending", "var": "ascending"}
"""Where top-p cuts, as `Sampling.nucleus` calls it; families that are not here cut "descending"."""


@dataclass(frozen=True)
class Preset:
    """What is known of a published file.

    Attributes:
        family: Name that `from_official` takes.
        config: The official constructor's arguments.
        licence: Of the weights.
        sampling: Settings of the official sampler, in its own terms; `official_guidance` translates them.
        parameters: Number of parameters as published or computed from the official code ("310.3M"); "" if not known.
        pixel_range: Lowest and highest value of a pixel that a tokenizer takes.
        beside: Another official file that is needed with it.
        note: What else to know.
    """

    family: str
    config: Mapping[str, Any]
    licence: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    parameters: str = ""
    pixel_range: tuple[float, float] | None = None
    beside: str = ""
    note: str = ""


def _scale_models() -> dict[str, Preset]:
    """VAR and MVAR."""

    def config(depth: int, scales: tuple[int, ...] = _SCALES_256, **more: Any) -> Config:
        sizes: Config = {
            "depth": depth,
            "embed_dim": 64 * depth,
            "num_heads": depth,
            "patch_nums": list(scales),
        }
        tokenizer: Config = {"vocab_size": 4096, "Cvae": 32, "share_quant_resi": 4, "quant_resi": 0.5}
        rest: Config = {"num_classes": 1000, "mlp_ratio": 4.0, "norm_eps": 1e-6, "attn_l2_norm": True}
        return {**sizes, **tokenizer, **rest, "shared_aln": False, **more}

    fid: Config = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    made = {}
    for depth, count in ((16, "310.3M"), (20, "0.6B"), (24, "1.0B"), (30, "2.0B")):
        made[f"var_d{depth}.pth"] = Preset("var", config(depth), "MIT", fid, count, beside=_VAR_VAE)
    large = config(36, _SCALES_512, shared_aln=True)
    made["var_d36.pth"] = Preset("var", large, "MIT", fid, "2.3B", beside=_VAR_VAE, note="512 pixels")
    rows: tuple[tuple[str, int, float, int, float], ...] = (
        ("mvar-d16.pth", 16, 2.7, 1200, 0.99),
        ("mvar-finetune-d16.pth", 16, 2.0, 900, 0.96),
        ("mvar-finetune-d20.pth", 20, 1.5, 900, 0.96),
        ("mvar-finetune-d24.pth", 24, 1.4, 900, 0.96),
    )
    for name, depth, cfg, top_k, top_p in rows:
        values: Config = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
        near = config(depth, kernel_size=7, refine_step=8)
        made[name] = Preset("mvar", near, "MIT", values, beside=_VAR_VAE)
    return made


_GPT: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "M": (18, 16, 1024),
    "L": (24, 16, 1024),
    "LP": (30, 20, 1280),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}
"""Layers, heads and width of the transformers of LlamaGen, NAR and PAR."""


def _gpt(size: str, block_size: int, **more: Any) -> Config:
    layers, heads, width = _GPT[size]
    sizes: Config = {"n_layer": layers, "n_head": heads, "dim": width, "block_size": block_size}
    classes: Config = {"vocab_size": 16384, "num_classes": 1000, "cls_token_num": 1, "model_type": "c2i"}
    return {**sizes, **classes, "class_dropout_prob": 0.1, "multiple_of": 256, **more}


_CAPTIONS = {"model_type": "t2i", "cls_token_num": 120, "caption_dim": 2048}


def _llamagen() -> dict[str, Preset]:
    made = {}
    rows = {
        "B": ((256, 384), 2.0, "110.9M"),
        "L": ((256, 384), 2.0, "342.9M"),
        "XL": ((384,), 1.75, "774.7M"),
        "XXL": ((384,), 1.75, "1411.0M"),
        "3B": ((384,), 1.65, "3096.7M"),
    }
    for size, (sides, scale, count) in rows.items():
        for side in sides:
            values: Config = {"cfg_scale": scale, **_PLAIN}
            config = _gpt(size, (side // 16) ** 2)
            made[f"c2i_{size}_{side}.pt"] = Preset("llamagen", config, "MIT", values, count)
    for stage, side in ((1, 256), (2, 512)):
        values = {"cfg_scale": 7.5, **_PLAIN, "top_k": 1000}
        config = _gpt("XL", (side // 16) ** 2, **_CAPTIONS)
        made[f"t2i_XL_stage{stage}_{side}.pt"] = Preset("llamagen", config, "MIT", values, "777.7M")
    return made


def _nar() -> dict[str, Preset]:
    """NAR; its collection names no files here, so these are names of models."""
    made = {}
    text = "MIT (LlamaGen's text; nothing is stated about the weights)"
    sizes: Config = {"B": "130.6M", "M": "295.5M", "L": "372.5M", "XL": "816.0M", "XXL": "1464.5M"}
    for size, count in sizes.items():
        made[f"NAR-{size}"] = Preset(
            "nar", _gpt(size, 256, medusa_attention_num=1), text, _PLAIN, count, note="256 pixels"
        )
    for stage, side in ((1, 256), (2, 512)):
        config = _gpt("XL", (side // 16) ** 2, medusa_attention_num=1, **_CAPTIONS)
        made[f"NAR-XL-t2i-stage{stage}"] = Preset("nar", config, text, _PLAIN, "819.0M")
    clip: Config = {"vocab_size": 8192, "num_classes": 101, "latent_shape": [4, 16, 16], "max_seq_len": 1024}
    for size, count in {"L": "368.7M", "LP": "693.6M", "XL": "815.5M"}.items():
        made[f"NAR-video-{size}"] = Preset(
            "nar_video",
            _gpt(size, 1024, **clip),
            "MIT",
            {"cfg_scale": 1.25, **_PLAIN},
            count,
            note="cfg_scale 1.25 to 2.5",
        )
    return made


def _par_and_dar() -> dict[str, Preset]:
    made = {}
    rows = (("XL", 4, 1.5), ("XXL", 4, 1.435), ("3B", 4, 1.345), ("3B", 16, 1.5))
    for size, regions, scale in rows:
        config = _gpt(size, 576, ar_token_num=regions, spe_token_num=regions - 1)
        made[f"PAR-{size}-{regions}x.pt"] = Preset(
            "par", config, _UNSTATED, {"cfg_scale": scale, **_PLAIN}, note="384 pixels"
        )
    for size, count in {"L": "343M", "XL": "775M"}.items():
        made[f"D-AR-{size}-360K.pt"] = Preset(
            "dar", _gpt(size, 256), "MIT", {"cfg_scale": "1.2,8.0", **_PLAIN}, count
        )
    return made


def _nbp() -> dict[str, Preset]:
    made = {}
    rule: Config = {"top_k": 16000, "top_p": 0.9, "temperature": 1.0}
    for size, name, ucf, k600 in (("base", "base", "983M", "884M"), ("3b", "3b", "4.23B", "4.03B")):
        layers, heads, width = (24, 16, 1536) if size == "base" else (32, 32, 3072)
        shape: Config = {
            "n_layer": layers,
            "n_head": heads,
            "n_embd": width,
            "block_size": 5120,
            "num_tokens": 1280,
        }
        shape |= {"first_stage_vocab_size": 64000, "token_number_per_step": 16}
        hybrid: Config = {
            "class_cond_dim": 32000,
            "cond_token_num": 8,
            "hybrid": True,
            "starts_with_bov": True,
        }
        plain: Config = {"class_cond_dim": 0, "cond_token_num": 0, "hybrid": False, "starts_with_bov": False}
        made[f"ucf_{name}_nbp16_hybrid.ckpt"] = Preset("nbp", {**shape, **hybrid}, "MIT", rule, ucf)
        made[f"k600_{name}_nbp16.ckpt"] = Preset(
            "nbp", {**shape, **plain}, "MIT", rule, k600, note="continues 2 given latent frames"
        )
    return made


_MAE = {"B": (768, 12, 12), "L": (1024, 16, 16), "H": (1280, 20, 16)}
"""Width, depth of each half, and heads of MAR and Hi-MAR."""


def _continuous() -> dict[str, Preset]:
    """xAR, MAR and Hi-MAR: generators of continuous tokens."""
    made = {}
    latent: Config = {
        "img_size": 256,
        "vae_stride": 16,
        "patch_size": 1,
        "vae_embed_dim": 16,
        "class_num": 1000,
    }

    def halves(width: int, depth: int, heads: int) -> dict[str, int]:
        sizes: Config = {"embed_dim": width, "depth": depth, "num_heads": heads}
        return {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in sizes.items()}

    xar: tuple[tuple[str, int, int, int, float, int, str], ...] = (
        ("B", 768, 8, 12, 2.7, 40, "172.6M"),
        ("L", 1024, 16, 16, 2.3, 50, "608.4M"),
        ("H", 1280, 20, 16, 2.2, 50, "1186.0M"),
    )
    for size, width, depth, heads, cfg, steps, count in xar:
        config: Config = {**latent, **halves(width, depth, heads), "mlp_ratio": 4, "clusters": 4}
        made[f"xAR-{size}.pth"] = Preset(
            "xar", config, _UNSTATED, {"cfg": cfg, "num_steps": steps}, count, note="latents of kl16.ckpt"
        )
    nets = {"B": (6, 1024), "L": (8, 1280), "H": (12, 1536)}
    mar = {"B": ("base", 2.9, "208M"), "L": ("large", 3.0, "479M"), "H": ("huge", 3.2, "943M")}
    himar: dict[str, tuple[float, float, int, int, int, str]] = {
        "B": (2.5, 2.7, 4, 512, 8, "244M"),
        "L": (3.5, 3.5, 4, 512, 8, "529M"),
        "H": (3.2, 5.5, 12, 768, 12, "1090M"),
    }
    for size, (width, depth, heads) in _MAE.items():
        blocks, net = nets[size]
        config = {**latent, **halves(width, depth, heads), "mlp_ratio": 4, "buffer_size": 64}
        config |= {"diffloss_d": blocks, "diffloss_w": net, "num_sampling_steps": "100"}
        name, scale, count = mar[size]
        values: Config = {"cfg": scale, "num_iter": 256, "temperature": 1.0}
        made[f"mar_{name}"] = Preset("mar", config, "MIT", values, count)
        cfg, re_cfg, steps, width_dit, heads_dit, count = himar[size]
        dit: Config = {
            "gdm_d": blocks,
            "gdm_w": width_dit,
            "head": heads_dit,
            "global_dm": True,
            "cond_dim": 16,
        }
        dit |= {"cond_scale": 8, "ratio": 2, "two_diffloss": True, "cos": True}
        values = {"cfg": cfg, "re_cfg": re_cfg, "num_iter": steps}
        made[f"Hi-MAR-{size}"] = Preset("himar", {**config, **dit}, _UNSTATED, values, count)
    return made


def _convolutional() -> dict[str, Preset]:
    """Convolutional tokenizers of LlamaGen, VAR, MaskGIT and Infinity."""
    made = {}
    vq: Config = {
        "ch": 128,
        "num_res_blocks": 2,
        "z_channels": 256,
        "norm_groups": 32,
        "codebook_size": 16384,
    }
    vq |= {"codebook_embed_dim": 8, "codebook_l2_norm": True, "commit_loss_beta": 0.25, "image_size": 256}
    f16, f8 = {**vq, "ch_mult": [1, 1, 2, 2, 4]}, {**vq, "ch_mult": [1, 2, 2, 4]}
    files = {
        "vq_ds16_c2i.pt": (f16, "71.9M"),
        "vq_ds16_t2i.pt": (f16, "71.9M"),
        "vq_ds8_c2i.pt": (f8, "70.1M"),
    }
    for name, (config, count) in files.items():
        made[name] = Preset("llamagen_vq", config, "MIT", parameters=count, pixel_range=_SIGNED)
    var: Config = {
        "ch": 160,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "norm_groups": 32,
        "vocab_size": 4096,
    }
    var |= {"z_channels": 32, "quant_resi": 0.5, "share_quant_resi": 4, "beta": 0.25, "using_znorm": False}
    var["v_patch_nums"] = list(_SCALES_256)
    made[_VAR_VAE] = Preset("var_vq", var, "MIT", parameters="108.9M", pixel_range=_SIGNED)
    maskgit: Config = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "blocks": 2, "z": 256, "codebook": 1024}
    maskgit |= {"norm_groups": 32, "image_size": 256}
    made["maskgit-vqgan-imagenet-f16-256.bin"] = Preset(
        "maskgit_vqgan", maskgit, "Apache-2.0", pixel_range=_UNSIGNED
    )
    sides = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
    cnn: Config = {
        "base_ch": 128,
        "ch_mult": [1, 2, 4, 4, 4],
        "num_res_blocks": 2,
        "patch_size": 16,
        "norm_groups": 32,
    }
    cnn["scale_schedule"] = [[1, side, side] for side in sides]
    for name, bits in {"d16": 16, "d24": 24, "d32": 32, "d64": 64, "d32reg": 32}.items():
        made[f"infinity_vae_{name}.pth"] = Preset(
            "infinity_bsq",
            {**cnn, "codebook_dim": bits},
            "MIT",
            pixel_range=_SIGNED,
            note="scales of a square of 1024 pixels; the first 7 are those of 256, the first 10 those of 512",
        )
    return made


def _titok() -> dict[str, Preset]:
    made = {}
    names = {"s": "small", "b": "base", "l": "large"}

    def config(encoder: str, decoder: str, tokens: int, **more: Any) -> Config:
        shape: Config = {"encoder": names[encoder], "decoder": names[decoder], "num_latent_tokens": tokens}
        return {**shape, "patch": 16, "image_size": 256, **more}

    def add(name: str, values: dict[str, Any], count: str = "", family: str = "titok") -> None:
        made[name] = Preset(family, values, "Apache-2.0", parameters=count, pixel_range=_UNSIGNED)

    pixel: Config = {"codebook": 1024, "z": 256, "ch": 128, "blocks": 2}
    old: Config = {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "is_legacy": True}
    old |= {"finetune_decoder": True, "quantize_mode": "vq", "pixel": pixel}
    new: Config = {"use_l2_norm": False, "is_legacy": False, "finetune_decoder": False}
    vq: Config = {**new, "codebook_size": 8192, "token_size": 64, "quantize_mode": "vq"}
    vae: Config = {**new, "token_size": 16, "quantize_mode": "vae"}
    for size, tokens, count in (("l", 32, "641M"), ("b", 64, "205M"), ("s", 128, "84M")):
        add(f"tokenizer_titok_{size}{tokens}_imagenet", config(size, size, tokens, **old), count)
    for sizes, tokens, count in (("bl", 64, ""), ("bl", 128, "390M"), ("sl", 256, "330M")):
        add(f"tokenizer_titok_{sizes}{tokens}_vq8k_imagenet", config(sizes[0], sizes[1], tokens, **vq), count)
    for sizes, tokens in (("ll", 32), ("bl", 64), ("bl", 128)):
        add(f"tokenizer_titok_{sizes}{tokens}_vae_c16_imagenet", config(sizes[0], sizes[1], tokens, **vae))
    for tokens in (32, 64, 128):
        add(f"tokenizer_tatitok_bl{tokens}_vq", config("b", "l", tokens, **vq), family="tatitok")
    for sizes, tokens in (("bl", 32), ("bl", 64), ("sl", 128)):
        add(
            f"tokenizer_tatitok_{sizes}{tokens}_vae",
            config(sizes[0], sizes[1], tokens, **vae),
            family="tatitok",
        )
    return made


def _other_tokenizers() -> dict[str, Preset]:
    """FlexTok, HiMTok, D-AR's and NBP's tokenizers, DAC."""
    made = {}
    sizes: Config = {
        "d12_d12_in1k": (12, 12),
        "d18_d18_in1k": (18, 18),
        "d18_d28_in1k": (18, 28),
        "d18_d28_dfn": (18, 28),
    }
    for name, (encoder, decoder) in sizes.items():
        widths = {d: {12: 768, 18: 1152, 28: 1792}[d] for d in (encoder, decoder)}
        config: Config = {"enc_depth": encoder, "enc_dim": widths[encoder], "dec_depth": decoder}
        config |= {"dec_dim": widths[decoder], "head_dim": 64, "n_registers": 256, "latent_channels": 16}
        config |= {"patch": 2, "max_grid": 16, "fsq_levels": [8, 8, 8, 5, 5, 5], "adaln_expansion": 2}
        config |= {"enc_mask_mode": "causal_last", "head_adaln": True, "freq_dim": 256, "max_timestep": 1.0}
        made[f"flextok_{name}"] = Preset(
            "flextok",
            config,
            _APPLE,
            {"steps": 20, "cfg_scale": 7.5, "apg": True},
            pixel_range=_SIGNED,
            note="latents of flextok_vae_c16; compare with the config.json of the repository",
        )
    himtok: Config = {"width": 1024, "layers": 24, "heads": 16, "image_size": 256, "codebook_size": 1024}
    himtok |= {"token_size": 12, "num_latent_tokens": 32, "norm_groups": 32}
    himtok["pixel"] = {"z": 1024, "ch": 128, "blocks": 2}
    made["himtok.pth"] = Preset("himtok", himtok, "Apache-2.0", {}, "644M", _UNSIGNED)
    decoder_config: Config = {
        "in_dim": 3,
        "out_dim": 3,
        "dim": 768,
        "cond_dim": 768,
        "patch_size": 8,
        "depth": 12,
    }
    decoder_config |= {"data_std": 0.6, "time_shift": 2, "mlp_head": False, "share_time_encoding": False}
    dar: Config = {
        "encoder_patch_size": 16,
        "num_encoder_layers": 8,
        "num_decoder_layers": 8,
        "query_low_rank": True,
    }
    dar |= {"encoder_dim": 768, "decoder_dim": 768, "vq_dim": 8, "vq_codebook_size": 16384}
    dar |= {"num_denoising_steps": 8, "num_query_groups": 8, "num_all_queries": 256, "queries_per_step": 32}
    dar |= {"vq_enable": True, "sampling_resolution": 256, "diff_decoder": decoder_config}
    made["D-AR-tokenizer_v1.pt"] = Preset(
        "dar_tokenizer", {"max_queries": 1024, "head_dim": 64, "dar": dar}, "MIT", {}, "300M", _SIGNED
    )
    video: Config = {"width_divisor": 1, "norm_groups": 32, "blocks": 4, "image_size": 128, "frames": 17}
    for data in ("ucf", "k600"):
        made[f"NBP-tokenizer-{data}"] = Preset(
            "nbp_video", {**video, "fsq_levels": [8, 8, 8, 5, 5, 5]}, "MIT", pixel_range=_UNSIGNED
        )
    rates: dict[str, tuple[int, list[int], int, str]] = {
        "dac_44khz": (44100, [2, 4, 8, 8], 9, "76.6M"),
        "dac_24khz": (24000, [2, 4, 5, 8], 32, "74.7M"),
        "dac_16khz": (16000, [2, 4, 5, 8], 12, "74.1M"),
    }
    for name, (rate, strides, books, count) in rates.items():
        dac: Config = {
            "encoder_dim": 64,
            "encoder_rates": strides,
            "decoder_dim": 1536,
            "decoder_rates": strides[::-1],
        }
        dac |= {"n_codebooks": books, "codebook_size": 1024, "codebook_dim": 8, "sample_rate": rate}
        made[name] = Preset("dac_original", {"dac": dac}, "MIT", {}, count, note="the file weights*.pth")
    return made


PRESETS: dict[str, Preset] = {
    **_scale_models(),
    **_llamagen(),
    **_nar(),
    **_par_and_dar(),
    **_nbp(),
    **_continuous(),
    **_convolutional(),
    **_titok(),
    **_other_tokenizers(),
}
"""Official file name, or name of the repository, folder or model where files have no telling names -> preset."""


def preset(name: str) -> Preset:
    """The preset of an official file name or model.

    Raises:
        TokenloomError: For an unknown name, with the closest matches.

    Example:
        >>> preset("var_d16.pth").config["depth"]
        16
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def find_preset(path: Path) -> str | None:
    """The name of the preset that a file is called after: by its name, its name without ending, or its folder's."""
    found = (name for name in (path.name, path.stem, path.absolute().parent.name) if name in PRESETS)
    return next(found, None)
