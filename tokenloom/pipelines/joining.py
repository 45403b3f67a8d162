"""Where a continuation meets its prompt: loudness before the codec, no click at the joint, no clipping behind it.

Everything works piece by piece, so that a stream gives what the whole gives. Knows samples alone.

Shapes: B sounds, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOUDEST, _QUIETEST = 10 ** (-14 / 20), 10 ** (-30 / 20)  # root mean square that codecs are trained on
_SILENCE = 1e-4
_FADE_SECONDS = 0.01
_KNEE = 0.9  # magnitudes above it are bent, so that none exceeds 1


def level(prompt: Tensor) -> Tensor:
    """Gains (B, 1, 1) that bring prompts (B, 1, S) to a loudness that codecs know; 1 for silence and usual loudness."""
    loud = prompt.square().mean(2, keepdim=True).sqrt()
    gain = loud.clamp(_QUIETEST, _LOUDEST) / loud.clamp(min=_SILENCE)
    return torch.where(loud < _SILENCE, torch.ones_like(gain), gain)


def limit(audio: Tensor) -> Tensor:
    """Samples of which none exceeds 1; those within [-0.9, 0.9] are untouched."""
    size, room = audio.abs(), 1 - _KNEE
    bent = _KNEE + room * ((size - _KNEE) / room).tanh()
    return torch.where(size > _KNEE, bent * audio.sign(), audio)


class Joint:
    """Makes the continuation of decoded pieces.

    The decoded sound begins at a frame, perhaps a little before the end of the prompt; that part is dropped. The step
    between the last sample of the prompt and what the codec makes of it fades within 10 ms.

    Args:
        prompt: Samples (B, 1, S).
        heard: What the codec makes of the end of its whole frames, (B, 1, s).
        rest: Samples of the prompt behind its last whole frame.
        samples: Length of the continuation.
        sample_rate: Samples a second.
    """

    def __init__(self, prompt: Tensor, heard: Tensor, rest: int, samples: int, sample_rate: int) -> None:
        self.end, self.last = prompt[:, :, -1:], heard[:, :, -1:]
        self.rest, self.left, self.done = rest, samples, 0
        self.step: Tensor | None = None
        self.fade = max(1, round(_FADE_SECONDS * sample_rate))

    def add(self, sound: Tensor) -> Tensor:
        """Samples (B, 1, n) of the continuation from the next decoded piece (B, 1, s)."""
        dropped = min(self.rest, sound.shape[2])
        if dropped:
            self.last = sound[:, :, dropped - 1 : dropped]
            self.rest -= dropped
        piece = sound[:, :, dropped : dropped + self.left]
        if piece.shape[2] == 0:
            return piece
        if self.step is None:
            self.step = self.end - self.last
        places = torch.arange(self.done, self.done + piece.shape[2])
        self.done, self.left = self.done + piece.shape[2], self.left - piece.shape[2]
        return limit(piece + self.step * (1 - (places + 1) / self.fade).clamp(min=0))
