"""What int8 weights change in the bundled model: the loss of its own pictures, and how often another code is likeliest.

    python benchmarks/int8_quality.py --count 32

`compiled-int8` rounds weights only where rows are few; here all of them are rounded, which is the worst case.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import typer

from tokenloom.pipelines.text_to_image import TextToImagePipeline


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix (O, K) as int8 codes and one scale an output hold it."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


@torch.no_grad()
def main(count: Annotated[int, typer.Option(help="Pictures.")] = 32) -> None:
    """Prints losses in nats a token, the divergence of the predictions, and agreement."""
    pipe = TextToImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    words = pipe.encode_prompts(["red apple", "lion", "house", "hamburger"]).repeat(-(-count // 4), 1)[:count]
    exact = pipe.generator
    other = copy.deepcopy(exact)
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(rounded(module.weight))
    codes = exact.generate(words, guidance=2.0, seeds=0)
    first, second = (model.logits(codes, words).log_softmax(-1) for model in (exact, other))
    losses = [-logs.gather(-1, codes[..., None]).mean().item() for logs in (first, second)]
    divergence = (first.exp() * (first - second)).sum(-1).mean().item()
    same = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    typer.echo(
        f"{codes.numel()} codes: {losses[0]:.4f} nats a token in float32, {losses[1]:.4f} in int8; divergence "
        f"{divergence:.5f} nats a token; the likeliest code is the same at {100 * same:.1f} %"
    )


if __name__ == "__main__":
    typer.run(main)
