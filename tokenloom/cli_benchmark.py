"""The command `tokenloom benchmark`. Knows nothing of how things are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli_options import ERR, OUT, DeviceOption, SetOption, device_of


def benchmark(
    families: Annotated[
        str,
        typer.Option(help="Comma-separated: llamagen, var, nar or published files of these; picture, sound."),
    ] = "llamagen,var,nar",
    official: Annotated[
        Path | None, typer.Option(help="Folder of official checkouts (LlamaGen, VAR, NAR) to compare with.")
    ] = None,
    rungs: Annotated[str, typer.Option(help="Comma-separated decode rungs.")] = "cached,compiled",
    batch: Annotated[int, typer.Option(help="Samples a call.")] = 1,
    rounds: Annotated[int, typer.Option(help="Pairs that count.")] = 5,
    dtype: Annotated[str, typer.Option(help="Number format: float32, bfloat16, float16.")] = "float32",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for benchmark.json, benchmark.md and a figure.")
    ] = Path("benchmark"),
    detokenize: Annotated[bool, typer.Option(help="Also decode to pixels.")] = True,
    changes: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
) -> None:
    """Measure decode rungs beside each other, or beside official code on the same random weights.

    Sides run in turns in one process; no ratio is printed unless both pick the same codes. --set changes arguments of the
    official constructors, e.g. --set n_layer=2.
    """
    from tokenloom.evaluation import speed
    from tokenloom.evaluation.tables import plain
    from tokenloom.media import write_atomically
    from tokenloom.training.config import read_values

    values = read_values(None, changes)
    config = speed.SpeedConfig(
        families=tuple(name.strip() for name in families.split(",")),
        rungs=tuple(name.strip() for name in rungs.split(",")),
        batch=batch,
        rounds=rounds,
        device=device_of(device),
        dtype=dtype,
        official=official,
        detokenize=detokenize,
        overrides=tuple(dict(values or {}).items()),
    )
    report = speed.speed_benchmark(config, log=lambda line: ERR.print(line, markup=False))
    tables = speed.benchmark_table(report) + "\n" + speed.segments_table(report)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "benchmark.json", json.dumps(plain(report), indent=1) + "\n")
    write_atomically(output / "benchmark.md", tables)
    OUT.print(tables, markup=False)
    if speed.draw_figure(report, output / "benchmark.svg") is None:
        ERR.print("No figure: matplotlib is not installed.", markup=False)
    OUT.print(output / "benchmark.json", markup=False)
