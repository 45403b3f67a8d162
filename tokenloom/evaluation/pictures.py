"""The pictures an evaluation looks at: a captioned folder, decoded once, as one uint8 tensor with its
captions.

Knows the captioned folder of `tokenloom.data`. Knows nothing of models. For small sets only: 10,000 pictures
of 64 x 64 take 120 MB.

Shapes: N pictures, B a batch of them, H rows, W columns; pixels are uint8 (N, 3, H, W) in RGB order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenloom.data.captions import Caption
from tokenloom.data.dataset import ImageCaptionFolder
from tokenloom.data.prompts import plain_caption
from tokenloom.errors import TokenloomError

CORE_GROUPS = ("objects", "travel", "smileys", "animals", "food", "activities")


@dataclass(frozen=True)
class EvaluationSet:
    """Pictures and their captions, in the same order.

    Attributes:
        pixels: uint8 (N, 3, H, W), transparent pictures laid on white.
        captions: N captions.
    """

    pixels: Tensor
    captions: tuple[Caption, ...]

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], image_size: int = 64) -> EvaluationSet:
        """Decodes all splits of a captioned folder.

        Args:
            folder: Holds pictures and `captions.jsonl`.
            image_size: Rows and columns; pictures of another size are resized, others than squares on white.

        Raises:
            TokenloomError: If the folder, a caption or a picture cannot be read.
        """
        data = ImageCaptionFolder(folder, size=image_size)
        return cls(data.stack(), data.captions)

    def where(self, keep: Callable[[Caption], bool]) -> EvaluationSet:
        """The pictures whose caption satisfies `keep`, in the same order."""
        return self.select([index for index, caption in enumerate(self.captions) if keep(caption)])

    def split(self, *names: str) -> EvaluationSet:
        """The pictures of the named splits."""
        return self.where(lambda caption: split_of(caption) in names)

    def groups(self, names: Collection[str] | None) -> EvaluationSet:
        """The pictures of the named groups (see `in_groups`); None keeps all."""
        return self.where(lambda caption: in_groups(caption, names))

    def select(self, indices: Sequence[int]) -> EvaluationSet:
        """The pictures at these places, in this order."""
        chosen = list(indices)
        return EvaluationSet(self.pixels[chosen], tuple(self.captions[index] for index in chosen))

    def sample(self, count: int, seed: int = 0) -> EvaluationSet:
        """At most `count` pictures, drawn without replacement and kept in their order; the seed decides
        which.
        """
        if count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.select(sorted(drawn.tolist()))


def split_of(caption: Caption) -> str:
    """The split of a caption; "train" where none is written."""
    return caption.split or "train"


def in_groups(caption: Caption, names: Collection[str] | None) -> bool:
    """Whether a caption is in one of the groups; "travel" also names the group "travel & places". None
    accepts every caption.
    """
    group = caption.group or ""
    return names is None or group in names or group.split(" ")[0] in names


def label_of(caption: Caption) -> str:
    """The name of what a picture shows: its label, or its whole caption where it has no label."""
    return caption.label or caption.text


def prompt_of(caption: Caption) -> str:
    """The plain prompt that asks for a picture: "a flat picture of onion", or the whole caption where there
    is no label.
    """
    return plain_caption(caption.label, caption.style) if caption.label else caption.text


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order; apostrophes stay inside words."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def check_pixels(pixels: Tensor) -> None:
    """Raises `TokenloomError` unless the pixels are uint8 (N, 3, H, W) with N of at least 1."""
    if (
        not isinstance(pixels, Tensor)
        or pixels.dtype != torch.uint8
        or pixels.ndim != 4
        or pixels.shape[1] != 3
    ):
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TokenloomError(f"Expected uint8 pixels (N, 3, H, W), got {got}. `as_uint8` converts pictures.")
    if len(pixels) == 0:
        raise TokenloomError("Expected at least one picture, got none. Choose another split or other groups.")


def to_pil(pixels: Tensor) -> Image.Image:
    """Turns uint8 (3, H, W) into a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def as_uint8(images: Any) -> Tensor:
    """Turns what a pipeline returned into uint8 (B, 3, H, W).

    Args:
        images: A uint8 or float tensor (B, 3, H, W) with floats in [0, 1], or a sequence of PIL pictures of
            one size.

    Raises:
        TokenloomError: If it is neither.
    """
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3:
        if images.dtype == torch.uint8:
            return images.cpu()
        return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    if (
        isinstance(images, Sequence)
        and len(images) > 0
        and all(isinstance(image, Image.Image) for image in images)
    ):
        arrays = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        if len({array.shape for array in arrays}) == 1:
            return torch.stack(arrays)
    raise TokenloomError(
        "Expected pictures as a tensor (B, 3, H, W) in [0, 1] or a list of PIL pictures of one size, got "
        f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}. Convert them first."
    )
