"""Commands about masks: data, training, segmentation by phrase and its evaluation.

Commands import what they need when they run. Knows nothing of how things work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenloom.cli_options import ERR as _ERR
from tokenloom.cli_options import OUT as _OUT
from tokenloom.cli_options import DecodeOption, DeviceOption, add_training
from tokenloom.cli_options import device_of as _device
from tokenloom.errors import TokenloomError
from tokenloom.models import default_for, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenloom.data.referring import Example


def add_commands(app: typer.Typer, data_app: typer.Typer) -> None:
    """Adds the commands to the program and to its group `data`."""
    app.command()(segment)
    add_training(
        app,
        "train-mask-tokenizer",
        "train_mask_tokenizer",
        "Train a mask tokenizer on the outlines of a referring pool.",
    )
    add_training(
        app,
        "train-segmentation",
        "train_segmentation",
        "Train a model that segments by phrase, or its baseline.",
    )
    app.command("evaluate-segmentation")(evaluate_segmentation)
    data_app.command()(referring)
    data_app.command("referring-scenes")(referring_scenes)


def segment(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    phrases: Annotated[list[str], typer.Argument(help="What to segment, e.g. 'the green apple'.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Bundled name, folder, or hub id.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Mask to write: white is the object.")
    ] = Path("mask.png"),
    overlay: Annotated[Path | None, typer.Option(help="Also write the picture with the masks.")] = None,
    mask_tokens: Annotated[int | None, typer.Option(help="Decode from fewer codes: coarser masks.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    decode: DecodeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Segment what phrases mean in a picture; several phrases write several masks."""
    name = default_for("SegmentationPipeline", "train-segmentation") if model is None else model
    folder = resolve(name)  # before the slow imports
    from PIL import Image

    from tokenloom import media
    from tokenloom.pipelines import segmentation

    for path in (output, *([overlay] if overlay else [])):
        media.check_output(path)
    if overlay is not None and overlay.resolve() in (output.resolve(), image.resolve()):
        raise TokenloomError(f"--overlay would replace {overlay}; choose another name.")
    if output.resolve() == image.resolve():
        raise TokenloomError(f"--output would replace the picture {image}; choose another name.")
    picture = media.open_image(image)
    pipe = segmentation.SegmentationPipeline.from_pretrained(folder).to(_device(device))
    result = pipe(
        picture, phrases, mask_tokens=mask_tokens, guidance_scale=guidance, decode=decode, output_type="np"
    )
    masks: Any = result.masks
    for index, text in enumerate(phrases):
        path = output if len(phrases) == 1 else output.with_name(f"{output.stem}-{index + 1}{output.suffix}")
        mask = masks[index]
        grey = Image.fromarray(mask).convert("L")
        box = ", ".join(f"{value:.0f}" for value in result.boxes[index].tolist())
        found = f"box {box}" if mask.any() else "nothing found"
        _OUT.print(
            f"{media.save_image(grey, path)}: {text}: {found}, score {float(result.scores[index]):.2f}",
            markup=False,
        )
    if overlay is not None:
        _OUT.print(media.save_image(segmentation.overlay(picture, masks), overlay), markup=False)


def referring(
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    size: Annotated[int, typer.Option(help="Longest side of a drawing in pixels.")] = 128,
    gpl_stamps: Annotated[
        bool,
        typer.Option(
            "--gpl-stamps",
            help="Add about 390 stamps of Tux Paint (161 MB). They are under GPL-2, and so is the pool then.",
        ),
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep downloaded packages here.")] = None,
) -> None:
    """Build the pool of cut-outs and photographs that scenes for segmentation by phrase are made of."""
    from tokenloom.data.referring_pool import build_referring

    report = build_referring(out, size=size, gpl_stamps=gpl_stamps, cache_dir=cache)
    parts = ", ".join(f"{name} {count:,}" for name, count in report.splits.items())
    _OUT.print(
        f"{report.folder}: {report.pictures:,} pictures (cut-outs: {parts}) in {report.seconds:.0f} s",
        markup=False,
    )
    under = ", ".join(f"{name} {count:,}" for name, count in report.licences.items())
    _OUT.print(f"licences: {under}; SOURCES.md credits each work", markup=False)
    if gpl_stamps:
        _OUT.print(
            "This pool holds pictures under GPL-2: pass it on under the same licence only.", markup=False
        )


def referring_scenes(
    pool: Annotated[Path, typer.Argument(help="Folder that `tokenloom data referring` made.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; must be empty or missing.")],
    count: Annotated[int, typer.Option(help="Scenes of each split.")] = 500,
    splits: Annotated[
        list[str], typer.Option("--split", help="Only this split (may be repeated): train, val_style, val.")
    ] = ["val_style", "val"],  # noqa: B006
    size: Annotated[int, typer.Option(help="Side of the scenes in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Decides the scenes.")] = 1,
    categories: Annotated[
        list[str],
        typer.Option(
            "--category", help="Only objects of this category of the pool (may be repeated); default all."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Write frozen scenes with phrases and masks, for evaluation."""
    from tokenloom.data.referring import freeze_scenes
    from tokenloom.data.referring_scenes import SceneConfig

    config = SceneConfig(size=size, categories=tuple(categories))
    phrases = freeze_scenes(pool, out, count=count, splits=splits, config=config, seed=seed)
    _OUT.print(f"{out}: {count * len(splits):,} scenes, {phrases:,} phrases", markup=False)


def evaluate_segmentation(
    model: Annotated[str, typer.Argument(help="Name of a bundled model, folder, or hub id.")],
    data: Annotated[
        Path, typer.Argument(help="Folder of frozen scenes, or of pictures where --instances is given.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.md and report.json.")
    ] = Path("segmentation"),
    instances: Annotated[Path | None, typer.Option(help="COCO annotation file of the pictures.")] = None,
    references: Annotated[Path | None, typer.Option(help="RefCOCO-style list of references.")] = None,
    split: Annotated[str | None, typer.Option(help="Only references of this split.")] = None,
    unet: Annotated[Path | None, typer.Option(help="Folder of the U-Net baseline.")] = None,
    mask_tokens: Annotated[
        list[int], typer.Option(help="Also decode from so many codes (may be repeated).")
    ] = [],  # noqa: B006
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most pictures.")] = None,
    code_masks: Annotated[
        int, typer.Option(min=0, help="Masks of the comparison of codes; 0 for none.")
    ] = 200,
    device: DeviceOption = "auto",
) -> None:
    """Measure segmentation by phrase beside its baselines, and mask tokens beside classical codes."""
    folder = resolve(model)  # before the slow imports
    from tokenloom.evaluation import mask_codes, segmentation
    from tokenloom.pipelines.segmentation import SegmentationPipeline

    pipe = SegmentationPipeline.from_pretrained(folder).to(_device(device))
    pipe.set_progress_bar_config(disable=True)
    predictors = {"tokens": segmentation.pipeline_predictor(pipe, None, guidance)}
    for count in mask_tokens:
        pipe.tokenizer.check_num_tokens(count)
        predictors[f"{count} tokens"] = segmentation.pipeline_predictor(pipe, count, guidance)
    if unet is not None:
        from tokenloom.evaluation.film_unet import FilmUNet
        from tokenloom.tokenizers.text import WordTokenizer

        network: Any = FilmUNet.from_pretrained(resolve(unet)).to(_device(device))
        predictors["U-Net"] = segmentation.unet_predictor(network.eval(), WordTokenizer.from_pretrained(unet))
    predictors["largest object"] = segmentation.largest_object
    examples = _examples(data, instances, references, split)
    results, bad = segmentation.evaluate_models(
        predictors, examples, limit, log=lambda line: _ERR.print(line, markup=False)
    )
    again = _examples(data, instances, references, split)
    sample = next((one for one in again if not isinstance(one, TokenloomError) and one.phrases), None)
    seconds = None if sample is None else segmentation.phrase_seconds(pipe, sample)
    codes = []
    if code_masks and instances is None:
        found = segmentation.object_masks(_examples(data, None, None, None), code_masks)
        codes = mask_codes.compare_codes(pipe.tokenizer, found)
    _OUT.print(segmentation.write_report(output, results, bad, codes, seconds), markup=False)


def _examples(
    data: Path, instances: Path | None, references: Path | None, split: str | None
) -> Iterator[Example | TokenloomError]:
    from tokenloom.data.annotations import read_coco
    from tokenloom.data.referring import read_scenes

    if instances is not None:
        return read_coco(instances, data, references, split)
    if references is not None:
        raise TokenloomError("--references needs --instances, the annotation file that it refers to.")
    return read_scenes(data)
