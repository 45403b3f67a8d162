"""Evaluation of segmentation by phrase: a model and its baselines on the same examples, and the mask tokenizer alone.

A bad record or a phrase that a model cannot read is listed, and the evaluation goes on. Knows examples and anything that
turns a picture and phrases into masks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tokenloom.data.referring import Example
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.segmentation_metrics import Outcome, figures
from tokenloom.evaluation.tables import markdown_table, plain
from tokenloom.media import write_atomically

if TYPE_CHECKING:
    from tokenloom.evaluation.film_unet import FilmUNet
    from tokenloom.pipelines.segmentation import SegmentationPipeline
    from tokenloom.tokenizers.text import WordTokenizer

Predict = Callable[[Example, list[str]], np.ndarray]
"""An example and phrases about it to masks, bool (n, H, W)."""

_SHOWN = 50  # errors in the report


@dataclass
class Result:
    """What one model did.

    Attributes:
        name: Of the model.
        outcomes: One a phrase.
        seconds: Spent in the model.
        errors: Phrases that the model refused; they count as answered by an empty mask.
    """

    name: str
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


def pipeline_predictor(
    pipe: SegmentationPipeline, mask_tokens: int | None = None, guidance_scale: float | None = None
) -> Predict:
    """The masks of a pipeline."""

    def predict(example: Example, phrases: list[str]) -> np.ndarray:
        output = pipe(
            example.picture,
            phrases,
            mask_tokens=mask_tokens,
            guidance_scale=guidance_scale,
            output_type="np",
        )
        return cast("np.ndarray", output.masks)

    return predict


def unet_predictor(network: FilmUNet, words: WordTokenizer) -> Predict:
    """The masks of the U-Net."""
    return lambda example, phrases: network.segment(example.picture, phrases, words)


def largest_object(example: Example, phrases: list[str]) -> np.ndarray:
    """The largest visible object, whatever the phrase: a baseline that is told the true outlines."""
    height, width = example.picture.height, example.picture.width
    if example.instances is not None:
        ids, counts = np.unique(example.instances[example.instances > 0], return_counts=True)
        mask = example.instances == ids[counts.argmax()] if len(ids) else np.zeros((height, width), bool)
    else:
        sizes = example.masks.sum((1, 2))
        mask = example.masks[sizes.argmax()]
    return np.repeat(mask[None], len(phrases), axis=0)


def evaluate_models(
    models: dict[str, Predict],
    examples: Iterable[Example | TokenloomError],
    limit: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Result], list[str]]:
    """Runs models over examples.

    Args:
        models: By name.
        examples: Examples, and errors in the place of bad records.
        limit: Most examples.
        log: Receives a line for each bad record, and one every 100 examples.

    Returns:
        A `Result` a model, and the messages of bad records.

    Raises:
        TokenloomError: If there is no example at all.
    """
    results, bad, done = [Result(name) for name in models], [], 0
    for example in examples:
        if isinstance(example, TokenloomError):
            bad.append(str(example))
            log(f"left out: {example}")
            continue
        for result in results:
            _run(result, models[result.name], example)
        done += 1
        if done % 100 == 0:
            log(f"{done} pictures")
        if limit is not None and done >= limit:
            break
    if not done:
        raise TokenloomError(
            f"There is nothing to evaluate: {len(bad)} records, all bad. The first: {bad[0] if bad else 'none'}"
        )
    return results, bad


def _run(result: Result, predict: Predict, example: Example) -> None:
    texts = [phrase.text for phrase in example.phrases]
    if not texts:
        return
    started = time.perf_counter()
    try:
        masks = predict(example, texts)
    except TokenloomError:  # one phrase may be at fault: ask one by one
        masks = np.zeros_like(example.masks)
        for index, text in enumerate(texts):
            try:
                masks[index] = predict(example, [text])[0]
            except TokenloomError as error:
                result.errors.append(f"{example.name}, {text!r}: {error}")
    result.seconds += time.perf_counter() - started
    for phrase, got, wanted in zip(example.phrases, masks, example.masks, strict=True):
        result.outcomes.append(Outcome.of(got, wanted, phrase.kind, example.split))


def phrase_seconds(pipe: SegmentationPipeline, example: Example, repeats: int = 5) -> dict[str, float]:
    """Median seconds of the first phrase about a picture, and of each further one; nothing if it can read none."""
    texts = [one.text for one in example.phrases if len(pipe.text_tokenizer.unknown(one.text)) == 0]
    if not texts:
        return {}
    text = texts[0]
    pipe(example.picture, text)  # warms up
    times: dict[str, list[float]] = {"first phrase": [], "further phrase": []}
    for _ in range(repeats):
        started = time.perf_counter()
        encoded = pipe.encode_picture(example.picture)
        pipe(encoded, text)
        times["first phrase"].append(time.perf_counter() - started)
        started = time.perf_counter()
        pipe(encoded, text)
        times["further phrase"].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in times.items()}


def object_masks(examples: Iterable[Example | TokenloomError], most: int) -> np.ndarray:
    """Bool (n, S, S) of the objects of examples of one size, for the mask tokenizer; empty and full ones are left out."""
    found: list[np.ndarray] = []
    for example in examples:
        if isinstance(example, TokenloomError):
            continue
        for mask in example.masks:
            blank = not mask.any() or mask.all()
            if not blank and not any(np.array_equal(mask, one) for one in found[-12:]):
                if not found or found[0].shape == mask.shape:
                    found.append(mask)
        if len(found) >= most:
            break
    if not found:
        raise TokenloomError("No example has a mask for the tokenizer; give scenes with objects.")
    return np.stack(found[:most])


def write_report(
    folder: str | os.PathLike[str],
    results: Sequence[Result],
    bad: Sequence[str],
    codes: Sequence[dict[str, float]] = (),
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """Writes report.md and report.json; returns the path of the first.

    Args:
        folder: Where to.
        results: What `evaluate_models` returned.
        bad: Messages of bad records.
        codes: What `compare_codes` returned.
        seconds: What `phrase_seconds` returned.
    """
    root = Path(folder)
    parts = ["# Segmentation by phrase\n"]
    record: dict[str, dict[str, float]] = {}
    groups = sorted({(one.split, one.kind) for result in results for one in result.outcomes})
    splits = list(dict.fromkeys(split for split, _ in groups))
    for split in splits:
        kinds = ["all phrases", *(kind for one, kind in groups if one == split)]
        parts.append(f"\n## Split {split}\n")
        for kind in kinds:
            rows = []
            for result in results:
                chosen = [
                    one for one in result.outcomes if one.split == split and kind in ("all phrases", one.kind)
                ]
                values = figures(chosen)
                record[f"{split}/{kind}/{result.name}"] = values
                rows.append([result.name, *(_number(value) for value in values.values())])
            parts += [f"\n{kind}\n\n", markdown_table(["model", *figures([])], rows)]
    parts.append("\n## Time\n\n")
    timed = [
        (one.name, len(one.outcomes), f"{one.seconds / max(1, len(one.outcomes)):.4f}") for one in results
    ]
    parts.append(markdown_table(["model", "phrases", "seconds a phrase"], timed))
    if seconds:
        parts.append("\n")
        parts.append(
            markdown_table(["one call", "seconds"], [(key, f"{value:.3f}") for key, value in seconds.items()])
        )
    if codes:
        parts.append(
            "\n## Mask tokens beside classical codes\n\nMean overlap at equal bits; median bits at equal overlap.\n\n"
        )
        parts.append(markdown_table(list(codes[0]), [[_number(v) for v in row.values()] for row in codes]))
    refused = [f"{one.name}: {message}" for one in results for message in one.errors]
    for title, messages in (("Records left out", list(bad)), ("Phrases a model refused", refused)):
        if messages:
            shown = "".join(f"* {' '.join(message.split())}\n" for message in messages[:_SHOWN])
            more = f"* and {len(messages) - _SHOWN} more (report.json)\n" if len(messages) > _SHOWN else ""
            parts.append(f"\n## {title}: {len(messages)}\n\n{shown}{more}")
    content: dict[str, Any] = {
        "figures": record,
        "codes": list(codes),
        "left out": list(bad),
        "refused": refused,
    }
    content["seconds"] = {one.name: one.seconds for one in results} | dict(seconds or {})
    write_atomically(root / "report.json", json.dumps(plain(content), indent=2))
    return write_atomically(root / "report.md", "".join(parts))


def _number(value: float) -> str:
    whole = math.isfinite(value) and value == int(value) and abs(value) > 1
    return f"{value:.0f}" if whole else f"{value:.3f}"
