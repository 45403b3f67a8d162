"""Trains the judge on real pictures: a contrastive loss between pictures and names, a style loss, and tags.

No generator or tokenizer is involved, so the judge is independent of what it judges. The whole set is kept as
one uint8 tensor and batches are cut from it, which lets a small network train on one CPU thread.

Shapes: B pictures, L names, H rows, W columns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.judge_augment import concept_view, style_view
from tokenloom.evaluation.judge_network import JudgeConfig, JudgeNetwork
from tokenloom.evaluation.pictures import EvaluationSet, label_of, words_of

Log = Callable[[str], None]
_SMALL, _SMALL_UNTIL = 0.6875, 0.6  # the first part of the training sees smaller pictures, at half the cost


@dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """How a judge is trained.

    Attributes:
        steps: Batches; `max_seconds` may end the training earlier (the learning rate follows whichever is
            further).
        batch_size: Pictures a batch.
        learning_rate: Peak of a one-cycle schedule, for AdamW.
        weight_decay: Decoupled weight decay of all matrices.
        tag_weight: Weight of naming the tags of pictures, beside the contrastive loss of names.
        word_dropout: Chance that a word of a longer name is left out in a step, so that every word learns its
            own meaning.
        seed: Fixes the initial weights, the order of the pictures and the augmentation.
        max_seconds: Wall-clock limit; None for none.
    """

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    tag_weight: float = 0.3
    word_dropout: float = 0.15
    seed: int = 0
    max_seconds: float | None = None


def judge_config(pictures: EvaluationSet) -> JudgeConfig:
    """The configuration for a training set: its words and styles.

    Raises:
        TokenloomError: If there are no pictures or fewer than two different names.
    """
    names = {label_of(caption) for caption in pictures.captions}
    if len(names) < 2:
        raise TokenloomError(
            f"Expected training pictures of at least two names to tell apart, got {len(names)}. "
            'Give a folder whose captions have a "label" and the split "train".'
        )
    words = sorted({word for name in names for word in words_of(name)})
    styles = sorted({caption.style for caption in pictures.captions if caption.style})
    return JudgeConfig(
        words=tuple(words), styles=tuple(styles) or ("-",), image_size=int(pictures.pixels.shape[-1])
    )


def fit(
    network: JudgeNetwork, pictures: EvaluationSet, training: JudgeTraining, log: Log | None = None
) -> None:
    """Trains a network in place and leaves it in evaluation mode with averaged weights.

    Args:
        network: A fresh `JudgeNetwork`.
        pictures: The training pictures; their label (or caption) is their name.
        training: Steps, rates and seed.
        log: Called with a line every 50 steps.
    """
    names = sorted({label_of(caption) for caption in pictures.captions})
    name_index = {name: index for index, name in enumerate(names)}
    style_index = {style: index for index, style in enumerate(network.config.styles)}
    target = torch.tensor([name_index[label_of(caption)] for caption in pictures.captions])
    style = torch.tensor([style_index.get(caption.style or "", -1) for caption in pictures.captions])
    flippable = torch.tensor(
        [not {"left", "right"} & set(words_of(label_of(caption))) for caption in pictures.captions]
    )
    random = torch.Generator().manual_seed(training.seed)
    tags = _TagHead(2 * network.config.widths[-1], pictures)
    optimizer = _optimizer([*network.parameters(), *tags.parameters()], training)
    average = {key: value.detach().clone() for key, value in network.state_dict().items()}
    batches = _batches(len(pictures), training.batch_size, random)
    started, progress, step = time.perf_counter(), 0.0, 0
    losses: list[float] = []
    network.train()
    while step < training.steps and progress < 1.0:
        _set_rate(optimizer, training.learning_rate, progress)
        chosen = next(batches)
        pixels = pictures.pixels[chosen]
        scale = _SMALL if progress < _SMALL_UNTIL else 1.0
        features = network.features(concept_view(pixels, flippable[chosen], random, scale))
        loss = _concept_loss(network, features, target[chosen], names, training.word_dropout, random)
        loss = loss + training.tag_weight * tags.loss(features, chosen)
        if bool((style[chosen] >= 0).any()):
            logits = network.style(style_view(pixels, random))
            loss = loss + F.cross_entropy(logits, style[chosen], ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            network.scale.clamp_(max=math.log(50.0))
        step += 1
        _update_average(average, network, min(0.998, step / (step + 10)))
        elapsed = time.perf_counter() - started
        progress = max(step / training.steps, elapsed / training.max_seconds if training.max_seconds else 0.0)
        losses.append(float(loss.detach()))
        if log is not None and step % 50 == 0:
            rate = step * training.batch_size / elapsed
            loss_now = sum(losses[-50:]) / 50
            log(f"step {step}/{training.steps} loss {loss_now:.3f} {rate:.0f} pictures/s {elapsed:.0f} s")
    network.load_state_dict(average)
    network.eval()


class _TagHead(nn.Module):
    """Names the tags of a picture from the encoder's features. It teaches what concepts have in common and is
    not kept.
    """

    def __init__(self, features: int, pictures: EvaluationSet) -> None:
        super().__init__()
        tags = sorted(
            {word for caption in pictures.captions for tag in caption.tags for word in words_of(tag)}
        )
        place = {word: index for index, word in enumerate(tags)}
        self.targets = torch.zeros(len(pictures), len(tags))
        for index, caption in enumerate(pictures.captions):
            for word in {word for tag in caption.tags for word in words_of(tag)}:
                self.targets[index, place[word]] = 1.0
        self.targets /= self.targets.sum(1, keepdim=True).clamp(min=1)
        self.linear = nn.Linear(features, len(tags)) if tags else None

    def loss(self, features: Tensor, chosen: Tensor) -> Tensor:
        """Cross-entropy with the tags of the chosen pictures as equal positives; 0 where there are none."""
        if self.linear is None:
            return features.new_zeros(())
        return F.cross_entropy(self.linear(F.dropout(features, 0.2)), self.targets[chosen])


def _concept_loss(
    network: JudgeNetwork,
    features: Tensor,
    target: Tensor,
    names: list[str],
    word_dropout: float,
    random: torch.Generator,
) -> Tensor:
    """Contrastive in both directions.

    A picture is compared with every training name (a superset of the names in the batch). A name is compared
    with the pictures of the batch; all pictures of its concept are positives and share the target evenly.
    """
    embedding = F.normalize(network.picture_head(F.dropout(features, 0.2)), dim=1)
    ids, offsets = network.tokenize(names)
    ids = _drop_words(ids, offsets, len(network.config.words), word_dropout, random)
    texts = F.normalize(network.word_vectors(ids, offsets), dim=1)
    logits = network.scale.exp() * embedding @ texts.T  # (B, L)
    to_name = F.cross_entropy(logits, target, label_smoothing=0.05)
    present = target.unique()
    positive = (present[:, None] == target[None, :]).float()  # (names in the batch, B)
    to_picture = F.cross_entropy(logits[:, present].T, positive / positive.sum(1, keepdim=True))
    return to_name + 0.5 * to_picture


def _drop_words(ids: Tensor, offsets: Tensor, unknown: int, chance: float, random: torch.Generator) -> Tensor:
    """Replaces words of names that have two words or more by the unknown word now and then."""
    lengths = torch.diff(offsets, append=torch.tensor([len(ids)]))
    longer = torch.repeat_interleave(lengths > 1, lengths)
    return torch.where((torch.rand(len(ids), generator=random) < chance) & longer, unknown, ids)


def _batches(count: int, batch_size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches; a set smaller than a batch is repeated within it."""
    while True:
        order = torch.randperm(count, generator=random)
        if count < batch_size:
            yield order.repeat(math.ceil(batch_size / count))[:batch_size]
            continue
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _optimizer(parameters: list[nn.Parameter], training: JudgeTraining) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98))


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, progress: float) -> None:
    """Linear warm-up over the first 5 %, then a cosine to 1 % of the peak."""
    rate = (
        progress / 0.05
        if progress < 0.05
        else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))
    )
    for group in optimizer.param_groups:
        group["lr"] = peak * max(rate, 0.01)


@torch.no_grad()
def _update_average(average: dict[str, Tensor], network: JudgeNetwork, decay: float) -> None:
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)
