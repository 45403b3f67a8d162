"""Metrics and codecs: golden values, and codecs that never spend more than they may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenloom.errors import TokenloomError
from tokenloom.evaluation import codecs
from tokenloom.evaluation.metrics import mean_pairwise_distance, psnr, ssim
from tokenloom.evaluation.reconstruction import codebook_use, evaluate_tokenizer, reconstruction_table

GOLDEN = load_file(Path(__file__).parent / "fixtures" / "metrics_image.safetensors")


def _pixels(count: int = 2, side: int = 64) -> torch.Tensor:
    """Smooth coloured pictures with an edge, uint8 (count, 3, side, side)."""
    ramp = torch.linspace(0, 1, side)
    pictures = []
    for index in range(count):
        picture = torch.stack(
            [
                ramp[None, :] * ramp[:, None],
                ramp.flip(0)[None, :].expand(side, -1),
                ramp[:, None].expand(-1, side),
            ]
        )
        picture[:, side // 4 : side // 2, 8 * (index + 1) :] = 0.1 * index
        pictures.append(picture)
    return (torch.stack(pictures) * 255).round().to(torch.uint8)


def test_psnr_matches_the_reference() -> None:
    torch.testing.assert_close(
        psnr(GOLDEN["input.image"], GOLDEN["input.image_degraded"]), GOLDEN["output.psnr"]
    )


@pytest.mark.parametrize("window", ["gaussian11", "uniform7"])
def test_ssim_matches_the_reference(window: str) -> None:
    measured = ssim(GOLDEN["input.image"], GOLDEN["input.image_degraded"], window)  # type: ignore[arg-type]
    torch.testing.assert_close(measured, GOLDEN[f"output.ssim_{window}"], atol=2e-6, rtol=0)


def test_psnr_of_equal_pictures_is_infinite_and_ssim_one() -> None:
    picture = GOLDEN["input.image"]
    assert psnr(picture, picture).isinf().all()
    torch.testing.assert_close(ssim(picture, picture), torch.ones(1))


def test_mean_pairwise_distance_by_hand() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    expected = (1.0 + 2**0.5 + 1.0) / 3  # rms of (1, 1), (0, 2), (-1, 1)
    assert mean_pairwise_distance(vectors) == pytest.approx(expected)
    assert mean_pairwise_distance(torch.eye(3), "cosine") == pytest.approx(1.0)
    assert mean_pairwise_distance(torch.ones(4, 3, 2, 2)) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)), "B, C, H, W"),
        (lambda: ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)), "at least 11"),
        (lambda: ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), "gausian11"), "gaussian11"),  # type: ignore[arg-type]
        (lambda: mean_pairwise_distance(torch.zeros(1, 4)), "at least two"),
        (lambda: codecs.encode_within("jpg", _pixels(1)[0], 2560), "jpeg"),
        (lambda: codecs.payload_bits("webp", b"RIFF"), "webp"),
        (lambda: codecs.evaluate_codec("jpeg", torch.zeros(1, 3, 8, 8), 100), "uint8"),
        (lambda: codebook_use(torch.tensor([4]), 4), "0..3"),
    ],
)
def test_mistakes_are_explained(call, words: str) -> None:
    with pytest.raises(TokenloomError, match=words):
        call()


@pytest.mark.parametrize("codec", codecs.codec_names())
@pytest.mark.parametrize("budget", [600, 2000])
def test_codec_stays_within_the_budget(codec: str, budget: int) -> None:
    result = codecs.evaluate_codec(codec, _pixels(), budget)
    assert result.fitted == result.pictures == 2
    for picture in _pixels():
        coded = codecs.encode_within(codec, picture, budget)
        assert coded is not None
        assert 0 < coded.payload_bits <= budget
        assert coded.payload_bits < coded.file_bits
    assert result.payload_bits <= budget
    assert result.psnr > 15


def test_more_bits_give_a_better_picture_and_headers_count_in_files() -> None:
    pixels = _pixels(1)
    small, large = (codecs.evaluate_codec("webp", pixels, budget) for budget in (500, 3000))
    assert large.psnr > small.psnr + 3
    by_file = codecs.evaluate_codec("webp", pixels, 500, count="file")
    assert by_file.file_bits <= 500
    assert by_file.psnr <= small.psnr


def test_a_budget_below_the_smallest_file_fits_nothing() -> None:
    result = codecs.evaluate_codec("jpeg", _pixels(), 800, count="file")
    assert result.fitted == 0
    assert "-" in reconstruction_table([], [result])


class _CoarseTokenizer:
    """Every 2 x 2 block becomes one of four grey levels; 32 x 32 tokens of two bits."""

    vocab_size = 4
    bits_per_image = 2048.0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        grey = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 2)
        return ((grey + 1) * 1.5).round().long().flatten(1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        grey = codes.view(-1, 1, 32, 32) / 1.5 - 1
        return grey.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


def test_evaluate_tokenizer_reports_hand_made_figures() -> None:
    black_and_white = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    black_and_white[1] = 255
    result = evaluate_tokenizer(_CoarseTokenizer(), black_and_white, "coarse")
    assert result.psnr == result.psnr_of_mean == 100.0  # both come back exactly
    assert result.ssim == pytest.approx(1.0, abs=1e-5)
    assert (result.codebook.used, result.codebook.dead) == (2, 2)
    assert result.codebook.perplexity == pytest.approx(2.0)
    assert result.entropy_bits == pytest.approx(1024.0)
    assert "50.0 %" in reconstruction_table([result])


def test_mean_psnr_and_psnr_of_mean_differ() -> None:
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    pixels[1] = 100
    result = evaluate_tokenizer(_CoarseTokenizer(), pixels)
    error = (100 - 85) / 255  # the second picture becomes level 1 of 0, 85, 170, 255
    one = -20 * torch.log10(torch.tensor(error)).item()
    assert result.psnr == pytest.approx((100 + one) / 2, abs=1e-3)
    assert result.psnr_of_mean == pytest.approx(one + 3.0103, abs=1e-3)
