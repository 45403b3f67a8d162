"""The yardstick of the benchmark: the same model size in raster order, one token a step, by reference
decoding.

The weights are random, which does not change the time a step takes; pictures of the twin mean nothing. Knows
the settings of generators and pipelines. Knows nothing of training.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.prompt_following import Generate, pipeline_caller
from tokenloom.generators import orders
from tokenloom.generators.next_token import NextTokenGenerator


def raster_twin(pipeline: Any, seed: int = 0) -> Any:
    """Builds a pipeline like another one, whose generator predicts one token a step in raster order.

    Width, depth, heads, vocabulary and condition are those of the original; directional heads become one
    head, which reads the deepest state.

    Args:
        pipeline: A `TextToImagePipeline`.
        seed: Of the random weights.

    Returns:
        A pipeline of the same class with the same tokenizers.

    Raises:
        TokenloomError: If the pipeline has no generator of codes.
    """
    original = getattr(pipeline, "generator", None)
    if original is None or not hasattr(original, "order"):
        raise TokenloomError(f"Expected a pipeline with a generator of codes, got {type(pipeline).__name__}.")
    settings = {key: value for key, value in dict(original.config).items() if not key.startswith("_")}
    transformer = dict(settings["transformer_config"])
    transformer["taps"] = [int(transformer["depth"])]
    settings["transformer_config"] = transformer
    settings["order_config"] = orders.build("raster", original.order.layout).to_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = NextTokenGenerator(**settings)
    twin = twin.to(device=original.device, dtype=original.dtype).eval()
    made = type(pipeline)(pipeline.tokenizer, twin, pipeline.text_tokenizer, dict(pipeline.config.sampling))
    made.set_progress_bar_config(disable=True)
    return made


def raster_reference(pipeline: Any, **options: Any) -> Generate:
    """The raster twin by reference decoding, as a function of prompts and seeds; `options` as usual."""
    return pipeline_caller(raster_twin(pipeline), **{**options, "decode": "reference"})
