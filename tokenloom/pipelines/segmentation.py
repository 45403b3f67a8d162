"""Masks from a picture and phrases: picture encoder, generator, mask tokenizer and words behind one call.

A picture is encoded once for all its phrases, and several pictures run together. An answer is four codes of a box and K codes of a mask, coarse to fine; an
object that is not there has a code of its own, which decodes to an exactly empty mask. By default the likeliest code is
taken at every place, so that a call repeats.

Knows how to call the components. Knows nothing of orders, transformers or quantizers.

Shapes: n phrases, K mask codes, H W pixels of the picture as given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from tokenloom import media
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.conditions import PictureWords
from tokenloom.generators.parallel import Parallel
from tokenloom.generators.ranged import RangedTokenGenerator
from tokenloom.generators.sampling import Guidance, Sampling
from tokenloom.pipelines import inputs
from tokenloom.pipelines.base import Pipeline
from tokenloom.pipelines.segmentation_request import (
    Asked,
    EncodedPicture,
    Picture,
    ask,
    ask_each,
    padded_square,
)
from tokenloom.tokenizers.answer_codes import BOX, AnswerCodes
from tokenloom.tokenizers.mask import MaskTokenizer
from tokenloom.tokenizers.picture_encoder import PictureEncoder
from tokenloom.tokenizers.text import WordTokenizer, split_words

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pt", "np", "pil", "codes")
_PRESET = ("guidance_scale", "temperature", "top_k", "top_p")
_COLOURS = ((230, 40, 40), (40, 120, 240), (40, 180, 70), (240, 170, 20), (170, 60, 210), (20, 190, 190))


@dataclass
class SegmentationOutput(BaseOutput):
    """What `SegmentationPipeline` returns.

    Attributes:
        masks: Bool (n, H, W) tensor or array, a list of pictures of mode "1", or the codes.
        scores: Float (n,): geometric mean of the probabilities of the codes that were generated, also of the answer "nothing".
        present: Float (n,): probability that there is such an object at all.
        boxes: Float (n, 4): x0, y0, x1, y1 in pixels of the picture, zeros where there is nothing.
        codes: LongTensor (n, K), the codes of the masks; (n, k) with `mask_tokens=k`.
        size: (H, W).
    """

    masks: Tensor | np.ndarray | list[Image.Image]
    scores: Tensor
    present: Tensor
    boxes: Tensor
    codes: Tensor
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
        self.answers = AnswerCodes.of(tokenizer, bins)
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

    def encode_picture(self, image: Picture) -> EncodedPicture:
        """Encodes a picture once; give the result in place of the picture for further phrases.

        Args:
            image: A picture or a file. Transparency is put on white, the EXIF orientation is applied; the picture is padded to
                a square below and to the right.
        """
        return self._encode([image])[0]

    @torch.no_grad()
    def _encode(self, images: Sequence[Picture | EncodedPicture]) -> list[EncodedPicture]:
        """All pictures after the encoder, which sees those that are new in one batch."""
        wanted = self.picture_encoder.image_size
        squares = [
            image if isinstance(image, EncodedPicture) else padded_square(image, wanted) for image in images
        ]
        new = [square for square in squares if not isinstance(square, EncodedPicture)]
        if not new:
            return [square for square in squares if isinstance(square, EncodedPicture)]
        pixels = torch.cat([media.to_pixels(picture) for picture, _ in new])
        features = iter(
            self.picture_encoder(pixels.to(self._execution_device, self.picture_encoder.dtype)).split(1)
        )
        return [
            square if isinstance(square, EncodedPicture) else EncodedPicture(next(features), square[1])
            for square in squares
        ]

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | EncodedPicture | Sequence[Picture | EncodedPicture],
        prompt: str | Sequence[str | Sequence[str]] | None = None,
        *,
        boxes: Any = None,
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
            image: A picture, its path, or what `encode_picture` returned; or a list of them, which run together.
            prompt: One phrase or several about the picture ("the green apple", "all dogs"). `None` where boxes are given. For a
                list of pictures: one phrase for all of them, or a list with the phrase or the phrases of each.
            boxes: One box a phrase (n, 4), x0, y0, x1, y1 in pixels: the mask of what is in the box. For a list of pictures: a
                list with the boxes of each.
            mask_tokens: Codes a mask, 1 to K; fewer give coarser masks, and no more are generated. They are the first of those
                that a full call makes. `None` = all.
            guidance_scale: g in `u + g * (c - u)`, u without words; 1 switches guidance off. Default: the preset, or 1.
            temperature: 0 takes the likeliest code everywhere. Default: the preset, or 0.
            top_k: Only the k likeliest codes; 0 for all. Default: the preset.
            top_p: Only the likeliest codes of this total probability. Default: the preset.
            seed: As for `TextToImagePipeline`; it matters if the temperature is above 0. An int counts on from phrase to phrase
                of a picture, and anew for each picture; a list holds one seed a phrase of all pictures. Default: 0.
            decode: "auto", "cached", "compiled", "parallel" (or a `Parallel`) or "reference".
            output_type: "pt", "np" (bool arrays), "pil" (pictures of mode "1"), or "codes".
            return_dict: False gives the tuple (masks, scores, boxes, codes).

        Returns:
            `SegmentationOutput`; for a list of pictures a list with one each.

        Raises:
            TokenloomError: For any argument that is not as described, an empty phrase, or one without a known word.
        """
        inputs.check_choice("output_type", output_type, OUTPUT_TYPES)
        if mask_tokens is not None:
            self.tokenizer.check_num_tokens(mask_tokens)
        many = isinstance(image, (list, tuple))
        asked = ask_each(list(image), prompt, boxes) if many else [ask(image, prompt, boxes)]  # type: ignore[arg-type]
        words = [self._words(one) for one in asked]
        rule, sampler = self._settings(guidance_scale, temperature, top_k, top_p)
        pictures = self._encode([one.image for one in asked])
        counts, levels = (
            [len(rows) for rows in words],
            self.answers.levels if mask_tokens is None else mask_tokens,
        )
        device = self._execution_device
        condition = PictureWords(
            torch.cat(
                [one.features.to(device).expand(n, -1, -1) for one, n in zip(pictures, counts, strict=True)]
            ),
            torch.cat(words).to(device),
        )
        known = keep = None
        if asked[0].boxes is not None:
            known = torch.cat(
                [self._known(one, picture.size) for one, picture in zip(asked, pictures, strict=True)]
            ).to(device)
            keep = torch.arange(self.answers.length, device=device) < BOX
        answers = self.awake(self.generator).generate(
            condition,
            guidance=rule,
            sampling=sampler,
            seeds=_seeds(seed, counts).to(device),
            known=known,
            keep=keep,
            decode=decode,
            steps=self.answers.steps(levels),
        )
        scores, present = self._scores(answers, condition, known is not None, levels)
        parts = zip(pictures, answers.split(counts), scores.split(counts), present.split(counts), strict=True)
        outputs = [self._output(*part, levels, output_type) for part in parts]
        self.maybe_free_model_hooks()
        made = outputs if return_dict else [(one.masks, one.scores, one.boxes, one.codes) for one in outputs]
        return made if many else made[0]  # type: ignore[return-value]  # typed for the usual call

    def _output(
        self,
        picture: EncodedPicture,
        answers: Tensor,
        scores: Tensor,
        present: Tensor,
        levels: int,
        output_type: str,
    ) -> SegmentationOutput:
        """What is said about one picture."""
        height, width = picture.size
        said, codes = self.answers.split(answers, (max(picture.size), max(picture.size)))
        said, codes = (
            torch.minimum(said.cpu(), torch.tensor([width, height, width, height]).float()),
            codes[:, :levels],
        )
        masks = codes if output_type == "codes" else self._render(codes, picture.size, output_type)
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
            mask_tokens: Codes to decode from; `None` = all that were generated.
        """
        count = len(output.codes)
        sizes = [output.size] * count if target_sizes is None else list(target_sizes)
        if len(sizes) != count:
            raise TokenloomError(f"Expected a target size for each of the {count} phrases, got {len(sizes)}.")
        if not all(isinstance(one, (tuple, list)) and len(one) == 2 and min(one) >= 1 for one in sizes):
            raise TokenloomError(
                f"A target size is (height, width), each at least 1, got {target_sizes!r:.80}."
            )
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

    def _words(self, asked: Asked) -> Tensor:
        if asked.phrases is None:
            return torch.zeros(len(asked.boxes or ()), self.text_tokenizer.max_length, dtype=torch.long)
        phrases = asked.phrases
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

    def _known(self, asked: Asked, size: tuple[int, int]) -> Tensor:
        """Answers that begin with the given boxes (n, 4) of a picture of a size (H, W)."""
        boxes, (height, width) = torch.as_tensor(asked.boxes), size
        limits = torch.tensor([width, height, width, height]).float()
        if bool(((boxes < -0.5) | (boxes > limits + 0.5)).any()):
            raise TokenloomError(
                f"Boxes must lie in the picture of {width}x{height} pixels, got {boxes.tolist()}."
            )
        empty = torch.zeros(len(boxes), self.answers.levels, dtype=torch.long)
        return self.answers.join(boxes, (max(size), max(size)), empty)

    def _scores(
        self, answers: Tensor, condition: PictureWords, known: bool, levels: int
    ) -> tuple[Tensor, Tensor]:
        """Geometric mean of the probabilities of the codes that were predicted, and the probability of a box."""
        logs = self.generator.logits(answers, condition).float().log_softmax(-1)
        chosen = logs.gather(-1, answers[..., None])[..., 0]
        present = 1 - logs[:, 0, self.answers.nothing].exp()
        return chosen[:, BOX * known : self.answers.steps(levels)].mean(1).exp().cpu(), present.cpu()

    def _render(
        self, codes: Tensor, size: tuple[int, int], kind: str
    ) -> Tensor | np.ndarray | list[Image.Image]:
        masks = self.awake(self.tokenizer).decode(codes, None, size, output="mask").cpu()
        if kind == "pt":
            return masks
        arrays = masks.numpy()
        return arrays if kind == "np" else [Image.fromarray(array) for array in arrays]


def _seeds(seed: int | Sequence[int] | None, counts: list[int]) -> Tensor:
    """One seed a phrase (sum of counts,); an int begins anew for each picture."""
    if seed is None or isinstance(seed, int):
        return torch.cat([inputs.make_seeds(0 if seed is None else seed, None, count) for count in counts])
    return inputs.make_seeds(seed, None, sum(counts))


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
