"""NBP's video tokenizer against its golden fixture, and of other sizes than that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tokenizers import near, read
from torch import Tensor

from tokenloom import Layout, TokenloomError, VideoTokenizer
from tokenloom.checkpoints import from_official, to_official
from tokenloom.checkpoints.presets import PRESETS
from tokenloom.checkpoints.recognise import guess_families

FAMILY = "nbp_video"


@pytest.fixture(scope="module")
def golden() -> tuple[VideoTokenizer, dict[str, Tensor]]:
    config, state, values = read("nbp_video_fsq")
    model: Any = from_official(FAMILY, state, config)
    return model, values


def clip_of(values: dict[str, Tensor]) -> Tensor:
    """The recorded clip (B, T, 3, H, W)."""
    return values["input.video"].transpose(1, 2)


def test_codes_are_those_recorded(golden: tuple[VideoTokenizer, dict[str, Tensor]]) -> None:
    model, values = golden
    tokens = values["output.tokens"]
    assert model.layout == Layout.clip(*tokens.shape[1:])
    codes = model.encode(clip_of(values))
    assert codes.dtype == torch.long
    assert torch.equal(codes, tokens.flatten(1).long())
    picture = model.encode(clip_of(values)[:, :1])
    assert torch.equal(picture, values["output.image_tokens"].flatten(1).long())


@torch.no_grad()
def test_features_vectors_and_frames_are_those_recorded(
    golden: tuple[VideoTokenizer, dict[str, Tensor]],
) -> None:
    model, values = golden
    codes = values["output.tokens"].flatten(1).long()
    near(model.features(clip_of(values)), values["output.features"].flatten(2).transpose(1, 2))
    near(model.quantizer.decode(codes), values["output.quantized"].flatten(2).transpose(1, 2))
    near(model.decode(codes), values["output.reconstruction"].transpose(1, 2))
    painted, quantized = model(clip_of(values))
    assert torch.equal(quantized.codes, codes)
    near(painted, values["output.reconstruction"].transpose(1, 2))


def test_official_weights_come_back_bit_for_bit(golden: tuple[VideoTokenizer, dict[str, Tensor]]) -> None:
    config, state, _ = read("nbp_video_fsq")
    again = to_official(golden[0])
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    inside = to_official(from_official(FAMILY, {"model_state_dict": wrapped}, config))  # type: ignore[dict-item]
    assert inside.keys() == wrapped.keys()
    assert guess_families(state) == (FAMILY,)


def other_sizes() -> tuple[VideoTokenizer, dict[str, Any]]:
    """A tokenizer of the official form with widths, depths, strides and levels of its own."""
    torch.manual_seed(0)
    model = VideoTokenizer(
        image_size=16,
        num_frames=3,
        patch=1,
        widths=(6, 6, 9),
        strides=((1, 2, 2), (2, 2, 2)),
        blocks=(1, 3, 2),
        up_kernel=3,
        norm_groups=3,
        quantizer_options={"levels": [5, 4, 3], "bound": "tan"},
        pixel_range=(0.0, 1.0),
        clamp=False,
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
        model.encoder.conv_out.weight *= 4
    model.official_family = FAMILY  # type: ignore[assignment]
    return model, {"fsq_levels": [5, 4, 3], "norm_groups": 3, "image_size": 16, "frames": 3}


def test_sizes_follow_from_the_weights() -> None:
    model, config = other_sizes()
    again: Any = from_official(FAMILY, to_official(model), config)
    for name in ("widths", "blocks", "strides", "num_frames"):
        assert _lists(again.config[name]) == _lists(model.config[name]), name
    clip = torch.rand(2, 3, 3, 16, 16)
    codes = model.encode(clip)
    assert len(codes.unique()) > 4
    assert torch.equal(again.encode(clip), codes)
    assert torch.equal(again.decode(codes), model.decode(codes))


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_presets_describe_weights_of_the_published_form() -> None:
    found = [one for one in PRESETS.values() if one.family == FAMILY]
    assert len(found) == 2
    for one in found:
        assert one.config["fsq_levels"] == [8, 8, 8, 5, 5, 5]


@pytest.mark.parametrize("change", ["unknown", "missing", "shape", "levels"])
def test_weights_that_do_not_fit_are_refused(change: str) -> None:
    config, state, _ = read("nbp_video_fsq")
    state, config = dict(state), dict(config)
    if change == "unknown":
        state["encoder_layers.0.extra"] = torch.zeros(1)
        message = r"Unknown keys \(1\): encoder_layers\.0\.extra"
    elif change == "missing":
        del state["decoder_layers.3.fn.1.beta"]
        message = r"Missing keys \(1\): decoder_layers\.3\.fn\.1\.beta"
    elif change == "shape":
        state["encoder_layers.16.weight"] = torch.zeros(5, 16, 1, 1, 1)
        message = "Shapes do not fit"
    else:
        del config["fsq_levels"]
        message = "fsq_levels"
    with pytest.raises(TokenloomError, match=message):
        from_official(FAMILY, state, config)
