"""A sheet of frozen scenes with a phrase each: above what is meant, below the masks of a model with 32 and with 8 tokens.

python recipes/masks_sheet.py data/referring-val docs/masks.png --split val_style
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenloom import SegmentationPipeline
from tokenloom.data.referring import Example, read_scenes
from tokenloom.media import save_image, sheet
from tokenloom.pipelines.segmentation import overlay

KINDS = ("name", "colour", "position", "size", "relation", "category", "all", "absent")


def main() -> None:
    """Takes the first scene that has a phrase of each kind, and writes the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="tokenloom-masks-128")
    parser.add_argument("--split", default="val_style")
    options = parser.parse_args()
    pipe = SegmentationPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    scenes = [
        one for one in read_scenes(options.scenes) if isinstance(one, Example) and one.split == options.split
    ]
    pictures, labels, used = [], [], set[str]()
    for kind in KINDS:
        fits = (one for one in scenes if one.name not in used and any(p.kind == kind for p in one.phrases))
        if (scene := next(fits, None)) is None:
            continue
        used.add(scene.name)
        number = next(i for i, phrase in enumerate(scene.phrases) if phrase.kind == kind)
        phrase = scene.phrases[number].text
        found = [
            pipe(scene.picture, phrase, mask_tokens=count, output_type="np").masks for count in (None, 8)
        ]
        pictures.append([overlay(scene.picture, masks) for masks in (scene.masks[number][None], *found)])
        labels.append(phrase)
    rows = [picture for row in zip(*pictures, strict=True) for picture in row]
    save_image(
        sheet(rows, columns=len(pictures), labels=[*labels, *([""] * 2 * len(labels))]), options.output
    )


if __name__ == "__main__":
    main()
