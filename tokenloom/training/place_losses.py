"""What each place of a picture knows by itself: the words that name it, the outline in it, and the box of its object.

Scenes know all their objects, so an encoder of pictures learns them here without waiting for a phrase about each. Knows
features, instances and words. Knows nothing of phrases, answers or generators.

Shapes: B pictures, P places of a square grid in rows, F features, M objects, T words, W word ids, S pixels a side. What a
scene shows is BoolTensor (B, M, S, S): the visible pixels of each object.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.tokenizers.boxes import masks_to_boxes

_FINEST = 8  # squares a place and side whose outline is told at most
_SHOWN = 0.25  # share of a place that an object must cover to be told by its box


class PlaceHeads(nn.Module):
    """Reads outlines and boxes off the features of places; of use in training alone.

    Args:
        features: F.
        stride: Pixels of a place and side.
    """

    def __init__(self, features: int, stride: int) -> None:
        super().__init__()
        self.detail = min(_FINEST, stride)
        self.outline, self.box = nn.Linear(features, self.detail**2), nn.Linear(features, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, P, d, d) of what belongs to any object, and boxes (B, P, 4), of features (B, P, F).

        A box holds the left, upper, right and lower side of the object that a place shows, 0 to 1 across the picture.
        """
        return self.outline(features).unflatten(-1, (self.detail, self.detail)), self.box(features)


def shown_objects(instances: Tensor, objects: int) -> Tensor:
    """What scenes show, BoolTensor (B, M, S, S), of maps (B, S, S): 0 is background, i + 1 is object i of at most M."""
    numbers = torch.arange(1, objects + 1, device=instances.device)
    return instances[:, None] == numbers[:, None, None]


def _shares(shown: Tensor, places: int) -> Tensor:
    """The share of each place that each object covers, (B, M, P)."""
    return F.adaptive_avg_pool2d(shown.float(), round(places**0.5)).flatten(2)


def name_loss(logits: Tensor, shown: Tensor, things: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the words that name what places show; a place of background says id 0, "no word".

    A place between objects names each by its share of the pixels, and an object each of its words alike.

    Args:
        logits: (B, P, W) of `PictureCondition.named`, P the places of a square grid in rows.
        shown: What scenes show.
        things: LongTensor (B, M, T), the words of each object, 0 = no word.
    """
    places = logits.shape[1]
    shares = _shares(shown, places)
    logs = logits.float().log_softmax(-1)
    flat = things.flatten(1)[:, None].expand(-1, places, -1)
    said = logs.gather(2, flat).view(-1, places, *things.shape[1:])
    there = (things > 0).float()[:, None]
    named = (said * there).sum(-1) / there.sum(-1).clamp(min=1)  # (B, P, M)
    background = (1 - shares.sum(1)) * logs[..., 0]
    return -(background + (named * shares.transpose(1, 2)).sum(-1)).mean()


def outline_loss(outline: Tensor, shown: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the squares that belong to any object.

    Args:
        outline: Logits (B, P, d, d) of `PlaceHeads`.
        shown: What scenes show.
    """
    grid, detail = round(outline.shape[1] ** 0.5), outline.shape[-1]
    wanted = F.adaptive_avg_pool2d(shown.any(1, keepdim=True).float(), grid * detail)
    said = outline.float().unflatten(1, (grid, grid)).transpose(2, 3).reshape(wanted.shape)
    return F.binary_cross_entropy_with_logits(said, wanted)


def box_loss(boxes: Tensor, shown: Tensor) -> Tensor:
    """Mean distance of a side of the boxes that places tell, of places that show one of the objects; 0 without such.

    Args:
        boxes: (B, P, 4) of `PlaceHeads`.
        shown: What scenes show.
    """
    share, which = _shares(shown, boxes.shape[1]).max(1)  # (B, P)
    wanted = masks_to_boxes(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]) / shown.shape[-1]
    wanted = wanted.to(boxes).gather(1, which[..., None].expand(-1, -1, 4))
    there = (share >= _SHOWN).float()
    distance = (boxes.float() - wanted).abs().mean(-1)
    return (distance * there).sum() / there.sum().clamp(min=1)
