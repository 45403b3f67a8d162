"""Answers to a phrase as one line of codes: whether there is an object, its box, then its mask, coarse to fine.

First stands one of two codes, "there" or "nothing"; then four of the box (x0, y0, x1, y1), then the K codes of the mask, in a
vocabulary of the mask's codes, the steps of the box's scale and these two. Whether there is something is a choice of its own,
because a side that is known roughly has a small chance at every step of its scale, so that "nothing" would win beside them. An
answer is itself coarse to fine, a box alone is its first part, and a known box is a known beginning. Of a mask tokenizer whose
first codes say a box themselves, an answer leaves these out: they follow from its own. Knows numbers; knows nothing of
networks, phrases or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.boxes import Size, boxes_to_codes, codes_to_boxes
from tokenloom.tokenizers.mask import MaskTokenizer
from tokenloom.tokenizers.mask_frames import MaskFrame

BOX = 5
"""Codes of a box: whether there is one, and its four sides."""


@dataclass(frozen=True)
class AnswerCodes:
    """The vocabulary of answers.

    Attributes:
        levels: Codes a mask K.
        masks: Number of codes of masks; they come first.
        bins: Steps of the scale of boxes, whose codes follow; the last two are `there` and `nothing`. `frame.steps` + 1 steps say
            a frame exactly.
        empty: The code of an empty mask, or `None`.
        frame: What makes the first codes of masks of their boxes, or `None`.
    """

    levels: int
    masks: int
    bins: int
    empty: int | None = None
    frame: MaskFrame | None = None

    @classmethod
    def of(cls, tokenizer: MaskTokenizer, bins: int) -> AnswerCodes:
        """The answers in codes of a tokenizer."""
        return cls(tokenizer.levels, tokenizer.vocab_size, bins, tokenizer.empty_code, tokenizer.frame)

    @property
    def framing(self) -> int:
        """Codes of a mask that follow from the box."""
        return 0 if self.frame is None else self.frame.codes

    @property
    def length(self) -> int:
        """Codes an answer."""
        return BOX + self.levels - self.framing

    def steps(self, mask_tokens: int) -> int:
        """Codes of an answer that the first so many codes of its mask need."""
        return BOX + max(1, mask_tokens - self.framing)

    @property
    def vocabulary(self) -> int:
        """Number of codes in all."""
        return self.masks + self.bins + 2

    @property
    def there(self) -> int:
        """The first code where there is an object."""
        return self.masks + self.bins

    @property
    def nothing(self) -> int:
        """The first code where there is none; the sides of the box are then the lowest of the scale."""
        return self.masks + self.bins + 1

    @property
    def ranges(self) -> list[list[int]]:
        """[count, low, high] of the three parts, as `RangedTokenGenerator` takes them."""
        return [
            [1, self.there, self.vocabulary],
            [4, self.masks, self.there],
            [self.length - BOX, 0, self.masks],
        ]

    def box_codes(self, boxes: Tensor, size: Size) -> Tensor:
        """LongTensor (B, 5) of boxes (B, 4) in pixels; boxes without area say that there is nothing."""
        codes = boxes_to_codes(boxes, size, self.bins) + self.masks
        none = ((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])).to(codes.device)[:, None]
        first = torch.full_like(codes[:, :1], self.there).masked_fill(none, self.nothing)
        return torch.cat((first, codes.masked_fill(none, self.masks)), dim=1)

    def join(self, boxes: Tensor, size: Size, masks: Tensor) -> Tensor:
        """Answers (B, length) of boxes (B, 4) in pixels of a picture of a size, and codes (B, K) of masks."""
        return torch.cat((self.box_codes(boxes, size).to(masks.device), masks[:, self.framing :]), dim=1)

    def split(self, answers: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Boxes (B, 4) float in pixels, corners in order, zeros where there is nothing; and codes (B, K) of masks.

        Masks are empty where there is nothing; with frames the picture must be square.
        """
        if answers.ndim != 2 or answers.shape[1] != self.length:
            raise TokenloomError(f"Answers must be (B, {self.length}), got {tuple(answers.shape)}.")
        codes = answers[:, 1:BOX] - self.masks
        none = answers[:, 0] == self.nothing
        boxes = codes_to_boxes(codes.clamp(0, self.bins - 1), size, self.bins)
        low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
        boxes, masks = torch.cat((low, high), dim=1), answers[:, BOX:]
        if self.frame is not None:
            frames = self.frame.encode(boxes, size[0])
            first = masks[:, :1]
            masks = torch.cat((torch.where(first < self.frame.vocabulary, frames, first), masks), dim=1)
        if self.empty is not None:
            masks = masks.masked_fill(none[:, None], self.empty)
        return boxes.masked_fill(none[:, None], 0.0), masks
