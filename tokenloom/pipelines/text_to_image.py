"""Pictures from words: text tokenizer, generator and image tokenizer behind one call.

Every random number of image i comes from seed i alone, so the same seed gives the same codes in any batch. Kernels may
round differently for another batch size; in float32 this has not changed a sampled code in the tests, and decoded
pictures agree to within one level of 255. In bfloat16 only the codes of a repeated identical call are guaranteed.

Knows how to call the three components. Knows nothing of orders, transformers or quantizers.

Shapes: B samples (prompts times images a prompt), N tokens, T words, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from tokenloom import media
from tokenloom.errors import TokenloomError
from tokenloom.generators.base import Generator
from tokenloom.generators.parallel import Parallel
from tokenloom.generators.sampling import Guidance, Schedule
from tokenloom.pipelines import inputs
from tokenloom.pipelines.base import Pipeline
from tokenloom.pipelines.preset import check_preset, merge_settings, read_prompts
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.text import WordTokenizer

logger = logging.getLogger(__name__)

StepCallback = Callable[[Any, int, int, dict[str, Any]], Any]


@dataclass
class TextToImageOutput(BaseOutput):
    """What `TextToImagePipeline` returns.

    Attributes:
        images: PIL images, or float values in [0, 1] as an array (B, H, W, 3) or a tensor (B, 3, H, W), or the codes.
        codes: LongTensor (B, N), the tokens of every image in layout order.
        seeds: The seed of every image; passing it again gives the same image.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    codes: Tensor
    seeds: list[int]


class TextToImagePipeline(Pipeline):
    """Generates square pictures from prompts.

    Args:
        tokenizer: Image tokenizer: codes to pixels and back.
        generator: Predicts codes from words.
        text_tokenizer: Words to word ids.
        sampling: Preset used where a call says nothing: any of "guidance_scale", "guidance_schedule", "guidance_start",
            "guidance_interval", "temperature", "top_k", "top_p", "nucleus". Stored in model_index.json.

    Raises:
        TokenloomError: The tokenizer and the generator do not fit together, or the preset has an unknown key.

    Example:
        >>> pipe = TextToImagePipeline.from_pretrained("tokenloom-emoji-64")  # doctest: +SKIP
        >>> pipe("a simple picture of a red apple", seed=7).images[0].save("apple.png")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "generator->tokenizer"  # type: ignore[assignment]
    tokenizer: ImageTokenizer
    generator: Generator
    text_tokenizer: WordTokenizer

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        generator: Generator,
        text_tokenizer: WordTokenizer,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        preset = check_preset(sampling)
        if tokenizer.vocab_size != generator.vocab_size or tokenizer.layout != generator.order.layout:
            raise TokenloomError(
                f"The tokenizer makes {tokenizer.layout} of {tokenizer.vocab_size} codes, but the generator was built "
                f"for {generator.order.layout} of {generator.vocab_size}. Use components that were trained together."
            )
        self.register_modules(tokenizer=tokenizer, generator=generator, text_tokenizer=text_tokenizer)
        self.register_to_config(sampling=preset)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance: Guidance | Schedule | None = None,
        temperature: float | Schedule | None = None,
        top_k: int | Schedule | None = None,
        top_p: float | Schedule | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Image.Image | str | Path | None = None,
        mask_image: Image.Image | str | Path | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        decode: str | Parallel = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = inputs.TENSOR_INPUTS,
    ) -> TextToImageOutput:
        """Generates images.

        Args:
            prompt: One prompt or a list. Unknown words and words beyond the model's length are ignored with a warning.
            num_images_per_prompt: Images for each prompt; the images of one prompt follow one another.
            guidance_scale: g in `u + g * (c - u)`; 1 switches guidance off (one forward a step). Default: the preset.
            guidance: A full `Guidance` (schedule, interval) or a callable of progress, instead of `guidance_scale`.
            temperature: 0 takes the likeliest code everywhere. This and the next two may be functions of progress in
                [0, 1]. Default: the preset.
            top_k: Only the k likeliest codes; 0 for all. Default: the preset.
            top_p: Only the likeliest codes of this total probability; 1 for all. Default: the preset.
            seed: An int s gives s, s+1, ... to the images; a list has one for each image. Default: fresh entropy.
            generator: `torch.Generator`, one or one an image, from which seeds are drawn (see `inputs.make_seeds`).
            image: Picture to repaint in part; cut to a centred square.
            mask_image: As large as `image`: white is repainted. A token is kept only if its whole patch is black; kept
                tokens pass through the image tokenizer, so kept pixels are its reconstruction.
            known: Codes (N,), (1, N) or (B, N), an alternative to `image`.
            keep: Which of `known` to keep, bool of the same shape.
            decode: "auto", "cached", "compiled", "parallel" (or a `Parallel`) or "reference", which all give the same
                codes, or "compiled-int8" and "compiled-w8a8". The progress bar of the compiled ones stands still where no
                callback is given.
            output_type: "pil", "np", "pt" or "codes".
            return_dict: False gives the tuple (images, codes, seeds).
            callback_on_step_end: `callback(pipe, step_index, timestep, callback_kwargs)`, after every step; `timestep`
                is the number of steps still to come. What it returns is ignored.
            callback_on_step_end_tensor_inputs: Keys of `callback_kwargs`: "codes" (B, N), "committed" bool (N,), and
                "preview", a function without arguments that decodes the codes so far into PIL images.

        Returns:
            `TextToImageOutput` with `.images`, `.codes` and `.seeds`.

        Raises:
            TokenloomError: For any argument that is not as described.
        """
        prompts = inputs.check_prompts(prompt)
        count = inputs.check_count("num_images_per_prompt", num_images_per_prompt)
        inputs.check_choice("output_type", output_type, inputs.OUTPUT_TYPES)
        for key in callback_on_step_end_tensor_inputs:
            inputs.check_choice("callback_on_step_end_tensor_inputs entry", key, inputs.TENSOR_INPUTS)
        rule, sampler = merge_settings(
            self.config["sampling"],
            guidance_scale,
            guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        batch = len(prompts) * count
        seeds = inputs.make_seeds(seed, generator, batch)
        known, keep = self._prepare_known(image, mask_image, known, keep, batch)
        words = self.encode_prompts(prompts).repeat_interleave(count, dim=0)  # (B, T)

        with self.progress_bar(total=self.generator.order.num_steps) as bar:

            def on_step(step: Any) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    self._report(step, callback_on_step_end, callback_on_step_end_tensor_inputs)

            device = self._execution_device
            reported = callback_on_step_end is not None or not str(decode).startswith("compiled")
            codes = self.awake(self.generator).generate(
                words.to(device),
                guidance=rule,
                sampling=sampler,
                seeds=seeds.to(device),
                known=known,
                keep=keep,
                on_step=on_step if reported else None,  # a recorded generation has no steps to report
                decode=decode,
            )
        images = self._render(codes, output_type)
        self.maybe_free_model_hooks()
        result = TextToImageOutput(images=images, codes=codes, seeds=inputs.seeds_as_ints(seeds))
        if return_dict:
            return result
        return result.images, result.codes, result.seeds  # type: ignore[return-value]  # typed for the usual call

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Returns word ids, LongTensor (len(prompts), T), and warns of words that the model cannot read."""
        return read_prompts(self.text_tokenizer, prompts, logger, "picture")

    def _prepare_known(
        self,
        image: Image.Image | str | Path | None,
        mask_image: Image.Image | str | Path | None,
        known: Tensor | None,
        keep: Tensor | None,
        batch: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns known codes and the mask of those to keep, both (B, N), from either way of giving them."""
        for first, second, names in (
            (image, mask_image, "image and mask_image"),
            (known, keep, "known and keep"),
        ):
            if (first is None) != (second is None):
                raise TokenloomError(f"Expected both {names}, got only one of them. Pass both or neither.")
        if image is not None and known is not None:
            raise TokenloomError(
                "Expected image and mask_image or known and keep, got all four. Pass one pair."
            )
        if image is not None and mask_image is not None:
            layout = self.tokenizer.layout
            if layout.kind != "grid":
                raise TokenloomError(
                    f"image and mask_image need a tokenizer whose codes lie on a grid, got {layout}; pass known and keep."
                )
            rows, columns = (int(length) for length in layout.coords[-1] + 1)
            pixels, keep = inputs.prepare_inpainting(
                image, mask_image, cast("int", self.tokenizer.image_size), (rows, columns)
            )
            known = self.awake(self.tokenizer).encode(pixels.to(self._execution_device, self.tokenizer.dtype))
        if known is None or keep is None:
            return None, None
        return self._spread("known", known, batch), self._spread("keep", keep, batch).bool()

    def _spread(self, name: str, value: Tensor, batch: int) -> Tensor:
        """Brings (N,), (1, N) or (B, N) to (B, N) on the device of the pipeline."""
        size = self.tokenizer.layout.size
        tensor = torch.as_tensor(value)
        shape = (1, *tensor.shape) if tensor.ndim == 1 else tuple(tensor.shape)
        if shape not in {(1, size), (batch, size)} or tensor.is_floating_point():
            raise TokenloomError(
                f"Expected {name} to be whole numbers or bools of shape ({size},), (1, {size}) or ({batch}, {size}), got "
                f"{tensor.dtype} {tuple(tensor.shape)}."
            )
        return tensor.reshape(shape).expand(batch, size).to(self._execution_device)

    def _report(self, step: Any, callback: StepCallback, names: Sequence[str]) -> None:
        values = {
            "codes": step.codes,
            "committed": step.committed,
            "preview": lambda: self._preview(step.codes, step.committed),
        }
        callback(self, step.index, step.num_steps - step.index - 1, {name: values[name] for name in names})

    def _preview(self, codes: Tensor, committed: Tensor) -> list[Image.Image]:
        """Decodes codes of which only some are there; the others show as those of a white picture."""
        size = cast("int", self.tokenizer.image_size)  # pictures are square
        white = torch.ones(1, 3, size, size, device=codes.device, dtype=self.tokenizer.dtype)
        with torch.no_grad():
            tokenizer = self.awake(self.tokenizer)
            filled = torch.where(committed.to(codes.device), codes, tokenizer.encode(white))
            pictures = media.to_pil(tokenizer.decode(filled))
        self.awake(self.generator)  # the generation goes on
        return pictures

    def _render(self, codes: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "codes":
            return codes
        pixels = self.awake(self.tokenizer).decode(codes)  # (B, 3, H, W) in [-1, 1]
        if output_type == "pil":
            return media.to_pil(pixels)
        unit = (pixels.float() + 1) / 2
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
