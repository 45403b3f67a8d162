"""Sound that goes on: a codec and a generator of its frames behind one call.

The prompt is kept sample by sample; what follows is decoded from new codes. A generator sees a window of T frames, which
slides on, so that networks need the same memory however long the sound becomes. Every random number of sound i comes from
seed i alone. Knows how to call the two components. Knows nothing of orders or networks.

Shapes: B sounds, S samples, K codebooks, T frames of a window.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.base import Generator
from tokenloom.generators.conditions import ClassCondition, NoCondition, WordCondition
from tokenloom.generators.parallel.options import Parallel
from tokenloom.generators.sampling import Guidance, Sampling
from tokenloom.generators.two_level import TwoLevelGenerator
from tokenloom.pipelines import inputs
from tokenloom.pipelines.audio_prompt import Audio, AudioPrompt, open_prompt
from tokenloom.pipelines.base import Pipeline
from tokenloom.pipelines.joining import Joint, level
from tokenloom.pipelines.preset import check_preset, merge_settings, read_prompts
from tokenloom.pipelines.windows import sliding_frames
from tokenloom.tokenizers.audio import AudioStream, AudioTokenizer
from tokenloom.tokenizers.text import WordTokenizer

logger = logging.getLogger(__name__)

_OUTPUT_TYPES = ("pt", "np")
_WARM_FRAMES = 50  # heard before the part of a long prompt that the generator sees

_GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio: keeps the seeds of windows apart


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
        generator: Predicts codes of `Layout.frames(T, K)`: a `Generator` or a `TwoLevelGenerator`, without a condition, from
            words or from a class.
        sampling: Preset used where a call says nothing, as for `TextToImagePipeline`. Stored in model_index.json.
        text_tokenizer: Words to word ids; `None` for a generator without words.

    Raises:
        TokenloomError: The codec and the generator do not fit together, or the preset has an unknown key.

    Example:
        >>> pipe = AudioContinuationPipeline.from_pretrained("runs/chorales/model")  # doctest: +SKIP
        >>> result = pipe("prompt.wav", seconds=8, seed=3)  # doctest: +SKIP
    """

    model_cpu_offload_seq = "generator->tokenizer"  # type: ignore[assignment]
    _optional_components = ["text_tokenizer"]  # noqa: RUF012
    tokenizer: AudioTokenizer
    generator: Generator | TwoLevelGenerator
    text_tokenizer: WordTokenizer | None

    def __init__(
        self,
        tokenizer: AudioTokenizer,
        generator: Generator | TwoLevelGenerator,
        sampling: dict[str, Any] | None = None,
        text_tokenizer: WordTokenizer | None = None,
    ) -> None:
        super().__init__()
        preset = check_preset(sampling)
        layout = generator.order.layout
        books = int(layout.shape[1]) if layout.kind == "frames" else 0  # type: ignore[arg-type]
        if not 1 <= books <= tokenizer.num_codebooks or tokenizer.vocab_size != generator.vocab_size:
            raise TokenloomError(
                f"The codec makes frames of {tokenizer.num_codebooks} codebooks of {tokenizer.vocab_size} codes, but the "
                f"generator was built for {layout} of {generator.vocab_size}. Use components that were trained together."
            )
        if not isinstance(generator.condition, (NoCondition, WordCondition, ClassCondition)):
            raise TokenloomError(
                "The generator needs a condition of kind 'none', 'words' or 'class', got "
                f"{type(generator.condition).__name__}."
            )
        if isinstance(generator.condition, WordCondition) != (text_tokenizer is not None):
            raise TokenloomError(
                "A generator with words needs a text_tokenizer, and one without words must have none; got "
                f"{'no ' if text_tokenizer is None else 'a '}text_tokenizer."
            )
        self.register_modules(tokenizer=tokenizer, generator=generator, text_tokenizer=text_tokenizer)
        self.register_to_config(sampling=preset)

    @property
    def window(self) -> tuple[int, int]:
        """Frames T and codebooks K of the generator."""
        frames, books = (int(side) for side in self.generator.order.layout.shape)  # type: ignore[arg-type]
        return frames, books

    @torch.no_grad()
    def __call__(
        self,
        audio: Audio | AudioPrompt,
        sampling_rate: int | None = None,
        *,
        prompt: str | list[str] | None = None,
        label: int | Sequence[int] | None = None,
        seconds: float = 4.0,
        overlap: float | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_continuations: int = 1,
        stream: bool | str = False,
        output_type: str = "pt",
        decode: str | Parallel = "auto",
    ) -> Any:
        """Continues sound.

        Args:
            audio: The prompt: a sound file, or samples (S,), (C, S) or (B, C, S) as for `to_mono`; at least one frame of the
                codec. The generator sees its end.
            sampling_rate: Its rate in Hz; needed for samples, known of a file.
            prompt: Words for a model that reads words: one for all sounds, or one a sound. `None` lets it go on as it likes.
            label: Class for a model with classes, likewise.
            seconds: Length of the continuation.
            overlap: Seconds that the generator looks back to when its window slides on, and sees of the prompt; default
                half a window. More costs more time.
            guidance_scale: g in `u + g * (c - u)` for words and classes; 1 switches guidance off. Default: the preset.
            temperature: 0 takes the likeliest code everywhere. Default: the preset.
            top_k: Only the k likeliest codes; 0 for all. Default: the preset.
            top_p: Only the likeliest codes of this total probability; 1 for all. Default: the preset.
            seed: An int s gives s, s+1, ... to the sounds; a list has one for each. Default: fresh entropy.
            generator: `torch.Generator`, one or one a sound, from which seeds are drawn (see `inputs.make_seeds`).
            num_continuations: Continuations of each prompt; those of one prompt follow one another.
            stream: Return an iterator of chunks instead: the continuation alone, float32 (B, 1, n), each as soon as its
                frames are there. In a row they are what `audios` holds behind the prompt, up to rounding of kernels. With
                "windows" a chunk is what a whole window adds, which costs less in all. Memory does not grow with the length
                of prompt or continuation.
            output_type: "pt" or "np".
            decode: How codes are made: "auto", "cached", or "compiled", which is several times as fast on a processor and
                takes some seconds once a machine; a generator that is not two-level has all rungs of `Generator`. All give
                the same codes, up to rounding.

        Returns:
            `AudioContinuationOutput`, or with `stream` the iterator.

        Raises:
            TokenloomError: For any argument that is not as described.
        """
        inputs.check_choice("output_type", output_type, _OUTPUT_TYPES)
        if not isinstance(stream, bool):
            inputs.check_choice("stream", stream, ("windows",))
        count = inputs.check_count("num_continuations", num_continuations)
        samples = self._samples(seconds)
        back = self._overlap(overlap)
        guidance, rule = merge_settings(
            self.config["sampling"], guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        given = self.read_prompt(audio, sampling_rate, overlap=overlap)
        condition = self._condition(prompt, label, len(given.end))
        if condition is None:
            guidance = Guidance()
        else:
            condition = condition.repeat_interleave(count, dim=0)
        end = given.end.repeat_interleave(count, dim=0)
        seeds = inputs.make_seeds(seed, generator, len(end))
        job = _Job(end, given.samples, samples, back, rule, seeds, guidance, condition, decode)
        if stream:
            return (_as(output_type, piece) for _, piece in self._pieces(job, live=stream != "windows"))
        context = self._context(job)
        parts = list(self._pieces(job, context=context))
        codes = torch.cat([context, *(codes for codes, _ in parts)], dim=2)
        whole = given.whole().repeat_interleave(count, dim=0)
        audios = torch.cat([whole, *(piece for _, piece in parts)], dim=2)
        self.maybe_free_model_hooks()
        return AudioContinuationOutput(
            audios=_as(output_type, audios),
            codes=codes,
            prompt_frames=context.shape[2],
            prompt_samples=given.samples,
            sampling_rate=self.tokenizer.sample_rate,
            seeds=inputs.seeds_as_ints(seeds),
        )

    def _condition(
        self, prompt: str | list[str] | None, label: int | Sequence[int] | None, sounds: int
    ) -> Tensor | None:
        """Word ids (B, P) or classes (B,), `None` where the model goes on as it likes."""
        condition = self.generator.condition
        if label is not None and not isinstance(condition, ClassCondition):
            raise TokenloomError("This model was trained without classes; leave the label out.")
        if prompt is not None:
            if self.text_tokenizer is None:
                raise TokenloomError("This model was trained without words; leave the prompt out.")
            given = read_prompts(self.text_tokenizer, inputs.check_prompts(prompt), logger, "continuation")
        elif label is not None:
            given = torch.as_tensor([label] if isinstance(label, int) else label)
            condition.check(given)
        else:
            return None
        if len(given) not in (1, sounds):
            raise TokenloomError(
                f"Expected one prompt for all {sounds} sounds or one each, got {len(given)}."
            )
        return given.expand(sounds, *given.shape[1:]).to(self._execution_device)

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

    def read_prompt(
        self, audio: Audio | AudioPrompt, sampling_rate: int | None = None, *, overlap: float | None = None
    ) -> AudioPrompt:
        """What the pipeline needs of a prompt; a call takes it in place of `audio`. Arguments as for a call.

        Raises:
            TokenloomError: If it is no sound, too short, or its rate is missing or wrong.
        """
        hop = self.tokenizer.hop_length
        count = (self._overlap(overlap) + _WARM_FRAMES + 1) * hop
        return open_prompt(audio, sampling_rate, self.tokenizer.sample_rate, hop, count)

    def _context(self, job: _Job) -> Tensor:
        """Codes (B, K, c) of the last whole frames of the prompt, at most the overlap."""
        hop, device = self.tokenizer.hop_length, self._execution_device
        frames, offset = job.heard // hop, job.heard - job.end.shape[2]
        first = max(0, frames - job.back - _WARM_FRAMES)
        heard = job.end[:, :, first * hop - offset : frames * hop - offset] * job.gain
        codes = self.awake(self.tokenizer).encode(heard.to(device), num_codebooks=self.window[1])
        return codes[:, :, -job.back :]

    def _pieces(
        self, job: _Job, *, context: Tensor | None = None, live: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(codes (B, K, n), samples (B, 1, s)) of the continuation, one after the other."""
        context = self._context(job) if context is None else context
        rest = job.heard % self.tokenizer.hop_length
        needed = self.tokenizer.num_frames(rest + job.samples)
        decoder = AudioStream(self.awake(self.tokenizer))
        with torch.no_grad():
            heard = decoder.decode(context.to(self._execution_device)).float().cpu() / job.gain
        joint = Joint(job.end, heard, rest, job.samples, self.tokenizer.sample_rate)
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
                job.condition,
                batch_size=len(known),
                guidance=job.guidance,
                sampling=job.rule,
                seeds=seeds.to(device),
                known=known.to(device),
                keep=keep.to(device),
                on_step=on_step,
                decode=job.decode,
            )

        return sliding_frames(generate, context, self.window[0], job.back, needed, live=live)


@dataclass(frozen=True)
class _Job:
    """What one call has to do.

    Attributes:
        end: End of the prompt, float32 (B, 1, E).
        heard: Samples of the whole prompt S.
        samples: New samples.
        back: Frames that are looked back to.
        rule: Sampling.
        seeds: LongTensor (B,).
        guidance: Of the condition.
        condition: Word ids (B, P), classes (B,) or `None`.
        decode: Rung.
    """

    end: Tensor
    heard: int
    samples: int
    back: int
    rule: Sampling
    seeds: Tensor
    guidance: Guidance
    condition: Tensor | None
    decode: str | Parallel

    @functools.cached_property
    def gain(self) -> Tensor:
        """Factors (B, 1, 1) that bring the end of the prompt to the loudness of the codec."""
        return level(self.end)


def _as(output_type: str, audio: Tensor) -> Tensor | np.ndarray:
    return audio.numpy() if output_type == "np" else audio
