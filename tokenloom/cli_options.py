"""What the commands of all media share: consoles, options, the choice of a device. Knows nothing of commands."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)

DeviceOption = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, mps.")]
ResumeOption = Annotated[str | None, typer.Option(help="'latest' or a checkpoint folder.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Change a setting, e.g. --set loop.steps=200.")]


def device_of(device: str) -> str:
    """The device that "auto" or a name stands for.

    Raises:
        TokenloomError: For a device that this machine does not have.
    """
    import torch

    from tokenloom.errors import unknown_name

    accelerator = (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    kinds = {"auto": accelerator, "cpu": "cpu", accelerator: accelerator}
    if device not in kinds:
        raise unknown_name("device", device, kinds, "See `tokenloom doctor` for what this machine has.")
    return kinds[device]
