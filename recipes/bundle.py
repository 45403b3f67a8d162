"""Copies a trained model into the package under a bundled name, in bfloat16 with its card.

    python recipes/bundle.py tokenloom-emoji-64 runs/emoji64-generator/model
    python recipes/bundle.py tokenloom-photos runs/photos-tokenizer/model --log runs/photos-tokenizer/log.jsonl \
        --figures rate/report.json --credits data/photo-crops/SOURCES.md
    python recipes/bundle.py tokenloom-video-64 runs/video64-generator/model --log runs/video64-generator/log.jsonl \
        --figures video-report/report.json

What the card says stands in `recipes/cards/cards.yaml`; the course of the training comes from the log, the figures from
`tokenloom evaluate-tokenizer`, `evaluate-video` or `evaluate-segmentation` (or from any JSON mapping).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import tokenloom
from tokenloom import models
from tokenloom.tokenizers import load_tokenizer

RECIPES = Path(__file__).resolve().parent
ASSETS = RECIPES.parent / "tokenloom" / "assets"
POINTS = 12  # of the curve
POINT_KEYS = ("tokens", "bits", "adaptive_bits", "psnr", "ssim")


def course(log: Path, batch_size: int) -> dict[str, Any]:
    """Steps, samples, minutes at work and PSNR or loss by step of a log of the training loop."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "samples_per_second" in row]
    every = max(1, len(rows) // POINTS)
    seconds, before = 0.0, 0
    for row in rows:
        seconds += (row["step"] - before) * batch_size / row["samples_per_second"]
        before = row["step"]
    kind, digits = ("psnr", 1) if "psnr" in rows[-1] else ("loss", 2)
    return {
        "steps": rows[-1]["step"],
        "pictures" if kind == "psnr" else "samples": rows[-1]["step"] * batch_size,
        "minutes": round(seconds / 60, 1),
        f"{kind}_of_training_batches_by_step": {
            row["step"]: round(row[kind], digits) for row in rows[::-1][::every][::-1]
        },
    }


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report of an evaluation that a card holds; another mapping as it is."""
    if "tokens" in figures:
        return clips_summary(figures)
    if "codes" in figures:
        return masks_summary(figures)
    if "points" not in figures:
        return figures
    return {
        "held_out_pictures": figures["pictures"],
        "size": figures["size"],
        "points": [{key: round(point[key], 3) for key in POINT_KEYS} for point in figures["points"]],
        **{key: round(figures["speed"][key], 1) for key in ("encode_ms", "decode_ms")},
        "details": "docs/tokenizers.md",
    }


def clips_summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report of `evaluate-video` that a card holds."""
    coded = {
        row["name"]: {key: round(row[key], 3) for key in ("bits", "psnr", "ssim")}
        for row in figures["tokens"]["rows"]
        if row["bits"] is not None
    }
    found: dict[str, Any] = {"held_out_clips": figures["clips"], "split": figures["split"], "coded": coded}
    if prompts := figures.get("prompts"):
        for name in ("generated", "real"):
            found[name] = {key: round(prompts[name][key], 3) for key in ("thing", "thing_top5", "motion")}
        found["frechet"] = round(prompts["frechet"], 2)
    if motion := figures.get("motion"):
        found["continued_strays"] = round(motion["continued"]["distance"], 3)
    if speed := figures.get("speed"):
        found["steps"] = speed["steps"]
        found["frames_per_second"] = round(speed["frames_per_second"], 1)
    return {**found, "details": "docs/video.md"}


def masks_summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report of `evaluate-segmentation` that a card holds: all phrases of each split, and mask tokens."""
    found: dict[str, Any] = {}
    for key, values in figures["figures"].items():
        split, kind, model = key.split("/")
        if kind == "all phrases":
            chosen = {name: values[name] for name in ("gIoU", "cIoU", "absent accuracy")}
            found.setdefault(split, {})[model] = {name: round(value, 3) for name, value in chosen.items()}
    codes = [
        {name: value if isinstance(value, str) else round(value, 3) for name, value in row.items()}
        for row in figures["codes"]
    ]
    return {"splits": found, "codes": codes, "details": "docs/masks.md"}


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="bundled name, a key of recipes/cards/cards.yaml")
    parser.add_argument("model", type=Path, help="folder written by a training")
    parser.add_argument("--log", type=Path, help="log.jsonl of the training")
    parser.add_argument("--figures", type=Path, help="JSON with measured figures")
    parser.add_argument("--credits", type=Path, help="table of sources, copied as CREDITS.md")
    options = parser.parse_args()
    card = yaml.safe_load((RECIPES / "cards" / "cards.yaml").read_text(encoding="utf-8"))[options.name]
    recipe = yaml.safe_load((RECIPES.parent / card["recipes"][-1]).read_text(encoding="utf-8"))
    if options.log:
        card["training"] = course(options.log, recipe["loop"]["batch_size"])
    if options.figures:
        card["figures"] = summary(json.loads(options.figures.read_text(encoding="utf-8")))
    target = ASSETS / options.name
    if models.is_pipeline(options.model):
        index = json.loads((options.model / models.INDEX_FILE).read_text(encoding="utf-8"))
        kind = getattr(tokenloom, index["_class_name"])
        pipeline = kind.from_pretrained(options.model, dtype=torch.bfloat16)
        pipeline.register_to_config(sampling=recipe["sampling"])  # it may be chosen after training
        pipeline.card = card
        pipeline.save_pretrained(target)
    else:
        tokenizer = load_tokenizer(options.model)
        nn.Module.to(tokenizer, torch.bfloat16)  # ModelMixin.to warns of an empty list of float32 modules
        tokenizer.register_to_config(_name_or_path=options.name)  # not the folder of the training
        tokenizer.save_pretrained(target)
        models.write_card(target, card)
    if options.credits:
        shutil.copyfile(options.credits, target / "CREDITS.md")
    print(f"{target}: {models.bundled()[options.name].num_bytes / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
