"""Encoding and decoding of LlamaGen's VQ-16 beside the official code, on the same random weights.

    git clone https://github.com/FoundationVision/LlamaGen
    python benchmarks/image_tokenizer.py LlamaGen --size 256 -o image_tokenizer.json

Runs in turns in one process; before any ratio is printed, codes must be equal and pictures agree. The official repository
is given by its path and is not part of tokenloom.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tokenloom.checkpoints import from_official
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.benchmark import compare_speed, environment
from tokenloom.media import write_atomically

_SOURCE = "tokenizer/tokenizer_image/vq_model.py"
_CONFIG = {"codebook_size": 16384, "codebook_embed_dim": 8}


def official(repository: Path) -> Any:
    """The official VQ-16 with random weights; the codebook is spread so that codes differ."""
    path = repository / _SOURCE
    if not path.is_file():
        raise TokenloomError(f"{repository} is no checkout of LlamaGen: it has no {_SOURCE}.")
    spec = importlib.util.spec_from_file_location("official_vq_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.VQ_models["VQ-16"](**_CONFIG).eval()


@torch.no_grad()
def main(
    repository: Annotated[Path, typer.Argument(help="A checkout of FoundationVision/LlamaGen.")],
    size: Annotated[int, typer.Option(help="Side of the pictures.")] = 256,
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 7,
    dtype: Annotated[str, typer.Option(help="Number format of ours: float32 or bfloat16.")] = "float32",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")] = None,
) -> None:
    """Times both and prints the ratios."""
    theirs = official(repository)
    exact = from_official(
        "llamagen_vq", theirs.state_dict(), {"encoder_ch_mult": [1, 1, 2, 2, 4], **_CONFIG}
    ).eval()
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    _, _, (_, _, codes) = theirs.encode(pixels)
    shape = (1, 8, size // 16, size // 16)
    reference = theirs.decode_code(codes, shape)
    if not torch.equal(exact.encode(pixels).flatten(), codes.flatten()):
        raise TokenloomError("The codes differ from the official ones, so no time is compared.")
    plain = exact.decode(codes.view(1, -1), size=(size, size))
    ours = exact.to(dtype=getattr(torch, dtype), memory_format=torch.channels_last)
    fast = ours.decode(codes.view(1, -1), size=(size, size)).float()
    figures: dict[str, Any] = {
        "size": size,
        "dtype": dtype,
        "difference": float((plain - reference).abs().max()),
        "difference_fast": float((fast - reference).abs().max()),
        "range": float(reference.abs().max()),
        "environment": environment(),
    }
    media = pixels.to(getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    names = (f"tokenloom, channels last, {dtype}", "official, float32")
    work = {
        "encode": (lambda: ours.encode(media), lambda: theirs.encode(pixels)),
        "decode": (
            lambda: ours.decode(codes.view(1, -1), size=(size, size)),
            lambda: theirs.decode_code(codes, shape),
        ),
    }
    for part, (mine, other) in work.items():
        result = compare_speed(mine, other, rounds=rounds, warmups=1, names=names)
        figures[part] = result.as_dict()
        typer.echo(
            f"{part}: {1e3 * result.ours.spread.median:.0f} ms, official {1e3 * result.other.spread.median:.0f} ms, "
            f"{result.ratio.median:.2f} times as fast"
        )
    typer.echo(f"largest difference of pictures: {figures['difference_fast']:.2e} of {figures['range']:.2f}")
    if output is not None:
        write_atomically(output, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
