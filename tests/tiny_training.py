"""Twelve captioned pictures, and the configs of short training runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

COLOURS = ["red", "green", "blue", "orange"]
SHAPES = ["circle", "square", "triangle"]
MODEL = {
    "image_size": 16,
    "patch": 4,
    "merge": 1,
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
}
FSQ = {**MODEL, "quantizer_options": {"levels": [8, 8, 4]}}
VQ = {**MODEL, "quantizer_type": "vq"}


def draw(colour: str, shape: str) -> Image.Image:
    picture = Image.new("RGB", (16, 16), "white")
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((2, 2, 13, 13), fill=colour)
    elif shape == "square":
        pen.rectangle((3, 3, 12, 12), fill=colour)
    else:
        pen.polygon([(8, 2), (2, 13), (14, 13)], fill=colour)
    return picture


def draw_folder(root: Path) -> Path:
    """Twelve pictures; captions with nothing but "file" and "text"."""
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(root / f"{colour}-{shape}.png")
            lines.append(json.dumps({"file": f"{colour}-{shape}.png", "text": f"a {colour} {shape}"}))
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def loop(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup": 1,
        "precision": "no",
    }
    values |= {"ema": 0.5, "log_every": 2, "sample_every": 2, "checkpoint_every": 2}
    return values | changes


def tokenizer_settings(root: Path, output: Path, **changes: Any) -> dict[str, Any]:
    data = {"root": str(root)}
    return {"output": str(output), "data": data, "model": FSQ, "loop": loop(), **changes}


def generator_settings(root: Path, tokenizer: Path, output: Path, **changes: Any) -> dict[str, Any]:
    model = {"transformer": {"width": 16, "heads": 2, "depth": 2}, "code_levels": [8, 8, 4]}
    values = {"output": str(output), "tokenizer": str(tokenizer), "data": {"root": str(root)}, "model": model}
    return {**values, "text": {"max_length": 4}, "loop": loop(), **changes}


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def log_rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def picture_array(root: Path, file: str) -> np.ndarray:
    with Image.open(root / file) as picture:
        return np.array(picture.convert("RGB")).transpose(2, 0, 1)
