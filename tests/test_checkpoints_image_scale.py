"""Official multi-scale tokenizers: published codes, reconstructions, losses and inputs, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tokenizers import near, read
from torch import Tensor

from tokenloom import Layout, TokenloomError
from tokenloom.checkpoints import from_official, to_official

FAMILIES = {"var_vq": "var_msvqvae", "infinity_bsq": "infinity_bsq"}


def golden(family: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    return read(FAMILIES[family])


def rows(maps: Tensor) -> Tensor:
    """(B, C, ...) to (B, N, C)."""
    return maps.flatten(2).transpose(1, 2)


def test_var():
    config, state, values = golden("var_vq")
    tokenizer = from_official("var_vq", state, config)
    pixels, tokens = values["input.image"], values["output.tokens"]
    assert tokenizer.layout == Layout.scales(config["v_patch_nums"])
    assert torch.equal(tokenizer.encode(pixels), tokens)
    near(tokenizer.features(pixels), rows(values["output.features"]))
    near(tokenizer.reconstruct(pixels), values["output.reconstruction"])
    near(tokenizer.previews(tokens)[0], values["output.reconstruction_scale0"])
    for scale, length in enumerate(tokenizer.lengths):
        near(tokenizer.quantizer.decode(tokens[:, :length]), rows(values[f"output.fhat.{scale}"]))
    near(tokenizer.quantizer.views(tokens), values["output.var_input"])
    near(tokenizer.residual_pyramid().views(tokens), values["output.var_input"])


def test_training_pass_of_var():
    config, state, values = golden("var_vq")
    tokenizer = from_official("var_vq", state, config).train()
    output, quantized = tokenizer(values["input.image"])
    near(quantized.losses["commitment"] + quantized.losses["codebook"], values["output.train.vq_loss"])
    near(quantized.z_q, rows(values["output.train.f_hat"]))
    near(output.clamp(-1, 1), values["output.reconstruction"])


def test_infinity():
    config, state, values = golden("infinity_bsq")
    tokenizer = from_official("infinity_bsq", state, config)
    pixels = values["input.image"]
    bits = torch.cat([values[f"output.bits.{scale}"].flatten(1, 3) for scale in range(4)], dim=1)
    assert tokenizer.layout == Layout.scales([1, 2, 3, 4]) and tokenizer.vocab_size == 2**8
    assert torch.equal(tokenizer.encode_bits(pixels), bits)
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes[:, -16:], values["output.packed_tokens.last"].flatten(1))
    near(tokenizer.features(pixels), rows(values["output.features"]))
    near(tokenizer.reconstruct(pixels), values["output.reconstruction"])
    near(tokenizer.decode_bits(bits), values["output.from_bits"])
    near(tokenizer.quantizer.decode(codes), rows(values["output.quantized"]))
    near(tokenizer.quantizer.decode(codes), rows(values["output.codes_sum"]))
    near(tokenizer.quantizer.views(codes, "bilinear"), values["output.teacher_inputs"])
    views = torch.cat([rows(values[f"output.var_input_area.{scale}"]) for scale in range(3)], dim=1)
    near(tokenizer.quantizer.views(codes), views)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_exact(family):
    config, state, _ = golden(family)
    official = to_official(from_official(family, state, config))
    assert official.keys() == state.keys()
    assert all(torch.equal(official[name], value) for name, value in state.items())


def test_infinity_weights_without_wrappers_and_in_a_container():
    config, state, values = golden("infinity_bsq")
    bare = {name.replace("_norm.norm", "_norm"): value for name, value in state.items() if "lfq" not in name}
    for kind in ("conv", "norm"):
        bare = {
            name.replace(f".{kind}.weight", ".weight").replace(f".{kind}.bias", ".bias"): value
            for name, value in bare.items()
        }
    assert "encoder.conv_in.weight" in bare and "encoder.down.0.downsample.conv.weight" in bare
    tokenizer = from_official("infinity_bsq", {"vae": bare}, config)  # type: ignore[dict-item]
    near(tokenizer.reconstruct(values["input.image"]), values["output.reconstruction"])
    assert to_official(tokenizer).keys() == bare.keys()


def test_published_schedules():
    config, state, _ = golden("infinity_bsq")
    del config["scale_schedule"]
    tokenizer = from_official("infinity_bsq", state, config | {"image_size": 1024})
    assert tokenizer.layout.size == 10521
    assert from_official("infinity_bsq", state, config).layout.size == 521
    with pytest.raises(TokenloomError, match="scale_schedule"):
        from_official("infinity_bsq", state, config | {"image_size": 300})
    config, state, _ = golden("var_vq")
    del config["v_patch_nums"], state["quantize.ema_vocab_hit_SV"]
    tokenizer = from_official("var_vq", state, config)
    assert (tokenizer.layout.size, tokenizer.image_size) == (680, 256)
    assert to_official(tokenizer).keys() == state.keys()


def test_the_cosine_variant_compares_directions_and_adds_codes_as_they_are():
    config, state, values = golden("var_vq")
    tokenizer = from_official("var_vq", state, config | {"using_znorm": True})
    plain = from_official("var_vq", state, config)
    codes = tokenizer.encode(values["input.image"])
    assert not torch.equal(codes, values["output.tokens"])
    assert torch.equal(tokenizer.decode(codes), plain.decode(codes))
    one = {
        name.replace("qresi_ls.0", "qresi"): value
        for name, value in state.items()
        if "qresi_ls." not in name or ".0." in name
    }
    shared = from_official("var_vq", one, config | {"share_quant_resi": 1})
    assert len(shared.quantizer.pyramid.phis) == 1 and to_official(shared).keys() == one.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_all_named(family):
    config, state, _ = golden(family)
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): extra\."):
        from_official(family, state | {"extra": torch.zeros(1)}, config)
    gone = {name for name in state if name.startswith("decoder.conv_out")}
    with pytest.raises(TokenloomError, match=r"Missing keys \(2\): decoder\.conv_out"):
        from_official(family, {key: value for key, value in state.items() if key not in gone}, config)
    first = next(name for name in state if name.startswith("encoder.conv_in"))
    with pytest.raises(TokenloomError, match="conv_in"):
        from_official(family, {key: value for key, value in state.items() if key != first}, config)
    name = next(iter(sorted(gone)))
    with pytest.raises(TokenloomError, match="Shapes do not fit"):
        from_official(family, state | {name: torch.zeros(7)}, config)
    if family == "infinity_bsq":
        with pytest.raises(TokenloomError, match="patch_size must be 16"):
            from_official(family, state, config | {"patch_size": 8})
        with pytest.raises(TokenloomError, match="one frame a scale"):
            from_official(family, state, config | {"scale_schedule": [[1, 1, 1], [2, 4, 4]]})
