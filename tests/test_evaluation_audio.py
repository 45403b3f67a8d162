"""Metrics of sound, codecs at equal bits, note-level scores, and the command evaluate-audio."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.tiny_audio import tiny_codec, tiny_pipeline, write_tones
from tokenloom import TokenloomError
from tokenloom.cli import app
from tokenloom.data.sounds import SoundFolder
from tokenloom.evaluation import audio_metrics
from tokenloom.evaluation.audio_codecs import CODECS, code_within, ogg_packets
from tokenloom.evaluation.audio_metrics import (
    mel_distance,
    missing_scores,
    perceptual_scores,
    si_sdr,
    stft_distance,
)
from tokenloom.evaluation.audio_report import codec_table, evaluate_codec, pieces
from tokenloom.evaluation.note_scores import (
    chromagram,
    f1,
    heard_onsets,
    key_scale,
    note_chroma,
    note_scores,
)

RATE = 16000


def noise(seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def test_si_sdr_is_that_of_the_formula_and_ignores_scale():
    target, other = noise(0.5), noise(0.5, 1)
    orthogonal = other - other.mean()
    centred = target - target.mean()
    orthogonal = orthogonal - (orthogonal @ centred) / (centred @ centred) * centred
    orthogonal = orthogonal * centred.norm() / orthogonal.norm() / 10
    assert si_sdr(target + orthogonal, target) == pytest.approx(20, abs=0.01)
    assert si_sdr(3 * (target + orthogonal) + 1, target) == pytest.approx(20, abs=0.01)


def test_distances_grow_with_noise():
    target = noise(0.5)
    for distance in (lambda a, b: mel_distance(a, b, RATE), stft_distance):
        values = [distance(target + scale * noise(0.5, 1), target) for scale in (0, 0.3, 3.0)]
        assert values[0] == 0 and 0 < values[1] < values[2]
    assert set(perceptual_scores(target, target, 11025, ["PESQ", "STOI"])) <= {"STOI"}
    with pytest.raises(TokenloomError, match="one length"):
        si_sdr(target[:-1], target)


def test_scores_are_measured_or_their_absence_is_said(monkeypatch):
    target = noise(0.5)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    missing = {"pesq", "pystoi", "libsvm"}
    assert perceptual_scores(target, target, RATE) == {}
    lines = missing_scores(RATE)
    assert len(lines) == 3 and lines[2].endswith("pip install visqol-python libsvm-official.")
    assert missing_scores(24000, ["PESQ"]) == ["PESQ is not defined at 24000 Hz, but at 8000 and 16000 Hz."]
    with pytest.raises(TokenloomError, match="'VISQOL'"):
        perceptual_scores(target, target, RATE, ["VISQOL"])


def test_visqol_is_given_both_sounds_at_48_khz(monkeypatch):
    given = []

    class Api:
        def create(self, mode):
            given.append(mode)

        def measure_from_arrays(self, reference, degraded, rate):
            given.append((len(reference), float(abs(reference - degraded).max()), rate))
            return types.SimpleNamespace(moslqo=4.5)

    for name in ("visqol", "libsvm"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["visqol"], "VisqolApi", Api, raising=False)
    audio_metrics._visqol_api.cache_clear()
    try:
        assert perceptual_scores(noise(0.5), noise(0.5), RATE, ["ViSQOL"]) == {"ViSQOL": 4.5}
    finally:
        audio_metrics._visqol_api.cache_clear()
    assert given == ["audio", (24000, 0.0, 48000)]


def test_codecs_keep_to_their_budget_and_are_charged_their_payload():
    audio = noise(1.0)
    for name in CODECS:
        small, large = (code_within(name, audio, RATE, bits) for bits in (20_000, 60_000))
        assert (
            small.audio.shape == audio.shape and small.payload_bits <= large.payload_bits <= large.file_bits
        )
        assert (small.payload_bits <= 20_000) == small.fits
        assert large.fits and large.payload_bits <= 60_000
    tight = code_within("vorbis", audio, RATE, 10)
    assert not tight.fits and tight.payload_bits > 10
    with pytest.raises(TokenloomError, match="opus"):
        code_within("opsu", audio, RATE, 1000)


def test_packets_of_ogg():
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(1.0).numpy(), RATE, format="OGG", subtype="OPUS")
    content = buffer.getvalue()
    packets = ogg_packets(content)
    assert packets[0] == 19  # OpusHead for one channel
    assert 45 <= len(packets) - 2 <= 60 and sum(packets) < len(content)  # 20 ms each
    with pytest.raises(TokenloomError, match="Ogg page"):
        ogg_packets(b"RIFFxxxx" * 10)


C_MAJOR = [(0.5 * index, 0.5, 60 + step) for index, step in enumerate((0, 4, 7, 12, 11, 9, 5, 2))]


def play(notes: list[tuple[float, float, int]], seconds: float) -> Tensor:
    audio = torch.zeros(round(seconds * RATE))
    for onset, duration, pitch in notes:
        time = torch.arange(round(duration * RATE)) / RATE
        wave = 0.2 * (2 * math.pi * 440 * 2 ** ((pitch - 69) / 12) * time).sin() * (-4 * time).exp()
        start = round(onset * RATE)
        audio[start : start + len(wave)] += wave[: len(audio) - start]
    return audio


def test_chroma_hears_the_pitch_class_in_every_octave():
    for pitch in (45, 60, 74, 83):
        frames = chromagram(play([(0, 1.0, pitch)], 1.0), RATE)
        assert (frames[2:15].argmax(1) == pitch % 12).all()
    assert chromagram(torch.zeros(RATE), RATE).abs().max() == 0


def test_keys():
    assert key_scale(note_chroma(C_MAJOR)) == (0, 2, 4, 5, 7, 9, 11)
    up = [(onset, duration, pitch + 2) for onset, duration, pitch in C_MAJOR]
    assert key_scale(note_chroma(up)) == (1, 2, 4, 6, 7, 9, 11)
    assert note_chroma([(1.0, 2.0, 61)], 0.0, 1.5)[1] == 0.5


def test_onsets_and_their_f1():
    heard = heard_onsets(play(C_MAJOR, 4.0), RATE)
    assert f1(heard, [onset for onset, _, _ in C_MAJOR], 0.075) > 0.85
    assert heard_onsets(torch.zeros(RATE), RATE) == []
    assert f1([1.0, 2.0], [1.01, 3.0], 0.05) == 0.5
    assert f1([1.0, 1.01], [1.0], 0.05) == pytest.approx(2 / 3)
    assert f1([], [], 0.05) == 1 and f1([], [1.0], 0.05) == 0


def test_scores_tell_the_right_music_from_the_wrong_one():
    real = play(C_MAJOR, 4.0)
    level = float(real.square().mean().sqrt())
    good = note_scores(real, RATE, C_MAJOR, 0.0, level)
    wrong = play([(0.5 * index + 0.2, 0.5, 61 + (index % 2) * 5) for index in range(7)], 4.0)
    bad = note_scores(wrong, RATE, C_MAJOR, 0.0, level)
    assert good.onset_f1 > 0.85 and good.chroma > 0.8 and good.in_key > 0.95 and good.repetition == 0
    assert bad.onset_f1 < 0.5 and bad.chroma < 0.6 and bad.in_key < 0.7 and bad.repetition > 0.5
    cluster = play([(0.0, 2.0, 60), (0.0, 2.0, 61)], 2.0)
    assert note_scores(cluster, RATE, C_MAJOR, 0.0, level).dissonance > 0.8 > 0.2 > good.dissonance
    assert note_scores(torch.zeros(RATE), RATE, C_MAJOR, 0.0, level).silence == 1
    with pytest.raises(TokenloomError, match="half a second"):
        note_scores(real[:100], RATE, C_MAJOR, 0.0, level)


def test_report_of_a_codec(tmp_path):
    sounds = SoundFolder(write_tones(tmp_path / "tones", count=4), None, 8000)
    chosen = pieces(sounds, 0.4, 2)
    assert [name for name, _ in chosen] == ["0.wav", "2.wav"] and chosen[0][1].shape == (3200,)
    codec = tiny_codec()
    report = evaluate_codec(
        codec, [sound for _, sound in chosen], codebooks=[1, 3], codecs=["opus"], scores=["PESQ"]
    )
    names = [row["name"] for row in report["rows"]]
    assert names == ["1 codebooks", "opus within 800", "3 codebooks", "opus within 2400"]
    codes = codec.encode(torch.stack([sound for _, sound in chosen])[:, None], num_codebooks=1)
    counts = torch.bincount(codes.flatten(), minlength=16)
    assert report["codebooks"][0]["usage"] == float((counts > 0).float().mean())
    assert report["rows"][0]["bits_per_second"] == 200 * 4
    assert report["speed"]["encode"] > 0 and "| 3 codebooks |" in codec_table(report)
    with pytest.raises(TokenloomError, match="No sound has 9 s"):
        pieces(sounds, 9, 2)


def test_command_writes_a_report_of_codec_and_continuations(tmp_path: Path):
    folder = write_tones(tmp_path / "tones", count=2, seconds=1.6)
    lines = [{"file": f"{index}.wav", "notes": [[0.0, 0.8, 55], [0.8, 0.8, 55]]} for index in range(2)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny_pipeline().save_pretrained(tmp_path / "model")
    words = ["evaluate-audio", str(folder), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "model")]
    words += [
        "--prompt-seconds",
        "0.8",
        "--seconds",
        "0.6",
        "--count",
        "1",
        "--codec",
        "mp3",
        "--codebooks",
        "2",
        "--score",
        "PESQ",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["Continuations"]["rows"]
    assert set(rows) == {
        "real continuation",
        "real, through the codec",
        "continuation",
        "prompt again",
        "noise, through the codec",
    }
    assert rows["real continuation"]["chroma"] > 0.9
    speed = report["Continuations"]["speed"]
    assert set(speed) == {"cached", "compiled"}
    assert all(np.isfinite(value) and value > 0 for pace in speed.values() for value in pace.values())
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| mp3 within 1600 |" in text and "| onset F1 |" in text


def test_command_refuses_a_model_of_pictures(tmp_path):
    write_tones(tmp_path / "tones", count=1)
    words = ["evaluate-audio", str(tmp_path / "tones"), "-m", "tokenloom-emoji-64"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "modality 'image'" in done.output
