"""VideoTokenizer: causality, streaming, pictures as clips, any length and size, gradients, files, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tokenloom import Layout, TokenloomError, VideoTokenizer
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers import video as video_module

SMALL: dict[str, Any] = {
    "image_size": 16,
    "num_frames": 9,
    "patch": 2,
    "widths": (8, 8, 12),
    "strides": ((2, 2, 2), (2, 1, 1)),
    "blocks": (1, 1, 1),
    "norm_groups": 4,
    "quantizer_options": {"levels": [5, 5, 4]},
}


def build(**options: Any) -> VideoTokenizer:
    torch.manual_seed(0)
    model = VideoTokenizer(**{**SMALL, **options}).eval()
    with torch.no_grad():  # so that codes differ, and every weight counts
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
        model.encoder.conv_out.weight *= 4
    return model


def clips(count: int, frames: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def pieces_of(clip: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return clip.split(sizes, dim=1)


def test_shapes_and_ranges() -> None:
    model = build()
    assert (model.modality, model.stride, model.vocab_size) == ("video", (4, 4, 4), 100)
    assert model.layout == Layout.clip(3, 4, 4) == model.layout_for(9)
    codes = model.encode(clips(2, 9))
    assert codes.shape == (2, 48)
    assert codes.dtype == torch.long
    assert len(codes.unique()) > 8
    output = model.decode(codes)
    assert output.shape == (2, 9, 3, 16, 16)
    assert output.abs().max() <= 1
    assert torch.equal(model.reconstruct(clips(2, 9)), output)


def test_the_conformance_suite() -> None:
    ran = check_tokenizer(build(), clips(4, 9))
    assert {"batch", "round trip", "gradient", "save and load", "bad codes", "dtype"} <= set(ran)


def test_the_default_network_is_small() -> None:
    model = VideoTokenizer()
    assert model.layout == Layout.clip(5, 8, 8)
    assert sum(value.numel() * 4 for value in model.parameters()) < 4_000_000


def test_no_frame_of_codes_sees_a_later_frame() -> None:
    model, clip = build(), clips(1, 13)
    codes, output = model.encode(clip), model.decode(model.encode(clip))
    for kept in (1, 2, 3):  # frames of codes
        frames = model.frames_of(kept)
        other = torch.cat([clip[:, :frames], clip[:, frames:].flip(1, 3)], dim=1)
        changed = model.encode(other)
        assert torch.equal(changed[:, : kept * 16], codes[:, : kept * 16])
        assert not torch.equal(changed, codes)
        torch.testing.assert_close(model.decode(codes[:, : kept * 16]), output[:, :frames])


def test_a_picture_is_a_clip_of_one_frame() -> None:
    model, clip = build(), clips(2, 5)
    picture = model.encode(clip[:, :1])
    assert picture.shape == (2, 16)
    assert torch.equal(model.encode(clip)[:, :16], picture)
    assert model.decode(picture).shape == (2, 1, 3, 16, 16)
    assert model.layout_for(1) == Layout.clip(1, 4, 4)


@pytest.mark.parametrize("sizes", [[1] * 13, [1, 4, 4, 4], [5, 8], [2, 3, 1, 7], [13]])
def test_streaming_equals_the_whole(sizes: list[int]) -> None:
    model, clip = build(), clips(2, 13)
    codes = model.encode(clip)
    with model.streaming() as stream:
        parts = [model.encode(piece) for piece in pieces_of(clip, sizes)]
        assert stream.finish().shape == (2, 0)
    assert torch.equal(torch.cat(parts, dim=1), codes)
    with model.streaming():
        frames = [model.decode(piece) for piece in codes.split(16, dim=1)]
    assert [part.shape[1] for part in frames] == [1, 4, 4, 4]
    torch.testing.assert_close(torch.cat(frames, dim=1), model.decode(codes), rtol=0, atol=1e-5)


def test_frames_that_fill_no_code_are_filled_up() -> None:
    model, clip = build(), clips(1, 7)
    codes = model.encode(clip)
    filled = torch.cat([clip, clip[:, -1:], clip[:, -1:]], dim=1)
    assert torch.equal(codes, model.encode(filled))
    with model.streaming() as stream:
        parts = [model.encode(piece) for piece in pieces_of(clip, [3, 3, 1])]
        parts.append(stream.finish())
        with pytest.raises(TokenloomError, match="has been finished"):
            model.encode(clip)
    assert torch.equal(torch.cat(parts, dim=1), codes)
    assert torch.equal(model.decode(codes, frames=7), model.decode(codes)[:, :7])
    assert model.reconstruct(clip).shape == clip.shape


def test_long_clips_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = build(), clips(1, 21)
    codes = model.encode(clip)
    output = model.decode(codes)
    monkeypatch.setattr(video_module, "_PIECE", 2)
    longest: list[int] = []
    network = model.encoder.forward
    monkeypatch.setattr(
        model.encoder, "forward", lambda x, state: longest.append(x.shape[2]) or network(x, state)
    )
    assert torch.equal(model.encode(clip), codes)
    assert longest == [9, 8, 4]
    torch.testing.assert_close(model.decode(codes), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 24), (13, 7), (1, 1)])
def test_frames_of_any_size(size: tuple[int, int]) -> None:
    model, clip = build(), clips(2, 6, *size)
    codes = model.encode(clip)
    assert codes.shape == (2, model.layout_for(6, size).size)
    output = model.decode(codes, 6, size)
    assert output.shape == clip.shape
    assert torch.equal(model.reconstruct(clip), output)
    assert model(clip)[0].shape == clip.shape


def test_bytes_and_pictures_are_taken() -> None:
    model = build()
    levels = torch.randint(256, (1, 5, 3, 16, 16), generator=torch.Generator().manual_seed(2)).byte()
    wanted = model.encode(levels.float() / 127.5 - 1)
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in levels[0]]
    assert torch.equal(model.encode(levels), wanted)
    assert torch.equal(model.encode(frames), wanted)
    assert torch.equal(model.encode([frames, frames]), wanted.expand(2, -1))
    assert torch.equal(model.encode(frames[0]), wanted[:, :16])


def test_the_training_pass_reaches_every_weight() -> None:
    model, clip = build().train(), clips(2, 9)
    output, quantized = model(clip)
    torch.testing.assert_close(output.detach().clamp(-1, 1), model.decode(quantized.codes), rtol=0, atol=1e-5)
    (output - clip).square().mean().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_a_small_tokenizer_learns_a_clip() -> None:
    model, clip = (
        VideoTokenizer(**SMALL).train(),
        clips(1, 5, 4, 4).repeat_interleave(4, 3).repeat_interleave(4, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(clip)[0] - clip).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(clips(1, 9)), model.encode(clips(1, 9)))
    assert again.layout == model.layout


@pytest.mark.parametrize(
    ("media", "message"),
    [
        (torch.zeros(1, 3, 9, 16, 16), r"clips\.transpose\(1, 2\)"),
        (torch.zeros(1, 9, 16, 16, 3), r"permute\(0, 1, 4, 2, 3\)"),
        (torch.zeros(9, 3, 16, 16), r"pixels\[:, None\].*pixels\[None\]"),
        (torch.zeros(1, 0, 3, 16, 16), "at least one frame"),
        (torch.zeros(1, 2, 3, 0, 16), "at least one pixel"),
        (torch.zeros(1, 2, 3, 16, 16, dtype=torch.int32), "uint8"),
        (torch.full((1, 2, 3, 16, 16), float("nan")), "NaN"),
        ([], "PIL pictures"),
        ("clip.gif", "read_clip"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "one size"),
        ([[Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 8))] * 2], "one length.*1, 2 frames"),
    ],
)
def test_media_that_cannot_be_encoded(media: Any, message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        build().encode(media)


def test_codes_that_cannot_be_decoded() -> None:
    model = build()
    with pytest.raises(TokenloomError, match="4 x 4 codes each, but 17"):
        model.decode(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(TokenloomError, match=r"\(B, 48\)"):
        model.decode(torch.zeros(1, 16, dtype=torch.long), frames=9)
    with pytest.raises(TokenloomError, match=r"0\.\.99"):
        model.decode(torch.full((1, 16), 100))
    with pytest.raises(TokenloomError, match="integer codes"):
        model.decode(torch.zeros(1, 16))
    with pytest.raises(TokenloomError, match="at least 1 frames, got 0"):
        model.decode(torch.zeros(1, 16, dtype=torch.long), frames=0)


def test_streams_say_what_they_cannot_do() -> None:
    model = build()
    with model.streaming() as stream:
        with pytest.raises(TokenloomError, match="streams already"), model.streaming():
            pass
        with pytest.raises(TokenloomError, match="nothing to finish"):
            stream.finish()
        model.encode(clips(1, 2))
        with pytest.raises(TokenloomError, match="keeps its batch and its size"):
            model.encode(clips(1, 2, 8, 8))
        with pytest.raises(TokenloomError, match="cut its end yourself"):
            model.decode(torch.zeros(1, 16, dtype=torch.long), frames=1)
        assert model.decode(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 3, 16, 16)
    assert model.encode(clips(1, 2)).shape == (1, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 8}, "got 8; use 9"),
        ({"num_frames": 0}, "at least 1 frames"),
        ({"widths": (8, 8)}, "one width and one number of blocks a level"),
        ({"strides": ((2, 2), (2, 1))}, "between two levels"),
        ({"strides": ((4, 1, 1), (1, 1, 1))}, "halves or thirds"),
        ({"norm_groups": 5}, "multiple of norm_groups=5"),
        ({"up_kernel": 2}, "up_kernel is 1 or 3"),
        (
            {
                "quantizer_type": "residual_vq",
                "quantizer_options": {"codebook_size": 8, "dim": 4, "quantizers": 2},
            },
            "one code",
        ),
    ],
)
def test_settings_that_do_not_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        VideoTokenizer(**{**SMALL, **options})
