"""The speed benchmark: costs by hand, equal codes before any ratio, official code from a folder, the command as a whole."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_generators import make
from torch import Tensor
from typer.testing import CliRunner

from tokenloom.cli import app
from tokenloom.errors import TokenloomError
from tokenloom.evaluation import roofline, speed, speed_cells
from tokenloom.evaluation.official_code import Official
from tokenloom.generators import NextScaleGenerator, NextTokenGenerator, orders
from tokenloom.layouts import Layout

TINY = {
    "n_layer": 1,
    "dim": 32,
    "n_head": 2,
    "block_size": 4,
    "vocab_size": 24,
    "num_classes": 5,
    "multiple_of": 16,
}
FAKE_GPT = """
import dataclasses, torch
@dataclasses.dataclass
class ModelArgs:
    n_layer: int; n_head: int; dim: int; block_size: int; vocab_size: int; num_classes: int; cls_token_num: int
    model_type: str
class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, d, v = args, args.dim, args.vocab_size
        shapes = {"tok_embeddings.weight": (v, d), "cls_embedding.embedding_table.weight": (args.num_classes + 1, d)}
        for i in range(args.n_layer):
            a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
            shapes |= {f"{a}.wqkv.weight": (3 * d, d), f"{a}.wo.weight": (d, d), f"{f}.w2.weight": (d, 96)}
            shapes |= {f"{f}.w1.weight": (96, d), f"{f}.w3.weight": (96, d)}
            shapes |= {f"layers.{i}.attention_norm.weight": (d,), f"layers.{i}.ffn_norm.weight": (d,)}
        shapes |= {"norm.weight": (d,), "output.weight": (v, d)}
        self.names = list(shapes)
        made = [torch.randn(s) * 0.5 if n != "output.weight" else torch.zeros(s) for n, s in shapes.items()]
        self.all = torch.nn.ParameterList(made)
    def state_dict(self):
        return dict(zip(self.names, (each.data for each in self.all)))
"""
FAKE_LOOP = """
from tokenloom import Sampling
from tokenloom.checkpoints import from_official
CALLS = []
def generate(model, cond, count, cfg_scale, temperature, top_k, top_p, sample_logits):
    CALLS.append(sample_logits)
    ours = from_official("llamagen", model.state_dict(), {**vars(model.args)})
    codes = ours.generate(cond, guidance=cfg_scale, sampling=Sampling(0), seeds=0, decode="reference")
    return codes.int() + WRONG
"""


def checkout(folder: Path, wrong: int = 0) -> Path:
    """A repository that is called like LlamaGen."""
    models = folder / "LlamaGen" / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(FAKE_GPT)
    (models / "generate.py").write_text(f"WRONG = {wrong}\n{FAKE_LOOP}")
    return folder


def tiny_cell(**changes: object) -> speed_cells.Cell:
    cell = speed_cells.make_cell("llamagen", None, TINY, detokenize=False)
    return replace(cell, **changes)  # type: ignore[arg-type]


def test_costs_are_those_of_the_plan() -> None:
    """Two blocks of width 24, one prefix row, six tokens of 12 codes, counted by hand."""
    model = make(NextTokenGenerator, orders.raster(Layout.grid(2, 3)), "class")
    block = 24 * 72 + 24 * 24 + 24 * 64 + 32 * 24 + 2 * 24  # qkv, out, gate and up, down, norms
    costs = roofline.decode_costs(model, batch=3, guided=True)
    assert len(costs) == 6
    for step, cost in enumerate(costs):
        length, rows = step + 1, 6
        assert cost.bytes == 4 * (2 * block + 12 * 24) + 2 * rows * 24 * 2 * 4 * (length + 1) + 4 * 3 * 12
        assert cost.flops == 2 * 2 * block * rows + 2 * 12 * 24 * 3 + 4 * 24 * length * 2 * rows
    bound = roofline.lower_bound(costs, roofline.Machine(bandwidth=1e9, flops=1e30))
    assert bound["seconds"] == pytest.approx(sum(cost.bytes for cost in costs) / 1e9)
    assert bound["bound_by_reading"] == 1
    assert roofline.lower_bound(costs, roofline.Machine(1e30, 1e9))["bound_by_reading"] == 0


def test_the_machine_is_measured() -> None:
    machine = roofline.measure_machine(rounds=1, read_bytes=1 << 20, side=64)
    assert 1e7 < machine.bandwidth < 1e14 and 1e6 < machine.flops < 1e16
    with pytest.raises(TokenloomError, match="at least 1"):
        roofline.measure_machine(rounds=0)


def test_no_time_is_compared_before_codes_are_equal(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="cached picks other codes than official at 8 of 8 places"):
        speed.speed_benchmark(
            speed.SpeedConfig(
                ("llamagen",),
                ("cached",),
                2,
                1,
                official=checkout(tmp_path, 1),
                detokenize=False,
                overrides=tuple(TINY.items()),
            )
        )


def test_official_code_is_run_and_forgotten(tmp_path: Path) -> None:
    before = list(sys.path)
    config = speed.SpeedConfig(
        ("llamagen",),
        ("cached", "compiled", "compiled-int8"),
        2,
        2,
        official=checkout(tmp_path),
        detokenize=False,
        overrides=tuple(TINY.items()),
    )
    lines: list[str] = []
    report = speed.speed_benchmark(config, lines.append)
    assert sys.path == before and not any(name.startswith("autoregressive") for name in sys.modules)
    assert [record["rung"] for record in report["records"]] == list(config.rungs)
    assert [record["equal_codes"] for record in report["records"]] == [8, 8, 0]
    assert {record["against"] for record in report["records"]} == {"official"} and len(lines) == 3
    for record in report["records"]:
        assert record["tokens"] == record["steps"] == 4 and record["first_call_seconds"] > 0
        assert set(record["segments"]) == {*speed.SEGMENTS, "rest"} and record["segments"]["detokenize"] == 0
        assert record["segments"]["decode"] > 0 and record["segments"]["sample"] > 0
        assert 0 < record["roofline"] and record["peak_memory_mb"] > 1
        assert record["tokens_per_second"] == pytest.approx(4 * record["samples_per_second"])
    assert "4 |" in speed.benchmark_table(report) and "detokenize" in speed.segments_table(report)


def test_missing_checkouts_and_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="no checkout of VAR"):
        speed_cells.make_cell("var", tmp_path)
    with pytest.raises(TokenloomError, match="llamagen"):
        speed_cells.resolve_family("lamagen")
    with pytest.raises(TokenloomError, match="class-conditional"):
        speed_cells.resolve_family("t2i_XL_stage1_256.pt")
    assert speed_cells.resolve_family("var_d20.pth") == "var_d20.pth"
    with pytest.raises(TokenloomError, match="at least two rungs"):
        speed.measure_cell(tiny_cell(), speed.SpeedConfig(rungs=("cached",)))


def test_random_models_have_the_shapes_of_the_official_ones() -> None:
    """VAR and NAR in small: what is drawn here has the state dict that a checkpoint has."""
    sizes = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_nums": [1, 2], "vocab_size": 16, "Cvae": 8}
    var = speed_cells.make_cell("var", None, sizes, detokenize=False)
    assert isinstance(var.generator, NextScaleGenerator) and var.sampling.nucleus == "ascending"
    assert var.guidance.at(1.0) == 2.5 and var.generator.plan.capacity == 5
    nar = speed_cells.make_cell("nar", None, TINY, detokenize=False)
    assert nar.generator.transformer.config.taps == (1, 2) and len(nar.generator.heads) == 2
    modulated = [value for name, value in var.generator.named_parameters() if "modulation.weight" in name]
    assert modulated and all(bool(value.any()) for value in modulated)


def test_the_bundled_picture_is_a_cell() -> None:
    cell = speed_cells.make_cell("picture")
    assert cell.whole and speed.check_equal(cell, cell.labels(1), ["cached", "compiled"]) == 64


def test_a_side_that_picks_other_codes_is_named() -> None:
    cell = tiny_cell()
    labels = cell.labels(2)

    def wrong(given: Tensor) -> Tensor:
        return torch.zeros(len(given), 4, dtype=torch.long) - 1

    bad = replace(cell, official=Official({}, wrong, wrong))
    with pytest.raises(TokenloomError, match="8 of 8"):
        speed.check_equal(bad, labels, ["cached"])
    assert speed.check_equal(cell, labels, ["cached", "compiled", "reference"]) == 8


def test_the_command_writes_json_and_tables(tmp_path: Path) -> None:
    options = [item for name, value in TINY.items() for item in ("--set", f"{name}={value}")]
    arguments = [
        "benchmark",
        "--families",
        "llamagen",
        "--rungs",
        "cached,compiled",
        "--rounds",
        "1",
        "--no-detokenize",
    ]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "-o", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "benchmark.json").read_text())
    (record,) = report["records"]
    assert (
        record["model"] == "c2i_B_256.pt" and record["rung"] == "compiled" and record["against"] == "cached"
    )
    assert report["environment"]["torch"] and record["bound"]["machine_bandwidth"] > 0
    assert "of the roofline" in (tmp_path / "benchmark.md").read_text()
