"""Codes that depend on nothing but their sound: every codec, and that a codec which breaks the rule is found."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import AudioTokenizer
from tokenloom.evaluation.audio_conformance import (
    conformance,
    conformance_table,
    liven,
    measure_small_codecs,
    small_codecs,
)

OURS = "AudioTokenizer, convolutions"


@functools.lru_cache
def rows() -> dict[str, Any]:
    return dict(measure_small_codecs())


@pytest.mark.parametrize("name", [name for name in small_codecs() if name != "EnCodec 48 kHz"])
def test_codes_depend_on_the_sound_alone(name):
    row = rows()[name]
    assert row["lengths"] and row["codes"] > 8 and row["sound"] < 1e-5
    assert row["streaming"] is (True if name.startswith("AudioTokenizer") else None)
    if row["streaming"]:
        assert row["padding"] == row["beginning"] == 1 and row["sound_streaming"] < 1e-5
    else:
        assert "piece by piece" in row["reason"]


def test_what_cannot_keep_the_contract_is_refused():
    assert "2 channels" in rows()["EnCodec 48 kHz"]
    table = conformance_table(rows())
    assert "| EnCodec 48 kHz | refused | refused |" in table and f"| {OURS} | exact | exact |" in table


class Leaky(AudioTokenizer):
    """Hears the loudness of the whole batch."""

    def encode(self, media: Tensor, **options: Any) -> Tensor:
        return super().encode(media / media.abs().mean(), **options)


def test_a_codec_that_leaks_is_found():
    torch.manual_seed(0)
    codec = Leaky(widths=(4, 6, 8, 8, 12), latent_channels=8, codebooks=3, codebook_size=32).eval()
    liven(codec)
    row = conformance(codec)
    assert not row["lengths"] and row["streaming"] is False and row["codes"] > 8
    assert "| leaky | **no** | **no** |" in conformance_table({"leaky": row})
