"""Every family's fixture through a file, a folder and back: recognised, and equal bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import read as read_generator
from golden import state_of
from golden_tokenizers import read as read_tokenizer
from safetensors.torch import save_file

from tokenloom import TokenloomError
from tokenloom.checkpoints import families, from_official, to_official
from tokenloom.checkpoints.convert import convert_checkpoint, load_converted
from tokenloom.checkpoints.recognise import check_config, guess_families, infer

GENERATORS = {"himar": "himar", "mar": "mar", "xar": "xar"}
TOKENIZERS = {
    "dac": "dac",
    "dac_original": "dac_original",
    "dar_tokenizer": "dar_tokenizer",
    "encodec_24k": "encodec",
    "flextok": "flextok",
    "himtok": "himtok",
    "infinity_bsq": "infinity_bsq",
    "llamagen_vq16": "llamagen_vq",
    "maskgit_vqgan": "maskgit_vqgan",
    "mimi": "mimi",
    "mimo_audio_patch": "mimo_audio_patch",
    "mimo_audio_tokenizer": "mimo_audio_tokenizer",
    "tatitok_tiny": "tatitok",
    "titok_legacy": "titok",
    "titok_vae": "titok",
    "titok_vq8k": "titok",
    "var_msvqvae": "var_vq",
}
"""Fixture -> family; the families that are not here are converted in test_checkpoints_convert.py."""


@pytest.mark.parametrize("name", [*GENERATORS, *TOKENIZERS])
def test_a_file_becomes_a_folder_and_comes_back(name: str, tmp_path: Path) -> None:
    if name in GENERATORS:
        family, state, config = GENERATORS[name], state_of(name), read_generator(name)[1]["config"]
    else:
        family, (config, state, _) = TOKENIZERS[name], read_tokenizer(name)
    assert guess_families(state) == (family,)
    shown = infer(family, state)
    assert {key: config.get(key) for key in shown} == shown
    check_config(family, config)
    save_file(state, tmp_path / "weights.safetensors")
    done = convert_checkpoint(
        tmp_path / "weights.safetensors", tmp_path / "out", family=family, config=config
    )
    assert f"{len(state)} of {len(state)} tensors equal those of the source bit for bit" in done.notes[-1]
    official = to_official(load_converted(tmp_path / "out"))
    assert official.keys() == state.keys()
    assert all(torch.equal(official[key], value) for key, value in state.items())


def test_the_share_of_codes_that_clustering_keeps_is_converted(tmp_path: Path) -> None:
    config, state, _ = read_tokenizer("tatitok_tiny")
    state["quantize.embed_prob"] = torch.rand(len(state["quantize.embedding.weight"]))
    save_file(state, tmp_path / "x.safetensors")
    convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", config=config)
    official = to_official(load_converted(tmp_path / "out"))
    assert torch.equal(official["quantize.embed_prob"], state["quantize.embed_prob"])


def test_names_without_wrappers_are_recognised() -> None:
    config, state, _ = read_tokenizer("infinity_bsq")
    bare = {
        key.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias"): value
        for key, value in state.items()
    }
    bare = {
        key.replace(".norm.weight", ".weight").replace(".norm.bias", ".bias"): value
        for key, value in bare.items()
    }
    bare["quantizer.lfq.mask"] = 2 ** torch.arange(config["codebook_dim"] - 1, -1, -1)
    assert guess_families(bare) == ("infinity_bsq",)


def test_what_no_weight_shows_has_to_be_given() -> None:
    with pytest.raises(TokenloomError, match="img_size, encoder_num_heads, decoder_num_heads, cond_scale"):
        check_config("himar", {})
    config, state, _ = read_tokenizer("flextok")
    state["vae.vae.decoder.conv_in.weight"] = torch.zeros(8, 4, 3, 3)
    state["vae.vae.encoder.down_blocks.0.resnets.0.conv1.weight"] = torch.zeros(8, 8, 3, 3)
    with pytest.raises(TokenloomError, match="scaling_factor"):
        from_official("flextok", state, config)
    assert set(TOKENIZERS.values()) | set(GENERATORS.values()) < set(families())
