"""Official tokenizers with a flow: every recorded tensor of FlexTok and D-AR, and the way back to official names."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from golden_tokenizers import near as nearly
from golden_tokenizers import read
from torch import Tensor

from tokenloom import ImageFlexTokenizer, ImageStepTokenizer, TokenloomError
from tokenloom.checkpoints import dar_tokenizer, flextok, from_official, to_official
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers.flex import DecoderConfig, FlexDecoder, FlexEncoder, StackConfig
from tokenloom.tokenizers.flow import make_levels

FAMILIES = ("dar_tokenizer", "flextok")
NO_EFFECT = r"(decoder_layers.*\.attention|.*\.cross_attn)\.k_norm\.bias"  # a constant in all keys, which softmax does not see
TINY = {"width": 16, "depth": 1, "heads": 2}
near = partial(nearly, tolerance=2e-5)


@lru_cache
def build(family: str) -> Any:
    config, state, _ = read(family)
    return from_official(family, state, config)


def spread(module: torch.nn.Module) -> None:
    """Fills every weight with noise, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(3)
    for value in module.state_dict().values():
        value.copy_(0.2 * torch.randn(value.shape, generator=generator))


# ---- FlexTok -----------------------------------------------------------------------------------------------------------


def test_flextok_codes():
    tokenizer, (_, _, values) = build("flextok"), read("flextok")
    latents = values["input.vae_latents"]
    assert torch.equal(tokenizer.encode(latents), values["output.tokens"])
    near(tokenizer.features(latents), values["output.fsq_input"])
    near(tokenizer.quantize(latents).z_q, values["output.quantized"])
    near(tokenizer.quantizer.decode(values["output.tokens"]), values["output.codes_from_tokens"])
    assert torch.equal(tokenizer.encode(latents, num_tokens=5), values["output.tokens"][:, :5])


@torch.no_grad()
def test_flextok_velocities_and_loss():
    tokenizer, (config, _, values) = build("flextok"), read("flextok")
    decoder, z_q = tokenizer.decoder, values["output.quantized"]
    noise, times = values["input.noise"], values["input.timesteps"]
    kept = decoder.registers(z_q, torch.tensor(config["keep_k"]))
    near(decoder.velocity(noise, times, decoder.registers(z_q, None)), values["output.velocity"])
    near(decoder.velocity(noise, times, kept), values["output.velocity_keep"])
    near(decoder.velocity(noise, times, decoder.no_registers(2)), values["output.velocity_null"])
    dropped = decoder.registers(z_q, None, torch.tensor([True, False]))
    near(decoder.velocity(noise, times, dropped)[:1], values["output.velocity_null"][:1])
    near(decoder.velocity(noise, times, dropped)[1:], values["output.velocity"][1:])
    noisy, velocity, loss = tokenizer.flow(values["input.vae_latents"], z_q, times, noise)
    near(noisy, values["output.train.noised"])
    near(velocity, values["output.train.velocity"])
    near(loss, values["output.train.flow_loss"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sample", {}),
        ("sample_cfg", {"guidance": 2.5}),
        ("sample_apg", {"guidance": 7.5, "projected": True}),
    ],
)
def test_flextok_samples(name, options):
    tokenizer, (_, _, values) = build("flextok"), read("flextok")
    got = tokenizer.decode(values["output.tokens"], steps=4, noise=values["input.noise"], **options)
    near(got, values[f"output.{name}"])


def test_flextok_samples_of_prefixes():
    tokenizer, (config, _, values) = build("flextok"), read("flextok")
    for index, count in enumerate(config["keep_k"]):
        here = slice(index, index + 1)
        codes, noise = values["output.tokens"][here, :count], values["input.noise"][here]
        got = tokenizer.decode(codes, steps=3, guidance=7.5, projected=True, noise=noise)
        near(got, values["output.sample_truncated"][here])


def test_flextok_positions_are_the_published_ones():
    _, state, _ = read("flextok")
    fresh = ImageFlexTokenizer(
        [24, 32], table=16, patch=2, encoder_config=TINY | {"width": 32}, decoder_config=TINY | {"width": 48}
    )
    near(fresh.encoder.table, state["encoder.module_dict.enc_posemb_module.posembs"][0])
    near(fresh.decoder.table, state["decoder.module_dict.dec_patches_posemb_module.posembs"][0])


FLEX_FORMS: list[dict[str, Any]] = [
    {"modulations": 1, "head_modulation": False, "mask": "full"},
    {"positions": False, "null": False, "mask": "causal", "frequencies": 31},
]


@pytest.mark.parametrize("form", FLEX_FORMS, ids=["shared modulation", "no positions"])
@pytest.mark.parametrize("mask", ["full", "causal", "registers"])
def test_flextok_forms_follow_from_the_weights(form, mask):
    module = ImageFlexTokenizer(
        [8, 12],
        registers=6,
        patch=2,
        channels=5,
        table=7,
        encoder_config=TINY | {"mask": mask},
        decoder_config=TINY | {"width": 24, "depth": 2, "heads": 3} | form,
        quantizer_options={"levels": [5, 4]},
        sampling={"clamp": False},
    ).eval()
    spread(module)
    state = flextok.to_official("flextok", module)
    names = {"registers": "causal_last", "full": "full", "causal": "causal"}
    config = {
        "head_dim": 8,
        "patch": 2,
        "fsq_levels": [5, 4],
        "enc_mask_mode": names[mask],
        "dec_mask_mode": names[form["mask"]],
        "latent_hw": [8, 12],
    }
    again = from_official("flextok", state, config)
    media = torch.randn(2, 5, 8, 12, generator=torch.Generator().manual_seed(1))
    assert isinstance(again, ImageFlexTokenizer)
    assert torch.equal(again.features(media), module.features(media))
    codes = module.encode(media)
    for options in ({}, {"guidance": 3.0}, {"steps": 2}):
        assert torch.equal(again.decode(codes, **options), module.decode(codes, **options))
    nested = {
        "encoder": {
            "_target_": "x",
            "module_dict": {
                "enc_transformer": {"head_dim": 8},
                "enc_patch_emb": {"patch_sizes": [2, 2]},
                "enc_seq_packer": {"mask_mode": names[mask]},
            },
        },
        "decoder": {"module_dict": {"dec_seq_packer": {"mask_mode": names[form["mask"]]}}},
        "regularizer": {"levels": [5, 4]},
    }
    hub = from_official("flextok", state, nested)
    assert torch.equal(hub.decode(codes, size=(8, 12)), module.decode(codes))
    assert hub.image_size == 14  # the whole table


def test_flextok_with_its_autoencoder():
    vae = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.7,
    }
    torch.manual_seed(0)
    module = ImageFlexTokenizer(
        16, 4, 2, encoder_config=TINY, decoder_config=TINY, sampling={"clamp": False}, vae_config=vae
    ).eval()
    state = flextok.to_official("flextok", module)
    assert "vae.vae.decoder.conv_in.weight" in state
    config = {
        "head_dim": 8,
        "patch": 2,
        "fsq_levels": [8, 8, 8, 5, 5, 5],
        "norm_num_groups": 4,
        "vae": {"scaling_factor": 0.7},
    }
    again = from_official("flextok", state, config)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(again.features(pixels), module.features(pixels))
    assert torch.equal(again.reconstruct(pixels), module.reconstruct(pixels))
    assert again.image_size == 16


# ---- D-AR --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dar_codes_and_condition():
    tokenizer, (_, _, values) = build("dar_tokenizer"), read("dar_tokenizer")
    pixels, codes = values["input.image"], values["output.tokens"]
    assert torch.equal(tokenizer.encode(pixels), codes)
    near(tokenizer.quantize(pixels).z_q, values["output.quantized"].squeeze(2).transpose(1, 2))
    condition = tokenizer.conditioner(tokenizer.quantizer.decode(codes))
    near(condition, values["output.condition"])
    velocity, features = tokenizer.painter(values["input.x_t"], values["input.time"], condition[:, :4])
    near(velocity, values["output.velocity"])
    near(features, values["output.repa_features"])


def test_dar_samples_and_preview():
    tokenizer, (_, _, values) = build("dar_tokenizer"), read("dar_tokenizer")
    codes, noise = values["output.tokens"], values["input.noise"]
    near(1 - torch.tensor(make_levels(4, 2.0)), values["output.schedule"])
    near(tokenizer.decode(codes, noise=noise), values["output.reconstruction"])
    near(tokenizer.decode(codes, order=1, noise=noise), values["output.reconstruction_euler"])
    near(tokenizer.decode(codes[:, :8], noise=noise), values["output.reconstruction_2_steps"])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_dar_forms_follow_from_the_weights(shared, rank):
    module = ImageStepTokenizer(
        [8, 16],
        registers=7,
        steps=5,
        groups=3,
        group_size=2,
        encoder_config=TINY | {"patch": 4, "rank": rank},
        condition_config=TINY | {"width": 24, "depth": 0 if shared else 2, "heads": 3},
        painter_config=TINY
        | {"patch": 2, "shift": 1.5, "deviation": 0.4, "shared_time": shared, "modulated_head": shared},
        quantizer_options={"codebook_size": 9, "dim": 5},
        rows=11,
        clamp=False,
    ).eval()
    spread(module)
    state = dar_tokenizer.to_official("dar_tokenizer", module)
    config = {
        "head_dim": 8,
        "num_all_queries": 7,
        "num_denoising_steps": 5,
        "num_query_groups": 3,
        "queries_per_step": 2,
        "sampling_resolution": 8,
        "diff_decoder": {"data_std": 0.4, "time_shift": 1.5, "repa_layer": 0},
    }
    again = from_official("dar_tokenizer", {"model": state}, config)  # type: ignore[dict-item]
    assert isinstance(again, ImageStepTokenizer)
    media = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = module.encode(media)
    assert torch.equal(again.features(media), module.features(media))
    assert torch.equal(again.decode(codes, size=(8, 16)), module.decode(codes))


def test_dar_published_size():
    """300 million."""
    stack = {"width": 768, "depth": 8, "heads": 12}
    with torch.device("meta"):
        module = ImageStepTokenizer(
            256,
            256,
            encoder_config=stack | {"patch": 16},
            condition_config=stack,
            painter_config=stack | {"depth": 12, "align_width": 2048},
            rows=1024,
        )
    assert sum(value.numel() for value in module.parameters()) / 1e6 == pytest.approx(300, rel=0.03)


@pytest.mark.parametrize(("encoder", "decoder", "total"), [(12, 12, 0.34), (18, 18, 0.94), (18, 28, 2.53)])
def test_flextok_published_sizes(encoder, decoder, total):
    """Billions of weights, with the 83.8 million of the autoencoder."""
    with torch.device("meta"):
        parts = [
            FlexEncoder(StackConfig(width=64 * encoder, depth=encoder, heads=encoder), 16, 2, 16, 256, 6),
            FlexDecoder(DecoderConfig(width=64 * decoder, depth=decoder, heads=decoder), 16, 2, 16, 256, 6),
        ]
    count = sum(value.numel() for part in parts for value in part.parameters())
    assert count / 1e9 + 0.0838 == pytest.approx(total, rel=0.02)


# ---- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_exact(family):
    _, state, _ = read(family)
    official = to_official(build(family))
    assert official.keys() == state.keys()
    assert all(torch.equal(official[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_used(family):
    """Shifts the numbers of each tensor by one place and looks for an output that moves."""
    config, state, values = read(family)
    media = values["input.vae_latents" if family == "flextok" else "input.image"][:1]
    codes, noise = values["output.tokens"][:1], values["input.noise"][:1]
    options = {"steps": 1, "guidance": 2.0} if family == "flextok" else {}
    prefix = codes[:, :-1]

    @torch.no_grad()
    def outputs(tokenizer: Any) -> list[Tensor]:
        painted = [tokenizer.decode(part, noise=noise, **options) for part in (codes, prefix)]
        if family == "dar_tokenizer":
            condition = tokenizer.conditioner(tokenizer.quantizer.decode(codes))[:, :4]
            painted.append(tokenizer.painter(noise, torch.zeros(1), condition)[1])
        return [tokenizer.features(media), *painted]

    wanted = outputs(build(family))
    for name, value in state.items():
        if name == "quantize.codebook_used" or re.match(NO_EFFECT, name):
            continue
        changed = from_official(family, state | {name: value.flatten().roll(1).view_as(value) + 0.05}, config)
        moved = max(float((a - b).abs().max()) for a, b in zip(outputs(changed), wanted, strict=True))
        assert moved > 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_all_named(family):
    config, state, _ = read(family)
    prefix = "decoder.module_dict.dec_to_patches.proj" if family == "flextok" else "diff_decoder.net.cond_mlp"
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): extra\."):
        from_official(family, state | {"extra": torch.zeros(1)}, config)
    with pytest.raises(TokenloomError, match=r"Missing keys \(2\)"):
        from_official(family, {k: v for k, v in state.items() if not k.startswith(prefix)}, config)
    with pytest.raises(TokenloomError, match="Shapes do not fit"):
        from_official(family, state | {f"{prefix}.bias": torch.zeros(5)}, config)
    with pytest.raises(TokenloomError, match="needs"):
        from_official(family, state, {"dar": {"diff_decoder": {}}} if "dar" in config else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_official_tokenizers_keep_the_contract(family):
    _, _, values = read(family)
    media = values["input.vae_latents" if family == "flextok" else "input.image"]
    ran = check_tokenizer(build(family), torch.cat([media, media[:1].flip(-1)]).clamp(-1, 1))
    assert {"batch", "save and load", "bad codes"} <= set(ran)
