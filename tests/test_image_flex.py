"""ImageFlexTokenizer: prefixes, batches, seeds, training, sizes, an autoencoder, files, and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tokenloom import ImageFlexTokenizer, Layout, TokenloomError
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers.flex import (
    from_patches,
    sincos_table,
    spread_places,
    spread_registers,
    to_patches,
)

KINDS = ("flow", "direct")
STACK: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}


def build(kind: str, size: int | Sequence[int] = 16, **options: Any) -> ImageFlexTokenizer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"quantizer_options": {"levels": [4, 4, 3]}, "sampling": {"steps": 3}}
    tokenizer = ImageFlexTokenizer(
        size,
        registers=8,
        encoder_config=STACK,
        decoder_config=STACK | {"kind": kind},
        **settings | options,
    )
    with torch.no_grad():  # modulations start at zero, which hides the codes
        for name, value in tokenizer.decoder.named_parameters():
            if "modulation" in name:
                value.normal_(std=0.2)
    return tokenizer.eval()


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_ranges(kind):
    tokenizer = build(kind)
    assert tokenizer.layout == Layout.line(8)
    assert tokenizer.lengths == range(1, 9)
    codes = tokenizer.encode(pictures(3))
    assert codes.shape == (3, 8)
    assert len(codes.unique()) > 4
    output = tokenizer.decode(codes)
    assert output.shape == (3, 3, 16, 16)
    assert output.abs().max() <= 1
    assert output.std() > 0.05
    assert torch.equal(tokenizer.reconstruct(pictures(3)), output)
    assert tokenizer.bits_per_image == pytest.approx(8 * 5.5849625)


def test_patches_and_back():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = to_patches(x, 2)
    assert torch.equal(patches[1, 4], x[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(from_patches(patches, 2, 2), x)


def test_registers_begin_where_their_first_ones_cover_the_picture():
    places = spread_places(64, 8)
    assert sorted(map(tuple, places.tolist())) == [(row, column) for row in range(8) for column in range(8)]
    for first, side in ((4, 4), (16, 2)):  # one in each quarter, one in each sixteenth
        assert len({tuple(cell) for cell in ((places[:first] + 0.5) // side).tolist()}) == first
    assert spread_places(5, 8).abs().max() < 8
    assert torch.equal(spread_registers(64, 8, 16)[1], sincos_table(8, 16)[:, 4, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_decodes_and_later_codes_do_not_count(kind):
    tokenizer = build(kind)
    codes = tokenizer.encode(pictures(2))
    painted = [tokenizer.decode(codes[:, :count]) for count in range(1, 9)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(painted))
    assert torch.equal(tokenizer.encode(pictures(2), num_tokens=3), codes[:, :3])
    assert torch.equal(tokenizer.reconstruct(pictures(2), num_tokens=3), painted[2])


def test_early_registers_do_not_see_later_ones():
    tokenizer = build("flow")
    before = tokenizer.features(pictures(2))
    with torch.no_grad():
        tokenizer.encoder.registers[5:] *= -1
    after = tokenizer.features(pictures(2))
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().min(-1).values.max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_the_same_in_any_batch(kind):
    tokenizer, batch = build(kind), pictures(4)
    codes = tokenizer.encode(batch)
    assert torch.equal(torch.cat([tokenizer.encode(picture[None]) for picture in batch]), codes)
    alone = torch.cat([tokenizer.decode(row[None]) for row in codes])
    torch.testing.assert_close(alone, tokenizer.decode(codes), atol=1e-5, rtol=1e-5)


def test_seeds_belong_to_pictures():
    tokenizer = build("flow")
    codes = tokenizer.encode(pictures(2))
    both = tokenizer.decode(codes, seeds=[5, 6])
    torch.testing.assert_close(both[1:], tokenizer.decode(codes[1:], seeds=6), atol=1e-5, rtol=1e-5)
    assert (both - tokenizer.decode(codes)).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(tokenizer.decode(codes, seeds=5), both)


def test_guidance_is_the_mean_of_two_velocities_in_one_step():
    tokenizer = build("flow", sampling={"steps": 1, "clamp": False})
    codes = tokenizer.encode(pictures(2))
    noise = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        none = tokenizer.decoder.velocity(noise, torch.ones(2), tokenizer.decoder.no_registers(2))
    plain = noise - tokenizer.decode(codes, noise=noise)
    guided = noise - tokenizer.decode(codes, noise=noise, guidance=3.0)
    torch.testing.assert_close(guided, 3 * plain - 2 * none, atol=1e-5, rtol=1e-4)
    projected = noise - tokenizer.decode(codes, noise=noise, guidance=3.0, projected=True)
    along = ((projected - plain) * plain).flatten(1).sum(1)
    assert along.abs().max() < 1e-3
    assert (projected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_pass_is_the_reconstruction(kind):
    tokenizer = build(kind)
    with torch.no_grad():
        output, quantized = tokenizer(pictures(2))
    assert torch.equal(output.clamp(-1, 1), tokenizer.reconstruct(pictures(2)))
    assert torch.equal(quantized.codes, tokenizer.encode(pictures(2)))
    assert quantized.losses == {}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_weight(kind):
    tokenizer = build(kind).train()
    output, quantized = tokenizer(pictures(1).expand(40, -1, -1, -1))  # enough to lose some conditions
    sum(quantized.losses.values(), output.square().mean()).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_few_pictures(kind):
    tokenizer = build(kind).train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    batch = pictures(2, 4, 4).repeat(8, 1, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    errors = []
    for _ in range(40):
        output, quantized = tokenizer(batch)
        loss = quantized.losses["flow"] if kind == "flow" else (output - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss))
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])


def test_lengths_of_training():
    torch.manual_seed(0)
    drawn = {
        mode: build("direct", nested=mode).draw_lengths(2000) for mode in ("uniform", "pow2", "uniform_pow2")
    }
    assert set(drawn["uniform"].tolist()) == set(range(1, 9))
    assert set(drawn["pow2"].tolist()) == set(drawn["uniform_pow2"].tolist()) == {1, 2, 4, 8}
    assert float((drawn["pow2"] == 8).float().mean()) == pytest.approx(1 / 4, abs=0.05)
    assert float((drawn["uniform_pow2"] == 8).float().mean()) == pytest.approx(4 / 8, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_pictures_of_any_shape(kind):
    tokenizer = build(kind)
    output = tokenizer.reconstruct(pictures(2, 7, 13))
    assert output.shape == (2, 3, 7, 13)
    assert torch.equal(tokenizer.decode(tokenizer.encode(pictures(2, 7, 13)), (7, 13)), output)
    assert build(kind, (8, 20)).reconstruct(pictures(1, 8, 20)).shape == (1, 3, 8, 20)


def test_bytes_and_pil_pictures():
    tokenizer = build("direct")
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    data = torch.tensor([200, 40, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert torch.equal(tokenizer.encode(picture), tokenizer.encode(data))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_an_autoencoder(kind, tmp_path):
    tokenizer = build(kind, patch=2, vae_config=VAE)
    assert tokenizer.encoder.table.shape[1] == 4  # 16 pixels = 8 places = 4 patches
    output = tokenizer.reconstruct(pictures(2))
    assert output.shape == (2, 3, 16, 16)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(ImageFlexTokenizer.from_pretrained(tmp_path).reconstruct(pictures(2)), output)
    tokenizer.train()
    assert not tokenizer.vae.training
    painted, quantized = tokenizer(pictures(2))
    sum(quantized.losses.values(), painted.square().mean()).backward()
    assert all(value.grad is None for value in tokenizer.vae.parameters())
    assert tokenizer.encoder.head.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizer = build(kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageFlexTokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(pictures(2))
    assert torch.equal(loaded.encode(pictures(2)), codes)
    assert torch.equal(loaded.decode(codes[:, :3]), tokenizer.decode(codes[:, :3]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_is_kept(kind):
    assert {"batch", "gradient", "save and load", "dtype"} <= set(check_tokenizer(build(kind), batch_size=3))


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(8, dtype=torch.long),
        torch.zeros(1, 9, dtype=torch.long),
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(1, 8),
        [[0] * 8],
    ],
)
def test_codes_of_a_wrong_kind_are_refused(codes):
    with pytest.raises(TokenloomError, match=r"integer codes of shape \(B, k\), k = 1\.\.8"):
        build("direct").decode(codes)


@pytest.mark.parametrize("value", [-1, 48])
def test_codes_outside_the_vocabulary_are_refused(value):
    with pytest.raises(TokenloomError, match=r"must lie in 0\.\.47"):
        build("direct").decode(torch.full((1, 3), value))


@pytest.mark.parametrize("count", [0, 9, True, 2.5])
def test_more_tokens_than_trained_are_refused(count):
    with pytest.raises(TokenloomError, match=r"1\.\.8 codes, not num_tokens="):
        build("direct").encode(pictures(1), num_tokens=count)


def test_bad_pixels_are_refused():
    tokenizer = build("direct")
    broken = pictures(1)
    broken[0, 0, 3, 3] = torch.nan
    for pixels, message in (
        (broken, "NaN or infinity"),
        (pictures(1)[:, :2], "expects float pixels"),
        (pictures(1, 24, 16), "positions for 4x4 patches of 4, but the picture has 6x4"),
        ("a.png", "expects float pixels"),
    ):
        with pytest.raises(TokenloomError, match=message):
            tokenizer.encode(pixels)
    with pytest.raises(TokenloomError, match="positions for 4x4 patches"):
        tokenizer.decode(torch.zeros(1, 8, dtype=torch.long), size=32)
    with pytest.warns(UserWarning, match=r"Pixels lie in"):
        tokenizer.encode(3 * pictures(1))


def test_latents_are_told_from_pictures():
    tokenizer = build("flow", channels=4)
    assert tokenizer.reconstruct(torch.randn(1, 4, 16, 16)).shape == (1, 4, 16, 16)
    with pytest.raises(
        TokenloomError, match=r"codes latents: float \(B, 4, H, W\).*got torch.float32 \(1, 3"
    ):
        tokenizer.encode(pictures(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested": "pow3"}, "Unknown way to draw numbers of codes 'pow3'"),
        ({"registers": 0}, "registers, patch and channels must be at least 1"),
        ({"encoder_config": {"widht": 8}}, "Unknown option of encoder_config 'widht'.*'width'"),
        ({"encoder_config": {"mask": "causl"}}, "Unknown mask 'causl'"),
        ({"encoder_config": {"width": 10}}, "multiple of 4"),
        ({"decoder_config": {"kind": "flw"}}, "Unknown kind of decoder 'flw'"),
        ({"decoder_config": {"modulations": 3}}, "modulations must be 1 or 2"),
        ({"sampling": {"step": 3}}, "Unknown sampling option 'step'"),
        ({"sampling": {"steps": 0}}, "steps must be a whole number"),
        (
            {"quantizer_type": "residual_fsq", "quantizer_options": {"levels": [4, 4], "quantizers": 2}},
            "one code",
        ),
        ({"vae_config": {"latent": 4}}, "Unknown option of the autoencoder 'latent'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TokenloomError, match=message):
        ImageFlexTokenizer(16, **options)


def test_bad_settings_of_decode():
    tokenizer, codes = build("flow"), torch.zeros(1, 2, dtype=torch.long)
    for options, message in (
        ({"steps": 0}, "steps must be"),
        ({"guidance": float("inf")}, "guidance must be"),
        ({"noise": torch.zeros(1, 3, 4, 4)}, "noise must have the shape"),
        ({"seeds": -1}, "seed"),
    ):
        with pytest.raises(TokenloomError, match=message):
            tokenizer.decode(codes, **options)  # type: ignore[arg-type]
