"""Tiny random models of the real classes, for tests of what stands around them."""

from __future__ import annotations

import torch

from tokenloom import (
    ImageVQTokenizer,
    Layout,
    NextNeighborGenerator,
    TextToImagePipeline,
    WordTokenizer,
    orders,
)

WORDS = ["apple", "detailed", "lion", "red", "simple"]
LENGTH = 6  # words of a prompt


def tiny_tokenizer(seed: int = 0) -> ImageVQTokenizer:
    """16x16 pictures to a 4x4 grid of 64 codes."""
    torch.manual_seed(seed)
    options = {"levels": [4, 4, 4]}
    tokenizer = ImageVQTokenizer(16, 2, 2, 16, 1, 1, 2, quantizer_options=options)
    with torch.no_grad():  # random weights give nearly one colour; this spreads the codes and the pixels
        tokenizer.to_code.weight.mul_(4)
        tokenizer.paint.weight.mul_(4)
    return tokenizer.eval()


def tiny_generator(seed: int = 0) -> NextNeighborGenerator:
    """A generator for the codes of `tiny_tokenizer`."""
    torch.manual_seed(seed)
    generator = NextNeighborGenerator(
        orders.neighbors(Layout.grid(4, 4)).to_config(),
        64,
        {"width": 16, "heads": 2, "depth": 2},
        {"kind": "words", "vocabulary": len(WORDS) + 2, "length": LENGTH},
    )
    with torch.no_grad():  # random heads are nearly uniform; these prefer some codes, depending on the prompt
        for head in generator.heads:
            head.weight.mul_(50)
    return generator.eval()


def tiny_pipeline(seed: int = 0, **sampling: object) -> TextToImagePipeline:
    """A pipeline of tiny random components; prompts may use `WORDS`."""
    words = WordTokenizer(WORDS, LENGTH)
    pipe = TextToImagePipeline(tiny_tokenizer(seed), tiny_generator(seed), words, sampling=sampling)
    pipe.set_progress_bar_config(disable=True)
    return pipe
