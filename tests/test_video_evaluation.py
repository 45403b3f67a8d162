"""Figures of clips: metrics, codecs at equal bits, the judge, and the report of a tiny model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from referring_pools import write_pool
from test_video_pipeline import make_pipeline
from typer.testing import CliRunner

from tokenloom import TokenloomError
from tokenloom.cli import app
from tokenloom.data.moving import MotionConfig, MotionMaker
from tokenloom.data.referring_pool import Pool
from tokenloom.data.video import build_video
from tokenloom.evaluation.codecs import av1_frame_bytes
from tokenloom.evaluation.metrics import frechet_distance, psnr
from tokenloom.evaluation.video_codecs import (
    code_clip_within,
    h264_slice_bytes,
    video_codec_names,
    webp_payload_bytes,
)
from tokenloom.evaluation.video_judge import VideoJudge, train_video_judge
from tokenloom.evaluation.video_metrics import (
    added_flicker,
    colour_drift,
    flicker,
    frame_quality,
    ground_colour,
    track,
    track_error,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pool."""
    return write_pool(tmp_path_factory.mktemp("pool"))


def moving(
    pool: Path, count: int, motion: str = "right", size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips uint8 (B, 9, 3, S, S) on plain colours, and their tracks."""
    maker = MotionMaker(Pool.open(pool), "train", MotionConfig(size, 9, plain=1.0, motions=(motion,)))
    clips = [maker.clip(seed) for seed in range(count)]
    frames = torch.stack([torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips])
    return frames, torch.stack([torch.from_numpy(clip.track).float() for clip in clips])


def test_quality_is_that_of_each_frame() -> None:
    clips = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    worse = clips.clone()
    worse[:, 4:] = (worse[:, 4:] + 0.2).clamp(0, 1)
    quality = frame_quality(worse, clips)
    assert quality.psnr[0, 0] == 100 and torch.allclose(
        quality.psnr[1, 5], psnr(worse[1, 5:], clips[1, 5:])[0]
    )
    assert quality.drift > 50 and quality.ssim.shape == (2, 6) and quality.ssim[0, 0] == 1
    with pytest.raises(TokenloomError, match="one shape"):
        frame_quality(clips, clips[:, :3])


def test_flicker_counts_what_trembles_and_not_what_is_wrong() -> None:
    still = torch.full((1, 8, 3, 16, 16), 0.5)
    shifted = still + 0.05
    trembling = still + 0.02 * torch.tensor([1.0, -1.0] * 4).view(1, 8, 1, 1, 1)
    assert added_flicker(shifted, still) < 1e-4 < added_flicker(trembling, still)
    assert added_flicker(trembling, still) == pytest.approx(0.04 * 255, rel=1e-3)
    assert flicker(still) == 0 and flicker(trembling) > 3
    passing = still.clone()
    for frame in range(8):
        passing[:, frame, :, 4:6, 2 * frame : 2 * frame + 2] = 1.0  # a thing that moves is no flicker
    assert flicker(passing) == 0
    fading = still + torch.linspace(0, 0.2, 8).view(1, 8, 1, 1, 1)
    assert colour_drift(still) == 0 and colour_drift(fading) > 20


def test_tracking_finds_the_thing(pool: Path) -> None:
    clips, known = moving(pool, 6)
    found = track(clips.float() / 255)
    distance, ratio = track_error(found, known)
    assert distance < 0.02 and ratio < 1.15
    wrong, _ = track_error(found.flip(1), known)
    assert wrong > 0.1
    assert ground_colour(clips.float()).round().equal(clips[:, 0, :, 0, 0].float())
    empty = torch.zeros(1, 9, 3, 64, 64)
    assert track_error(track(empty), known[:1]) == (0.5, 2.0)


def test_frechet_distance_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(4000, 3, generator=generator)
    other = torch.randn(4000, 3, generator=generator) * 2 + 1
    assert frechet_distance(one, one) < 1e-8
    assert frechet_distance(one, other) == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.08)
    with pytest.raises(TokenloomError, match="two sets"):
        frechet_distance(one, other[:, :2])


def test_codecs_stay_within_their_budget(pool: Path) -> None:
    clip = moving(pool, 1)[0][0]
    assert video_codec_names()[0] == "webp"
    small, large = (code_clip_within("webp", clip, bits) for bits in (6000, 40000))
    assert small is not None and large is not None
    assert small.bits <= 6000 and large.bits <= 40000 and large.psnr > small.psnr
    assert small.clip.shape == clip.shape and small.clip.dtype == torch.uint8
    error = ((small.clip.float() - clip.float()) / 255).square().mean()
    assert small.psnr == pytest.approx(float(-10 * torch.log10(error)))
    assert code_clip_within("webp", clip, 8) is None
    with pytest.raises(TokenloomError, match="h264"):
        code_clip_within("h265", clip, 4000)
    with pytest.raises(TokenloomError, match="uint8"):
        code_clip_within("webp", clip.float(), 4000)
    if find_spec("av") is None:
        with pytest.raises(TokenloomError, match="pip install av"):
            code_clip_within("h264", clip, 4000)
    else:
        for name in video_codec_names()[1:]:
            coded = code_clip_within(name, clip, 6000)
            assert coded is not None and coded.bits <= 6000 and coded.psnr > 25


def test_payloads_leave_headers_out() -> None:
    slices = b"\x00\x00\x00\x01\x67abc\x00\x00\x01\x65" + b"x" * 9 + b"\x00\x00\x01\x06sei\x00\x00\x01\x41yy"
    assert h264_slice_bytes(slices) == 10 + 3
    units = (
        bytes([0x12, 0x00]) + bytes([0x0A, 0x02, 1, 2]) + bytes([0x32, 0x03, 7, 7, 7])
    )  # delimiter, header, frame
    assert av1_frame_bytes(units) == 3
    frame = b"VP8 " + (14).to_bytes(4, "little") + bytes(14)
    chunk = b"ANMF" + (16 + len(frame)).to_bytes(4, "little") + bytes(16) + frame
    assert webp_payload_bytes(b"RIFF" + bytes(4) + b"WEBP" + chunk * 2) == 8


def test_a_judge_learns_motions_and_is_read_back(pool: Path, tmp_path: Path) -> None:
    config = MotionConfig(64, 9, plain=1.0, motions=("right", "left"))
    judge = train_video_judge(pool, steps=60, batch_size=16, learning_rate=4e-3, config=config)
    assert judge.things == ["apple", "frog", "whale"] and judge.motions == ["right", "left"]
    right, left = moving(pool, 8, "right")[0], moving(pool, 8, "left")[0]
    seen = judge.look(torch.cat([right, left])).motions.argmax(1)
    assert (seen == torch.tensor([0] * 8 + [1] * 8)).float().mean() > 0.8  # chance is a half
    opened = VideoJudge.load(judge.save(tmp_path).parent)
    assert torch.equal(opened.look(right).features, judge.look(right).features)
    marks = opened.marks(right, ["apple"] * 4 + ["no such thing"] * 4, ["right"] * 8)
    assert marks["known_things"] == 4 and marks["thing_top5"] == 1 and marks["motion"] > 0.8
    with pytest.raises(TokenloomError, match="none of the things"):
        opened.marks(right, ["nothing"] * 8, ["right"] * 8)
    with pytest.raises(TokenloomError, match="uint8"):
        opened.look(right.float())
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(TokenloomError, match="train-video-judge"):
        VideoJudge.load(tmp_path / "bad.safetensors")


def test_the_command_reports_all_figures(pool: Path, tmp_path: Path) -> None:
    config = MotionConfig(16, 9, plain=1.0)
    build_video(tmp_path / "clips", pool=pool, count=4, splits=("train",), config=config)
    make_pipeline().save_pretrained(tmp_path / "model")
    train_video_judge(pool, steps=1, batch_size=4, config=MotionConfig(16, 9)).save(tmp_path / "judge")
    words = [
        "evaluate-video",
        str(tmp_path / "clips"),
        "-o",
        str(tmp_path / "report"),
        "--codec",
        "webp",
        "--long",
        "20",
    ]
    run = CliRunner().invoke(app, [*words, "-m", str(tmp_path / "model"), "--judge", str(tmp_path / "judge")])
    assert run.exit_code == 0, run.output + repr(run.exception)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["tokens"]["bits"] == 320 and report["tokens"]["rows"][0]["psnr"] > 0
    assert len(report["tokens"]["rows"][0]["psnr_by_frame"]) == 9
    assert report["speed"]["steps"] == 20 and report["speed"]["long"]["frames"] == 20
    assert report["motion"]["clips"] == 4 and report["motion"]["real"]["distance"] < 0.1
    assert set(report["prompts"]["generated"]) == {"thing", "thing_top5", "motion", "clips", "known_things"}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "frames a second" in text and "| generated |" in text and "| webp |" in text
    alone = ["evaluate-video", str(tmp_path / "clips"), "-o", str(tmp_path / "other"), "--codec", "webp"]
    run = CliRunner().invoke(app, [*alone, "-m", str(tmp_path / "model" / "tokenizer")])
    assert run.exit_code == 0, run.output + repr(run.exception)
    assert "speed" not in json.loads((tmp_path / "other" / "report.json").read_text())
