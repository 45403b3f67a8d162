"""Frames of any number from a generator that sees a window of them, with the memory of one window.

Every window is decoded by itself, because it begins with a picture, as the clips of training do: what two windows share is
decoded and encoded anew. Knows a tokenizer and a generator. Knows nothing of prompts or files.

Shapes: B clips, T frames of codes of a window, P codes a frame, k frames that a frame of codes stands for, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.generators.base import Generator
from tokenloom.generators.sliding import slide
from tokenloom.tokenizers.video import VideoTokenizer

_NEXT_CANDIDATE = 0x2545F4914F6CDD1D  # odd, so that all candidates of a clip have noise of their own


def video_frames(
    tokenizer: VideoTokenizer,
    generator: Generator,
    count: int,
    *,
    overlap: int,
    start: Tensor | None = None,
    **options: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """New frames, window by window.

    Args:
        tokenizer: Encodes what two windows share and decodes.
        generator: A generator over `Layout.clip(T, h, w)`.
        count: New frames F in all, those of `start` not among them.
        overlap: Frames of codes that two windows share, 1 to T - 1.
        start: Codes (B, c P) of c < T frames of codes that the first window begins with; `None` = it begins with nothing.
        options: As for `tokenloom.generators.slide`: condition, batch_size, seeds, guidance, sampling, on_step, decode.

    Yields:
        New codes (B, n P) of a window, and their frames (B, f, 3, H, W) in the tokenizer's pixel range.
    """
    length = int(generator.order.layout.shape[0])  # type: ignore[arg-type]
    begun = 0 if start is None else start.shape[1] * length // generator.order.layout.size
    window: list[Tensor] = []
    pixels: list[Tensor] = []

    def renew(known: Tensor) -> Tensor:
        """The codes of the last frames of the window as those of a clip of their own."""
        last = pixels[0][:, -tokenizer.frames_of(overlap) :]
        codes = tokenizer.encode(last)
        window[:] = codes.chunk(overlap, dim=1)
        return codes

    frames = -(-count // tokenizer.stride[0]) if begun else tokenizer.codes_frames(count)
    made = slide(generator, frames=begun + frames, overlap=overlap, start=start, renew=renew, **options)
    known, left = begun, count
    for number, frame in enumerate(made, start=1):
        window.append(frame)
        if len(window) < length and number < begun + frames:
            continue
        codes = torch.cat(window, dim=1)
        pixels[:] = [tokenizer.decode(codes)]
        fresh = pixels[0][:, tokenizer.frames_of(known) if known else 0 :][:, :left]
        yield torch.cat(window[known:], dim=1), fresh
        left -= fresh.shape[1]
        known = overlap


def between(
    tokenizer: VideoTokenizer,
    generator: Generator,
    ends: Tensor,
    frames: int,
    *,
    candidates: int,
    condition: Tensor | None,
    seeds: Tensor,
    **options: Any,
) -> Tensor:
    """Codes of clips whose first and last frames are known.

    The last picture is encoded behind a held first one, and its frame of codes is kept. An order that goes forward in time
    does not see it while it makes the frames before, so several candidates are made, and that one is taken under which the
    kept end is the likeliest.

    Args:
        tokenizer: Encodes the ends.
        generator: A generator over `Layout.clip(T, h, w)`.
        ends: First and last frames (B, 2, 3, H, W) in the tokenizer's pixel range.
        frames: Frames F of the clips, at most those of T frames of codes.
        candidates: How many are made of each clip.
        condition: Conditions (B, ...), or `None`.
        seeds: LongTensor (B,).
        options: Further arguments of `generate`.

    Returns:
        LongTensor (B, n P).
    """
    layout, batch = generator.order.layout, len(ends)
    count, each = tokenizer.codes_frames(frames), layout.size // int(layout.shape[0])  # type: ignore[arg-type]
    held = ends[:, :1].expand(-1, tokenizer.frames_of(count - 1), -1, -1, -1)
    last = ends[:, 1:].expand(-1, tokenizer.stride[0], -1, -1, -1)
    draft = tokenizer.encode(torch.cat([held, last], dim=1))
    known = draft.new_zeros(batch, layout.size)
    known[:, : draft.shape[1]] = draft
    keep = torch.zeros(layout.size, dtype=torch.bool, device=known.device)
    end = slice((count - 1) * each, count * each)
    keep[:each] = keep[end] = True
    given = None if condition is None else condition.repeat(candidates, 1)
    noise = torch.cat(
        [seeds + torch.tensor(number) * _NEXT_CANDIDATE for number in range(candidates)]
    )  # modulo 2**64
    codes = generator.generate(
        given,
        batch_size=None if given is not None else batch * candidates,
        seeds=noise,
        known=known.repeat(candidates, 1),
        keep=keep,
        **options,
    )
    if candidates > 1:
        likelihood = generator.logits(codes, given)[:, end].float().log_softmax(-1)
        fit = likelihood.gather(2, codes[:, end, None]).sum((1, 2)).unflatten(0, (candidates, batch))
        codes = codes.unflatten(0, (candidates, batch))[fit.argmax(0), torch.arange(batch)]
    return codes[:, : count * each]


@dataclass(frozen=True)
class VideoJob:
    """What one call has to do.

    Attributes:
        tokenizer: Encodes what is given.
        condition: Word ids (B, T) or `None`.
        seeds: LongTensor (B,).
        given: Frames (1, G, 3, S, S) that the clip begins with, or `None`.
        overlap: Frames of codes that are looked back to.
        options: Further arguments of `generate`.
    """

    tokenizer: VideoTokenizer
    condition: Tensor | None
    seeds: Tensor
    given: Tensor | None
    overlap: int
    options: dict[str, Any]

    @property
    def begun(self) -> int:
        """Frames of codes of the given frames that the generator sees."""
        if self.given is None:
            return 0
        whole = 1 + (self.given.shape[1] - 1) // self.tokenizer.stride[0]
        return min(self.overlap, whole)

    def start(self) -> Tensor | None:
        """Codes (B, c P) of the end of the given frames."""
        if self.given is None:
            return None
        seen = self.given[:, -self.tokenizer.frames_of(self.begun) :]
        return self.tokenizer.encode(seen).expand(len(self.seeds), -1)
