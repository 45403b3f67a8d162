"""Golden fixtures of the published generators: loading them, and the checks that all families share."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tokenloom.checkpoints import from_official
from tokenloom.generators import CaptionFeatures, Generator, Guidance, Sampling, guide

FIXTURES = Path(__file__).parent / "fixtures" / "generators"
GREEDY = Sampling(temperature=0)


@lru_cache
def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a fixture."""
    with safe_open(FIXTURES / f"{name}_tiny.safetensors", "pt") as file:
        data = {key: file.get_tensor(key) for key in file.keys()}
        return data, json.loads(file.metadata()["meta"])


def state_of(name: str) -> dict[str, Tensor]:
    """The official state dict."""
    return {key[6:]: value for key, value in read(name)[0].items() if key.startswith("state.")}


@lru_cache
def build(family: str, name: str) -> Any:
    """The generator of a fixture."""
    return from_official(family, state_of(name), read(name)[1]["config"])


def condition_of(name: str) -> Any:
    """Labels, or caption features with their mask, or nothing."""
    data = read(name)[0]
    if "input.emb_masks" in data:
        return CaptionFeatures(data["input.cond"], data["input.emb_masks"])
    return data.get("input.cond")


def null_of(model: Generator, name: str) -> Any:
    """The null condition that the official code puts beside the condition of a fixture."""
    return model.condition.null_like(condition_of(name), torch.device("cpu"))


def close(got: Tensor, want: Tensor) -> bool:
    """Within 2e-4 of the largest value."""
    return bool((got - want).abs().max() <= 2e-4 * want.abs().max())


@torch.no_grad()
def guided_steps_match(model: Generator, name: str, codes: Tensor, guidance: Guidance, prefix: str) -> None:
    """Compares what the official sampler saw at every step with our guided teacher-forced logits of its own codes."""
    data = read(name)[0]
    conditional = model.logits(codes, condition_of(name))
    null = model.logits(codes, null_of(model, name)) if guidance.enabled else conditional
    made = 0
    for step, place in enumerate(model.order.slices):
        progress = step / (model.order.num_steps - 1)
        scale = guidance.at(progress, step=step, made=made, count=place.stop - place.start)
        guided = guide(conditional, null, scale)
        want = data[f"output.{prefix}_step_logits.{step}"]
        assert close(guided[:, model.order.permutation[place]], want), step
        made += want.shape[1]
