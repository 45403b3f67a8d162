"""Codes of masks inside sequences of words: putting them in, reading them out, and their probabilities.

A language model speaks of a mask by a start word, one word a code, and an end word (HiMTok). Knows ids and logits; knows
nothing of masks, tokenizers or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError

IGNORED = -100
"""The label of a word that is not trained on (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class MaskWords:
    """Ids of the words of masks in a vocabulary.

    Attributes:
        start: Id of the word before the codes.
        end: Id of the word behind them.
        first: Id of the word of code 0; the others follow.
        levels: Codes a mask K.
        codes: Number of codes.
    """

    start: int
    end: int
    first: int
    levels: int
    codes: int

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            TokenloomError: For negative ids, or no codes.
        """
        if min(self.start, self.end, self.first) < 0 or min(self.levels, self.codes) < 1:
            raise TokenloomError(f"Ids must not be negative, and levels and codes at least 1; got {self}.")

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where the first mask of each sequence stands.

        Args:
            ids: LongTensor (B, T).

        Returns:
            LongTensor (B, K), the places of its codes (0 where there is none), and BoolTensor (B,), whether a start
            word stands there with room for all codes and the end word behind it.
        """
        starts = ids == self.start
        at = starts.long().argmax(1)
        found = starts.any(1) & (at + self.levels + 1 < ids.shape[1])
        places = at[:, None] + 1 + torch.arange(self.levels, device=ids.device)
        return places.masked_fill(~found[:, None], 0), found

    def insert(self, ids: Tensor, labels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the codes of each sequence's mask into its ids, and into those labels that are trained on.

        Args:
            ids: LongTensor (B, T) with placeholders where the codes belong.
            labels: LongTensor (B, T); `IGNORED` where nothing is trained.
            codes: LongTensor (B, K).

        Returns:
            New ids and labels; a sequence without a mask stays as it is.
        """
        if codes.shape != (ids.shape[0], self.levels) or labels.shape != ids.shape:
            raise TokenloomError(
                f"Codes must be ({ids.shape[0]}, {self.levels}) and labels {tuple(ids.shape)}, got "
                f"{tuple(codes.shape)} and {tuple(labels.shape)}."
            )
        places, found = self.find(ids)
        rows, places = found.nonzero(), places[found]
        words = codes[found] + self.first
        new_ids, new_labels = ids.clone(), labels.clone()
        new_ids[rows, places] = words
        kept = labels[rows, places]
        new_labels[rows, places] = torch.where(kept == IGNORED, kept, words)
        return new_ids, new_labels

    def parse(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, K) of the first mask of each sequence (zeros where there is none), and BoolTensor (B,) of where.

        Raises:
            TokenloomError: If other words than codes stand between start and end.
        """
        places, found = self.find(ids)
        codes = (ids.gather(1, places) - self.first).masked_fill(~found[:, None], 0)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise TokenloomError(
                f"Behind the start word {self.start} there must be {self.levels} words from {self.first} to "
                f"{self.first + self.codes - 1}, but other words stand there; forbid them when generating."
            )
        return codes, found

    def probabilities(self, logits: Tensor, labels: Tensor, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
        """Probabilities of the codes alone at the places of each sequence's mask.

        Args:
            logits: (B, T, vocabulary); row t predicts word t + 1.
            labels: LongTensor (B, T), the words of the sequence or `IGNORED`.
            sharpness: Factor on the logits before the softmax (2 in HiMTok).

        Returns:
            (B, K, codes), zeros where there is no mask, and BoolTensor (B,) of where there is one.
        """
        places, found = self.find(labels)
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        chosen = logits[rows, (places - 1).clamp(min=0), self.first : self.first + self.codes]
        return (sharpness * chosen).softmax(-1) * found[:, None, None], found
