"""The command `tokenloom`: generate, reconstruct, train, evaluate, look around.

Commands import what they need when they run, so that `tokenloom --help` does not wait for torch. A mistake of the user
ends with one line on stderr and exit code 2, Ctrl-C with one line and exit code 130. Knows nothing of how things work.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tokenloom import __version__, cli_audio, cli_video
from tokenloom import cli_masks as masks
from tokenloom.cli_benchmark import benchmark
from tokenloom.cli_options import ERR as _ERR
from tokenloom.cli_options import OUT as _OUT
from tokenloom.cli_options import (
    ConfigArgument,
    DecodeOption,
    DeviceOption,
    ResumeOption,
    SetOption,
    add_training,
    print_trained,
)
from tokenloom.cli_options import device_of as _device
from tokenloom.errors import TokenloomError
from tokenloom.models import DEFAULT_MODEL, bundled, resolve

if TYPE_CHECKING:
    from PIL import Image

    from tokenloom.pipelines.text_to_image import TextToImagePipeline

_BATCH = 16  # pictures generated at once by `generate`
_PREVIEWS = 16  # pictures in a sheet of steps
_STOPPED = {
    "train": "Stopped. The last checkpoint is kept: go on with --resume latest.",
    "train-codec": "Stopped. The last checkpoint is kept: go on with --resume latest.",
    "train-continuation": "Stopped. The last checkpoint is kept: go on with --resume latest.",
    "train-tokenizer": "Stopped. The last checkpoint is kept: go on with --resume latest.",
    "train-mask-tokenizer": "Stopped. The last checkpoint is kept: go on with --resume latest.",
    "train-segmentation": "Stopped. The last checkpoint is kept: go on with --resume latest.",
    "benchmark": "Stopped. Nothing was written.",
    "evaluate": "Stopped. The parts that were done are in the report.",
}


class _Group(TyperGroup):
    """The group of commands, which turns errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command."""
        try:
            return super().invoke(ctx)
        except TokenloomError as error:
            _ERR.print(f"Error: {' '.join(str(error).split())}", style="red", markup=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            _ERR.print(
                _STOPPED.get(
                    ctx.invoked_subcommand, "Stopped. Nothing was written beyond the files named above."
                ),
                style="red",
                markup=False,
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn media into tokens, model the tokens, turn them back into media.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build training data from published packages.")
app.add_typer(data_app, name="data")
cli_audio.add(app, data_app)
cli_video.add(app, data_app)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Bundled name, folder, or hub id.")]


def _show_version(value: bool) -> None:
    if value:
        _OUT.print(f"tokenloom {__version__}", markup=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture file; see above for -n.")] = Path(
        "out.png"
    ),
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first picture; the next ones count up.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How strongly to follow the prompt; 1 is off.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only tokens of this total probability.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    columns: Annotated[int | None, typer.Option(help="Pictures in a row of the sheet.")] = None,
    scale: Annotated[int, typer.Option(help="Repeat every pixel this often in both directions.")] = 1,
    decode: DecodeOption = "auto",
    image: Annotated[Path | None, typer.Option(help="Picture to repaint in part.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where --image is repainted.")] = None,
    steps: Annotated[
        Path | None, typer.Option(help="Also save a sheet of the first picture step by step.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Generate pictures from a prompt.

    One picture is written to OUTPUT. With -n 4 -o lion.png the pictures are lion-1.png to lion-4.png, and lion.png is a
    sheet of all of them. The seed of every picture is printed; it gives the same picture again.
    """
    folder = resolve(model)  # before the slow imports, so that a wrong name is answered at once
    from tokenloom import media
    from tokenloom.pipelines import inputs

    inputs.check_prompts(prompt)
    inputs.check_count("--count", count)
    inputs.check_count("--scale", scale)
    if columns is not None:
        inputs.check_count("--columns", columns)
    for path in (output, steps):
        if path is not None:
            media.check_output(path)
    pipe = _load(folder, device)
    seeds = inputs.seeds_as_ints(inputs.make_seeds(seed, None, count))
    frames: list[Image.Image] = []
    pictures: list[Image.Image] = []
    for start in range(0, count, _BATCH):
        part = seeds[start : start + _BATCH]
        result = pipe(
            prompt,
            num_images_per_prompt=len(part),
            seed=part,
            guidance_scale=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            decode=decode,
            image=image,
            mask_image=mask,
            callback_on_step_end=_collect(frames) if steps is not None and start == 0 else None,
        )
        pictures += [media.enlarge(picture, scale) for picture in result.images]
    _write_pictures(pictures, seeds, output, columns)
    if steps is not None:
        chosen = _spread_over(frames, _PREVIEWS)
        _OUT.print(
            media.save_image(media.sheet([media.enlarge(one, scale) for one in chosen]), steps), markup=False
        )


def _load(folder: Path, device: str) -> TextToImagePipeline:
    """Loads a pipeline without progress bars, onto the chosen device."""
    from diffusers.utils import logging as diffusers_logging

    from tokenloom.pipelines.text_to_image import TextToImagePipeline

    diffusers_logging.disable_progress_bar()
    pipe = TextToImagePipeline.from_pretrained(folder).to(_device(device))
    pipe.set_progress_bar_config(desc="generating", leave=False, disable=None)
    return pipe


def _collect(frames: list[Image.Image]) -> Any:
    """Returns a callback that keeps the preview of the first picture after every step."""

    def on_step(pipe: Any, step: int, timestep: int, values: dict[str, Any]) -> None:
        frames.append(values["preview"]()[0])

    return on_step


def _spread_over(items: list[Any], count: int) -> list[Any]:
    """Returns at most `count` items, evenly spread, always with the last one."""
    if len(items) <= count:
        return items
    return [items[round((index + 1) * len(items) / count) - 1] for index in range(count)]


def _write_pictures(pictures: list[Image.Image], seeds: list[int], output: Path, columns: int | None) -> None:
    from tokenloom import media

    if len(pictures) == 1:
        _OUT.print(f"{media.save_image(pictures[0], output)} (seed {seeds[0]})", markup=False)
        return
    for index, (picture, seed) in enumerate(zip(pictures, seeds, strict=True), start=1):
        path = media.save_image(picture, output.with_name(f"{output.stem}-{index}{output.suffix}"))
        _OUT.print(f"{path} (seed {seed})", markup=False)
    _OUT.print(f"{media.save_image(media.sheet(pictures, columns), output)} (sheet)", markup=False)


@app.command()
def reconstruct(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture file to write.")] = Path(
        "reconstruction.png"
    ),
    model: Annotated[
        str,
        typer.Option("--tokenizer", "--model", "-m", help="Bundled name, folder, or hub id."),
    ] = DEFAULT_MODEL,
    fit: Annotated[
        bool, typer.Option("--fit", help="Shrink the picture to one tile instead of cutting it into tiles.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens kept of each tile, where the tokenizer decodes prefixes.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Turn a picture into tokens and back, and print bits per pixel and PSNR."""
    resolve(model)  # before the slow imports, so that a wrong name is answered at once
    from tokenloom import media
    from tokenloom.pipelines.reconstruction import reconstruct_image
    from tokenloom.tokenizers import load_tokenizer

    media.check_output(output)
    picture = media.open_image(image)
    tokenizer = load_tokenizer(model).to(_device(device))
    result = reconstruct_image(tokenizer, picture, fit=fit, num_tokens=tokens)
    path = media.save_image(result.image, output)
    _OUT.print(f"{path}: {result}", markup=False)


@app.command()
def convert(
    files: Annotated[list[Path], typer.Argument(help="Weights: .safetensors, .pth, .pt, .ckpt, .bin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    family: Annotated[str | None, typer.Option(help="Family; guessed from the weights if not given.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings of a published file; by default those of its name.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON: official constructor arguments.")] = None,
    changes: SetOption = [],  # noqa: B006
    ema: Annotated[bool, typer.Option(help="Take averaged weights where a file holds both.")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
) -> None:
    """Convert published weights to a folder. Give several files where a model is published in parts."""
    from tokenloom.checkpoints.convert import convert_checkpoint
    from tokenloom.training.config import read_values

    values = read_values(config, changes)
    if not isinstance(values, dict):
        raise TokenloomError(f"Expected names and values in {config}, got {values!r}.")
    done = convert_checkpoint(
        files,
        output,
        family=family,
        config=values,
        preset_name=preset,
        ema=ema,
        dtype=dtype,
        force=force,
    )
    for note in done.notes:
        _OUT.print(f"  {note}", markup=False)
    _OUT.print(f"{output}: {done.family}", markup=False)


@app.command()
def models(
    presets: Annotated[bool, typer.Option("--presets", help="List the files that convert knows.")] = False,
) -> None:
    """List the bundled models, or the published files that `convert` knows by name."""
    if presets:
        from tokenloom.checkpoints.presets import PRESETS

        for name, one in PRESETS.items():
            _OUT.print(f"{name}: {one.family}, {one.licence}", markup=False)
        return
    for info in bundled().values():
        default = " (default)" if info.name == DEFAULT_MODEL else ""
        _OUT.print(f"{info.name}{default}: {info.num_bytes / 1e6:.1f} MB", style="bold", markup=False)
        for key in ("description", "license", "training_data"):
            if info.card.get(key):
                _OUT.print(f"  {key.replace('_', ' ')}: {info.card[key]}", markup=False)
    if not bundled():
        _OUT.print("No bundled model. Give --model a folder or a hub id.")


@app.command()
def doctor() -> None:
    """Check versions, devices, number formats and the bundled models."""
    from tokenloom.doctor import examine

    marks = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "fail": "[red]FAIL[/]"}
    failed = False
    for finding in examine():
        failed = failed or finding.status == "fail"
        _OUT.print(marks[finding.status], f"{finding.topic}:", end=" ")
        _OUT.print(finding.text, markup=False)
    if failed:
        raise typer.Exit(1)


@app.command("train-tokenizer")
def train_tokenizer(
    config: ConfigArgument,
    resume: ResumeOption = None,
    changes: SetOption = [],  # noqa: B006
    init_from: Annotated[
        Path | None,
        typer.Option(help="Folder of a tokenizer to start from, for instance converted official weights."),
    ] = None,
) -> None:
    """Train an image tokenizer."""
    if init_from is not None:
        changes = [*changes, f"init_from={json.dumps(str(init_from))}"]
    print_trained("train_tokenizer", config, resume, changes)


add_training(app, "train", "train_generator", "Train a generator.")


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Folder with pictures and captions.jsonl.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.md and report.json.")
    ] = Path("report"),
    model: ModelOption = DEFAULT_MODEL,
    judge: Annotated[Path | None, typer.Option(help="Folder that train-judge wrote.")] = None,
    parts: Annotated[
        list[str], typer.Option("--part", help="Only this part (may be repeated); by default all.")
    ] = [],  # noqa: B006
    groups: Annotated[
        list[str], typer.Option("--group", help="Only pictures of this group (may be repeated).")
    ] = [],  # noqa: B006
    prompts: Annotated[int | None, typer.Option(help="Most prompts of each kind.")] = None,
    seed: Annotated[int, typer.Option(help="Decides every choice.")] = 0,
) -> None:
    """Measure a model: reconstruction, prompt following, diversity, near-copies, speed."""
    from tokenloom.evaluation.report import PARTS, EvaluationConfig
    from tokenloom.evaluation.report import evaluate as run_evaluation

    chosen = EvaluationConfig(
        parts=tuple(parts or PARTS), groups=tuple(groups) or None, prompts=prompts, seed=seed
    )
    run_evaluation(model, data, output, judge=judge, config=chosen, log=_log)
    _OUT.print(output / "report.md", markup=False)


@app.command("evaluate-tokenizer")
def evaluate_tokenizer(
    tokenizer: Annotated[str, typer.Argument(help="Name of a bundled model, folder or hub id.")],
    images: Annotated[Path, typer.Argument(help="Folder of pictures, with or without captions.jsonl.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.md, report.json and the figure.")
    ] = Path("rate-distortion"),
    split: Annotated[str | None, typer.Option(help="Only pictures of this split of captions.jsonl.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures, where the tokenizer takes any.")
    ] = None,
    count: Annotated[int, typer.Option(help="Most pictures, drawn at random.")] = 500,
    tokens: Annotated[
        list[int], typer.Option(help="Tokens a picture (may be repeated), where prefixes decode.")
    ] = [],  # noqa: B006
    codecs: Annotated[
        list[str], typer.Option("--codec", help="Only this codec (may be repeated); by default all.")
    ] = [],  # noqa: B006
    codec_pictures: Annotated[int, typer.Option(help="Pictures the codecs code; 0 for none.")] = 50,
    seed: Annotated[int, typer.Option(help="Decides which pictures are drawn.")] = 0,
    fid: Annotated[
        str | None, typer.Option(help="Measure FID with this file: StyleGAN3's inception-2015-12-05.pt.")
    ] = None,
    lpips: Annotated[
        str | None, typer.Option(help="Measure LPIPS with this file: StyleGAN3's vgg16.pt.")
    ] = None,
) -> None:
    """Measure rate and distortion of a tokenizer beside JPEG, WebP, AVIF and JPEG 2000."""
    resolve(tokenizer)  # before the slow imports
    from tokenloom.evaluation import rate_distortion as rd
    from tokenloom.tokenizers import load_tokenizer

    module = load_tokenizer(tokenizer)
    pixels = rd.load_pixels(images, rd.picture_size(module, size), split, count, seed)
    config = rd.RateDistortionConfig(
        tokens=tuple(tokens) or None,
        codecs=tuple(codecs) or None,
        codec_pictures=codec_pictures,
        fid=fid,
        lpips=lpips,
    )
    for path in rd.write_rate_distortion(rd.rate_distortion(module, pixels, config, tokenizer), output):
        _OUT.print(path, markup=False)


@app.command("train-judge")
def train_judge(
    data: Annotated[Path, typer.Argument(help="Folder with pictures and captions.jsonl.")],
    output: Annotated[Path, typer.Argument(help="Folder for the judge.")],
    steps: Annotated[int | None, typer.Option(help="Batches.")] = None,
) -> None:
    """Train the judge of prompt following on real pictures."""
    from tokenloom.evaluation.judge import train_judge as run_training

    run_training(data, output, steps, log=_log)
    _OUT.print(output, markup=False)


def _log(line: str) -> None:
    _ERR.print(line, markup=False)


@data_app.command()
def emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    quality: Annotated[int, typer.Option(help="WebP quality, 1 to 100.")] = 92,
    share_alike: Annotated[
        bool, typer.Option("--include-share-alike", help="Add the OpenMoji pictures (CC-BY-SA-4.0).")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep downloaded packages here.")] = None,
) -> None:
    """Build the captioned emoji set that the default model is trained on."""
    from tokenloom.data.emoji import build_emoji

    report = build_emoji(out, size=size, quality=quality, include_share_alike=share_alike, cache_dir=cache)
    parts = ", ".join(f"{name} {count:,}" for name, count in report.splits.items())
    _OUT.print(
        f"{report.folder}: {report.pictures:,} pictures ({parts}) in {report.seconds:.0f} s", markup=False
    )


@data_app.command()
def photos(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    crops: Annotated[int, typer.Option(help="Square crops of each photograph; 0 for whole photographs.")] = 0,
    size: Annotated[int, typer.Option(help="Side of the crops in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Decides the crops.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Keep downloaded packages here.")] = None,
) -> None:
    """Build the set of photographs (permissive licences) that the photo tokenizer is trained on."""
    from tokenloom.data.photos import build_photos

    report = build_photos(out, crops=crops, size=size, seed=seed, cache_dir=cache)
    parts = ", ".join(f"{name} {count:,}" for name, count in report.splits.items())
    _OUT.print(
        f"{report.folder}: {report.pictures:,} pictures ({parts}) in {report.seconds:.0f} s", markup=False
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("demo"),
    model: ModelOption = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Generate a sheet from a handful of prompts and reconstruct a photograph."""
    folder = resolve(model)
    from tokenloom.demo import run

    for line in run(_load(folder, device), output, seed):
        _OUT.print(line, markup=False)


masks.add_commands(app, data_app)
app.command()(benchmark)

if __name__ == "__main__":
    app()
