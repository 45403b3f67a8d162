"""Draws the sheet of samples of the README: fixed prompts, seeds 0 to 3, nothing picked.

python recipes/sample_sheet.py docs/samples.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenloom import TextToImagePipeline
from tokenloom.media import save_image, sheet

PROMPTS = [
    "a simple picture of a red apple",
    "a detailed picture of a hamburger",
    "a 3d picture of a pizza",
    "a flat picture of a house",
    "a simple picture of a smiling face",
    "a blob picture of a cat face",
    "a detailed picture of a lion",
    "a glossy picture of a guitar",
    "a muted picture of a rose",
    "a flat picture of a rocket",
    "a detailed picture of a crab",
    "a 3d picture of a soccer ball",
]
SEEDS = [0, 1, 2, 3]


def main(path: Path) -> None:
    """Writes the sheet: one prompt a cell of four pictures, three cells a row."""
    pipe = TextToImagePipeline.from_pretrained("tokenloom-emoji-64")
    images = pipe(PROMPTS, seed=SEEDS * len(PROMPTS), num_images_per_prompt=len(SEEDS)).images
    labels = [PROMPTS[index // 4] if index % 4 == 0 else "" for index in range(len(images))]
    save_image(sheet(images, 12, labels), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
