"""The command line: files, messages, exit codes. Models are tiny and random."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_pipeline
from typer.testing import CliRunner, Result

import tokenloom
from tokenloom import TextToImagePipeline, cli, doctor, models
from tokenloom.errors import TokenloomError

PROMPT = "a simple picture of a red apple"
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tiny_pipeline(guidance_scale=2.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder, on the CPU."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return invoke


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def assert_one_line_error(result: Result, *parts: str) -> None:
    """Exit code 2, one line on stderr that holds `parts`, and no traceback."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


# generate


def test_one_picture(run: Run, model: str, tmp_path: Path) -> None:
    result = run("generate", PROMPT, "-o", "lion.png", "--seed", 7, "--model", model)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "lion.png (seed 7)"
    assert written(tmp_path) == ["lion.png"]
    pipe = TextToImagePipeline.from_pretrained(model)
    assert np.array_equal(np.array(Image.open("lion.png")), np.array(pipe(PROMPT, seed=7).images[0]))


def test_several_pictures_and_their_sheet(run: Run, model: str, tmp_path: Path) -> None:
    result = run(
        "generate", PROMPT, "-o", "out/lion.png", "-n", 4, "--seed", 7, "--columns", 4, "--model", model
    )
    assert result.exit_code == 0, result.output
    assert written(tmp_path) == ["lion-1.png", "lion-2.png", "lion-3.png", "lion-4.png", "lion.png"]
    assert [int(seed) for seed in re.findall(r"seed (\d+)", result.stdout)] == [7, 8, 9, 10]
    page = Image.open("out/lion.png")
    assert page.width > 4 * 16
    for index in range(4):
        tile = page.crop((8 + index * 24, 8, 24 + index * 24, 24))
        assert np.array_equal(np.array(tile), np.array(Image.open(f"out/lion-{index + 1}.png")))


def test_more_pictures_than_one_batch_are_the_same_pictures(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("generate", PROMPT, "-o", "a.png", "-n", 5, "--seed", 1, "--model", model).exit_code == 0
    monkeypatch.setattr(cli, "_BATCH", 2)
    assert run("generate", PROMPT, "-o", "b.png", "-n", 5, "--seed", 1, "--model", model).exit_code == 0
    first, second = (np.array(Image.open(name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(first - second).max() <= 1


def test_a_printed_seed_gives_the_same_picture(run: Run, model: str) -> None:
    first = run("generate", PROMPT, "-o", "a.png", "--model", model)
    seed = re.findall(r"seed (\d+)", first.stdout)[0]
    assert run("generate", PROMPT, "-o", "b.png", "--seed", seed, "--model", model).exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_scale_and_steps(run: Run, model: str, tmp_path: Path) -> None:
    result = run("generate", PROMPT, "--scale", 3, "--steps", "steps.png", "--seed", 1, "--model", model)
    assert result.exit_code == 0, result.output
    assert written(tmp_path) == ["out.png", "steps.png"]
    assert Image.open("out.png").size == (48, 48)
    assert Image.open("steps.png").width > 2 * 48


def test_inpainting(run: Run, model: str) -> None:
    Image.new("RGB", (32, 32), (200, 0, 0)).save("i.png")
    Image.new("L", (32, 32), 0).save("m.png")
    arguments = ("generate", PROMPT, "--image", "i.png", "--mask", "m.png", "--model", model, "-o")
    assert run(*arguments, "a.png", "--seed", 1).exit_code == 0
    assert run(*arguments, "b.png", "--seed", 2).exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()  # everything was kept
    Image.new("L", (31, 32), 0).save("m.png")
    assert_one_line_error(run(*arguments, "c.png"), "31x32", "Resize the mask")
    assert not Path("c.png").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["", "-o", "x.png"], ["prompt is empty"]),
        ([PROMPT, "-n", "0"], ["--count", "at least 1", "got 0"]),
        ([PROMPT, "-n", "-4"], ["--count", "got -4"]),
        ([PROMPT, "--scale", "0"], ["--scale"]),
        ([PROMPT, "-n", "4", "--columns", "0"], ["--columns"]),
        ([PROMPT, "--seed", str(2**64)], ["seed", "2**64"]),
        ([PROMPT, "--seed", "-1"], ["seed", "-1"]),
        ([PROMPT, "--model", "tokenloom-emoji-65"], ["Unknown model", "'tokenloom-emoji-65'"]),
        ([PROMPT, "--model", "./nothing"], ["no such folder"]),
        ([PROMPT, "--decode", "cachd"], ["cached"]),
        ([PROMPT, "--temperature", "-1"], ["temperature"]),
        ([PROMPT, "--top-p", "3"], ["top_p"]),
        ([PROMPT, "--device", "gpu"], ["Unknown device", "cpu"]),
        ([PROMPT, "-o", "x.pgn"], ["Did you mean '.png'"]),
        ([PROMPT, "-o", "."], ["folder"]),
        ([PROMPT, "-o", "file/x.png"], ["cannot be written", "not a folder"]),
        ([PROMPT, "--steps", "file/x.png"], ["cannot be written"]),
        ([PROMPT, "--image", "missing.png", "--mask", "missing.png"], ["missing.png"]),
    ],
)
def test_bad_arguments(run: Run, model: str, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    Path("file").write_text("in the way")
    extra = [] if "--model" in arguments else ["--model", model]
    assert_one_line_error(run("generate", *arguments, *extra), *parts)
    assert written(tmp_path) == ["file"]


def test_very_long_prompts_and_unknown_words(run: Run, model: str) -> None:
    assert run("generate", "red apple " * 1000, "--model", model).exit_code == 0
    assert run("generate", "zyzzyva", "--model", model).exit_code == 0


def test_damaged_weights(run: Run, model: str, tmp_path: Path) -> None:
    TextToImagePipeline.from_pretrained(model).save_pretrained("m")
    weights = Path("m/generator/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_line_error(run("generate", PROMPT, "--model", "m"), "damaged", str(weights))
    assert not Path("out.png").exists()


# Ctrl-C


def test_ctrl_c_while_generating(model: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from tokenloom import cli\n"
        "from tokenloom.pipelines.text_to_image import TextToImagePipeline\n"
        "render = TextToImagePipeline._render\n"
        "def interrupted(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return render(*arguments)\n"
        "TextToImagePipeline._render = interrupted\n"
        f"sys.argv = ['tokenloom', 'generate', {PROMPT!r}, '-n', '3', '--model', {model!r}]\n"
        "cli.app()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Stopped. Nothing was written")
    assert "Traceback" not in done.stderr
    assert written(tmp_path) == []


@pytest.mark.parametrize("command", ["train", "train-tokenizer"])
def test_ctrl_c_while_training_says_how_to_go_on(
    run: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenloom.training import run as training

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_generator", stop)
    monkeypatch.setattr(training, "train_tokenizer", stop)
    result = run(command, "config.yaml")
    assert result.exit_code == 130
    assert "--resume latest" in result.stderr


# reconstruct


def test_reconstruct_prints_bits_and_psnr(run: Run, model: str, tmp_path: Path) -> None:
    photo = Path(tokenloom.__file__).parent / "assets" / "photos" / "cat.jpg"
    result = run("reconstruct", photo, "-o", "r.png", "--model", model)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        r"r\.png: PSNR -?\d+\.\d\d dB at 0\.\d{3} bits per pixel \(451x300 pixels, .*\)\n", result.stdout
    )
    assert Image.open("r.png").size == Image.open(photo).size
    fitted = run("reconstruct", photo, "-o", "f.png", "--fit", "--model", model)
    assert "1 tile, 96 bits" in fitted.stdout
    assert Image.open("f.png").size == (16, 16)


def save_odd_pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Writes one picture of every odd kind; returns their names and sizes."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (20_000, 3), (3, 200, 100)).save(folder / "wide.png")
    Image.fromarray(noise, "RGBA").save(folder / "alpha.png")
    Image.fromarray(noise[..., :3]).quantize(7).save(folder / "palette.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(noise, "CMYK").save(folder / "cmyk.jpg")
    frames = [Image.new("RGB", (30, 20), (value, 0, 0)) for value in (10, 200)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    sizes = dict.fromkeys(("alpha.png", "palette.png", "deep.png", "cmyk.jpg", "moving.gif"), (30, 20))
    return {**sizes, "pixel.png": (1, 1), "wide.png": (20_000, 3)}


def test_reconstruct_takes_odd_pictures(run: Run, model: str, tmp_path: Path) -> None:
    for name, size in save_odd_pictures(tmp_path).items():
        result = run("reconstruct", name, "-o", "r.png", "--model", model)
        assert result.exit_code == 0, (name, result.output)
        assert Image.open("r.png").size == size


def test_reconstruct_refuses_what_is_no_picture(run: Run, model: str, tmp_path: Path) -> None:
    Path("text.png").write_text("no picture at all")
    Path("empty.png").touch()
    Path("folder").mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:60])
    for name in ("text.png", "empty.png", "folder", "cut.png", "missing.png"):
        assert_one_line_error(run("reconstruct", name, "-o", "r.png", "--model", model), name)
    assert_one_line_error(
        run("reconstruct", "text.png", "-o", "text.png/r.png", "--model", model), "not a folder"
    )
    assert not Path("r.png").exists()


# The rest


def test_help_is_quick_and_names_every_command() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tokenloom.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.perf_counter() - start < 1.5
    assert done.returncode == 0, done.stderr
    for name in (
        "generate",
        "reconstruct",
        "models",
        "doctor",
        "train",
        "train-tokenizer",
        "data",
        "evaluate",
        "train-judge",
        "demo",
    ):
        assert name in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == f"tokenloom {tokenloom.__version__}"


def test_unknown_commands_and_options_are_usage_errors(run: Run) -> None:
    for arguments in (
        ["generat", PROMPT],
        ["generate"],
        ["generate", PROMPT, "--sede", "1"],
        ["generate", PROMPT, "-n", "x"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_models_lists_what_is_bundled(run: Run, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(models, "_ASSETS", Path(model).parent)
    result = run("models")
    assert result.exit_code == 0
    assert re.match(r"tiny: \d+\.\d MB", result.stdout)


def test_doctor_finds_this_machine_sound(run: Run, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(models, "_ASSETS", Path(model).parent)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for part in (
        "tokenloom:",
        "packages:",
        "threads:",
        "compiler:",
        "cpu:",
        "numerics cpu:",
        "noise equal",
        "tiny:",
    ):
        assert part in result.stdout


def test_doctor_reports_damage_and_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    TextToImagePipeline.from_pretrained(model).save_pretrained(tmp_path / "assets" / "tiny")
    weights = tmp_path / "assets" / "tiny" / "tokenizer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(models, "_ASSETS", tmp_path / "assets")

    def broken() -> Any:
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "_device_names", broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert "RuntimeError: no driver" in result.stdout
    assert f"{weights} are damaged" in result.stdout


def test_demo_writes_a_sheet_and_a_photo(run: Run, model: str, tmp_path: Path) -> None:
    result = run("demo", "--output", "here", "--model", model)
    assert result.exit_code == 0, result.output
    assert written(tmp_path) == ["photo.png", "sheet.png"]
    assert "none picked" in result.stdout
    assert str(tmp_path / "here") in result.stdout


@pytest.mark.parametrize("command", ["train", "train-tokenizer"])
def test_training_refuses_a_config_that_is_not_there(run: Run, command: str) -> None:
    assert_one_line_error(run(command, "missing.yaml"), "missing.yaml")


def test_data_emoji_refuses_a_folder_in_use(run: Run, tmp_path: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep me")
    assert_one_line_error(run("data", "emoji", "out"), "out")
    assert written(tmp_path) == ["mine.txt"]


def test_errors_keep_their_brackets(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenloom import media

    def fail(*arguments: object) -> None:
        raise TokenloomError("expected [red] or\n[/] something")

    monkeypatch.setattr(media, "check_output", fail)
    assert_one_line_error(run("generate", PROMPT, "--model", model), "expected [red] or [/] something")


@pytest.mark.parametrize("command", re.findall(r"(?m)^tokenloom ([a-z-]+)", SHELL))
def test_commands_of_the_readme_exist(run: Run, command: str) -> None:
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize("target", re.findall(r"(?m)^make ([a-z]+)", SHELL))
def test_make_targets_of_the_readme_exist(target: str) -> None:
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in SHELL
