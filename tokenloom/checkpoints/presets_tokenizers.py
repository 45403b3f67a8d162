"""Published tokenizers: family, official constructor arguments, range of pixels, licence. Data only."""

from __future__ import annotations

from typing import Any

from tokenloom.checkpoints._preset import SCALES_256, VAR_VAE, Config, Preset

_SIGNED, _UNSIGNED = (-1.0, 1.0), (0.0, 1.0)


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
    var["v_patch_nums"] = list(SCALES_256)
    made[VAR_VAE] = Preset("var_vq", var, "MIT", parameters="108.9M", pixel_range=_SIGNED)
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
            parameters="110M",
            pixel_range=_SIGNED,
            note="scales of a square of 1024 pixels; the first 7 are those of 256, the first 10 those of 512",
        )
    return made


def _lines(tokens: int, encoder: str, decoder: str, codes: int, size: int, **more: Any) -> Config:
    """Settings of TiTok's kind: those of "model.vq_model" in the official files, and the side of the pictures."""
    names = {"s": "small", "b": "base", "l": "large"}
    sizes: Config = {"vit_enc_model_size": names[encoder], "vit_dec_model_size": names[decoder]}
    sizes |= {
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": tokens,
        "token_size": size,
    }
    return {**sizes, **({"codebook_size": codes} if codes else {}), "crop_size": 256, **more}


def _titok() -> dict[str, Preset]:
    """TiTok and TA-TiTok; their repositories are called so, the files in them model.safetensors."""
    made = {}

    def add(name: str, values: Config, count: str = "", family: str = "titok") -> None:
        made[name] = Preset(family, values, "Apache-2.0", parameters=count, pixel_range=_UNSIGNED)

    old: Config = {"use_l2_norm": True, "commitment_cost": 0.25, "finetune_decoder": True, "is_legacy": True}
    new: Config = {"finetune_decoder": False, "is_legacy": False}
    vq: Config = {**new, "quantize_mode": "vq", "use_l2_norm": False, "commitment_cost": 0.25}
    vae: Config = {**new, "quantize_mode": "vae"}
    text: Config = {"text_context_length": 77, "text_embed_dim": 768}
    for size, tokens, count in (("l", 32, "641M"), ("b", 64, "205M"), ("s", 128, "84M")):
        add(f"tokenizer_titok_{size}{tokens}_imagenet", _lines(tokens, size, size, 4096, 12, **old), count)
    for sizes, tokens, count in (("bl", 64, ""), ("bl", 128, "390M"), ("sl", 256, "330M")):
        add(
            f"tokenizer_titok_{sizes}{tokens}_vq8k_imagenet",
            _lines(tokens, sizes[0], sizes[1], 8192, 64, **vq),
            count,
        )
    for sizes, tokens in (("ll", 32), ("bl", 64), ("bl", 128)):
        add(
            f"tokenizer_titok_{sizes}{tokens}_vae_c16_imagenet",
            _lines(tokens, sizes[0], sizes[1], 0, 16, **vae),
        )
    for tokens in (32, 64, 128):
        values = _lines(tokens, "b", "l", 8192, 64, **{**vq, "clustering_vq": True, **text})
        add(f"tokenizer_tatitok_bl{tokens}_vq", values, family="tatitok")
    for sizes, tokens in (("bl", 32), ("bl", 64), ("sl", 128)):
        values = _lines(tokens, sizes[0], sizes[1], 0, 16, **{**vae, **text})
        add(f"tokenizer_tatitok_{sizes}{tokens}_vae", values, family="tatitok")
    return made


def _other_pictures() -> dict[str, Preset]:
    """HiMTok, and the tokenizers of D-AR and NBP."""
    made = {}
    himtok = _lines(32, "l", "l", 1024, 12, use_l2_norm=True, commitment_cost=0.01, is_legacy=True)
    made["himtok.pth"] = Preset("himtok", himtok, "Apache-2.0", {}, "644M", _UNSIGNED)
    painter: Config = {"in_dim": 3, "out_dim": 3, "dim": 768, "cond_dim": 768, "patch_size": 8, "depth": 12}
    painter |= {"data_std": 0.6, "time_shift": 2, "mlp_head": False, "share_time_encoding": False}
    dar: Config = {"encoder_patch_size": 16, "num_encoder_layers": 8, "num_decoder_layers": 8}
    dar |= {"query_low_rank": True, "encoder_dim": 768, "decoder_dim": 768}
    dar |= {"vq_dim": 8, "vq_codebook_size": 16384, "vq_enable": True, "sampling_resolution": 256}
    dar |= {"num_denoising_steps": 8, "num_query_groups": 8, "num_all_queries": 256, "queries_per_step": 32}
    dar["diff_decoder"] = {**painter, "repa_layer": 8}
    made["D-AR-tokenizer_v1.pt"] = Preset(
        "dar_tokenizer",
        dar,
        "MIT",
        parameters="307.4M",
        pixel_range=_SIGNED,
        note="published as 300M: without the layers that align features in training",
    )
    video: Config = {"width_divisor": 1, "norm_groups": 32, "blocks": 4, "image_size": 128, "frames": 17}
    for data in ("ucf", "k600"):
        made[f"NBP-tokenizer-{data}"] = Preset(
            "nbp_video", {**video, "fsq_levels": [8, 8, 8, 5, 5, 5]}, "MIT", pixel_range=_UNSIGNED
        )
    return made


def _audio() -> dict[str, Preset]:
    """DAC under its own names and under those of transformers; EnCodec and Mimi of transformers."""
    made = {}
    rates: dict[str, tuple[int, list[int], int, str, tuple[str, ...]]] = {
        "44": (44100, [2, 4, 8, 8], 9, "76.6M", ("weights_44khz_8kbps_0.0.1.pth",)),
        "24": (24000, [2, 4, 5, 8], 32, "74.7M", ("weights_24khz.pth", "weights_24khz_8kbps_0.0.4.pth")),
        "16": (16000, [2, 4, 5, 8], 12, "74.1M", ("weights_16khz.pth", "weights_16khz_8kbps_0.0.5.pth")),
    }
    for size, (rate, strides, books, count, names) in rates.items():
        sizes: Config = {"n_codebooks": books, "codebook_size": 1024, "codebook_dim": 8}
        own: Config = {"encoder_dim": 64, "encoder_rates": strides, "decoder_dim": 1536}
        own |= {"decoder_rates": strides[::-1], "sample_rate": rate, "quantizer_dropout": 0.5}
        for name in names:
            made[name] = Preset("dac_original", {**own, **sizes}, "MIT", {}, count)
        hub: Config = {"encoder_hidden_size": 64, "decoder_hidden_size": 1536, "sampling_rate": rate}
        made[f"dac_{size}khz"] = Preset(
            "dac", {**hub, **sizes, "downsampling_ratios": strides}, "MIT", note="the folder of transformers"
        )
    mimi: Config = {
        "hidden_size": 512,
        "num_filters": 64,
        "upsampling_ratios": [8, 6, 5, 4],
        "sliding_window": 250,
    }
    mimi |= {"codebook_size": 2048, "codebook_dim": 256, "num_quantizers": 32, "num_semantic_quantizers": 1}
    made["mimi"] = Preset("mimi", mimi, "CC-BY-4.0", {}, "79.3M")
    encodec: Config = {"num_filters": 32, "hidden_size": 128, "upsampling_ratios": [8, 5, 4, 2]}
    encodec |= {
        "codebook_size": 1024,
        "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
        "sampling_rate": 24000,
    }
    made["encodec_24khz"] = Preset("encodec", encodec, "CC-BY-NC-4.0 (of audiocraft's weights)", {}, "14.9M")
    return made


TOKENIZERS: dict[str, Preset] = {
    **_convolutional(),
    **_titok(),
    **_other_pictures(),
    **_audio(),
}
"""Official file name, or name of the repository or folder where files have no telling names -> preset."""
