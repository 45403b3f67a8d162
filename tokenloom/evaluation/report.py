"""Runs the evaluations of one model and writes `report.json`, `report.md` and the figure of nearest training
pictures.

Only orchestration: what each figure means is said in the module that computes it. After every part both files
are written anew, so an interrupted run keeps the parts that were done.

Shapes: pixels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.evaluation.benchmark import environment
from tokenloom.evaluation.judge import Judge
from tokenloom.evaluation.parts import MEASURES, NEEDS_JUDGE, PARTS, EvaluationConfig, Run
from tokenloom.evaluation.pictures import EvaluationSet
from tokenloom.evaluation.prompt_following import Generate
from tokenloom.evaluation.tables import plain
from tokenloom.media import write_atomically

__all__ = ["PARTS", "EvaluationConfig", "evaluate"]


def evaluate(
    model: Any,
    data: str | os.PathLike[str] | EvaluationSet,
    out: str | os.PathLike[str],
    *,
    judge: Judge | str | os.PathLike[str] | None = None,
    config: EvaluationConfig | None = None,
    baseline: Generate | None = None,
    options: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluates a text-to-image pipeline, or an image tokenizer alone.

    Args:
        model: A `TextToImagePipeline`, its name or folder, or an image tokenizer (then only "reconstruction"
            can be measured).
        data: A captioned folder with the splits "train", "val" and "val_style", or one that is loaded
            already.
        out: Folder for `report.json`, `report.md` and `nearest.png`.
        judge: A `Judge` or the place of one (see `train_judge`); needed for "following" and "diversity".
        config: What is measured; by default all parts on all groups.
        baseline: What the speed is compared with, beside the model's own reference decoding; by default the
            same model size in raster order (`tokenloom.evaluation.baseline`).
        options: Passed to every call of the pipeline (guidance_scale, temperature, ...).
        log: Called with a line when a part begins.

    Returns:
        What stands in `report.json`: {"settings": ..., "environment": ..., part: figures, ...}.

    Raises:
        TokenloomError: If a part is unknown or cannot be measured with what was given.
    """
    config = config or EvaluationConfig()
    pipeline, tokenizer = _open_model(model)
    _check(config, model, pipeline, judge)
    pictures = (
        data if isinstance(data, EvaluationSet) else EvaluationSet.load(data, int(tokenizer.image_size))
    )
    referee = judge if judge is None or isinstance(judge, Judge) else Judge.load(Path(judge))
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    run = Run(pipeline, tokenizer, pictures, referee, config, Path(out), baseline, dict(options or {}), name)
    run.figures["settings"] = {**config.__dict__, "options": run.options}
    run.figures["environment"] = environment()
    for part in config.parts:
        if log is not None:
            log(f"{part} ...")
        MEASURES[part](run)
        _write(run)
    return run.figures


def _open_model(model: Any) -> tuple[Any, Any]:
    """Returns (pipeline or None, tokenizer)."""
    if isinstance(model, (str, os.PathLike)):
        from tokenloom.pipelines.text_to_image import TextToImagePipeline

        model = TextToImagePipeline.from_pretrained(os.fspath(model))
    if hasattr(model, "tokenizer") and callable(model):
        if hasattr(model, "set_progress_bar_config"):
            model.set_progress_bar_config(disable=True)
        return model, model.tokenizer
    if hasattr(model, "encode") and hasattr(model, "decode"):
        return None, model
    raise TokenloomError(f"Expected a pipeline, its name, or an image tokenizer, got {type(model).__name__}.")


def _check(config: EvaluationConfig, model: Any, pipeline: Any, judge: Any) -> None:
    for part in config.parts:
        if part not in PARTS:
            raise unknown_name("part of the evaluation", part, PARTS)
        if part != "reconstruction" and pipeline is None:
            raise TokenloomError(
                f"The part {part!r} needs a pipeline, got a tokenizer. Ask for parts=('reconstruction',)."
            )
        if part == "startup" and not isinstance(model, (str, os.PathLike)):
            raise TokenloomError("The part 'startup' runs commands: give the model by its name or folder.")
        if part in NEEDS_JUDGE and judge is None:
            raise TokenloomError(
                f"The part {part!r} needs a judge, got none. Train one with train_judge and pass its folder."
            )


def _write(run: Run) -> None:
    """Writes both files; figures that are not numbers become null."""
    write_atomically(run.out / "report.json", json.dumps(plain(run.figures), indent=1) + "\n")
    text = "# Evaluation\n\n" + "\n".join(f"## {title}\n\n{body}" for title, body in run.sections.items())
    write_atomically(run.out / "report.md", text)
