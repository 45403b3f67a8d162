"""What a continuation is told of its prompt: its end, how long it is, and how loud; and a file that goes on in a file.

However long the prompt is, no more than its end is resampled for the codec, and a file is read and written piece by piece.
Knows sound files and samples. Knows no networks.

Shapes: B sounds, S samples, E samples of the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.media_audio import (
    AudioWriter,
    audio_blocks,
    audio_end,
    load_audio,
    resample,
    resample_end,
    sound_rate,
    to_mono,
)
from tokenloom.pipelines.inputs import make_seeds, seeds_as_ints

logger = logging.getLogger(__name__)

_QUIET = 1e-4  # root mean square below which a prompt counts as silence
_SHOWN_SECONDS = 30.0  # of prompt and of continuation, in figures

Audio = Tensor | np.ndarray | str | os.PathLike[str]


@dataclass(frozen=True)
class AudioPrompt:
    """A prompt at the rate of the codec.

    Attributes:
        end: Its last samples, float32 (B, 1, E) in [-1, 1].
        samples: Samples of the whole prompt S.
        scale: (B, 1, 1); a prompt that reaches beyond 1 is divided by it.
        source: Where the whole prompt comes from: a file, or samples (B, 1, S') at `source_rate`.
        source_rate: Samples a second of the source.
        rate: Samples a second of the codec.
    """

    end: Tensor
    samples: int
    scale: Tensor
    source: Path | Tensor
    source_rate: int
    rate: int

    def whole(self) -> Tensor:
        """The whole prompt, float32 (B, 1, S) in [-1, 1]."""
        if isinstance(self.source, Tensor):
            return _fit(resample(self.source, self.source_rate, self.rate), self.scale)
        return _fit(to_mono(load_audio(self.source, self.rate)[0]), self.scale)

    def blocks(self) -> Iterator[Tensor]:
        """The whole prompt in pieces (B, 1, n); a file is read as they are asked for."""
        if isinstance(self.source, Tensor):
            yield self.whole()
        else:
            for block in audio_blocks(self.source, self.rate):
                yield _fit(block[None], self.scale)


def open_prompt(
    audio: Audio | AudioPrompt, sampling_rate: int | None, rate: int, hop: int, count: int
) -> AudioPrompt:
    """Reads the end of a prompt.

    Args:
        audio: A sound file, or samples as for `to_mono`.
        sampling_rate: Its rate in Hz; needed for samples, known of a file.
        rate: Samples a second of the codec.
        hop: Samples a frame of the codec, the least that a prompt must have.
        count: Samples of the end that are wanted.

    Raises:
        TokenloomError: If it is no sound, too short, or its rate is missing or wrong.
    """
    if isinstance(audio, AudioPrompt):
        return audio
    source: Path | Tensor
    if isinstance(audio, (str, os.PathLike)):
        source, actual = Path(audio), sound_rate(audio)
        if sampling_rate is not None and sampling_rate != actual:
            raise TokenloomError(
                f"{str(source)!r} has {actual} samples a second, not sampling_rate={sampling_rate}. Leave it out."
            )
        end = audio_end(source, rate, count)
    elif isinstance(audio, (Tensor, np.ndarray)):
        source = to_mono(audio).cpu()
        end = resample_end(source, sampling_rate, rate, count)
        actual = int(sampling_rate or rate)
    else:
        raise TokenloomError(
            f"Expected audio to be a sound file, a tensor or an array, got {type(audio).__name__}."
        )
    if end.total < hop:
        raise TokenloomError(
            f"The prompt has {1000 * end.total / rate:.1f} ms; this codec needs at least one frame, "
            f"{1000 * hop / rate:.1f} ms. Give a longer prompt."
        )
    scale = end.peak.clamp(min=1).view(-1, 1, 1)
    if bool((scale > 1).any()):
        logger.warning("The prompt reaches %.3g and is turned down to fit [-1, 1].", float(end.peak.amax()))
    samples = _fit(to_mono(end.samples), scale) if isinstance(source, Path) else _fit(end.samples, scale)
    if float(samples.square().mean(2).sqrt().amin()) < _QUIET:
        logger.warning("The prompt is silent at its end; what follows may be anything.")
    return AudioPrompt(samples, end.total, scale, source, actual, rate)


def _fit(audio: Tensor, scale: Tensor) -> Tensor:
    """Samples within [-1, 1]; the filter that resamples may reach a little beyond."""
    return (audio / scale).clamp(-1, 1)


@dataclass(frozen=True)
class ContinuedFile:
    """What `continue_file` has written.

    Attributes:
        path: The file.
        samples: Samples of prompt and continuation.
        prompt_samples: Where the continuation begins.
        sampling_rate: Samples a second.
        seed: Gives the same continuation again.
        shown: The end of the prompt and the beginning of the continuation, (s,), at most 30 s of each.
        shown_from: Where the continuation begins in `shown`.
    """

    path: Path
    samples: int
    prompt_samples: int
    sampling_rate: int
    seed: int
    shown: Tensor
    shown_from: int


def continue_file(
    pipe: Any,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    seed: int | None = None,
    **options: Any,
) -> ContinuedFile:
    """Continues a sound file in another one, piece by piece: two hours need no more memory than a minute.

    Args:
        pipe: An `AudioContinuationPipeline`.
        source: The prompt.
        output: The file to write, as for `save_audio`; it appears when it is whole.
        seed: As for the pipeline.
        **options: Further arguments of the pipeline.

    Raises:
        TokenloomError: For any argument that is not as described; nothing is written then.
    """
    rate = pipe.tokenizer.sample_rate
    seeds = seeds_as_ints(make_seeds(seed, None, 1))
    prompt = pipe.read_prompt(source, overlap=options.get("overlap"))
    pieces = pipe(prompt, seed=seeds, stream="windows", **options)
    most = round(_SHOWN_SECONDS * rate)
    before, after = torch.zeros(0), torch.zeros(0)
    with AudioWriter(output, rate) as file:
        for block in prompt.blocks():
            file.write(block[0, 0])
            before = torch.cat([before, block[0, 0]])[-most:]
        for piece in pieces:
            file.write(piece[0, 0])
            after = torch.cat([after, piece[0, 0, : most - len(after)]])
    return ContinuedFile(
        file.path, file.written, prompt.samples, rate, seeds[0], torch.cat([before, after]), len(before)
    )
