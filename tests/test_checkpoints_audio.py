"""Published audio codecs through transformers: golden codes and sound, exact ways back, batches, files, bad input."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import pytest
import torch
from golden_tokenizers import near, read
from torch import Tensor

from tokenloom import HubAudioTokenizer, TokenloomError
from tokenloom.checkpoints import families, from_official, to_official
from tokenloom.tokenizers.audio_base import PADDING

FAMILIES = ["encodec_24k", "mimi", "dac", "dac_original"]
TINY: dict[str, dict[str, Any]] = {
    "encodec": {"num_filters": 4, "hidden_size": 8, "codebook_size": 32, "target_bandwidths": [0.75, 1.5]},
    "mimi": {
        "hidden_size": 16,
        "num_filters": 4,
        "codebook_size": 32,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 4,
        "upsample_groups": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
    },
    "dac": {
        "encoder_hidden_size": 4,
        "decoder_hidden_size": 32,
        "downsampling_ratios": [2, 4, 5, 8],
        "n_codebooks": 3,
        "codebook_size": 32,
    },
    "xcodec": {
        "codebook_size": 32,
        "acoustic_model_config": {
            "model_type": "dac",
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 32,
            "downsampling_ratios": [8, 5, 4, 2],
            "upsampling_ratios": [8, 5, 4, 2],
            "hidden_size": 16,
        },
        "semantic_model_config": {
            "model_type": "hubert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_dim": [16] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
        "target_bandwidths": [0.25, 1.0],
    },
}


@lru_cache
def build(family: str) -> HubAudioTokenizer:
    config, state, _ = read(family)
    return from_official(family, state, config)  # type: ignore[return-value]


@lru_cache
def tiny(kind: str) -> HubAudioTokenizer:
    torch.manual_seed(0)
    tokenizer = HubAudioTokenizer(kind, TINY[kind]).eval()
    for name, value in tokenizer.model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            value.normal_(std=0.3)
        elif name.endswith("cluster_usage"):
            value.fill_(1.0)
    return tokenizer


def sounds(count: int, samples: int) -> Tensor:
    return 0.3 * torch.randn(count, 1, samples, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_published_codes_and_sound(family):
    tokenizer, (config, _, values) = build(family), read(family)
    audio, tolerance = values["input.audio"], 5e-4 if family == "dac_original" else 2e-4
    checked = 0
    for name, wanted in values.items():
        if not name.startswith("output.codes"):
            continue
        wanted = wanted[0] if wanted.ndim == 4 else wanted  # transformers puts EnCodec's chunks first
        count = wanted.shape[1]
        assert torch.equal(tokenizer.encode(audio, num_codebooks=count), wanted)
        sound = values[name.replace("codes", "audio")].view(len(audio), 1, -1)
        near(tokenizer.decode(wanted)[..., : sound.shape[2]], sound, tolerance)
        output = tokenizer.reconstruct(audio, num_codebooks=count)
        assert output.shape == audio.shape
        near(output, sound[..., : audio.shape[2]], tolerance)
        checked += 1
    assert checked == 2 and audio.shape[2] == config["samples"]


def test_published_rates():
    rates = {family: (build(family).sample_rate, build(family).frame_rate) for family in FAMILIES}
    assert rates["encodec_24k"] == (24000, 75.0) and rates["mimi"] == (24000, 12.5)
    assert rates["dac"] == rates["dac_original"] == (16000, 31.25)
    assert build("mimi").layout_for(7).shape == (7, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_exact(family):
    _, state, _ = read(family)
    official = to_official(build(family))
    assert official.keys() == state.keys()
    assert all(torch.equal(official[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_all_named(family):
    config, state, _ = read(family)
    gone = sorted(name for name in state if name.startswith("decoder."))[:2]
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): extra") as raised:
        from_official(
            family, {k: v for k, v in state.items() if k not in gone} | {"extra": torch.zeros(1)}, config
        )
    assert "Missing keys (2)" in str(raised.value)


def test_dac_in_a_published_container():
    config, state, values = read("dac_original")
    container: Any = {"state_dict": state, "metadata": {"kwargs": config["dac"]}}
    tokenizer: Any = from_official("dac_original", container, {})
    assert torch.equal(tokenizer.encode(values["input.audio"]), values["output.codes_4"])
    assert tokenizer.sample_rate == 16000


def test_a_narrow_latent_width_of_dac_is_kept():
    """The 44 kHz model at 16 kbit/s, whose latent width is not that of its encoder."""
    torch.manual_seed(0)
    source = HubAudioTokenizer("dac", {**TINY["dac"], "hidden_size": 10}, weight_norm=True)
    source.official_family = "dac_original"  # type: ignore[assignment]
    again: Any = from_official("dac_original", to_official(source), {"sample_rate": 16000})
    assert again.model.config.hidden_size == 10
    audio = sounds(1, 1000)
    assert torch.equal(again.encode(audio), source.eval().encode(audio))


@pytest.mark.parametrize("kind", TINY)
def test_padding_changes_no_code_and_no_sample(kind):
    tokenizer, audio = tiny(kind), sounds(3, 9000)
    lengths = [9000, 5000, 2000]
    codes = tokenizer.encode(audio, lengths=lengths)
    output = tokenizer.decode(codes, lengths=lengths)
    assert output.shape == audio.shape
    for row, length in enumerate(lengths):
        frames, alone = tokenizer.num_frames(length), tokenizer.encode(audio[row : row + 1, :, :length])
        assert alone.shape[2] == frames
        assert torch.equal(codes[row : row + 1, :, :frames], alone)
        assert bool((codes[row, :, frames:] == PADDING).all())
        near(output[row : row + 1, :, :length], tokenizer.decode(alone, lengths=length), 1e-4)
        assert not output[row, :, length:].any()
    assert len(codes.unique()) > 3


@pytest.mark.parametrize("kind", TINY)
def test_equal_lengths_in_a_batch_are_as_alone(kind):
    tokenizer, audio = tiny(kind), sounds(3, 4000)
    codes = tokenizer.encode(audio)
    assert torch.equal(torch.cat([tokenizer.encode(row[None]) for row in audio]), codes)
    assert tokenizer.encode(audio, num_codebooks=1).shape[1] == 1
    assert torch.equal(tokenizer.unflatten(tokenizer.flatten(codes)), codes)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_restore_everything(family, tmp_path):
    audio = read(family)[2]["input.audio"]
    build(family).save_pretrained(tmp_path)
    again = HubAudioTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(audio), build(family).encode(audio))
    assert torch.equal(again.reconstruct(audio), build(family).reconstruct(audio))
    assert again.layout == build(family).layout


@pytest.mark.parametrize("kind", TINY)
def test_models_of_transformers_load_from_their_own_folders(kind, tmp_path):
    tokenizer, audio = tiny(kind), sounds(1, 3000)
    tokenizer.model.save_pretrained(tmp_path / "theirs")
    again = HubAudioTokenizer.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.encode(audio), tokenizer.encode(audio))
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        HubAudioTokenizer.from_pretrained(tmp_path / "ours").encode(audio), tokenizer.encode(audio)
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"audio_channels": 2}, "2 channels"),
        ({"normalize": True}, "loudness"),
        ({"chunk_length_s": 1.0, "overlap": 0.01}, "chunks"),
    ],
)
def test_models_that_cannot_keep_the_contract_are_refused_with_the_reason(options, reason):
    with pytest.raises(TokenloomError, match=reason):
        HubAudioTokenizer("encodec", {**TINY["encodec"], **options})
    with pytest.raises(TokenloomError, match=reason):
        from_official("encodec_48k", {}, {"hf": {**TINY["encodec"], **options}})


def test_wrong_calls_are_named():
    with pytest.raises(TokenloomError, match="'encodec'"):
        HubAudioTokenizer("encodek")
    with pytest.raises(TokenloomError, match="piece by piece"):
        tiny("dac").streaming()
    with pytest.raises(TokenloomError, match="below the codebook sizes"):
        tiny("dac").decode(torch.full((1, 3, 4), 32))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenloomError, match=r"pip install 'tokenloom\[hub-codecs\]'"):
        HubAudioTokenizer("dac")


def test_families_are_known():
    assert {*FAMILIES, "encodec", "xcodec"} <= set(families())
