"""Sound that goes on: a codec and a generator of its frames behind one call.

The prompt is kept sample by sample; what follows is decoded from new codes. A generator sees a window of T frames, which
slides on, so that networks need the same memory however long the sound becomes. Every random number of sound i comes from
seed i alone. Knows how to call the two components. Knows nothing of orders or networks.

Shapes: B sounds, S samples, K codebooks, T frames of a window.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.base import Generator
from tokenloom.generators.sampling import Sampling
from tokenloom.generators.two_level import TwoLevelGenerator
from tokenloom.media_audio import load_audio, resample, sound_rate, to_mono
from tokenloom.pipelines import inputs
from tokenloom.pipelines.base import Pipeline
from tokenloom.pipelines.joining import Joint, level
from tokenloom.pipelines.windows import sliding_frames
from tokenloom.tokenizers.audio import AudioStream, AudioTokenizer

logger = logging.getLogger(__name__)

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "nucleus")
_OUTPUT_TYPES = ("pt", "np")
_WARM_FRAMES = 50  # heard before the part of a long prompt that the generator sees
_QUIET = 1e-4  # root mean square below which a prompt counts as silence

_GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio: keeps the seeds of windows apart

Audio = Tensor | np.ndarray | str | os.PathLike[str]


@dataclass
class AudioContinuationOutput(BaseOutput):
    """What `AudioContinuationPipeline` returns.

    Attributes:
        audios: Prompt and continuation, float32 (B, 1, S) in [-1, 1], a tensor or an array.
        codes: LongTensor (B, K, F): the codes of what the generator saw of the prompt, then those of the continuation.
        prompt_frames: How many of the F frames are the prompt's.
        prompt_samples: Where in `audios` the continuation begins.
        sampling_rate: Samples a second, that of the codec.
        seeds: The seed of every sound; passing it again gives the same sound.
    """

    audios: Tensor | np.ndarray
    codes: Tensor
    prompt_frames: int
    prompt_samples: int
    sampling_rate: int
    seeds: list[int]


class AudioContinuationPipeline(Pipeline):
    """Continues sound.

    Args:
        tokenizer: The codec: samples to codes and back, piece by piece.
        generator: Predicts codes of `Layout.frames(T, K)`: a `Generator` or a `TwoLevelGenerator` without a condition.
        sampling: Preset used where a call says nothing: any of "temperature", "top_k", "top_p", "nucleus". Stored in
            model_index.json.

    Raises:
        TokenloomError: The codec and the generator do not fit together, or the preset has an unknown key.

    Example:
        >>> pipe = AudioContinuationPipeline.from_pretrained("runs/chorales/model")  # doctest: +SKIP
        >>> result = pipe("prompt.wav", seconds=8, seed=3)  # doctest: +SKIP
    """

    model_cpu_offload_seq = "generator->tokenizer"  # type: ignore[assignment]
    tokenizer: AudioTokenizer
    generator: Generator | TwoLevelGenerator

    def __init__(
        self,
        tokenizer: AudioTokenizer,
        generator: Generator | TwoLevelGenerator,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        preset = dict(sampling or {})
        for key in preset:
            if key not in _SAMPLING_KEYS:
                raise unknown_name("sampling setting", key, _SAMPLING_KEYS)
        layout = generator.order.layout
        books = int(layout.shape[1]) if layout.kind == "frames" else 0  # type: ignore[arg-type]
        if not 1 <= books <= tokenizer.num_codebooks or tokenizer.vocab_size != generator.vocab_size:
            raise TokenloomError(
                f"The codec makes frames of {tokenizer.num_codebooks} codebooks of {tokenizer.vocab_size} codes, but the "
                f"generator was built for {layout} of {generator.vocab_size}. Use components that were trained together."
            )
        if generator.condition.length and generator.condition.null(1, generator.device) is not None:
            raise TokenloomError("The generator needs a condition of kind 'none'; train it on sound alone.")
        self.register_modules(tokenizer=tokenizer, generator=generator)
        self.register_to_config(sampling=preset)

    @property
    def window(self) -> tuple[int, int]:
        """Frames T and codebooks K of the generator."""
        frames, books = (int(side) for side in self.generator.order.layout.shape)  # type: ignore[arg-type]
        return frames, books

    @torch.no_grad()
    def __call__(
        self,
        audio: Audio,
        sampling_rate: int | None = None,
        *,
        seconds: float = 4.0,
        overlap: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_continuations: int = 1,
        stream: bool = False,
        output_type: str = "pt",
    ) -> Any:
        """Continues sound.

        Args:
            audio: The prompt: a sound file, or samples (S,), (C, S) or (B, C, S) as for `to_mono`; at least one frame of the
                codec. The generator sees its end.
            sampling_rate: Its rate in Hz; needed for samples, known of a file.
            seconds: Length of the continuation.
            overlap: Seconds that the generator looks back to when its window slides on, and sees of the prompt; default
                half a window. More costs more time.
            temperature: 0 takes the likeliest code everywhere. Default: the preset.
            top_k: Only the k likeliest codes; 0 for all. Default: the preset.
            top_p: Only the likeliest codes of this total probability; 1 for all. Default: the preset.
            seed: An int s gives s, s+1, ... to the sounds; a list has one for each. Default: fresh entropy.
            generator: `torch.Generator`, one or one a sound, from which seeds are drawn (see `inputs.make_seeds`).
            num_continuations: Continuations of each prompt; those of one prompt follow one another.
            stream: Return an iterator of chunks instead: the continuation alone, float32 (B, 1, n), each as soon as its
                frames are there. In a row they are what `audios` holds behind the prompt, up to rounding of kernels.
            output_type: "pt" or "np".

        Returns:
            `AudioContinuationOutput`, or with `stream` the iterator.

        Raises:
            TokenloomError: For any argument that is not as described.
        """
        inputs.check_choice("output_type", output_type, _OUTPUT_TYPES)
        count = inputs.check_count("num_continuations", num_continuations)
        samples = self._samples(seconds)
        back = self._overlap(overlap)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        changes = {key: value for key, value in given.items() if value is not None}
        rule = Sampling(**{**self.config["sampling"], **changes})
        prompt = self._prompt(audio, sampling_rate).repeat_interleave(count, dim=0)
        seeds = inputs.make_seeds(seed, generator, len(prompt))
        job = _Job(prompt, samples, back, rule, seeds)
        if stream:
            return (_as(output_type, piece) for _, piece in self._pieces(job, live=True))
        context = self._context(job)
        parts = list(self._pieces(job, context=context))
        codes = torch.cat([context, *(codes for codes, _ in parts)], dim=2)
        audios = torch.cat([prompt, *(piece for _, piece in parts)], dim=2)
        self.maybe_free_model_hooks()
        return AudioContinuationOutput(
            audios=_as(output_type, audios),
            codes=codes,
            prompt_frames=context.shape[2],
            prompt_samples=prompt.shape[2],
            sampling_rate=self.tokenizer.sample_rate,
            seeds=inputs.seeds_as_ints(seeds),
        )

    def _samples(self, seconds: object) -> int:
        rate = self.tokenizer.sample_rate
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or not 1 / rate <= seconds < float("inf"):  # type: ignore[operator]
            raise TokenloomError(f"Expected a positive number of seconds, got {seconds!r}.")
        return max(1, round(seconds * rate))  # type: ignore[operator]

    def _overlap(self, overlap: float | None) -> int:
        """Frames that are looked back to."""
        frames, rate = self.window[0], self.tokenizer.frame_rate
        number = isinstance(overlap, (int, float)) and abs(overlap) < frames  # seconds; not NaN
        back = frames // 2 if overlap is None else round(overlap * rate) if number else 0
        if not 1 <= back < frames:
            raise TokenloomError(
                f"overlap must lie between {1 / rate:.3f} s and less than the {frames / rate:.3f} s of a window, got "
                f"{overlap!r}."
            )
        return back

    def _prompt(self, audio: Audio, sampling_rate: int | None) -> Tensor:
        """Samples (B, 1, S) of the prompt at the rate of the codec, within [-1, 1]."""
        rate, hop = self.tokenizer.sample_rate, self.tokenizer.hop_length
        if isinstance(audio, (str, os.PathLike)):
            path = Path(audio)
            actual = sound_rate(path)
            if sampling_rate is not None and sampling_rate != actual:
                raise TokenloomError(
                    f"{str(path)!r} has {actual} samples a second, not sampling_rate={sampling_rate}. Leave it out."
                )
            prompt = to_mono(load_audio(path, rate)[0])
        elif isinstance(audio, (Tensor, np.ndarray)):
            prompt = resample(to_mono(audio), sampling_rate, rate)
        else:
            raise TokenloomError(
                f"Expected audio to be a sound file, a tensor or an array, got {type(audio).__name__}."
            )
        if prompt.shape[2] < hop:
            raise TokenloomError(
                f"The prompt has {1000 * prompt.shape[2] / rate:.1f} ms; this codec needs at least one frame, "
                f"{1000 * hop / rate:.1f} ms. Give a longer prompt."
            )
        peak = float(prompt.abs().amax())
        if peak > 1:
            logger.warning("The prompt reaches %.3g and is turned down to fit [-1, 1].", peak)
            prompt = prompt / peak
        if float(prompt.square().mean().sqrt()) < _QUIET:
            logger.warning("The prompt is silent; what follows may be anything.")
        return prompt.cpu()

    def _context(self, job: _Job) -> Tensor:
        """Codes (B, K, c) of the last whole frames of the prompt, at most the overlap."""
        hop, device = self.tokenizer.hop_length, self._execution_device
        frames = job.prompt.shape[2] // hop
        first = max(0, frames - job.back - _WARM_FRAMES)
        heard = job.prompt[:, :, first * hop : frames * hop] * job.gain
        codes = self.awake(self.tokenizer).encode(heard.to(device), num_codebooks=self.window[1])
        return codes[:, :, -job.back :]

    def _pieces(
        self, job: _Job, *, context: Tensor | None = None, live: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(codes (B, K, n), samples (B, 1, s)) of the continuation, one after the other."""
        context = self._context(job) if context is None else context
        rest = job.prompt.shape[2] % self.tokenizer.hop_length
        needed = self.tokenizer.num_frames(rest + job.samples)
        decoder = AudioStream(self.awake(self.tokenizer))
        with torch.no_grad():
            heard = decoder.decode(context.to(self._execution_device)).float().cpu() / job.gain
        joint = Joint(job.prompt, heard, rest, job.samples, self.tokenizer.sample_rate)
        with self.progress_bar(total=needed) as bar:
            for codes in self._frames(job, context, needed, live):
                with torch.no_grad():
                    sound = decoder.decode(codes).float().cpu() / job.gain
                bar.update(codes.shape[2])
                yield codes, joint.add(sound)

    def _frames(self, job: _Job, context: Tensor, needed: int, live: bool) -> Iterator[Tensor]:
        device = self._execution_device

        def generate(known: Tensor, keep: Tensor, number: int, on_step: Callable[[Any], None]) -> None:
            seeds = job.seeds + torch.tensor(number) * _GOLDEN  # wraps around
            self.awake(self.generator).generate(
                batch_size=len(known),
                sampling=job.rule,
                seeds=seeds.to(device),
                known=known.to(device),
                keep=keep.to(device),
                on_step=on_step,
            )

        return sliding_frames(generate, context, self.window[0], job.back, needed, live=live)


class _Job:
    """What one call has to do: prompt (B, 1, S), new samples, frames to look back to, sampling and seeds."""

    def __init__(self, prompt: Tensor, samples: int, back: int, rule: Sampling, seeds: Tensor) -> None:
        self.prompt, self.samples, self.back = prompt, samples, back
        self.rule, self.seeds, self.gain = rule, seeds, level(prompt)


def _as(output_type: str, audio: Tensor) -> Tensor | np.ndarray:
    return audio.numpy() if output_type == "np" else audio
