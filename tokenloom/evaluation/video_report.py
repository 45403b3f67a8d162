"""Measures a model of clips: what its tokens keep beside video codecs, and what it generates, continues and how fast.

What each figure means is said in the module that computes it. Clips with a "track" and "plain" in their captions.jsonl, as
`tokenloom data video` writes them, are also measured for motion. Knows the pipeline by its call.

Shapes: B clips, T frames.
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

from tokenloom.data.clips import ClipFolder
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.benchmark import environment, peak_rss_mb
from tokenloom.evaluation.metrics import frechet_distance
from tokenloom.evaluation.tables import markdown_table, plain
from tokenloom.evaluation.video_codecs import code_clip_within, video_codec_names
from tokenloom.evaluation.video_judge import VideoJudge
from tokenloom.evaluation.video_metrics import (
    added_flicker,
    colour_drift,
    flicker,
    frame_quality,
    track,
    track_error,
)
from tokenloom.media import write_atomically
from tokenloom.tokenizers.pixels import rescale

_AT_ONCE = 8
_ROUNDS = 3

Log = Callable[[str], None]


def measure_tokens(
    tokenizer: Any, clips: Tensor, codecs: Sequence[str] | None = None, log: Log = lambda line: None
) -> dict[str, Any]:
    """What comes back of clips beside video codecs at the same bits.

    Args:
        tokenizer: A `VideoTokenizer`.
        clips: uint8 (B, T, 3, S, S).
        codecs: Names of `VIDEO_CODECS`; `None` for all that are there.
        log: Receives a line a step.

    Returns:
        A JSON-able dictionary: "bits", "rows".
    """
    output = _reconstructed(tokenizer, clips)
    codes = tokenizer.layout_for(clips.shape[1], tuple(clips.shape[3:])).size
    bits = codes * torch.tensor(float(tokenizer.vocab_size)).log2().item()
    reference = clips.float() / 255
    rows = [{"name": "tokens", "bits": bits, "clips": len(clips)} | _quality(output, reference)]
    for name in video_codec_names() if codecs is None else codecs:
        log(f"{name} within {bits:.0f} bits")
        coded = [code_clip_within(name, clip, bits) for clip in clips]
        kept = [index for index, one in enumerate(coded) if one is not None]
        row: dict[str, Any] = {"name": name, "bits": None, "clips": len(kept)}
        if kept:
            found = [one for one in coded if one is not None]
            decoded = torch.stack([one.clip for one in found]).float() / 255
            row |= {"bits": statistics.fmean(one.bits for one in found)}
            row |= _quality(decoded, reference[kept])
        rows.append(row)
    return {"bits": bits, "frames": clips.shape[1], "rows": rows}


def _reconstructed(tokenizer: Any, clips: Tensor) -> Tensor:
    """Clips uint8 (B, T, 3, S, S) through the tokenizer, float in [0, 1]."""
    made = [tokenizer.reconstruct(part.to(tokenizer.device)).float().cpu() for part in clips.split(_AT_ONCE)]
    return rescale(torch.cat(made), tokenizer.pixel_range, (0.0, 1.0)).clamp(0, 1)


def _quality(output: Tensor, reference: Tensor) -> dict[str, Any]:
    quality = frame_quality(output, reference)
    return {
        "psnr": float(quality.psnr.mean()),
        "ssim": float(quality.ssim.mean()),
        "drift": quality.drift,
        "added_flicker": added_flicker(output, reference),
        "psnr_by_frame": quality.psnr.mean(0).tolist(),
    }


def generate_clips(pipe: Any, prompts: Sequence[str], seed: int, frames: int, **options: Any) -> Tensor:
    """uint8 (B, frames, 3, S, S) of one clip a prompt; clip i has the seed `seed + i`."""
    made = []
    for start in range(0, len(prompts), _AT_ONCE):
        chosen = list(prompts[start : start + _AT_ONCE])
        made.append(pipe(chosen, num_frames=frames, seed=seed + start, output_type="pt", **options).frames)
    return (torch.cat(made) * 255).round().to(torch.uint8)


def measure_prompts(
    pipe: Any, judge: VideoJudge, clips: Tensor, captions: Sequence[Any], seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Whether generated clips show the things and motions of their captions, beside real clips of the same captions.

    Args:
        pipe: A `VideoPipeline` with words.
        judge: The judge.
        clips: uint8 (B, T, 3, S, S), real clips.
        captions: Their captions, whose "label" is the thing and "style" the motion.
        seed: Seed of the first clip.
        options: Passed to every call of the pipeline.
    """
    things, motions = [str(item.label) for item in captions], [str(item.style) for item in captions]
    made = generate_clips(pipe, [item.text for item in captions], seed, clips.shape[1], **options)
    coded = (255 * _reconstructed(pipe.tokenizer, clips)).round().to(torch.uint8)
    real = judge.look(clips).features
    half = len(real) // 2
    return {
        "generated": judge.marks(made, things, motions),
        "reconstructed": judge.marks(coded, things, motions),
        "real": judge.marks(clips, things, motions),
        "frechet": frechet_distance(judge.look(made).features, real),
        "frechet_of_reconstructions": frechet_distance(judge.look(coded).features, real),
        "frechet_of_real_halves": frechet_distance(real[:half], real[half:]) if half > 1 else None,
        "flicker": flicker(made.float() / 255),
        "colour_drift": colour_drift(made.float() / 255),
    }


def measure_motion(
    pipe: Any, clips: Tensor, captions: Sequence[Any], given: int, seed: int = 0, **options: Any
) -> dict[str, Any] | None:
    """How far the tracked thing lies from its known track where clips on a plain colour are continued.

    Args:
        pipe: A `VideoPipeline`.
        clips: uint8 (B, T, 3, S, S).
        captions: Their captions, with "track" and "plain".
        given: Frames that are given.
        seed: Seed of the first clip.
        options: Passed to every call of the pipeline.

    Returns:
        "continued", "held" (the last given frame for ever) and "real" (what tracking itself gets wrong): mean distance of
        the centres in shares of the frame, and mean ratio of the sizes; `None` without such clips.
    """
    chosen = [i for i, item in enumerate(captions) if item.extra.get("plain") and item.extra.get("track")]
    if not chosen:
        return None
    known = torch.tensor([captions[index].extra["track"] for index in chosen])[
        :, given : clips.shape[1]
    ].float()
    made = []
    for place, index in enumerate(chosen):
        prompt = captions[index].text if pipe.text_tokenizer is not None else None
        result = pipe(
            prompt,
            video=clips[index, :given],
            num_frames=clips.shape[1],
            seed=seed + place,
            output_type="pt",
            **options,
        )
        made.append(result.frames[0, given:])
    real = clips[chosen].float() / 255
    held = real[:, given - 1 : given].expand(-1, clips.shape[1] - given, -1, -1, -1)
    report: dict[str, Any] = {"clips": len(chosen), "given": given}
    for name, frames in (("continued", torch.stack(made)), ("held", held), ("real", real[:, given:])):
        distance, ratio = track_error(track(frames), known)
        report[name] = {"distance": distance, "size_ratio": ratio}
    return report


def measure_speed(pipe: Any, prompt: str | None, long: int = 0, **options: Any) -> dict[str, Any]:
    """Frames a second of one window and its steps; with `long` the memory that so many more frames take.

    Args:
        pipe: A `VideoPipeline`.
        prompt: What is generated.
        long: Frames of a long clip that is streamed after the short one; 0 for none.
        options: Passed to every call of the pipeline.
    """
    times = []
    for number in range(_ROUNDS):
        started = time.perf_counter()
        pipe(prompt, seed=number, output_type="pt", **options)
        times.append(time.perf_counter() - started)
    report: dict[str, Any] = {
        "frames": pipe.window_frames,
        "steps": pipe.generator.order.num_steps,
        "forwards": len(pipe.generator.plan.feeds),
        "seconds": statistics.median(times),
        "frames_per_second": pipe.window_frames / statistics.median(times),
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_rss_mb(),
    }
    if long:
        started, count = time.perf_counter(), 0
        for piece in pipe(prompt, num_frames=long, stream=True, seed=0, output_type="pt", **options):
            count += piece.shape[1]
        report["long"] = {
            "frames": count,
            "frames_per_second": count / (time.perf_counter() - started),
            "peak_memory_mb": peak_rss_mb(),
        }
    return report


def evaluate_video(
    model: Any,
    data: str | Path,
    *,
    judge: VideoJudge | None = None,
    split: str | None = None,
    count: int = 64,
    given: int | None = None,
    long: int = 0,
    codecs: Sequence[str] | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """All figures of a pipeline, or of a tokenizer alone.

    Args:
        model: A `VideoPipeline` or a `VideoTokenizer`.
        data: Folder of clips, as `tokenloom data video` writes them for all figures.
        judge: For prompts and Frechet distances; `None` leaves them out.
        split: Only clips of this split.
        count: Most clips, evenly spread.
        given: Frames that are given to a continuation; default half of a window.
        long: Frames of a long clip whose memory is measured; 0 for none.
        codecs: Names of `VIDEO_CODECS`; `None` for all that are there.
        seed: Seed of the first generated clip.
        options: Passed to every call of the pipeline.
        log: Receives a line a step.

    Raises:
        TokenloomError: If the folder has no clips, or `count` is below 2.
    """
    pipe = model if callable(model) and hasattr(model, "tokenizer") else None
    tokenizer = model if pipe is None else pipe.tokenizer
    frames = tokenizer.num_frames if pipe is None else pipe.window_frames
    folder = ClipFolder(data, split, int(tokenizer.image_size))
    if count < 2 or len(folder) < 2:
        raise TokenloomError(f"An evaluation needs at least 2 clips, got {min(count, len(folder))}.")
    chosen = torch.linspace(0, len(folder) - 1, min(count, len(folder))).long().tolist()
    clips = torch.stack([folder.window(index, frames) for index in chosen])
    captions = [folder.captions[index] for index in chosen]
    extra = options or {}
    log("tokens ...")
    report: dict[str, Any] = {"tokens": measure_tokens(tokenizer, clips, codecs, log)}
    if pipe is not None:
        words = pipe.text_tokenizer is not None
        if judge is not None and words and all(item.label and item.style for item in captions):
            log("prompts ...")
            report["prompts"] = measure_prompts(pipe, judge, clips, captions, seed, **extra)
        log("motion ...")
        report["motion"] = measure_motion(pipe, clips, captions, given or frames // 2 + 1, seed, **extra)
        log("speed ...")
        report["speed"] = measure_speed(pipe, captions[0].text if words else None, long, **extra)
    return report | {"clips": len(clips), "split": split, "environment": environment()}


def write_video_report(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Writes `report.md` and `report.json`."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenloomError(f"Cannot write to {str(folder)!r}: {error.strerror}.") from error
    return [
        write_atomically(folder / "report.md", report_text(report)),
        write_atomically(folder / "report.json", json.dumps(plain(report), indent=2) + "\n"),
    ]


def report_text(report: dict[str, Any]) -> str:
    """The figures as markdown."""
    parts = [f"# Video\n\n{report['clips']} clips.\n", _tokens_text(report["tokens"])]
    if found := report.get("prompts"):
        rows = [
            (name, *(f"{100 * found[name][key]:.1f} %" for key in ("thing", "thing_top5", "motion")))
            for name in ("generated", "reconstructed", "real")
        ]
        table = markdown_table(("clips", "thing", "thing among 5", "motion"), rows)
        parts.append(
            f"## Prompts\n\n{table}\nFrechet distance in the judge's features: {found['frechet']:.2f}; of reconstructions "
            f"{found['frechet_of_reconstructions']:.2f}. Flicker {found['flicker']:.2f} and drift of the ground "
            f"{found['colour_drift']:.2f} levels of 255.\n"
        )
    if found := report.get("motion"):
        rows = [
            (name, f"{100 * found[name]['distance']:.1f} %", f"{found[name]['size_ratio']:.2f}")
            for name in ("continued", "held", "real")
        ]
        table = markdown_table(("frames", "distance", "ratio of sizes"), rows)
        parts.append(
            f"## Motion\n\n{found['clips']} clips continued behind {found['given']} frames.\n\n{table}"
        )
    if found := report.get("speed"):
        parts.append(
            f"## Speed\n\n{found['steps']} steps for {found['frames']} frames, {found['frames_per_second']:.1f} frames a second "
            f"on {found['threads']} threads; {found['peak_memory_mb']:.0f} MB at most.\n"
        )
        if "long" in found:
            parts.append(
                f"{found['long']['frames']} frames in a row: {found['long']['frames_per_second']:.1f} frames a second, "
                f"{found['long']['peak_memory_mb']:.0f} MB at most.\n"
            )
    return "\n".join(parts)


def _tokens_text(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        if row["bits"] is None:
            rows.append((row["name"], "does not fit", "-", "-", "-", "-"))
            continue
        cells = (
            f"{row['psnr']:.2f} dB",
            f"{row['ssim']:.4f}",
            f"{row['drift']:.2f} dB",
            f"{row['added_flicker']:.2f}",
        )
        rows.append((row["name"], f"{row['bits']:.0f}", *cells))
    table = markdown_table(("", "bits a clip", "PSNR", "SSIM", "drift", "added flicker"), rows)
    return f"## Tokens\n\nClips of {found['frames']} frames; payload bits.\n\n{table}"
