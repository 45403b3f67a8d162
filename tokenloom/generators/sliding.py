"""Clips longer than a generator: window after window over the frames, each begun with the last frames of the one before.

Memory does not grow with the clip: one window of codes is held. Knows codes and layouts. Knows no pixels.

Legend: B samples, T frames of codes of a window, P = h w positions of a frame, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.arguments import check_batch, check_codes
from tokenloom.generators.base import Generator
from tokenloom.generators.conditions import Given
from tokenloom.rng import as_seeds

_NEXT_WINDOW = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that all windows of a sample have noise of their own


def slide(
    generator: Generator,
    condition: Given | None = None,
    *,
    frames: int | None = None,
    overlap: int | None = None,
    start: Tensor | None = None,
    renew: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    seeds: int | list[int] | Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Generates a clip of any length, frame of codes by frame of codes.

    The first window is what `generator.generate` gives, so that a clip of no more than T frames is the same. Every further
    window keeps the last `overlap` frames as its first ones. A window is generated when its first new frame is asked for.

    Args:
        generator: A generator over `Layout.clip(T, h, w)`.
        condition: Batch of conditions, the same for all windows.
        frames: Frames to give, those of `start` among them; `None` = without end.
        overlap: Frames that two windows share, 1 to T - 1; `None` = half of T, at least 1.
        start: LongTensor (B, n P), frames of codes that the clip begins with; of more than `overlap` frames the last decide.
        renew: Turns the last `overlap` frames (B, overlap P) into those that the next window begins with; `None` = as they
            are. Where a tokenizer treats the first frame of a clip as a picture, decoding and encoding them anew is closer
            to what a generator has seen in training.
        batch_size: Number of samples where there is neither a condition nor a start.
        seeds: One seed a sample, as in `generate`; each window has noise of its own.
        options: Further arguments of `generate`: guidance, sampling, on_step, decode.

    Yields:
        LongTensor (B, P): the codes of the next frame.

    Raises:
        TokenloomError: For a layout without frames, or arguments that do not fit it; before anything is generated.
    """
    length, positions = _frames_of(generator)
    if start is not None and isinstance(start, Tensor) and start.ndim == 2:
        batch_size = start.shape[0] if condition is None else batch_size
    batch = check_batch(generator.condition, condition, batch_size, generator.device)[1]
    shared = _check_overlap(overlap, length)
    limit = _check_frames(frames)
    begun = _check_start(start, generator, batch, positions)
    noise_seeds = as_seeds(seeds, batch, generator.device)

    def windows() -> Iterator[Tensor]:
        given = 0
        known = begun
        if begun is not None:
            for frame in begun.split(positions, dim=1):
                if given == limit:
                    return
                yield frame
                given += 1
            if begun.shape[1] >= length * positions:  # too much for one window: only the end counts
                known = begun[:, -shared * positions :]
        noise = noise_seeds
        while given != limit:
            first = 0 if known is None else known.shape[1]
            codes = generator.generate(
                condition,
                batch_size=batch,
                seeds=noise,
                **_kept(generator, known, batch),
                **options,
            )
            for frame in codes[:, first:].split(positions, dim=1):
                if given == limit:
                    return
                yield frame
                given += 1
            known = codes[:, -shared * positions :].clone()
            if renew is not None:
                known = _check_renewed(renew(known), known)
            noise = noise + _NEXT_WINDOW  # modulo 2**64

    return windows()


def _frames_of(generator: Generator) -> tuple[int, int]:
    """Frames T of a window and positions P of a frame."""
    layout = generator.order.layout
    if layout.kind != "clip":
        raise TokenloomError(
            f"Only a generator over a clip has frames to slide over, this one is over {layout}. Use Layout.clip(t, h, w)."
        )
    length = int(layout.shape[0])  # type: ignore[arg-type]
    if length < 2:
        raise TokenloomError(f"Sliding needs at least 2 frames of codes a window, got {layout}.")
    return length, layout.size // length


def _check_overlap(overlap: int | None, length: int) -> int:
    if overlap is None:
        return length // 2
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 1 <= overlap < length:
        raise TokenloomError(
            f"overlap must lie in 1..{length - 1}, less than the {length} frames of a window; got {overlap!r}."
        )
    return overlap


def _check_frames(frames: int | None) -> int | None:
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
        raise TokenloomError(f"frames must be a whole number of at least 1, or None; got {frames!r}.")
    return frames


def _check_start(start: Tensor | None, generator: Generator, batch: int, positions: int) -> Tensor | None:
    if start is None:
        return None
    given = start.shape[1] if isinstance(start, Tensor) and start.ndim == 2 else 0
    size = max(1, given // positions) * positions
    check_codes(start, size, (-generator.special, generator.vocab_size), "start")
    if start.shape[0] not in (1, batch):
        raise TokenloomError(f"start must hold frames of codes of {batch} samples, got {tuple(start.shape)}.")
    return start.to(generator.device).expand(batch, -1)


def _kept(generator: Generator, known: Tensor | None, batch: int) -> dict[str, Any]:
    """`known` and `keep` of a window that begins with the frames of `known`."""
    if known is None:
        return {}
    size = generator.order.layout.size
    codes = torch.zeros(batch, size, dtype=torch.long, device=known.device)
    codes[:, : known.shape[1]] = known
    return {"known": codes, "keep": torch.arange(size, device=known.device) < known.shape[1]}


def _check_renewed(renewed: Tensor, known: Tensor) -> Tensor:
    if not isinstance(renewed, Tensor) or renewed.shape != known.shape or renewed.dtype != torch.long:
        raise TokenloomError(f"renew must return int64 codes {tuple(known.shape)}, as it was given.")
    return renewed
