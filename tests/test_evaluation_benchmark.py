"""The benchmark's arithmetic on a fake clock, real commands, and the report as a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenloom.data.captions import Caption
from tokenloom.errors import TokenloomError
from tokenloom.evaluation import startup
from tokenloom.evaluation.benchmark import Spread, compare_speed, environment, speed_table
from tokenloom.evaluation.pictures import EvaluationSet
from tokenloom.evaluation.report import EvaluationConfig, evaluate
from tokenloom.evaluation.startup import command_table, measure_command


class _FakeTime:
    """A clock that moves only when work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def work(self, name: str, seconds: list[float]):
        remaining = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(remaining)

        return run


def test_pairs_alternate_and_ratios_are_taken_within_pairs() -> None:
    time = _FakeTime()
    # the machine is twice as slow in the third round: the ratio of the pair does not notice
    fast = time.work("a", [9.0, 1.0, 1.0, 2.0])
    slow = time.work("b", [9.0, 3.0, 4.0, 6.0])
    result = compare_speed(
        fast,
        slow,
        2,
        rounds=3,
        warmups=1,
        names=("fast", "slow"),
        clock=lambda: time.now,
        cpu_clock=lambda: time.now / 2,
    )
    assert time.order == ["a", "b"] * 4
    assert result.ours.seconds == [1.0, 1.0, 2.0]
    assert result.other.seconds == [3.0, 4.0, 6.0]
    assert result.ours.cpu_seconds == [0.5, 0.5, 1.0]
    assert result.ratio == Spread(median=3.0, minimum=3.0, low=3.0, high=3.5)
    assert result.ours.seconds_per_image == 0.5
    assert result.as_dict()["other"]["images_per_second"] == 0.5
    table = speed_table([result])
    assert "| fast | 2 | 0.500 | 2.00 |" in table
    assert "3.00 (3.00 to 3.50)" in table


def test_spread_of_one_value_and_bad_counts() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0)
    with pytest.raises(TokenloomError, match="at least 1 round"):
        compare_speed(print, print, rounds=0)


def test_command_is_timed_with_its_memory_and_first_file(tmp_path: Path) -> None:
    file = tmp_path / "first.txt"
    code = f"import pathlib, time; x = bytearray(60_000_000); pathlib.Path({str(file)!r}).touch(); "
    code += "time.sleep(0.2)"
    run = measure_command([sys.executable, "-c", code], watch=file)
    assert run.seconds_to_file is not None
    assert 0 < run.seconds_to_file < run.seconds - 0.1
    assert 60 < run.peak_rss_mb < 2000
    assert "first.txt" in command_table([run])
    with pytest.raises(TokenloomError, match="exists already"):
        measure_command([sys.executable, "-c", ""], watch=file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([sys.executable, "-c", "raise SystemExit('went wrong')"], "went wrong"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "longer than"),
        (["no-such-program-at-all"], "Could not start"),
    ],
)
def test_failing_commands_are_errors(arguments: list[str], words: str) -> None:
    with pytest.raises(TokenloomError, match=words):
        measure_command(arguments, timeout=0.5 if words == "longer than" else 30)


def test_command_that_forgets_its_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="no file"):
        measure_command([sys.executable, "-c", ""], watch=tmp_path / "never.png")


def test_startup_takes_the_median_of_fresh_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3.0, 1.0, 2.0] * 3)
    commands: list[list[str]] = []

    def run(command: list[str], watch: Path | None, name: str) -> startup.CommandRun:
        commands.append(command)
        return startup.CommandRun(name, command, next(seconds), 0.5 if watch else None, 100.0, 0)

    monkeypatch.setattr(startup, "measure_command", run)
    runs = startup.measure_startup("some-model", "a red apple", runs=3)
    assert [run.seconds for run in runs] == [2.0] * 3
    assert [run.seconds_to_file for run in runs] == [None, None, 0.5]
    assert commands[-1][-1] == "some-model"
    assert len(commands) == 9
    assert '| `tokenloom generate "a red apple"` | 2.00 | 0.50 | 100 |' in startup.command_table(runs)


def test_environment_is_plain_json() -> None:
    machine = json.loads(json.dumps(environment()))
    assert machine["torch"] == torch.__version__
    assert machine["torch_threads"] >= 1


class _Tokenizer:
    """Codes are average grey levels of 8 x 8 blocks."""

    image_size = 64
    vocab_size = 256
    bits_per_image = 64 * 8.0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return (
            ((torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 8) + 1) * 127.5).long().flatten(1)
        )

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        grey = codes.view(-1, 1, 8, 8) / 127.5 - 1
        return grey.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


class _Pipeline:
    """Returns the same grey picture for every prompt."""

    tokenizer = _Tokenizer()

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def __call__(
        self, prompts: list[str], seed: list[int], output_type: str, **options: object
    ) -> SimpleNamespace:
        self.calls.append(options)
        return SimpleNamespace(images=torch.full((len(prompts), 3, 64, 64), 0.5))


def _set() -> EvaluationSet:
    random = torch.Generator().manual_seed(0)
    splits = ["train"] * 6 + ["val"] * 2 + ["val_style"] * 2
    captions = tuple(
        Caption(
            file=f"{i}.png", text=f"thing {i}", label=f"thing {i}", style="flat", group="food", split=split
        )
        for i, split in enumerate(splits)
    )
    return EvaluationSet(
        torch.randint(0, 256, (10, 3, 64, 64), generator=random, dtype=torch.uint8), captions
    )


def test_report_writes_what_it_measured(tmp_path: Path) -> None:
    pipeline = _Pipeline()
    config = EvaluationConfig(
        parts=("reconstruction", "copies", "speed"),
        codec_pictures=1,
        rounds=2,
        batch_size=2,
        copies_held_out=4,
    )
    figures = evaluate(pipeline, _set(), tmp_path, config=config, options={"guidance_scale": 3.0})
    written = json.loads((tmp_path / "report.json").read_text())
    assert [row["pictures"] for row in written["reconstruction"]["tokenizer"]] == [2, 6, 1]
    assert {row["codec"] for row in written["reconstruction"]["codecs"]} >= {"jpeg"}
    assert written["copies"]["samples"] == 2
    assert written["copies"]["feature_threshold"] is None  # no judge
    assert [row["ours"]["batch_size"] for row in written["speed"]] == [1, 2]
    assert figures["settings"]["options"] == {"guidance_scale": 3.0}
    assert all(options["guidance_scale"] == 3.0 for options in pipeline.calls)
    assert any(options.get("decode") == "reference" for options in pipeline.calls)
    text = (tmp_path / "report.md").read_text()
    assert "## Reconstruction of unseen concepts" in text
    assert "JPEG at most 512 payload bits" in text
    assert (tmp_path / "nearest.png").exists()


def test_report_of_a_tokenizer_alone(tmp_path: Path) -> None:
    config = EvaluationConfig(parts=("reconstruction",), codec_pictures=0)
    figures = evaluate(_Tokenizer(), _set(), tmp_path, config=config)
    assert figures["reconstruction"]["tokenizer"][0]["bits"] == 512


@pytest.mark.parametrize(
    ("model", "parts", "words"),
    [
        (_Tokenizer(), ("speed",), "needs a pipeline"),
        (_Pipeline(), ("startup",), "by its name or folder"),
        (_Pipeline(), ("following",), "needs a judge"),
        (_Pipeline(), ("folowing",), "following"),
        (object(), ("reconstruction",), "image tokenizer"),
    ],
)
def test_report_says_what_is_missing(
    tmp_path: Path, model: object, parts: tuple[str, ...], words: str
) -> None:
    with pytest.raises(TokenloomError, match=words):
        evaluate(model, _set(), tmp_path, config=EvaluationConfig(parts=parts))
    assert not list(tmp_path.iterdir())


def test_every_public_name_of_the_package_exists() -> None:
    from tokenloom import evaluation

    for name in evaluation.__all__:
        assert getattr(evaluation, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        evaluation.nothing_like_it  # noqa: B018


def test_raster_twin_has_the_same_size_and_is_timed_against_the_model() -> None:
    from tiny_models import tiny_pipeline

    from tokenloom.evaluation.baseline import raster_reference, raster_twin
    from tokenloom.evaluation.prompt_following import pipeline_caller

    pipeline = tiny_pipeline()
    twin = raster_twin(pipeline)
    steps = pipeline.tokenizer.layout.size
    assert twin.generator.order.num_steps == steps > pipeline.generator.order.num_steps
    sizes = [
        sum(p.numel() for p in part.transformer.parameters()) for part in (twin.generator, pipeline.generator)
    ]
    assert sizes[0] == sizes[1]
    prompts, seeds = ["red apple", "lion"], [1, 2]
    ours, other = pipeline_caller(pipeline), raster_reference(pipeline)
    assert other(prompts, seeds).shape == ours(prompts, seeds).shape == (2, 3, 16, 16)
    result = compare_speed(
        lambda: ours(prompts, seeds), lambda: other(prompts, seeds), 2, rounds=2, warmups=1
    )
    assert (
        result.ratio.median > 1
    )  # one token a step without a cache is slower than a diagonal a step with one
    with pytest.raises(TokenloomError, match="generator of codes"):
        raster_twin(_Pipeline())
