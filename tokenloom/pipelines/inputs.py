"""Checks what users pass to a pipeline and brings it into one form: prompts, counts, seeds, masks.

Every mistake becomes a `TokenloomError` that says what was expected, what came, and how to fix it. Knows nothing of models.

Shapes: B samples, N tokens, H W pixels, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenloom import media, rng
from tokenloom.errors import TokenloomError, unknown_name

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
TENSOR_INPUTS = ("codes", "committed", "preview")


def check_prompts(prompt: object) -> list[str]:
    """Returns the prompts as a list; a `str` is always one prompt."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)):
        raise TokenloomError(
            f"Expected a prompt (str) or a list of prompts, got {type(prompt).__name__}. "
            'Pass for instance prompt="a simple picture of a red apple".'
        )
    if not prompts:
        raise TokenloomError("Expected at least one prompt, got an empty list.")
    for index, text in enumerate(prompts):
        if not isinstance(text, str):
            raise TokenloomError(
                f"Expected every prompt to be a str, got {type(text).__name__} ({str(text)[:40]!r}) at position {index}. "
                "Convert it with str() or take it out."
            )
        if not text.strip():
            where = "" if isinstance(prompt, str) else f" at position {index}"
            raise TokenloomError(
                f"The prompt{where} is empty. Describe the picture, for instance 'a red apple'."
            )
    return list(prompts)


def check_count(name: str, value: object) -> int:
    """Returns a count that must be a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TokenloomError(f"Expected {name} to be a whole number of at least 1, got {value!r}.")
    return value


def check_choice(name: str, value: object, options: Sequence[str]) -> None:
    """Raises with the closest matches unless `value` is one of `options`."""
    if value not in options:
        raise unknown_name(name, value, options)


def make_seeds(
    seed: int | Sequence[int] | Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    batch_size: int,
) -> Tensor:
    """Returns one seed a sample, LongTensor (B,) on the CPU.

    Args:
        seed: An int s gives s, s+1, ...; a list gives one each; `None` asks `generator`, or the operating system.
        generator: One `torch.Generator`, from which all seeds are drawn in one call, or a list with one each, from
            which one seed is drawn each: `torch.randint(2**63 - 1, (count,), generator=generator)`.
        batch_size: Number of samples B.

    Raises:
        TokenloomError: Both are given, or the number or range of the seeds is wrong.
    """
    if generator is None:
        return rng.as_seeds(seed, batch_size)
    if seed is not None:
        raise TokenloomError("Expected either seed or generator, got both. Leave one of them out.")
    if isinstance(generator, torch.Generator):
        return _draw(generator, batch_size)
    if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TokenloomError(
            f"Expected generator to be a torch.Generator or a list of them, got {type(generator).__name__}. "
            "For plain numbers use seed=."
        )
    if len(generator) != batch_size:
        raise TokenloomError(
            f"Expected one generator for each of the {batch_size} images, got {len(generator)}. "
            "Pass a single generator or as many as images."
        )
    return torch.cat([_draw(one, 1) for one in generator])


def _draw(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device).cpu()


def seeds_as_ints(seeds: Tensor) -> list[int]:
    """Returns seeds, held as two's complement, as the non-negative numbers that the user may pass again."""
    return [seed % 2**64 for seed in seeds.tolist()]


def load_picture(name: str, picture: Image.Image | str | Path) -> Image.Image:
    """Returns a PIL image from an image or a file."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, (str, Path)):
        return media.open_image(picture)
    raise TokenloomError(
        f"Expected {name} to be a PIL image or the path of one, got {type(picture).__name__}. "
        "Convert an array with PIL.Image.fromarray."
    )


def prepare_inpainting(
    image: Image.Image | str | Path, mask: Image.Image | str | Path, size: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Brings a picture and its mask to the size of the tokenizer.

    Both are cut to the largest centred square. A token is kept only if no pixel of its whole patch is white.

    Args:
        image: The picture.
        mask: As large as the picture; white (128 and above) is repainted, black is kept.
        size: Side of the tokenizer's pictures in pixels.
        grid: Rows and columns of tokens (h, w).

    Returns:
        Pixels (1, 3, size, size) in [-1, 1], and a BoolTensor (1, h*w) of the tokens to keep.

    Raises:
        TokenloomError: The sizes differ, or a file cannot be read.
    """
    picture, stencil = load_picture("image", image), load_picture("mask_image", mask)
    if picture.size != stencil.size:
        raise TokenloomError(
            f"Expected mask_image to have the size of image ({picture.size[0]}x{picture.size[1]}), got "
            f"{stencil.size[0]}x{stencil.size[1]}. Resize the mask, for instance mask.resize(image.size)."
        )
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    square = media.to_rgb(picture).crop(box).resize((size, size), Image.Resampling.LANCZOS)
    white = torch.from_numpy(np.array(stencil.convert("L").crop(box)) >= 128).float()
    if side < max(grid):
        white = F.interpolate(white[None, None], (size, size), mode="nearest")[0, 0]
    keep = F.adaptive_max_pool2d(white[None, None], grid)[0, 0] == 0
    return media.to_pixels(square), keep.flatten()[None]
