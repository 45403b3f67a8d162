"""Two economies of training by phrase: phrases that share the rows of their picture, and the loss of what places name.

Knows rows of pictures, words and answers. Knows nothing of scenes, tokenizers or loops.

Shapes: B pictures, n phrases a picture, P places, T words, N codes an answer, S pixels a side.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.picture_condition import PictureCondition
from tokenloom.generators.ranged import RangedTokenGenerator


def shared_logits(
    generator: RangedTokenGenerator, features: Tensor, words: Tensor, answers: Tensor
) -> Tensor:
    """`generator.logits` of several phrases a picture, with the rows of each picture computed once.

    The phrases of a picture stand behind it in one sequence, each at the positions that it has alone, and see the picture
    and themselves.

    Args:
        generator: Made with `causal_prefix`, so that the rows of the picture see no words.
        features: (B, P, F).
        words: LongTensor (B n, T).
        answers: LongTensor (B n, N).

    Returns:
        (B n, N, V).

    Raises:
        TokenloomError: The rows of the picture see words, so that they cannot be shared.
    """
    condition, plan = cast(PictureCondition, generator.condition), generator.plan
    first, pictures = condition.picture_rows, len(features)
    if bool(plan.mask[:first, first:].any()):
        raise TokenloomError("Phrases share the rows of a picture only where causal_prefix is on.")
    count, own = len(words) // pictures, plan.rows - first
    tokens = generator.tokens(answers[:, plan.position[plan.position >= 0]])
    said = torch.cat((condition.say(features, words), tokens), dim=1)
    x = torch.cat((condition.look(features), said.reshape(pictures, count * own, -1)), dim=1)
    rows = torch.cat((torch.arange(first), torch.arange(first, plan.rows).repeat(count)))
    phrase = torch.cat((torch.full((first,), -1), torch.arange(count).repeat_interleave(own)))
    together = (phrase[:, None] == phrase) | (phrase < 0)
    (hidden,) = generator.run_rows(x, rows, mask=plan.mask[rows][:, rows] & together)
    sources = plan.sources[0, generator.order.inverse]
    at = torch.arange(count)[:, None] * (sources >= first) * own + sources
    hidden = hidden[:, at.flatten().to(x.device)].reshape(len(words), len(sources), -1)
    logits = generator._head(hidden[None], plan.weights[:, generator.order.inverse], generator._table())
    positions = torch.arange(len(sources), device=x.device)
    return logits.masked_fill(~generator.possible(positions), -torch.inf)


def place_loss(logits: Tensor, instances: Tensor, things: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the words that name what places show; a place of background says id 0, "no word".

    A place between objects names each by its share of the pixels, and an object each of its words alike.

    Args:
        logits: (B, P, W) of `PictureCondition.named`, P the places of a square grid in rows.
        instances: Integers (B, S, S): 0 is background, i + 1 is object i.
        things: LongTensor (B, M, T), the words of each object, 0 = no word.
    """
    batch, places, _ = logits.shape
    grid = round(places**0.5)
    numbers = torch.arange(1, things.shape[1] + 1, device=logits.device)
    shown = (instances[:, None] == numbers[:, None, None]).float()
    shares = F.adaptive_avg_pool2d(shown, grid).flatten(2)  # (B, M, P)
    logs = logits.float().log_softmax(-1)
    flat = things.flatten(1)[:, None].expand(-1, places, -1)
    said = logs.gather(2, flat).view(batch, places, *things.shape[1:])
    there = (things > 0).float()[:, None]
    named = (said * there).sum(-1) / there.sum(-1).clamp(min=1)  # (B, P, M)
    background = (1 - shares.sum(1)) * logs[..., 0]
    return -(background + (named * shares.transpose(1, 2)).sum(-1)).mean()
