"""Masks from a picture and phrases: picture encoder, generator, mask tokenizer and words behind one call.

The picture is encoded once for all its phrases. An answer is four codes of a box and K codes of a mask, coarse to fine; an
object that is not there has a code of its own, which decodes to an exactly empty mask. By default the likeliest code is
taken at every place, so that a call repeats.

Knows how to call the components. Knows nothing of orders, transformers or quantizers.

Shapes: n phrases, K mask codes, H W pixels of the picture as given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image, ImageOps
from torch import Tensor

from tokenloom import media
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.conditions import PictureWords
from tokenloom.generators.parallel import Parallel
from tokenloom.generators.ranged import RangedTokenGenerator
from tokenloom.generators.sampling import Guidance, Sampling
from tokenloom.pipelines import inputs
from tokenloom.pipelines.base import Pipeline
from tokenloom.tokenizers.answer_codes import BOX, AnswerCodes
from tokenloom.tokenizers.mask import MaskTokenizer
from tokenloom.tokenizers.picture_encoder import PictureEncoder
from tokenloom.tokenizers.text import WordTokenizer, split_words

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pt", "np", "pil", "codes")
_PRESET = ("guidance_scale", "temperature", "top_k", "top_p")
_COLOURS = ((230, 40, 40), (40, 120, 240), (40, 180, 70), (240, 170, 20), (170, 60, 210), (20, 190, 190))
_PADDING = (128, 128, 128)


@dataclass
class SegmentationOutput(BaseOutput):
    """What `SegmentationPipeline` returns.

    Attributes:
        masks: Bool (n, H, W) tensor or array, a list of pictures of mode "1", or the codes.
        scores: Float (n,): geometric mean of the probabilities of all codes of the answer, also of the answer "nothing".
        present: Float (n,): probability that there is such an object at all.
        boxes: Float (n, 4): x0, y0, x1, y1 in pixels of the picture, zeros where there is nothing.
        codes: LongTensor (n, K), the codes of the masks.
        size: (H, W).
    """

    masks: Tensor | np.ndarray | list[Image.Image]
    scores: Tensor
    present: Tensor
    boxes: Tensor
    codes: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class EncodedPicture:
    """A picture after the encoder, for further phrases.

    Attributes:
        features: (1, P, F).
        size: (H, W) of the picture.
    """

    features: Tensor
    size: tuple[int, int]


class SegmentationPipeline(Pipeline):
    """Segments what phrases mean.

    Args:
        tokenizer: Mask tokenizer.
        generator: Predicts answers from a picture and words.
        picture_encoder: Pictures to features.
        text_tokenizer: Words to word ids.
        bins: Steps of the scale of boxes.
        sampling: Preset used where a call says nothing: any of "guidance_scale", "temperature", "top_k", "top_p".

    Raises:
        TokenloomError: The components do not fit together, or the preset has an unknown key.

    Example:
        >>> pipe = SegmentationPipeline.from_pretrained("runs/segmentation/model")  # doctest: +SKIP
        >>> pipe("photo.png", "the green apple").masks.shape  # doctest: +SKIP
        torch.Size([1, 480, 640])
    """

    model_cpu_offload_seq = "picture_encoder->generator->tokenizer"  # type: ignore[assignment]
    tokenizer: MaskTokenizer
    generator: RangedTokenGenerator
    picture_encoder: PictureEncoder
    text_tokenizer: WordTokenizer

    def __init__(
        self,
        tokenizer: MaskTokenizer,
        generator: RangedTokenGenerator,
        picture_encoder: PictureEncoder,
        text_tokenizer: WordTokenizer,
        bins: int = 64,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        preset = dict(sampling or {})
        for key in preset:
            if key not in _PRESET:
                raise unknown_name("sampling setting", key, _PRESET)
        self.answers = AnswerCodes(tokenizer.levels, tokenizer.vocab_size, bins)
        wanted, got = (
            (self.answers.length, self.answers.vocabulary),
            (
                generator.order.layout.size,
                generator.vocab_size,
            ),
        )
        if wanted != got:
            raise TokenloomError(
                f"Answers of this mask tokenizer with {bins} bins have {wanted[0]} of {wanted[1]} codes, but the generator makes "
                f"{got[0]} of {got[1]}. Use components that were trained together."
            )
        self.register_modules(
            tokenizer=tokenizer,
            generator=generator,
            picture_encoder=picture_encoder,
            text_tokenizer=text_tokenizer,
        )
        self.register_to_config(bins=bins, sampling=preset)

    @torch.no_grad()
    def encode_picture(self, image: Image.Image | str | Path) -> EncodedPicture:
        """Encodes a picture once; give the result in place of the picture for further phrases.

        Args:
            image: A picture or a file. Transparency is put on white, the EXIF orientation is applied; the picture is padded to
                a square below and to the right.
        """
        picture = inputs.load_picture("image", image)
        if isinstance(image, Image.Image):
            picture = media.to_rgb(ImageOps.exif_transpose(picture))
        if min(picture.size) < 1:
            raise TokenloomError(
                f"The picture has no pixels: {picture.size[0]}x{picture.size[1]}. Give another."
            )
        side, wanted = max(picture.size), self.picture_encoder.image_size
        square = Image.new("RGB", (side, side), _PADDING)
        square.paste(picture, (0, 0))
        pixels = media.to_pixels(square.resize((wanted, wanted), Image.Resampling.LANCZOS))
        features = self.picture_encoder(pixels.to(self._execution_device, self.picture_encoder.dtype))
        return EncodedPicture(features, (picture.height, picture.width))

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | str | Path | EncodedPicture,
        prompt: str | list[str] | None = None,
        *,
        boxes: Sequence[Sequence[float]] | Tensor | None = None,
        mask_tokens: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        decode: str | Parallel = "auto",
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> SegmentationOutput:
        """Segments.

        Args:
            image: A picture, its path, or what `encode_picture` returned.
            prompt: One phrase or several about the picture ("the green apple", "all dogs"). `None` where boxes are given.
            boxes: One box a phrase (n, 4), x0, y0, x1, y1 in pixels: the mask of what is in the box.
            mask_tokens: Codes to decode masks from, 1 to K; fewer give coarser masks. `None` = all.
            guidance_scale: g in `u + g * (c - u)`, u without words; 1 switches guidance off. Default: the preset, or 1.
            temperature: 0 takes the likeliest code everywhere. Default: the preset, or 0.
            top_k: Only the k likeliest codes; 0 for all. Default: the preset.
            top_p: Only the likeliest codes of this total probability. Default: the preset.
            seed: As for `TextToImagePipeline`; it matters if the temperature is above 0. Default: 0.
            decode: "auto", "cached", "parallel" (or a `Parallel`) or "reference".
            output_type: "pt", "np" (bool arrays), "pil" (pictures of mode "1"), or "codes".
            return_dict: False gives the tuple (masks, scores, boxes, codes).

        Returns:
            `SegmentationOutput`.

        Raises:
            TokenloomError: For any argument that is not as described, an empty phrase, or one without a known word.
        """
        inputs.check_choice("output_type", output_type, OUTPUT_TYPES)
        if mask_tokens is not None:
            self.tokenizer.check_num_tokens(mask_tokens)
        given = None if boxes is None else _as_boxes(boxes)
        if prompt is None and given is None:
            raise TokenloomError("Expected a phrase (prompt) or boxes, got neither.")
        words = self._words(prompt, 0 if given is None else len(given))
        if given is not None and len(given) != len(words):
            raise TokenloomError(
                f"Expected one box a phrase, got {len(given)} boxes and {len(words)} phrases."
            )
        rule, sampler = self._settings(guidance_scale, temperature, top_k, top_p)
        picture = image if isinstance(image, EncodedPicture) else self.encode_picture(image)
        side, device = (max(picture.size), max(picture.size)), self._execution_device
        count = len(words)
        condition = PictureWords(picture.features.to(device).expand(count, -1, -1), words.to(device))
        known = keep = None
        if given is not None:
            empty = torch.zeros(count, self.answers.levels, dtype=torch.long)
            known = self.answers.join(self._inside(given, picture.size), side, empty).to(device)
            keep = torch.arange(self.answers.length, device=device) < BOX
        answers = self.awake(self.generator).generate(
            condition,
            guidance=rule,
            sampling=sampler,
            seeds=inputs.make_seeds(0 if seed is None else seed, None, count).to(device),
            known=known,
            keep=keep,
            decode=decode,
        )
        scores, present = self._scores(answers, condition, given is not None)
        said, codes = self.answers.split(answers, side)
        height, width = picture.size
        said = torch.minimum(said.cpu(), torch.tensor([width, height, width, height]).float())
        masks = (
            codes if output_type == "codes" else self._render(codes, mask_tokens, picture.size, output_type)
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return masks, scores, said, codes  # type: ignore[return-value]  # typed for the usual call
        return SegmentationOutput(
            masks=masks, scores=scores, present=present, boxes=said, codes=codes, size=picture.size
        )

    def post_process(
        self,
        output: SegmentationOutput,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        threshold: float = 0.0,
        mask_tokens: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """One {"mask": bool (H, W), "score", "box"} a phrase whose score reaches a threshold.

        Args:
            output: What a call returned.
            target_sizes: (H, W) of each phrase's mask; `None` = the size of the picture.
            threshold: Least score.
            mask_tokens: Codes to decode from; `None` = all.
        """
        count = len(output.codes)
        sizes = [output.size] * count if target_sizes is None else [(int(h), int(w)) for h, w in target_sizes]
        if len(sizes) != count:
            raise TokenloomError(f"Expected a target size for each of the {count} phrases, got {len(sizes)}.")
        results = []
        for index, (height, width) in enumerate(sizes):
            if float(output.scores[index]) < threshold:
                continue
            codes = output.codes[index : index + 1]
            mask = (
                self.awake(self.tokenizer).decode(codes, mask_tokens, (height, width), output="mask")[0].cpu()
            )
            factor = max(height, width) / max(output.size)
            results.append({"mask": mask, "score": output.scores[index], "box": output.boxes[index] * factor})
        return results

    def _words(self, prompt: str | list[str] | None, boxes: int) -> Tensor:
        if prompt is None:
            return torch.zeros(boxes, self.text_tokenizer.max_length, dtype=torch.long)
        phrases = inputs.check_prompts(prompt)
        for text in phrases:
            words, unknown = split_words(text), self.text_tokenizer.unknown(text)
            if len(unknown) == len(words):
                raise TokenloomError(
                    f"The model knows no word of the phrase {text[:60]!r}; name a thing, for instance 'the green apple'."
                )
            if unknown:
                logger.warning("The model does not know %s in the phrase %r.", ", ".join(unknown[:8]), text)
            if len(words) > self.text_tokenizer.max_length:
                logger.warning(
                    "The phrase %r has %d words; the model reads the first %d.",
                    text,
                    len(words),
                    self.text_tokenizer.max_length,
                )
        return self.text_tokenizer(phrases)

    def _settings(
        self,
        guidance_scale: float | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
    ) -> tuple[Guidance, Sampling]:
        values: dict[str, Any] = {"guidance_scale": 1.0, "temperature": 0.0, **self.config["sampling"]}
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        values.update({key: value for key, value in given.items() if value is not None})
        return Guidance.of(values.pop("guidance_scale")), Sampling(**values)

    def _inside(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        limits = torch.tensor([width, height, width, height]).float()
        if bool(((boxes < -0.5) | (boxes > limits + 0.5)).any()):
            raise TokenloomError(
                f"Boxes must lie in the picture of {width}x{height} pixels, got {boxes.tolist()}."
            )
        return boxes

    def _scores(self, answers: Tensor, condition: PictureWords, known: bool) -> tuple[Tensor, Tensor]:
        """Geometric mean of the probabilities of the codes that were predicted, and the probability of a box."""
        logs = self.generator.logits(answers, condition).float().log_softmax(-1)
        chosen = logs.gather(-1, answers[..., None])[..., 0]
        present = 1 - logs[:, 0, self.answers.nothing].exp()
        return chosen[:, BOX * known :].mean(1).exp().cpu(), present.cpu()

    def _render(
        self, codes: Tensor, count: int | None, size: tuple[int, int], kind: str
    ) -> Tensor | np.ndarray | list[Image.Image]:
        masks = self.awake(self.tokenizer).decode(codes, count, size, output="mask").cpu()
        if kind == "pt":
            return masks
        arrays = masks.numpy()
        return arrays if kind == "np" else [Image.fromarray(array) for array in arrays]


def _as_boxes(boxes: Sequence[Sequence[float]] | Tensor) -> Tensor:
    try:
        values = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    except (TypeError, ValueError):
        values = torch.zeros(0)
    good = values.ndim == 2 and values.shape[0] > 0 and values.shape[1] == 4
    if not good or not bool((values[:, :2] < values[:, 2:]).all()):
        raise TokenloomError(
            f"Boxes must be numbers (n, 4): x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {boxes!r:.80}."
        )
    return values


def overlay(picture: Image.Image, masks: Tensor | np.ndarray, strength: float = 0.55) -> Image.Image:
    """The picture with each mask in a colour and its outline in full colour.

    Args:
        picture: RGB.
        masks: Bool (n, H, W) of the picture's size.
        strength: Share of the colour inside a mask.
    """
    canvas = np.asarray(media.to_rgb(picture), dtype=np.float32).copy()
    for index, mask in enumerate(np.asarray(masks, dtype=bool)):
        if mask.shape != canvas.shape[:2]:
            raise TokenloomError(f"Masks must be {canvas.shape[:2]} as the picture, got {mask.shape}.")
        colour = np.array(_COLOURS[index % len(_COLOURS)], dtype=np.float32)
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        canvas[mask] = (1 - strength) * canvas[mask] + strength * colour
        canvas[mask & ~inner] = colour
    return Image.fromarray(canvas.round().astype(np.uint8))
