"""Rate and distortion of a tokenizer, and opening tokenizers by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tiny_pipeline, tiny_tokenizer
from tiny_networks import Means
from typer.testing import CliRunner

from tokenloom import ImageCNNTokenizer, models
from tokenloom.cli import app
from tokenloom.errors import TokenloomError
from tokenloom.evaluation import rate_distortion as rd
from tokenloom.evaluation.reconstruction import adaptive_bits
from tokenloom.tokenizers import load_tokenizer


class _Means(torch.nn.Module):
    """Token k says what the mean grey level of row k is, in 256 levels; missing rows are grey."""

    vocab_size = 256
    image_size, any_size = 16, True
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels.mean((1, 3)) + 1) * 127.5).round().long()

    def lengths_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (1, 2, 4, 8, 16)

    def decode(self, codes: torch.Tensor, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
        assert size == (16, 16)
        rows = torch.nn.functional.pad(codes / 127.5 - 1, (0, 16 - codes.shape[1]))
        return rows[:, None, :, None].expand(-1, 3, -1, 16)


def _rows(count: int = 3) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 1, 16, 1), generator=torch.Generator().manual_seed(0))
    return levels.to(torch.uint8).expand(-1, 3, -1, 16).contiguous()


def _folder(path: Path) -> Path:
    path.mkdir()
    for index, picture in enumerate(_rows(4)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{index}.png")
    return path


def test_more_tokens_keep_more_of_a_picture() -> None:
    config = rd.RateDistortionConfig(codecs=("jpeg",), codec_pictures=1, rounds=1)
    figures = rd.rate_distortion(_Means(), _rows(), config, "rows")
    assert [point["tokens"] for point in figures["points"]] == [1, 2, 4, 8, 16]
    assert [point["bits"] for point in figures["points"]] == [8, 16, 32, 64, 128]
    quality = [point["psnr"] for point in figures["points"]]
    assert quality == sorted(quality) and quality[0] < 12 and quality[-1] == 100
    assert figures["points"][-1]["adaptive_bits"] == pytest.approx(128, rel=0.1)
    assert "| 16 | 128 |" in rd.rate_distortion_table(figures)
    assert "| PSNR of the codecs' pictures | JPEG |" in rd.rate_distortion_table(figures)
    first = rd.rate_distortion(_Means(), _rows()[:1], rd.RateDistortionConfig(codec_pictures=0, rounds=1))
    own = [point["psnr_codec_pictures"] for point in figures["points"]]
    assert own == [point["psnr"] for point in first["points"]]
    assert "codecs' pictures" not in rd.rate_distortion_table(first)
    assert figures["speed"]["encode_ms"] > 0


def test_a_tokenizer_for_any_size_is_told_the_size() -> None:
    torch.manual_seed(0)
    tokenizer = ImageCNNTokenizer(16, channels=8, multipliers=(1, 2), blocks=1, norm_groups=4).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    config = rd.RateDistortionConfig(codec_pictures=0, rounds=1)
    figures = rd.rate_distortion(tokenizer, pixels, config)
    assert (figures["size"], figures["points"][0]["tokens"]) == ([16, 24], 8 * 12)


def test_only_prefixes_that_decode_are_measured() -> None:
    assert rd.token_counts(_Means(), _rows(1), (8, 2)) == [2, 8]
    with pytest.raises(TokenloomError, match="does not decode 3 of 16 tokens; it decodes 1, 2, 4, 8, 16"):
        rd.token_counts(_Means(), _rows(1), (3,))
    with pytest.raises(TokenloomError, match="does not decode 3 of 16 tokens; it decodes 16"):
        rd.token_counts(tiny_tokenizer(), _rows(1), (3,))


def test_adaptive_bits_follow_the_counts() -> None:
    codes, counts, expected = [2, 2, 0, 2], [0.5] * 3, 0.0
    for code in codes:
        expected -= math.log2(counts[code] / sum(counts))
        counts[code] += 1
    assert adaptive_bits(torch.tensor(codes), 3) == pytest.approx(expected)
    assert adaptive_bits(torch.zeros(1000, dtype=torch.long), 4096) < 3000  # far from 12,000 nominal bits


def test_the_command_writes_a_report_and_a_figure(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "tokenizer"), str(_folder(tmp_path / "pictures")), "-o", str(out)]
    result = CliRunner().invoke(app, ["evaluate-tokenizer", *arguments, "--codec", "webp", "--count", "3"])
    assert result.exit_code == 0, result.output
    figures = json.loads((out / "report.json").read_text())
    assert figures["pictures"] == 3 and figures["points"][0]["bits"] == 16 * 6
    assert Image.open(out / "rate_distortion.png").size[0] > 500
    assert "WEBP" in (out / "report.md").read_text()


def test_fid_and_lpips_need_the_files_of_their_networks(tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    config = rd.RateDistortionConfig(
        tokens=(4, 16),
        codec_pictures=0,
        rounds=1,
        fid=str(tmp_path / "means.pt"),
        lpips=str(tmp_path / "means.pt"),
    )
    figures = rd.rate_distortion(_Means(), _rows(), config)
    few, exact = figures["points"]
    assert few["fid"] > 1e-4 and few["lpips"] > 1e-4
    assert exact["fid"] == pytest.approx(0, abs=1e-9) and exact["lpips"] == 0
    assert "| LPIPS | FID |" in rd.rate_distortion_table(figures)
    with pytest.raises(TokenloomError, match="FID is defined by a network that does not come with tokenloom"):
        rd.rate_distortion(_Means(), _rows(), rd.RateDistortionConfig(fid="none.pt"))


def test_a_size_the_tokenizer_does_not_take_is_refused() -> None:
    assert rd.picture_size(tiny_tokenizer(), None) == 16
    assert rd.picture_size(_Means(), 32) == 32
    with pytest.raises(TokenloomError, match="takes pictures of 16 pixels, got size 32"):
        rd.picture_size(tiny_tokenizer(), 32)


def test_tokenizers_open_from_their_own_folder_and_from_a_pipeline(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "alone")
    models.write_card(tmp_path / "alone", {"license": "MIT"})
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    pixels = _rows(1).float() / 127.5 - 1
    for place in ("alone", "pipeline"):
        assert torch.equal(load_tokenizer(tmp_path / place).encode(pixels), tokenizer.encode(pixels))
    assert list(models.read_card(tmp_path / "alone")["sha256"]) == ["diffusion_pytorch_model.safetensors"]


def test_a_damaged_component_and_a_foreign_class_are_named(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(TokenloomError, match="truncated"):
        load_tokenizer(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "ImageVQTokeniser"}))
    with pytest.raises(TokenloomError, match="ImageVQTokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TokenloomError, match="must hold a mapping"):
        load_tokenizer(tmp_path)
