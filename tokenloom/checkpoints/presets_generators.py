"""Published generators: family, official constructor arguments, sampling settings, licence. Data only."""

from __future__ import annotations

from typing import Any

from tokenloom.checkpoints._preset import SCALES_256, UNSTATED, VAR_VAE, Config, Preset

_SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_PLAIN = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


def _scale_models() -> dict[str, Preset]:
    """VAR and MVAR."""

    def config(depth: int, scales: tuple[int, ...] = SCALES_256, **more: Any) -> Config:
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
        made[f"var_d{depth}.pth"] = Preset("var", config(depth), "MIT", fid, count, beside=VAR_VAE)
    large = config(36, _SCALES_512, shared_aln=True)
    made["var_d36.pth"] = Preset("var", large, "MIT", fid, "2.3B", beside=VAR_VAE, note="512 pixels")
    rows: tuple[tuple[str, int, float, int, float], ...] = (
        ("mvar-d16.pth", 16, 2.7, 1200, 0.99),
        ("mvar-finetune-d16.pth", 16, 2.0, 900, 0.96),
        ("mvar-finetune-d20.pth", 20, 1.5, 900, 0.96),
        ("mvar-finetune-d24.pth", 24, 1.4, 900, 0.96),
    )
    for name, depth, cfg, top_k, top_p in rows:
        values: Config = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
        near = config(depth, kernel_size=7, refine_step=8)
        made[name] = Preset("mvar", near, "MIT", values, beside=VAR_VAE)
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
            "par", config, UNSTATED, {"cfg_scale": scale, **_PLAIN}, note="384 pixels"
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
            "xar", config, UNSTATED, {"cfg": cfg, "num_steps": steps}, count, note="latents of kl16.ckpt"
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
        dit |= {"cond_scale": 8, "ratio": 4, "two_diffloss": True, "cos": True}
        values = {"cfg": cfg, "re_cfg": re_cfg, "num_iter": steps}
        made[f"Hi-MAR-{size}"] = Preset("himar", {**config, **dit}, UNSTATED, values, count)
    return made


GENERATORS: dict[str, Preset] = {
    **_scale_models(),
    **_llamagen(),
    **_nar(),
    **_par_and_dar(),
    **_nbp(),
    **_continuous(),
}
"""Official file name, or name of the repository, folder or model where files have no telling names -> preset."""
