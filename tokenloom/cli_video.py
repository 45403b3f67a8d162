"""The commands of clips: video, train-video-tokenizer, train-video, train-video-judge, evaluate-video, data video, data flare.

Commands import what they need when they run. Knows nothing of how things work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenloom import models
from tokenloom.cli_options import ERR, OUT, DecodeOption, DeviceOption, add_training, device_of
from tokenloom.errors import TokenloomError

_PIPELINE = "VideoPipeline"
_Categories = Annotated[
    list[str],
    typer.Option(
        "--category", help="Only things of this category of the pool (may be repeated); default all."
    ),
]


def add(app: typer.Typer, data_app: typer.Typer) -> None:
    """Adds the commands to the program and to its group `data`."""
    app.command("video")(video)
    add_training(app, "train-video-tokenizer", "train_video_tokenizer", "Train a video tokenizer.")
    add_training(app, "train-video", "train_video", "Train a generator of clips.")
    app.command("train-video-judge")(train_judge)
    app.command("evaluate-video")(evaluate_video)
    data_app.command("video")(data_video)
    data_app.command("flare")(data_flare)


def video(
    prompt: Annotated[
        str | None, typer.Argument(help="What the clip shows, e.g. 'a red ball bouncing'.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Clip to write: GIF, WebP, or MP4 where PyAV is there.")
    ] = Path("out.gif"),
    proceed: Annotated[
        Path | None, typer.Option("--continue", help="Clip to continue: a file or a folder of frames.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture that the clip begins with.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="Picture that the clip ends with.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Lead back to the first frame.")] = False,
    frames: Annotated[
        int | None, typer.Option(help="Frames of the result, those of --continue among them.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; default the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Gives the same clip again.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only tokens of this total probability.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Bundled name, folder, or hub id.")
    ] = None,
    decode: DecodeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Make a clip from words, or continue one. The seed is printed."""
    folder = models.resolve(
        models.default_for(_PIPELINE, "train-video") if model is None else model
    )  # before the slow imports
    from diffusers.utils import logging as diffusers_logging

    from tokenloom import media_video
    from tokenloom.pipelines.video import VideoPipeline

    media_video.check_clip_output(output)
    given = None if proceed is None else media_video.read_clip(proceed)
    rate = fps if fps is not None or given is None else given.fps
    if rate is not None:
        media_video.check_rate(output, rate)
    diffusers_logging.disable_progress_bar()
    pipe = VideoPipeline.from_pretrained(folder).to(device_of(device))
    pipe.set_progress_bar_config(desc="generating", leave=False, disable=None)
    result = pipe(
        prompt,
        video=None if given is None else given.frames,
        image=image,
        last_image=last_image,
        loop=loop,
        num_frames=frames,
        seed=seed,
        guidance_scale=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        decode=decode,
    )
    rate, clip = result.fps if rate is None else rate, result.frames[0]
    path = media_video.save_clip(clip, output, rate)
    new = f", new from frame {result.prompt_frames}" if result.prompt_frames else ""
    OUT.print(f"{path}: {len(clip)} frames at {rate:g} a second{new} (seed {result.seeds[0]})", markup=False)


def train_judge(
    pool: Annotated[Path, typer.Argument(help="Pool of cut-outs: OUT/pool of `tokenloom data video OUT`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the judge.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Clips a step.")] = 32,
    categories: _Categories = [],  # noqa: B006
    plain: Annotated[float, typer.Option(help="Share of clips on a plain colour.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Decides weights and clips.")] = 0,
) -> None:
    """Train the judge that says what moves in a clip, and how."""
    from tokenloom.data.moving import MotionConfig
    from tokenloom.evaluation.video_judge import train_video_judge

    config = MotionConfig(plain=plain, categories=tuple(categories))
    judge = train_video_judge(pool, steps=steps, batch_size=batch_size, config=config, seed=seed, log=_log)
    OUT.print(judge.save(out), markup=False)


def evaluate_video(
    data: Annotated[Path, typer.Argument(help="Folder of clips, as `tokenloom data video` writes them.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.md and report.json.")
    ] = Path("video-report"),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model or tokenizer: bundled name, folder, or hub id.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Judge that `tokenloom train-video-judge` wrote.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only clips of this split.")] = None,
    count: Annotated[int, typer.Option(help="Most clips.")] = 64,
    long: Annotated[int, typer.Option(help="Also stream so many frames and measure the memory.")] = 0,
    codecs: Annotated[
        list[str], typer.Option("--codec", help="Only this codec (may be repeated); by default all.")
    ] = [],  # noqa: B006
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Measure a model of clips: tokens beside video codecs, prompts, motion, speed."""
    folder = models.resolve(
        models.default_for(_PIPELINE, "train-video") if model is None else model
    )  # before the slow imports
    from tokenloom.evaluation import video_judge, video_report
    from tokenloom.pipelines.video import VideoPipeline
    from tokenloom.tokenizers import load_tokenizer

    subject = (VideoPipeline.from_pretrained if models.is_pipeline(folder) else load_tokenizer)(folder)
    subject.to(device_of(device))
    if getattr(subject, "tokenizer", subject).modality != "video":
        raise TokenloomError("Expected a model of clips, got one of another modality.")
    if models.is_pipeline(folder):
        subject.set_progress_bar_config(disable=True)
    report = video_report.evaluate_video(
        subject,
        data,
        judge=None if judge is None else video_judge.VideoJudge.load(judge),
        split=split,
        count=count,
        long=long,
        codecs=codecs or None,
        seed=seed,
        options={"guidance_scale": guidance},
        log=_log,
    )
    for path in video_report.write_video_report(report, output):
        OUT.print(path, markup=False)


def _log(line: str) -> None:
    ERR.print(line, markup=False)


def data_video(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    pool: Annotated[
        Path | None,
        typer.Option(
            help="Pool that is there already (`tokenloom data referring`); default builds OUT/pool."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Clips of each split; 0 for the pool alone.")] = 200,
    splits: Annotated[
        list[str],
        typer.Option("--split", help="Only this split (may be repeated): train, val_style, val, val_pair."),
    ] = ["val_style", "val", "val_pair"],  # noqa: B006
    size: Annotated[int, typer.Option(help="Side of the frames in pixels.")] = 64,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 17,
    plain: Annotated[float, typer.Option(help="Share of clips on a plain colour.")] = 0.7,
    categories: _Categories = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Decides the clips; training takes 0.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Keep downloaded packages here.")] = None,
) -> None:
    """Build the moving cut-outs: a pool for training clips, and frozen clips with captions and tracks."""
    from tokenloom.data.moving import MotionConfig
    from tokenloom.data.video import build_video

    config = MotionConfig(size=size, frames=frames, plain=plain, categories=tuple(categories))
    report = build_video(
        out, pool=pool, count=count, splits=splits, config=config, seed=seed, cache_dir=cache
    )
    parts = ", ".join(f"{name} {number:,}" for name, number in report.splits.items()) or "the pool alone"
    OUT.print(f"{report.folder}: {report.pictures:,} clips ({parts}) in {report.seconds:.0f} s", markup=False)


def data_flare(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    size: Annotated[int, typer.Option(help="Side of the frames in pixels.")] = 64,
    cache: Annotated[Path | None, typer.Option(help="Keep the downloaded package here.")] = None,
) -> None:
    """Build clips of the Flare game's creatures (share-alike: CC-BY-SA-3.0 or later)."""
    from tokenloom.data.flare import build_flare

    report = build_flare(out, size=size, cache_dir=cache)
    parts = ", ".join(f"{name} {number:,}" for name, number in report.splits.items())
    OUT.print(f"{report.folder}: {report.pictures:,} clips ({parts}) in {report.seconds:.0f} s", markup=False)
