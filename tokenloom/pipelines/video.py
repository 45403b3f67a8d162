"""Clips from words, from other clips, or between two pictures: text tokenizer, generator and video tokenizer behind one call.

A generator sees a window of frames, which slides on, so that networks need the same memory however long the clip becomes.
Every random number of clip i comes from seed i alone. Knows how to call the components. Knows nothing of orders.

Shapes: B clips (prompts times clips a prompt), F frames, H W pixels, N codes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.base import Generator
from tokenloom.generators.parallel import Parallel
from tokenloom.generators.sampling import Guidance, Schedule
from tokenloom.pipelines import inputs
from tokenloom.pipelines.base import Pipeline
from tokenloom.pipelines.preset import check_preset, merge_settings, read_prompts
from tokenloom.pipelines.video_inputs import Clips, Picture, check_form, load_clip, load_frame
from tokenloom.pipelines.video_outputs import as_output, to_bytes
from tokenloom.pipelines.video_windows import VideoJob, between, video_frames
from tokenloom.tokenizers.pixels import rescale
from tokenloom.tokenizers.text import WordTokenizer
from tokenloom.tokenizers.video import VideoTokenizer

logger = logging.getLogger(__name__)

VideoCallback = Callable[[Any, int, int, dict[str, Any]], Any]

_OUTPUT_TYPES = ("pil", "np", "pt")
_TENSOR_INPUTS = ("codes", "committed")


@dataclass
class VideoOutput(BaseOutput):
    """What `VideoPipeline` returns.

    Attributes:
        frames: Of each clip a list of PIL pictures; or float values in [0, 1], an array (B, F, H, W, 3) or a tensor
            (B, F, 3, H, W).
        codes: LongTensor (B, N): codes in layout order; of a clip of several windows those of the first one, then the new
            ones of each further window.
        prompt_frames: How many of the frames were given.
        fps: Frames a second that the model was trained with.
        seeds: The seed of every clip; passing it again gives the same clip.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    codes: Tensor
    prompt_frames: int
    fps: float
    seeds: list[int]


class VideoPipeline(Pipeline):
    """Generates clips.

    Args:
        tokenizer: Video tokenizer: codes to frames and back.
        generator: Predicts codes of `Layout.clip(T, h, w)`, from words or without a condition.
        text_tokenizer: Words to word ids; `None` for a generator without words.
        sampling: Preset used where a call says nothing, as for `TextToImagePipeline`. Stored in model_index.json.
        fps: Frames a second of the training clips.

    Raises:
        TokenloomError: The components do not fit together, or the preset has an unknown key.

    Example:
        >>> pipe = VideoPipeline.from_pretrained("runs/video64-generator/model")  # doctest: +SKIP
        >>> result = pipe("a red apple bouncing", seed=7)  # doctest: +SKIP
        >>> save_clip(result.frames[0], "apple.gif", result.fps)  # doctest: +SKIP
    """

    model_cpu_offload_seq = "generator->tokenizer"  # type: ignore[assignment]
    _optional_components = ["text_tokenizer"]  # noqa: RUF012
    tokenizer: VideoTokenizer
    generator: Generator
    text_tokenizer: WordTokenizer | None

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        generator: Generator,
        text_tokenizer: WordTokenizer | None = None,
        sampling: dict[str, Any] | None = None,
        fps: float = 8.0,
    ) -> None:
        super().__init__()
        preset = check_preset(sampling)
        layout = generator.order.layout
        fits = layout.kind == "clip" and layout.shape[1:] == tokenizer.layout.shape[1:]
        if not fits or tokenizer.vocab_size != generator.vocab_size:
            raise TokenloomError(
                f"The tokenizer makes {tokenizer.layout} of {tokenizer.vocab_size} codes, but the generator was built for "
                f"{layout} of {generator.vocab_size}. Use components that were trained together."
            )
        self._reads = (
            bool(generator.condition.length) and generator.condition.null(1, generator.device) is not None
        )
        if self._reads != (text_tokenizer is not None):
            raise TokenloomError(
                "A generator with words needs a text_tokenizer, and one without a condition must have none; got "
                f"{'no ' if text_tokenizer is None else 'a '}text_tokenizer."
            )
        self.register_modules(tokenizer=tokenizer, generator=generator, text_tokenizer=text_tokenizer)
        self.register_to_config(sampling=preset, fps=fps)

    @property
    def window(self) -> int:
        """Frames of codes T that the generator sees at once."""
        return int(self.generator.order.layout.shape[0])  # type: ignore[arg-type]

    @property
    def window_frames(self) -> int:
        """Frames of a window."""
        return self.tokenizer.frames_of(self.window)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        video: Clips | None = None,
        image: Picture | None = None,
        last_image: Picture | None = None,
        loop: bool = False,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        overlap: int | None = None,
        candidates: int = 8,
        guidance_scale: float | None = None,
        guidance: Guidance | Schedule | None = None,
        temperature: float | Schedule | None = None,
        top_k: int | Schedule | None = None,
        top_p: float | Schedule | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decode: str | Parallel = "auto",
        stream: bool = False,
        output_type: str = "pil",
        callback_on_step_end: VideoCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = _TENSOR_INPUTS,
    ) -> Any:
        """Generates clips.

        Args:
            prompt: One prompt or a list; `None` lets a model with words make whatever it likes.
            video: A clip to continue: a file or a folder of frames, a list of PIL pictures, or a tensor (F, 3, H, W). Frames
                of another size are cut to a centred square and resized. The generator sees its end; the clip itself is
                returned as it came, at the model's size.
            image: First frame, a file or a PIL picture, for a clip that begins with it.
            last_image: Last frame of the clip, for a clip from `image` to it; of at most one window.
            loop: The clip leads back to its first frame.
            num_frames: Frames of the result, those of `video` among them; any number. Default: one window, behind `video` as
                many as a window makes anew.
            num_videos_per_prompt: Clips of each prompt; the clips of one prompt follow one another.
            overlap: Frames of codes that the window keeps as it slides on, and sees of `video`; default half of the window.
                More costs more time.
            candidates: Clips that are made where the last frame is known; that one is taken which leads to it best.
            guidance_scale: g in `u + g * (c - u)`; 1 switches guidance off. Default: the preset.
            guidance: A full `Guidance` or a callable of progress, instead of `guidance_scale`.
            temperature: 0 takes the likeliest code everywhere. Default: the preset.
            top_k: Only the k likeliest codes; 0 for all. Default: the preset.
            top_p: Only the likeliest codes of this total probability; 1 for all. Default: the preset.
            seed: An int s gives s, s+1, ... to the clips; a list has one for each. Default: fresh entropy.
            generator: `torch.Generator`, one or one a clip, from which seeds are drawn (see `inputs.make_seeds`).
            decode: "auto", "cached", "compiled", "parallel" (or a `Parallel`) or "reference"; all give the same codes.
            stream: Return an iterator of new frames instead, as `output_type` says, window by window; memory does not grow.
            output_type: "pil", "np" or "pt".
            callback_on_step_end: `callback(pipe, step_index, timestep, callback_kwargs)`, after every step of every window.
            callback_on_step_end_tensor_inputs: Keys of `callback_kwargs`: "codes" (B, N) and "committed" bool (N,).

        Returns:
            `VideoOutput` with `.frames` and `.codes`, or with `stream` the iterator.

        Raises:
            TokenloomError: For any argument that is not as described.
        """
        inputs.check_choice("output_type", output_type, _OUTPUT_TYPES)
        for key in callback_on_step_end_tensor_inputs:
            inputs.check_choice("callback_on_step_end_tensor_inputs entry", key, _TENSOR_INPUTS)
        check_form(video, image, last_image, loop, stream)
        rule, sampler = merge_settings(
            self.config["sampling"],
            guidance_scale,
            guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        words = self._words(prompt, inputs.check_count("num_videos_per_prompt", num_videos_per_prompt))
        batch = num_videos_per_prompt if words is None else len(words)
        seeds = inputs.make_seeds(seed, generator, batch)

        job = VideoJob(
            tokenizer=self.tokenizer,
            condition=words,
            seeds=seeds.to(self._execution_device),
            given=self._given(video, image),
            overlap=self._overlap(overlap),
            options={
                "guidance": rule,
                "sampling": sampler,
                "decode": decode,
                "on_step": self._reporter(callback_on_step_end, callback_on_step_end_tensor_inputs),
            },
        )
        bounded = loop or last_image is not None
        frames = self._count(num_frames, job, bounded)
        if bounded:
            tries = inputs.check_count("candidates", candidates)
            parts = [self._between(job, last_image, frames, tries)]
        else:
            made = self._pieces(job, frames)
            if stream:
                return (as_output(output_type, pixels) for _, pixels in made)
            parts = list(made)
        shown = (
            []
            if bounded or job.given is None
            else [to_bytes(job.given, self.tokenizer).expand(batch, -1, -1, -1, -1)]
        )
        pixels = torch.cat([*shown, *(pixels for _, pixels in parts)], dim=1)
        self.maybe_free_model_hooks()
        return VideoOutput(
            frames=as_output(output_type, pixels),
            codes=torch.cat([codes for codes, _ in parts], dim=1),
            prompt_frames=sum(part.shape[1] for part in shown),
            fps=float(self.config["fps"]),
            seeds=inputs.seeds_as_ints(seeds),
        )

    def _words(self, prompt: str | list[str] | None, count: int) -> Tensor | None:
        """Word ids (B, T) of prompts, `None` where the model makes what it likes."""
        if prompt is None:
            return None
        prompts = inputs.check_prompts(prompt)
        if self.text_tokenizer is None:
            raise TokenloomError("This model was trained without words; leave the prompt out.")
        words = read_prompts(self.text_tokenizer, prompts, logger, "clip")
        return words.repeat_interleave(count, dim=0).to(self._execution_device)

    def _given(self, video: Clips | None, image: Picture | None) -> Tensor | None:
        """Frames (1, G, 3, S, S) in the tokenizer's range that the clip begins with."""
        if video is None and image is None:
            return None
        clip = load_frame("image", image, self._side) if image is not None else load_clip(video, self._side)  # type: ignore[arg-type]
        return rescale(clip, (-1.0, 1.0), self.tokenizer.pixel_range).to(self._execution_device)

    @property
    def _side(self) -> int:
        side = self.tokenizer.image_size
        if not isinstance(side, int):
            raise TokenloomError(
                f"Pictures and clips are cut to squares, but this model's frames are {side}; generate from words alone."
            )
        return side

    def _overlap(self, overlap: int | None) -> int:
        if overlap is None:
            return max(1, self.window // 2)
        if isinstance(overlap, bool) or not isinstance(overlap, int) or not 1 <= overlap < self.window:
            raise TokenloomError(
                f"overlap counts frames of codes, 1 to {self.window - 1} of the {self.window} of a window; got {overlap!r}."
            )
        return overlap

    def _count(self, num_frames: int | None, job: VideoJob, bounded: bool) -> int:
        """New frames to make."""
        given = 0 if job.given is None or bounded else job.given.shape[1]
        most = self.window_frames
        if num_frames is None:
            return most if not given else most - self.tokenizer.frames_of(job.begun)
        count = inputs.check_count("num_frames", num_frames)
        least = self.tokenizer.stride[0] + 1
        if bounded and not least <= count <= most:
            raise TokenloomError(
                f"A clip with a known end has {least} to {most} frames, what this model sees at once; got num_frames={count}."
            )
        if count <= given:
            raise TokenloomError(
                f"num_frames counts the frames of the result, and {given} are given already; got {count}. Ask for more, or "
                "give a shorter clip."
            )
        return count - given

    def _reporter(self, callback: VideoCallback | None, names: Sequence[str]) -> Callable[[Any], None]:
        def on_step(step: Any) -> None:
            if callback is not None:
                values = {name: getattr(step, name) for name in names}
                callback(self, step.index, step.num_steps - step.index - 1, values)

        return on_step

    def _pieces(self, job: VideoJob, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """New codes (B, n) and frames uint8 (B, f, 3, H, W), window by window."""
        made = video_frames(
            self.tokenizer,
            self.generator,
            count,
            overlap=job.overlap,
            start=job.start(),
            condition=job.condition,
            batch_size=None if job.condition is not None else len(job.seeds),
            seeds=job.seeds,
            **job.options,
        )
        with self.progress_bar(total=count) as bar:
            while True:
                with torch.no_grad():  # not while the caller holds the iterator
                    piece = next(made, None)
                if piece is None:
                    return
                bar.update(piece[1].shape[1])
                yield piece[0], to_bytes(piece[1], self.tokenizer)

    def _between(
        self, job: VideoJob, last_image: Picture | None, frames: int, candidates: int
    ) -> tuple[Tensor, Tensor]:
        """Codes (B, n) and frames uint8 (B, frames, 3, H, W) of clips with two known ends."""
        batch = len(job.seeds)
        if job.given is not None:
            first = job.given[:, :1].expand(batch, -1, -1, -1, -1)
        else:
            begun = next(self._pieces(job, 1))[1].float() / 127.5 - 1
            first = rescale(begun, (-1.0, 1.0), self.tokenizer.pixel_range).to(self._execution_device)
        last = first
        if last_image is not None:
            picture = load_frame("last_image", last_image, self._side)
            picture = rescale(picture, (-1.0, 1.0), self.tokenizer.pixel_range).to(first)
            last = picture.expand(batch, -1, -1, -1, -1)
        codes = between(
            self.tokenizer,
            self.generator,
            torch.cat([first, last], dim=1),
            frames,
            candidates=candidates,
            condition=job.condition,
            seeds=job.seeds,
            **job.options,
        )
        return codes, to_bytes(self.tokenizer.decode(codes)[:, :frames], self.tokenizer)
