"""The commands of sound: continue, train-codec, train-continuation, evaluate-audio, data chorales, data speech.

Commands import what they need when they run. `tokenloom.cli` adds them to the program and turns errors into one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenloom import models
from tokenloom.cli_options import ERR, OUT, DecodeOption, DeviceOption, add_training, device_of
from tokenloom.errors import TokenloomError

if TYPE_CHECKING:
    from tokenloom.data.chorales import SoundReport

_PIPELINE = "AudioContinuationPipeline"


def add(app: typer.Typer, data_app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command("continue")(continue_sound)
    add_training(app, "train-codec", "train_codec", "Train an audio codec.")
    add_training(app, "train-continuation", "train_continuation", "Train a generator that continues sound.")
    app.command("evaluate-audio")(evaluate_audio)
    data_app.command("chorales")(chorales)
    data_app.command("speech")(speech)


def continue_sound(
    sound: Annotated[Path, typer.Argument(help="Sound file: WAV, FLAC, OGG, Opus, MP3.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Sound file to write.")] = Path("out.wav"),
    seconds: Annotated[float, typer.Option(help="Length of the continuation.")] = 4.0,
    prompt: Annotated[
        str | None, typer.Option(help='Words, for a model that reads words: "a chorale in G minor".')
    ] = None,
    label: Annotated[int | None, typer.Option(help="Class, for a model with classes.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Weight of words or class; 1 switches guidance off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Gives the same continuation again.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only tokens of this total probability.")] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Seconds that the model looks back to; default half its window.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Bundled name, folder, or hub id.")
    ] = None,
    decode: DecodeOption = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Also write a figure of spectrograms (needs tokenloom[figures]).")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Continue a piece of sound. The prompt stays as it is; the seed is printed."""
    folder = models.resolve(
        models.default_for(_PIPELINE, "train-continuation") if model is None else model
    )  # before the slow imports
    from diffusers.utils import logging as diffusers_logging

    from tokenloom import media, media_audio
    from tokenloom.media_spectrogram import plot_spectrograms
    from tokenloom.pipelines.audio_continuation import AudioContinuationPipeline
    from tokenloom.pipelines.audio_prompt import continue_file

    media_audio.check_audio_output(output)
    if plot is not None:
        media.check_output(plot)
    media_audio.sound_rate(sound)
    diffusers_logging.disable_progress_bar()
    pipe = AudioContinuationPipeline.from_pretrained(folder).to(device_of(device))
    pipe.set_progress_bar_config(desc="continuing", leave=False, disable=None)
    made = continue_file(
        pipe,
        sound,
        output,
        prompt=prompt,
        label=label,
        guidance_scale=guidance,
        seconds=seconds,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        overlap=overlap,
        decode=decode,
    )
    rate, begin = made.sampling_rate, made.prompt_samples / made.sampling_rate
    OUT.print(
        f"{made.path}: {made.samples / rate:.2f} s, new from {begin:.2f} s (seed {made.seed})", markup=False
    )
    if plot is not None:
        shown = {made.path.name: made.shown}
        OUT.print(plot_spectrograms(shown, rate, plot, made.shown_from / rate), markup=False)


def evaluate_audio(
    data: Annotated[
        Path, typer.Argument(help="Folder of sounds; with notes.jsonl continuations are judged too.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.md and report.json.")
    ] = Path("audio-report"),
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Codec or continuation model: bundled name, folder, or hub id."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only sounds of this split of captions.jsonl.")] = None,
    count: Annotated[int, typer.Option(help="Most sounds.")] = 16,
    prompt_seconds: Annotated[float, typer.Option(help="Length of a prompt.")] = 4.0,
    seconds: Annotated[float, typer.Option(help="Length of a continuation.")] = 6.0,
    codebooks: Annotated[
        list[int], typer.Option(help="Codebooks used (may be repeated); default half and all.")
    ] = [],  # noqa: B006
    codecs: Annotated[
        list[str], typer.Option("--codec", help="Only this codec (may be repeated); by default all.")
    ] = [],  # noqa: B006
    scores: Annotated[
        list[str],
        typer.Option(
            "--score",
            help="Only this perceptual score (may be repeated): PESQ, STOI, ViSQOL; by default all that are installed.",
        ),
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of the first continuation.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Measure a codec beside Opus, MP3 and Vorbis, and continuations note by note."""
    folder = models.resolve(
        models.default_for(_PIPELINE, "train-continuation") if model is None else model
    )  # before the slow imports
    from tokenloom.data.chorales import NOTES_FILE
    from tokenloom.data.sounds import SoundFolder
    from tokenloom.evaluation import audio_report, continuations
    from tokenloom.tokenizers import load_tokenizer

    codec = load_tokenizer(folder).to(device_of(device))
    if codec.modality != "audio":
        raise TokenloomError(f"Expected a model of sound, got one of the modality {codec.modality!r}.")
    sounds = SoundFolder(data, split, codec.sample_rate)
    chosen = audio_report.pieces(sounds, prompt_seconds + seconds, count)
    figures = audio_report.evaluate_codec(
        codec,
        [sound for _, sound in chosen],
        codebooks=codebooks or None,
        codecs=codecs or None,
        scores=scores or None,
        log=_log,
    )
    parts = {"Codec": (figures, audio_report.codec_table(figures))}
    if models.pipeline_class(folder) == _PIPELINE and (data / NOTES_FILE).is_file():
        from tokenloom.pipelines.audio_continuation import AudioContinuationPipeline

        pipe = AudioContinuationPipeline.from_pretrained(folder).to(device_of(device))
        pipe.set_progress_bar_config(disable=True)
        judged = continuations.evaluate_continuations(
            pipe,
            sounds,
            prompt_seconds=prompt_seconds,
            seconds=seconds,
            count=count,
            seed=seed,
            log=_log,
        )
        parts["Continuations"] = (judged, continuations.continuation_table(judged))
    for path in audio_report.write_audio_report(parts, output):
        OUT.print(path, markup=False)


def _log(line: str) -> None:
    ERR.print(line, markup=False)


def chorales(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    copies: Annotated[
        int, typer.Option(help="Renderings of each training piece, in other keys and tempos.")
    ] = 1,
    rate: Annotated[int, typer.Option(help="Samples a second.")] = 16000,
    limit: Annotated[int | None, typer.Option(help="Render no more pieces than this.")] = None,
    seed: Annotated[int, typer.Option(help="Decides keys and tempos.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Keep downloaded packages here.")] = None,
) -> None:
    """Build the set of Bach's chorales on recorded piano notes (credit needed: CC-BY-3.0)."""
    from tokenloom.data.chorales import build_chorales

    _print_sounds(
        build_chorales(out, copies=copies, sample_rate=rate, limit=limit, seed=seed, cache_dir=cache)
    )


def speech(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    rate: Annotated[int, typer.Option(help="Samples a second.")] = 16000,
    held_out: Annotated[
        str, typer.Option(help='Language whose voice is held out: en, es, fr, it or ru; "" for none.')
    ] = "fr",
    limit: Annotated[
        int | None, typer.Option(help="Take no more prompts of each language than this.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep downloaded packages here.")] = None,
) -> None:
    """Build the set of recorded telephone prompts in five languages (share-alike: CC-BY-SA-3.0; credit needed)."""
    from tokenloom.data.speech import build_speech

    _print_sounds(
        build_speech(out, sample_rate=rate, held_out=held_out or None, limit=limit, cache_dir=cache)
    )


def _print_sounds(report: SoundReport) -> None:
    parts = ", ".join(f"{name} {count:,}" for name, count in report.splits.items())
    OUT.print(
        f"{report.folder}: {report.sounds:,} sounds ({parts}), {report.minutes:.0f} min, in {report.seconds:.0f} s",
        markup=False,
    )
