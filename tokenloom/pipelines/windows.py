"""A generator of T frames made to write any number: its window slides on, and looks back at its own last frames.

Knows codes and what `on_step` reports. Knows nothing of networks or sound.

Shapes: B sounds, K codebooks, T frames of a window, N = T K positions.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Generate = Callable[[Tensor, Tensor, int, Callable[[Any], None]], None]
"""(known codes (B, N), where to keep them (N,), number of the window, `on_step`) -> nothing; codes come through `on_step`."""


class _Enough(Exception):
    """Ends a generation whose further frames nobody needs."""


def sliding_frames(
    generate: Generate, context: Tensor, frames: int, back: int, needed: int, *, live: bool = False
) -> Iterator[Tensor]:
    """New frames behind a context.

    Args:
        generate: Runs one window.
        context: LongTensor (B, K, c) of the frames before, 1 <= c < T.
        frames: Frames of a window T.
        back: Frames that the next window looks back to, less than T.
        needed: Frames that are wanted.
        live: Whether to yield frames while a window is still running (in a thread of its own), or window by window.

    Yields:
        LongTensor (B, K, n), in all `needed` frames.
    """
    number, seen = 0, context
    while needed > 0:
        seen = seen[:, :, -back:]
        wanted = min(needed, frames - seen.shape[2])
        run = _live if live else _whole
        for piece in run(generate, seen, frames, wanted, number):
            seen = torch.cat([seen, piece.to(seen.device)], dim=2)
            needed -= piece.shape[2]
            yield piece
        number += 1


def _window(
    generate: Generate, seen: Tensor, frames: int, wanted: int, number: int, give: Callable[[Tensor], None]
) -> None:
    """Runs one window; new frames (B, K, n) go to `give` as soon as all their codes are there."""
    batch, books, start = seen.shape
    known = torch.zeros(batch, frames, books, dtype=torch.long)
    known[:, :start] = seen.transpose(1, 2).cpu()
    keep = torch.zeros(frames, books, dtype=torch.bool)
    keep[:start] = True
    done = start

    def on_step(step: Any) -> None:
        nonlocal done
        ready = step.committed.view(frames, books).all(1).cpu()
        whole = min(start + wanted, int(ready.long().cumprod(0).sum()))
        if whole > done:
            codes = step.codes.view(batch, frames, books)[:, done:whole]
            done = whole
            give(codes.transpose(1, 2).clone())
        if done == start + wanted:
            raise _Enough

    with contextlib.suppress(_Enough):
        generate(known.flatten(1), keep.flatten(), number, on_step)


def _whole(generate: Generate, seen: Tensor, frames: int, wanted: int, number: int) -> Iterator[Tensor]:
    pieces: list[Tensor] = []
    _window(generate, seen, frames, wanted, number, pieces.append)
    yield torch.cat(pieces, dim=2)


def _live(generate: Generate, seen: Tensor, frames: int, wanted: int, number: int) -> Iterator[Tensor]:
    """The same from a thread, which stops when nobody asks any more; its errors are raised here."""
    pieces: queue.Queue[Tensor | BaseException | None] = queue.Queue()
    closed = threading.Event()

    def give(piece: Tensor) -> None:
        if closed.is_set():
            raise _Enough
        pieces.put(piece)

    def work() -> None:
        try:
            _window(generate, seen, frames, wanted, number, give)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=work, name="tokenloom-window", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        thread.join()
