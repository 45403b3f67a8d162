"""What the commands of all media share: consoles, options, the choice of a device, and the command that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, mps.")]
DecodeOption = Annotated[
    str,
    typer.Option(
        help="How tokens are made: auto, cached, compiled or parallel; the same result at other speeds."
    ),
]
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


def print_trained(entry: str, config: Path, resume: str | None, changes: list[str]) -> None:
    """Trains with a function of `tokenloom.training.run` and prints where the model is."""
    from tokenloom.training import run

    folder = getattr(run, entry)(config, resume=resume, overrides=changes)
    OUT.print(f"trained: {folder}", markup=False)


def add_training(app: typer.Typer, command: str, entry: str, description: str) -> None:
    """Adds a command that trains from a YAML file.

    Args:
        app: Where to.
        command: Its name.
        entry: The function of `tokenloom.training.run`.
        description: What `--help` says.
    """

    @app.command(command, help=description)
    def train(config: ConfigArgument, resume: ResumeOption = None, changes: SetOption = []) -> None:  # noqa: B006
        print_trained(entry, config, resume, changes)
