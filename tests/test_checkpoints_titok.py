"""TiTok and TA-TiTok: published codes, posteriors, pictures and losses, and the way back to official names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_tokenizers import near, read
from torch import Tensor

from tokenloom import ImageLineTokenizer, Layout, TokenloomError
from tokenloom.checkpoints import from_official, to_official

FAMILY = {"titok_legacy": "titok", "titok_vq8k": "titok", "titok_vae": "titok", "tatitok_tiny": "tatitok"}


def build(name: str) -> tuple[ImageLineTokenizer, dict[str, Tensor]]:
    config, state, values = read(name)
    return from_official(FAMILY[name], state, config), values  # type: ignore[return-value]


def as_published(vectors: Tensor) -> Tensor:
    """(B, N, d) as (B, d, 1, N)."""
    return vectors.transpose(1, 2).unsqueeze(2)


@pytest.mark.parametrize("name", ["titok_legacy", "titok_vq8k"])
def test_published_codes_and_pictures(name):
    tokenizer, values = build(name)
    pixels, tokens = values["input.image"], values["output.tokens"]
    assert torch.equal(tokenizer.encode(pixels), tokens)
    near(tokenizer.decode(tokens), values["output.reconstruction"])
    near(tokenizer.reconstruct(pixels), values["output.reconstruction"])
    near(as_published(tokenizer.features(pixels)), values["output.z"])
    quantized = tokenizer.quantize(pixels)
    near(as_published(quantized.z_q), values["output.quantized"])
    near(tokenizer.map_vectors(quantized.z_q), values["output.decoder_out"])
    near(tokenizer(pixels)[0], values["output.reconstruction"])
    near(quantized.losses["codebook"], values["output.codebook_loss"])
    near(quantized.losses["commitment"], values["output.commitment_loss"])


def test_the_first_stage_of_two_is_trained_on_codes_of_a_grid_tokenizer():
    tokenizer, values = build("titok_legacy")
    logits = tokenizer.map_vectors(tokenizer.quantizer.decode(values["output.tokens"]))
    near(F.cross_entropy(logits, values["output.proxy_target"]), values["output.stage1_ce"])


def test_published_posterior():
    tokenizer, values = build("titok_vae")
    pixels = values["input.image"]
    near(as_published(tokenizer.features(pixels)), values["output.z"], 5e-4)
    posterior = tokenizer.posterior(pixels)
    near(as_published(posterior.mean), values["output.mean"], 5e-4)
    near(as_published(posterior.log_variance), values["output.logvar"], 5e-4)
    near(posterior.divergence(), values["output.kl"], 5e-4)
    sample = posterior.sample(values["input.posterior_noise"].squeeze(2).transpose(1, 2))
    near(as_published(sample), values["output.sample"], 5e-4)
    near(tokenizer.decode(sample), values["output.reconstruction"], 5e-4)
    near(tokenizer.reconstruct(pixels), values["output.reconstruction_mode"], 5e-4)
    assert torch.equal(tokenizer.encode(pixels), posterior.mean)


def test_text_helps_to_paint():
    tokenizer, values = build("tatitok_tiny")
    pixels, tokens, text = values["input.image"], values["output.tokens"], values["input.text_guidance"]
    assert torch.equal(tokenizer.encode(pixels), tokens)
    near(as_published(tokenizer.features(pixels)), values["output.z"])
    quantized = tokenizer.quantize(pixels)
    near(as_published(quantized.z_q), values["output.quantized"])
    near(quantized.losses["codebook"], values["output.codebook_loss"])
    near(quantized.losses["commitment"], values["output.commitment_loss"])
    near(tokenizer.decode(tokens, text), values["output.reconstruction"])
    near(tokenizer.reconstruct(pixels, text), values["output.reconstruction"])
    near(tokenizer(pixels, text)[0], values["output.reconstruction"])
    with pytest.warns(UserWarning, match="text features"):
        plain = tokenizer.decode(tokens)
    assert (plain - values["output.reconstruction"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILY)
def test_the_way_back_is_exact(name):
    tokenizer, _ = build(name)
    official, (_, state, _) = to_official(tokenizer), read(name)
    assert official.keys() == state.keys()
    assert all(torch.equal(official[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", FAMILY)
def test_every_weight_is_used(name):
    tokenizer, values = build(name)
    random = torch.Generator().manual_seed(3)
    shape = (1, tokenizer.registers, tokenizer.decoder.embed.in_features)
    vectors, text = torch.randn(shape, generator=random), values.get("input.text_guidance")
    text = None if text is None else text[:1]

    def outputs() -> tuple[Tensor, Tensor]:
        return tokenizer.features(values["input.image"][:1]), tokenizer.paint_vectors(vectors, text)

    with torch.no_grad():
        before = outputs()
        for key, weight in tokenizer.named_parameters():
            if not key.startswith("quantizer."):
                kept = weight.clone()
                weight += torch.randn(weight.shape, generator=random)
                assert any((a - b).abs().max() > 1e-4 for a, b in zip(outputs(), before, strict=True)), key
                weight.copy_(kept)


def test_sizes_follow_from_the_weights():
    tokenizer, values = build("tatitok_tiny")
    assert tokenizer.image_size == values["input.image"].shape[-1] == 48
    assert tokenizer.layout == Layout.line(6)
    assert tokenizer.text_size == (5, 20)
    shapes = [
        (part.blocks[0].attention.heads, len(part.blocks)) for part in (tokenizer.encoder, tokenizer.decoder)
    ]
    assert shapes == [(2, 2), (4, 3)]


def test_a_configuration_may_be_nested_as_published():
    config, state, values = read("titok_vq8k")
    names = {"quantize_mode", "use_l2_norm", "is_legacy"}
    inner = {name: config[name] for name in names}
    nested = {"model": {"vq_model": inner}, "dataset": {"preprocessing": {"crop_size": 64}}, "heads": 2}
    tokenizer = from_official("titok", {"model": state}, nested)  # type: ignore[dict-item]
    assert torch.equal(tokenizer.encode(values["input.image"]), values["output.tokens"])


def test_published_sizes_tell_the_heads():
    config, state, _ = read("titok_vq8k")
    del config["heads"]
    with pytest.raises(TokenloomError, match="add 'heads'"):
        from_official("titok", state, config)
    config |= {"encoder": "small", "vit_dec_model_size": "large"}
    tokenizer = from_official("titok", state, config)
    assert tokenizer.encoder.blocks[0].attention.heads == 8
    assert tokenizer.decoder.blocks[0].attention.heads == 16


def test_training_bookkeeping_is_ignored():
    config, state, values = read("tatitok_tiny")
    tokenizer = from_official("tatitok", state | {"quantize.embed_prob": torch.zeros(64)}, config)
    assert torch.equal(tokenizer.encode(values["input.image"]), values["output.tokens"])


def test_weights_that_do_not_fit_are_all_named():
    config, state, _ = read("titok_legacy")
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): extra\."):
        from_official("titok", state | {"extra": torch.zeros(1)}, config)
    gone = ("encoder.ln_pre.bias", "pixel_decoder.mid.0.conv1.weight")
    with pytest.raises(TokenloomError, match=r"Missing keys \(2\)"):
        from_official("titok", {key: value for key, value in state.items() if key not in gone}, config)
    with pytest.raises(TokenloomError, match=r"pixel_quantize\.embedding"):
        cut = {key: value for key, value in state.items() if not key.startswith("pixel_")}
        from_official("titok", cut, config)
    with pytest.raises(TokenloomError, match=r"ln_pre\.weight"):
        from_official("titok", state | {"encoder.ln_pre.weight": torch.zeros(5)}, config)
    with pytest.raises(TokenloomError, match="quantize_mode"):
        from_official("titok", state, config | {"quantize_mode": "fsq"})
    with pytest.raises(TokenloomError, match="text_guidance"):
        from_official("tatitok", state, config)
    with pytest.raises(TokenloomError, match="square grid"):
        positions = state["encoder.positional_embedding"][:-3]
        from_official("titok", state | {"encoder.positional_embedding": positions}, config)


@pytest.mark.parametrize("name", ["titok_legacy", "titok_vae"])
def test_files_keep_official_weights(name, tmp_path):
    tokenizer, values = build(name)
    tokenizer.save_pretrained(tmp_path)
    again = ImageLineTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.reconstruct(values["input.image"]),
        tokenizer.reconstruct(values["input.image"]),
        atol=1e-5,
        rtol=1e-5,
    )
