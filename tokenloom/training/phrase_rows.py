"""An economy of training by phrase: all phrases of a picture share its rows.

Knows rows of pictures, words and answers. Knows nothing of scenes, tokenizers or loops.

Shapes: B pictures, n phrases a picture, P places, T words, N codes an answer.
"""

from __future__ import annotations

from typing import cast

import torch
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
