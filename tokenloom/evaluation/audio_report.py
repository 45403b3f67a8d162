"""Rate, distortion and speed of an audio codec beside Opus, MP3 and Vorbis at the same bits, as a table.

The same sounds for all, cut to one length; nominal bits of the tokens, their bits after an adaptive entropy coder, and
payload bits of the codecs. Knows nothing of training or of the command line. Shapes: (S,) samples.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.data.sounds import SoundFolder
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.audio_codecs import CODECS, code_within
from tokenloom.evaluation.audio_metrics import (
    SCORES,
    mel_distance,
    missing_scores,
    perceptual_scores,
    si_sdr,
    stft_distance,
)
from tokenloom.evaluation.benchmark import environment
from tokenloom.evaluation.reconstruction import adaptive_bits, codebook_use
from tokenloom.evaluation.tables import markdown_table, plain
from tokenloom.media import write_atomically

_TIMED_SECONDS = 10.0
_ROUNDS = 3


def pieces(sounds: SoundFolder, seconds: float, count: int) -> list[tuple[str, Tensor]]:
    """At most `count` beginnings (file, samples (S,)) of the sounds, evenly spread over the folder; shorter sounds are left out.

    Raises:
        TokenloomError: If no sound is that long.
    """
    size = round(seconds * sounds.sample_rate)
    long = [index for index, length in enumerate(sounds.starts.diff().tolist()) if length >= size]
    if not long or size < 1 or count < 1:
        raise TokenloomError(
            f"No sound has {seconds} s, or none is asked for (count {count}); lower the seconds."
        )
    number = min(count, len(long))
    chosen = [long[place * len(long) // number] for place in range(number)]
    return [(sounds.captions[index].file, sounds.sound(index)[0, :size]) for index in chosen]


def evaluate_codec(
    codec: Any,
    audio: Sequence[Tensor],
    *,
    codebooks: Sequence[int] | None = None,
    codecs: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a codec at several numbers of codebooks, and classical codecs at the nominal bits of each.

    Args:
        codec: An audio tokenizer.
        audio: Sounds (S,) at its rate, of one length.
        codebooks: Numbers of codebooks; `None` = half and all.
        codecs: Names of `CODECS`; `None` for all, an empty sequence for none.
        scores: Names of perceptual `SCORES`; `None` for all, an empty sequence for none. Those whose package is not
            installed are left out, and "missing" says so.
        log: Receives a line a step.

    Returns:
        A JSON-able dictionary: "rows", "missing", "codebooks", "speed", "environment".
    """
    rate, whole = codec.sample_rate, codec.num_codebooks
    counts = sorted({max(1, whole // 2), whole}) if codebooks is None else list(codebooks)
    seconds = len(audio[0]) / rate
    rows: list[dict[str, Any]] = []
    for count in counts:
        log(f"{count} codebooks")
        codes = [_encode(codec, sound, count) for sound in audio]
        made = [_decode(codec, one, len(sound)) for one, sound in zip(codes, audio, strict=True)]
        nominal = codec.bits_per_second(count)
        coded = sum(
            adaptive_bits(torch.stack([one[0, book] for one in codes]), codec.codebook_sizes[book])
            for book in range(count)
        )
        rows.append(
            {"name": f"{count} codebooks", "bits_per_second": nominal}
            | {"adaptive_bits_per_second": coded / (seconds * len(audio)), "fits": True}
            | _distances(made, audio, rate, scores)
        )
        for name in CODECS if codecs is None else codecs:
            log(f"{name} within {nominal:.0f} bit/s")
            results = [code_within(name, sound, rate, nominal * seconds) for sound in audio]
            bits = sum(result.payload_bits for result in results) / (seconds * len(audio))
            rows.append(
                {"name": f"{name} within {nominal:.0f}", "bits_per_second": bits}
                | {"adaptive_bits_per_second": None, "fits": all(result.fits for result in results)}
                | _distances([result.audio for result in results], audio, rate, scores)
            )
    return {
        "sounds": len(audio),
        "seconds": seconds,
        "sample_rate": rate,
        "parameters": sum(weight.numel() for weight in codec.parameters()),
        "rows": rows,
        "missing": missing_scores(rate, scores),
        "codebooks": _usage(codec, [_encode(codec, sound, whole) for sound in audio]),
        "speed": speed(codec),
        "environment": environment(),
    }


def _encode(codec: Any, sound: Tensor, count: int) -> Tensor:
    return codec.encode(sound[None, None].to(codec.device), num_codebooks=count).cpu()


def _decode(codec: Any, codes: Tensor, size: int) -> Tensor:
    return codec.decode(codes.to(codec.device), lengths=size)[0, 0].float().cpu()


def _distances(
    made: Sequence[Tensor], audio: Sequence[Tensor], rate: int, scores: Sequence[str] | None
) -> dict[str, float]:
    """Means over all sounds."""
    found: list[dict[str, float]] = [
        {
            "si_sdr": si_sdr(output, target),
            "mel": mel_distance(output, target, rate),
            "stft": stft_distance(output, target),
            **perceptual_scores(output, target, rate, scores),
        }
        for output, target in zip(made, audio, strict=True)
    ]
    return {key: statistics.fmean(item[key] for item in found) for key in found[0]}


def _usage(codec: Any, codes: Sequence[Tensor]) -> list[dict[str, float]]:
    """Share of the codes of each codebook that occurred, and their perplexity."""
    uses = [
        codebook_use(torch.stack([one[0, book] for one in codes]), size)
        for book, size in enumerate(codec.codebook_sizes)
    ]
    return [{"usage": use.usage, "perplexity": use.perplexity} for use in uses]


def speed(codec: Any) -> dict[str, float]:
    """Seconds of sound that are encoded and decoded in one second (the median of three times ten seconds of noise)."""
    size = round(_TIMED_SECONDS * codec.sample_rate)
    audio = 0.1 * torch.randn(1, 1, size, generator=torch.Generator().manual_seed(0)).to(codec.device)
    codes = codec.encode(audio)
    return {
        "encode": _TIMED_SECONDS / _median_time(lambda: codec.encode(audio)),
        "decode": _TIMED_SECONDS / _median_time(lambda: codec.decode(codes)),
    }


def _median_time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        result = call()
        if isinstance(result, Tensor):
            result.cpu()  # waits for an accelerator
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def codec_table(report: dict[str, Any]) -> str:
    """The rows of `evaluate_codec` as markdown; a star marks codecs that need more bits than allowed."""
    extra = [key for key in SCORES if key in report["rows"][0]]
    header = ("", "bit/s", "after entropy coding", "SI-SDR", "mel distance", "STFT distance", *extra)
    rows = []
    for row in report["rows"]:
        coded = row["adaptive_bits_per_second"]
        cells = [f"{row['si_sdr']:.2f} dB", f"{row['mel']:.3f}", f"{row['stft']:.3f}"]
        cells += [f"{row[key]:.3f}" for key in extra]
        star = "" if row["fits"] else " *"
        rows.append(
            (
                row["name"],
                f"{row['bits_per_second']:.0f}{star}",
                "-" if coded is None else f"{coded:.0f}",
                *cells,
            )
        )
    use = markdown_table(
        ("codebook", "codes used", "perplexity"),
        [
            (index, f"{100 * book['usage']:.1f} %", f"{book['perplexity']:.0f}")
            for index, book in enumerate(report["codebooks"])
        ],
    )
    pace = report["speed"]
    return (
        f"{report['sounds']} sounds of {report['seconds']:.1f} s at {report['sample_rate']} Hz. Payload bits without "
        f"container; * = the smallest that the codec makes is larger than allowed.{_lines(report['missing'])}\n\n"
        f"{markdown_table(header, rows)}\n{use}\n"
        f"Encoding {pace['encode']:.1f} and decoding {pace['decode']:.1f} times faster than real time.\n"
    )


def _lines(missing: Sequence[str]) -> str:
    return "".join(f" {line}" for line in missing)


def write_audio_report(parts: dict[str, tuple[dict[str, Any], str]], folder: str | Path) -> list[Path]:
    """Writes `report.md` and `report.json` of parts, title -> (figures, text)."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenloomError(f"Cannot write to {str(folder)!r}: {error.strerror}.") from error
    text = "\n".join(f"## {title}\n\n{body}" for title, (_, body) in parts.items())
    figures = {title: values for title, (values, _) in parts.items()}
    return [
        write_atomically(folder / "report.md", f"# Sound\n\n{text}"),
        write_atomically(folder / "report.json", json.dumps(plain(figures), indent=2) + "\n"),
    ]
