"""The codes of a patch by guessing: all steps of a window in one forward, again until what was guessed is what is drawn.

Noise is a function of (seed, position, id), so what sampling draws is a function of the logits: a step is final when the steps
before it are, and the codes are those of one step a forward (Jacobi iteration, as in `tokenloom.generators.parallel`). Knows
the patch decoder; knows nothing of the transformer over patches.

Legend: b samples, B rows (2 b with guidance), G frames, K codebooks, S steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.parallel.options import Parallel, ParallelStats
from tokenloom.generators.patches import PatchDecoder

_DRAFTS = ("neighbor", "repeat")


class GuessedPatches:
    """Writes one patch after the other; the patch before is the first guess.

    Args:
        decoder: The patch decoder.
        batch: Samples b.
        options: The draft is "neighbor" (the codes of the patch before) or "repeat" (a draw from its logits), the acceptance
            "coupled".

    Raises:
        TokenloomError: For other options.
    """

    def __init__(self, decoder: PatchDecoder, batch: int, options: Parallel) -> None:
        if options.accept != "coupled" or options.draft not in _DRAFTS:
            raise TokenloomError(
                f"Inside a patch, parallel decoding accepts 'coupled' and drafts {' or '.join(map(repr, _DRAFTS))}; got "
                f"{options.accept!r} and {options.draft!r}."
            )
        self.decoder, self.options, self.stats = decoder, options, options.stats or ParallelStats()
        places = [positions for positions, _ in decoder.steps]
        self.positions = torch.cat(places)  # layout indices, step by step
        self.step = torch.arange(len(places)).repeat_interleave(torch.tensor([len(part) for part in places]))
        self.guess = torch.zeros(batch, len(self.positions), dtype=torch.long)  # codes, step by step
        self.logits: Tensor | None = None  # (B, G K, V) of the patch before, step by step

    def __call__(
        self, tables: nn.ModuleList, vectors: Tensor, draw: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Codes (b, G, K) of vectors (B, D); arguments as for `PatchDecoder.generate`."""
        decoder, steps, device = self.decoder, len(self.decoder.steps), vectors.device
        positions, step, codes = self.positions.to(device), self.step.to(device), self.guess.to(device)
        if self.logits is not None and self.options.draft == "repeat":
            codes = draw(self.logits, positions)
        seen: list[Tensor] = []  # logits of final steps
        done = 0
        while done < steps:
            stop = min(steps, done + self.options.window)
            fed = self._placed(codes).repeat(len(vectors) // len(codes), 1, 1)
            hidden = decoder.hidden(tables, vectors, fed, stop)
            logits = [decoder.step_logits(hidden[:, index], index) for index in range(done, stop)]
            window = (step >= done) & (step < stop)
            drawn = draw(torch.cat(logits, dim=1), positions[window])
            wrong = (drawn != codes[:, window]).any(0)
            first = (
                int(step[window][wrong].min()) if bool(wrong.any()) else stop
            )  # final for every sample before it
            gain = min(first + 1, stop) - done
            self.stats.add([gain], [stop - done], [first - done])
            codes = codes.masked_scatter(window, drawn)
            seen += logits[:gain]
            done += gain
        self.guess, self.logits = codes, torch.cat(seen, dim=1)
        return self._placed(codes)

    def _placed(self, codes: Tensor) -> Tensor:
        """Codes (b, G, K) of codes (b, G K) step by step."""
        placed = torch.empty_like(codes)
        placed[:, self.positions] = codes
        frames, books = (int(side) for side in self.decoder.order.layout.shape)  # type: ignore[arg-type]
        return placed.view(-1, frames, books)
