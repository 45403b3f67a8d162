"""The judge: says which of many names a picture fits best, and which style it has. Trained on real pictures
only.

`train_judge` trains one from a captioned folder and writes `judge.safetensors`; `Judge.load` reads it;
`judge_accuracy` measures it on real held-out pictures, which is the ceiling of what a generator can score
with it. Knows nothing of generators or tokenizers.

Shapes: B pictures, L names, C dimensions; pixels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.judge_network import JudgeConfig, Judgement, JudgeNetwork
from tokenloom.evaluation.judge_training import JudgeTraining, Log, fit, judge_config
from tokenloom.evaluation.pictures import EvaluationSet, check_pixels
from tokenloom.evaluation.retrieval import Kind, Question, Score, hits, questions, score
from tokenloom.media import write_atomically

FILE_NAME = "judge.safetensors"


class Judge:
    """A trained judge.

    Attributes:
        network: The network, in evaluation mode.
        card: How it was trained: steps, seed, pictures.
    """

    def __init__(self, network: JudgeNetwork, card: dict[str, Any] | None = None) -> None:
        self.network = network.eval()
        self.card = card or {}

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Reads a judge from a file, or from `judge.safetensors` in a folder.

        Raises:
            TokenloomError: If the file is missing, damaged, or not a judge.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
                state = {key: opened.get_tensor(key) for key in opened.keys()}
            config = JudgeConfig.from_dict(json.loads(metadata["judge"]))
            network = JudgeNetwork(config)
            network.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError, RuntimeError) as error:
            raise TokenloomError(
                f"Expected a judge written by train_judge, got {str(path)!r} ({type(error).__name__}: "
                f"{error}). Train it again."
            ) from error
        return cls(network, json.loads(metadata.get("card", "{}")))

    def save(self, path: str | Path) -> Path:
        """Writes the judge to a file, or to `judge.safetensors` in a folder; whole or not at all."""
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / FILE_NAME
        state = {key: value.contiguous() for key, value in self.network.state_dict().items()}
        metadata = {"judge": json.dumps(self.network.config.to_dict()), "card": json.dumps(self.card)}
        return write_atomically(path, save(state, metadata=metadata))

    @torch.inference_mode()
    def look(self, pixels: Tensor, batch_size: int = 64) -> Judgement:
        """Looks at pictures.

        Args:
            pixels: uint8 (B, 3, H, W); other sizes than the judge's are resized.
            batch_size: Pictures at a time.

        Returns:
            A `Judgement` of all of them.
        """
        check_pixels(pixels)
        parts = [self.network(self._prepare(part)) for part in pixels.split(batch_size)]
        return Judgement(
            torch.cat([part.embedding for part in parts]),
            torch.cat([part.style_logits for part in parts]),
            torch.cat([part.features for part in parts]),
        )

    def _prepare(self, pixels: Tensor) -> Tensor:
        size = self.network.config.image_size
        images = pixels.float() / 127.5 - 1
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return images

    @torch.inference_mode()
    def name_vectors(self, asked: Sequence[Question]) -> dict[str, Tensor]:
        """Unit vectors of every name that occurs in the questions."""
        names = sorted({name for question in asked for name in (question.name, *question.rivals)})
        return dict(zip(names, self.network.texts(names), strict=True))

    def styles(self, seen: Judgement) -> list[str]:
        """The most likely style of each picture."""
        return [self.network.config.styles[index] for index in seen.style_logits.argmax(1).tolist()]

    def mark(self, pixels: Tensor, asked: Sequence[Question]) -> Score:
        """Marks one picture for each question.

        Args:
            pixels: uint8 (N, 3, H, W).
            asked: N questions.

        Returns:
            The shares of right concepts and right styles.
        """
        seen = self.look(pixels)
        concept = hits(seen.embedding, self.name_vectors(asked), asked)
        pairs = zip(self.styles(seen), asked, strict=True)
        style = torch.tensor(
            [style == question.style for style, question in pairs if question.style is not None]
        )
        return score(concept, style)


def judge_accuracy(
    judge: Judge,
    pictures: EvaluationSet,
    kind: Kind,
    groups: Sequence[str] | None = None,
    candidates: int = 100,
    seed: int = 0,
) -> Score:
    """Marks the real held-out pictures themselves: the ceiling for a generator that is asked the same
    questions.
    """
    asked = questions(pictures, kind, groups, candidates, seed)
    return judge.mark(pictures.pixels[[question.index for question in asked]], asked)


def train_judge(
    data_root: str | Path,
    out: str | Path,
    steps: int | None = None,
    *,
    training: JudgeTraining | None = None,
    groups: Sequence[str] | None = None,
    image_size: int = 64,
    start: Judge | str | Path | None = None,
    log: Log | None = None,
) -> Judge:
    """Trains a judge on the real training pictures of a captioned folder and writes it.

    The same seed, data, number of threads and machine give the same weights, unless `training.max_seconds` is
    set.

    Args:
        data_root: A folder with `captions.jsonl`; captions without a split count as training pictures.
        out: Folder (or `.safetensors` file) for the result.
        steps: Batches, if other than `training.steps`.
        training: Rates, seed and limits.
        groups: Train on these groups only; None for all.
        image_size: Rows and columns the judge looks at.
        start: Continue with the weights of this judge, which must know the same words and styles.
        log: Called with progress lines, for example `print`.

    Returns:
        The trained judge, in evaluation mode.
    """
    training = training or JudgeTraining()
    if steps is not None:
        training = replace(training, steps=steps)
    pictures = EvaluationSet.load(data_root, image_size).split("train").groups(groups)
    config = judge_config(pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network, before = _first_network(config, start)
        parameters = sum(p.numel() for p in network.parameters())
        if log is not None:
            sizes = f"{len(config.words)} words, {len(config.styles)} styles, {parameters} parameters"
            log(f"{len(pictures)} pictures, {sizes}")
        fit(network, pictures, training, log)
    card = {
        "steps": before + training.steps,
        "seed": training.seed,
        "pictures": len(pictures),
        "parameters": parameters,
    }
    judge = Judge(network, card)
    judge.save(out)
    return judge


def _first_network(config: JudgeConfig, start: Judge | str | Path | None) -> tuple[JudgeNetwork, int]:
    """A fresh network, or a copy of another judge's, and the steps it was trained for."""
    network = JudgeNetwork(config)
    if start is None:
        return network, 0
    other = start if isinstance(start, Judge) else Judge.load(start)
    if other.network.config != config:
        known = other.network.config
        raise TokenloomError(
            f"Expected a judge for {len(config.words)} words and {len(config.styles)} styles, got one for "
            f"{len(known.words)} and {len(known.styles)}, or of another size. Train from the beginning."
        )
    network.load_state_dict(other.network.state_dict())
    return network, int(other.card.get("steps", 0))
