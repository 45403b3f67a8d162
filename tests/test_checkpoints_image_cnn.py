"""Official convolutional tokenizers: published codes, reconstructions and losses, and the way back to official names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tokenizers import near, read
from torch import Tensor, nn

from tokenloom import Layout, TokenloomError
from tokenloom.checkpoints import from_official, to_official
from tokenloom.tokenizers.cnn import CNNConfig, CNNDecoder, CNNEncoder

FAMILIES = {"llamagen_vq": "llamagen_vq16", "maskgit_vqgan": "maskgit_vqgan"}


def golden(family: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    return read(FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_published_codes_and_reconstruction(family):
    config, state, values = golden(family)
    tokenizer = from_official(family, state, config)
    pixels, tokens = values["input.image"], values["output.tokens"].flatten(1)
    assert torch.equal(tokenizer.encode(pixels), tokens)
    near(tokenizer.decode(tokens), values["output.reconstruction"])
    near(tokenizer.reconstruct(pixels), values["output.reconstruction"])
    quantized = tokenizer.quantize(pixels)
    near(tokenizer.features(pixels), values["output.z"].flatten(2).transpose(1, 2))
    near(quantized.z_q, values["output.quantized"].flatten(2).transpose(1, 2))
    near(tokenizer(pixels)[0], values["output.reconstruction"])


def test_published_losses():
    config, state, values = golden("llamagen_vq")
    losses = from_official("llamagen_vq", state, config).quantize(values["input.image"]).losses
    near(losses["codebook"], values["output.train.vq_loss"])
    near(losses["commitment"], values["output.train.commit_loss"])
    near(losses["entropy"], values["output.train.entropy_loss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_exact(family):
    config, state, _ = golden(family)
    official = to_official(from_official(family, state, config))
    assert official.keys() == state.keys()
    assert all(torch.equal(official[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_skip_and_middle_weights_are_used(family):
    config, state, values = golden(family)
    pixels, tokens = values["input.image"], values["output.tokens"].flatten(1)
    names = [name for name in state if name.endswith(("nin_shortcut.weight", "mid.0.conv1.weight"))]
    assert len(names) >= 6
    for name in names:
        changed = from_official(family, state | {name: state[name].flip(0)}, config)
        if name.startswith("encoder"):
            difference = changed.features(pixels).transpose(1, 2) - values["output.z"].flatten(2)
        else:
            difference = changed.decode(tokens) - values["output.reconstruction"]
        assert difference.abs().max() > 1e-3, name


def test_the_layout_is_that_of_the_configured_picture():
    config, state, _ = golden("llamagen_vq")
    assert from_official("llamagen_vq", state, config).layout == Layout.grid(4, 3)
    del config["image_hw"]
    tokenizer = from_official("llamagen_vq", state, config)
    assert tokenizer.layout == Layout.grid(16, 16)  # 256 pixels, as published
    assert tokenizer.reconstruct(torch.zeros(1, 3, 50, 30)).shape == (1, 3, 50, 30)


def test_weights_in_a_published_container():
    config, state, values = golden("llamagen_vq")
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    tokenizer = from_official("llamagen_vq", {"model": other, "ema": state}, config)  # type: ignore[dict-item]
    assert torch.equal(tokenizer.encode(values["input.image"]), values["output.tokens"].flatten(1))


def test_files_keep_official_weights(tmp_path):
    config, state, values = golden("maskgit_vqgan")
    tokenizer = from_official("maskgit_vqgan", state, config)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    near(again.reconstruct(values["input.image"]), values["output.reconstruction"])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_all_named(family):
    config, state, _ = golden(family)
    name = "encoder.conv_in.weight"
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): extra\."):
        from_official(family, state | {"extra": torch.zeros(1)}, config)
    with pytest.raises(TokenloomError, match=name):
        from_official(family, {key: value for key, value in state.items() if key != name}, config)
    with pytest.raises(TokenloomError, match=r"Missing keys \(2\)"):
        gone = ("decoder.conv_out.bias", "decoder.conv_out.weight")
        from_official(family, {key: value for key, value in state.items() if key not in gone}, config)
    with pytest.raises(TokenloomError, match="conv_out"):
        from_official(family, state | {"decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}, config)


@pytest.mark.parametrize(
    ("multipliers", "encoder", "total"), [((1, 1, 2, 2, 4), 29.3, 71.9), ((1, 2, 2, 4), 28.6, 70.1)]
)
def test_published_sizes_have_the_published_number_of_weights(multipliers, encoder, total):
    with torch.device("meta"):
        shape = CNNConfig(128, multipliers, 2, 256, 32)
        parts = [CNNEncoder(shape), CNNDecoder(shape), nn.Conv2d(256, 8, 1), nn.Conv2d(8, 256, 1)]
    counts = [sum(value.numel() for value in part.parameters()) / 1e6 for part in parts]
    assert round(counts[0], 1) == encoder
    assert round(sum(counts) + 16384 * 8 / 1e6, 1) == total
