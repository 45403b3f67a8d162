"""Presets of published files: every one names a known family, builds, and has the published number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from official_shapes import FAMILIES, model_of
from typer.testing import CliRunner

from tokenloom import TokenloomError, cli
from tokenloom.checkpoints import families, official_guidance
from tokenloom.checkpoints.convert import _sampling
from tokenloom.checkpoints.guidance import guided_families
from tokenloom.checkpoints.presets import PRESETS, find_preset, preset
from tokenloom.checkpoints.recognise import check_config
from tokenloom.generators import Guidance

BUILT = [name for name, one in PRESETS.items() if one.family in FAMILIES]


def test_every_preset_is_of_a_known_family() -> None:
    assert {one.family for one in PRESETS.values()} <= FAMILIES
    assert FAMILIES <= set(families())
    assert len(BUILT) > 80
    for name, one in PRESETS.items():
        assert one.licence and one.config, name
        check_config(one.family, one.config)


def tokens_of(config: Mapping[str, Any]) -> int:
    """Tokens of a sample, by the arguments that say it in the one or the other family."""
    if "patch_nums" in config:
        return sum(side**2 for side in config["patch_nums"])
    if "img_size" in config:
        large = config["img_size"] // config["vae_stride"] // config["patch_size"]
        return large**2 + config.get("cond_scale", 0) ** 2
    return config.get("num_tokens") or config["block_size"]


@pytest.mark.parametrize("name", BUILT)
def test_presets_build_models_of_the_published_size(name: str) -> None:
    one = preset(name)
    model = model_of(one.family, one.config)
    assert all(value.is_meta for value in model.parameters())
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    unit = {"M": 1e6, "B": 1e9}
    if one.parameters:
        number, scale = one.parameters[:-1], unit[one.parameters[-1]]
        digits = len(number.partition(".")[2])
        assert abs(count / scale - float(number)) < 10**-digits, count  # some are rounded, some are cut
    else:
        assert count > 1e7
    if hasattr(model, "order"):
        assert model.order.layout.size == tokens_of(one.config)


def test_published_sampling_is_translated() -> None:
    for name, one in PRESETS.items():
        values = _sampling(one.family, one.sampling)
        assert set(values) <= {
            "temperature",
            "top_k",
            "top_p",
            "nucleus",
            "guidance_scale",
            "guidance_schedule",
            "guidance_start",
        }, name
        published = {key: value for key, value in one.sampling.items() if key.startswith(("cfg", "re_cfg"))}
        if (
            one.family in guided_families()
        ):  # a rule that is no simple schedule has no counterpart in a pipeline
            simple = isinstance(official_guidance(one.family, **published).schedule, str)
            assert ("guidance_scale" in values) == (bool(published) and simple), name
    assert _sampling("dar", preset("D-AR-L-360K.pt").sampling) == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "nucleus": "descending",
        "guidance_scale": 8.0,
        "guidance_schedule": "linear",
        "guidance_start": 1.2,
    }
    assert official_guidance("var", **preset("var_d16.pth").sampling) == Guidance(2.5, "linear", 1.0)


def test_presets_are_found_by_the_names_of_files_and_folders() -> None:
    assert find_preset(Path("x/var_d16.pth")) == "var_d16.pth"
    assert find_preset(Path("NAR-XL.pt")) == "NAR-XL"
    assert find_preset(Path("mar_base/checkpoint-last.pth")) == "mar_base"
    assert (
        find_preset(Path("tokenizer_titok_l32_imagenet/model.safetensors")) == "tokenizer_titok_l32_imagenet"
    )
    assert find_preset(Path("x/mine.pth")) is None
    with pytest.raises(TokenloomError, match=r"Unknown preset 'var_d17\.pth'.*var_d16\.pth"):
        preset("var_d17.pth")


def test_the_command_lists_presets() -> None:
    result = CliRunner().invoke(cli.app, ["models", "--presets"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == len(PRESETS)
    assert "var_d16.pth: var, MIT" in lines
