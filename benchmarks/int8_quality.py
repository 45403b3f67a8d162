"""What int8 changes in the bundled model: the loss of its own pictures, and how often another code is likeliest.

    python benchmarks/int8_quality.py --count 32

`compiled-int8` rounds weights, and `compiled-w8a8` rows as well, only where rows are few; here all of them are rounded, which is
the worst case.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import typer

from tokenloom.pipelines.text_to_image import TextToImagePipeline


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Rows (..., K) as int8 codes and one scale a row hold them."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (values / scale).round().clamp(-127, 127) * scale


def round_rows(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook that rounds what a layer is given."""
    return (rounded(given[0]), *given[1:])


@torch.no_grad()
def main(count: Annotated[int, typer.Option(help="Pictures.")] = 32) -> None:
    """Prints losses in nats a token, the divergence of the predictions, and agreement."""
    pipe = TextToImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    words = pipe.encode_prompts(["red apple", "lion", "house", "hamburger"]).repeat(-(-count // 4), 1)[:count]
    exact = pipe.generator
    other = copy.deepcopy(exact)
    layers = [module for module in other.modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers:
        layer.weight.copy_(rounded(layer.weight))
    codes = exact.generate(words, guidance=2.0, seeds=0)
    first = exact.logits(codes, words).log_softmax(-1)
    loss = -first.gather(-1, codes[..., None]).mean().item()
    typer.echo(f"{codes.numel()} codes: {loss:.4f} nats a token in float32")
    for form in ("int8", "w8a8"):
        hooks = [layer.register_forward_pre_hook(round_rows) for layer in layers if form == "w8a8"]
        second = other.logits(codes, words).log_softmax(-1)
        loss = -second.gather(-1, codes[..., None]).mean().item()
        divergence = (first.exp() * (first - second)).sum(-1).mean().item()
        same = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
        typer.echo(
            f"{form}: {loss:.4f} nats a token; divergence {divergence:.5f} nats a token; the likeliest code is the same at "
            f"{100 * same:.1f} %"
        )
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    typer.run(main)
