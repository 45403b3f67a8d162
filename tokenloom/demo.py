"""What `make demo` shows: a sheet of generated pictures, and a real photograph through the image tokenizer.

Knows a handful of prompts and where the shipped photograph lies; everything else is the public API.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from tokenloom import media
from tokenloom.pipelines.reconstruction import reconstruct_image
from tokenloom.pipelines.text_to_image import TextToImagePipeline

PHOTO = Path(__file__).parent / "assets" / "photos" / "cat.jpg"
PROMPTS = (
    "a detailed picture of a lion",
    "a simple picture of a red apple",
    "a detailed picture of a sailboat",
    "a simple picture of a house",
    "a detailed picture of a hot beverage",
    "a simple picture of a sunflower",
)
_COUNT = 4
_SCALE = 2


def run(pipe: TextToImagePipeline, output: Path, seed: int = 0) -> Iterator[str]:
    """Writes `sheet.png` and `photo.png`.

    Args:
        pipe: The model.
        output: Folder, made if missing.
        seed: Seed of the first picture; the others count up.

    Yields:
        One line for each file written, then one with the time it took.

    Raises:
        TokenloomError: The folder cannot be written.
    """
    start = time.perf_counter()
    sheet_path = media.check_output(output / "sheet.png")
    images = pipe(list(PROMPTS), num_images_per_prompt=_COUNT, seed=seed).images
    pictures = [media.enlarge(image, _SCALE) for image in images]
    labels = [PROMPTS[index // _COUNT] if index % _COUNT == 0 else "" for index in range(len(pictures))]
    media.save_image(media.sheet(pictures, _COUNT, labels), sheet_path)
    yield f"{sheet_path}: {len(pictures)} pictures generated from {len(PROMPTS)} prompts, none picked"

    result = reconstruct_image(pipe.tokenizer, media.open_image(PHOTO))
    photo_path = output / "photo.png"
    media.save_image(
        media.sheet([result.original, result.image], 2, ["photograph", "after the tokenizer"]), photo_path
    )
    yield f"{photo_path}: {result}"
    yield f"Done in {time.perf_counter() - start:.1f} s. The pictures are in {output.absolute()}."
