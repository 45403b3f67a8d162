"""Converting published files: containers, families, settings, safety, and what is refused."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import read, state_of
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from tokenloom import TokenloomError, cli, models
from tokenloom.checkpoints import convert, from_official, to_official
from tokenloom.checkpoints.convert import convert_checkpoint, load_converted
from tokenloom.checkpoints.files import unwrap
from tokenloom.checkpoints.recognise import guess_families, infer

FAMILIES = {
    "dar_gpt": ("llamagen", "dar"),
    "llamagen_c2i": ("llamagen", "dar"),
    "llamagen_t2i": ("llamagen",),
    "mvar": ("mvar",),
    "nar_c2i": ("nar",),
    "nar_t2i": ("nar",),
    "nar_video": ("nar_video",),
    "nbp_fp": ("nbp",),
    "nbp_hybrid": ("nbp",),
    "par_16x": ("par",),
    "par_4x": ("par",),
    "var": ("var",),
}
SETTINGS = ["n_head=4", "block_size=16"]


class Foreign:
    """An object that no file of weights should hold."""


def official(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Official weights and constructor arguments of a fixture."""
    return dict(state_of(name)), dict(read(name)[1]["config"])


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


Run = Callable[..., Result]


@pytest.fixture
def run(desk: Path) -> Run:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])

    return invoke


def assert_refused(result: Result, *parts: str) -> None:
    """One line on stderr with `parts`, exit code 2, and nothing written."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    assert not Path("out").exists()
    assert list(Path().glob(".out*")) == []


# What is found


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_recognised_by_their_names(name: str) -> None:
    state, config = official(name)
    assert guess_families(state) == FAMILIES[name]
    shown = infer(FAMILIES[name][0], state)
    assert {key: config.get(key, value) for key, value in shown.items()} == shown


def test_the_rotary_table_and_the_mask_tell_families_apart() -> None:
    state, config = official("llamagen_c2i")
    table = torch.zeros(17, 8, 2)
    table[1:, :, 0] = 1
    assert guess_families(state | {"freqs_cis": table}) == ("llamagen",)
    assert guess_families(state | {"freqs_cis": table.flip(0)}) == ("dar",)
    shown = infer("llamagen", state | {"freqs_cis": table})
    assert (shown["n_head"], shown["block_size"]) == (config["n_head"], config["block_size"])
    state = official("var")[0]
    del state["attn_bias_for_masking"]
    assert guess_families(state) == ("var", "mvar")
    assert guess_families(state, ["trainer", "mvar_wo_ddp"]) == ("mvar",)
    assert guess_families({"some.weight": torch.zeros(1)}) == ()


@pytest.mark.parametrize(
    ("wrapped", "containers"),
    [
        (lambda state: state, []),
        (lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, ["model"]),
        (lambda state: {"model": {"name": "x", "sd": state}}, ["model", "sd"]),
        (lambda state: {"trainer": {"var_wo_ddp": state}, "epoch": 3}, ["trainer", "var_wo_ddp"]),
        (lambda state: {"mvar_wo_ddp": state}, ["mvar_wo_ddp"]),
        (
            lambda state: {"model_state_dict": {f"module.{k}": v for k, v in state.items()}},
            ["model_state_dict"],
        ),
        (lambda state: {"module": {f"_orig_mod.module.{k}": v for k, v in state.items()}}, ["module"]),
        (lambda state: {"state_dict": state, "global_step": 5, "loops": {}}, ["state_dict"]),
        (lambda state: {"model": {k: v * 0 for k, v in state.items()}, "ema": state}, ["ema"]),
        (lambda state: {"model": {k: v * 0 for k, v in state.items()}, "model_ema": state}, ["model_ema"]),
        (lambda state: {"vae": state, "step": torch.ones(1)}, ["vae"]),
    ],
)
def test_containers(wrapped: Callable[[Any], Any], containers: list[str]) -> None:
    state = {"a.weight": torch.randn(2), "b": torch.randn(3)}
    found = unwrap(wrapped(state))
    assert found.containers == containers
    assert equal(found.state, state)


def test_averages_can_be_refused() -> None:
    state, average = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    assert unwrap({"model": state, "ema": average}, ema=False).state == state
    assert unwrap({"ema": average}, ema=False).state == average
    assert "beside it: model" in " ".join(unwrap({"model": state, "ema": average}).notes)


def test_what_is_no_state_dict_is_described() -> None:
    with pytest.raises(TokenloomError, match="it holds epoch, optimizer"):
        unwrap({"optimizer": {}, "epoch": 3})
    with pytest.raises(TokenloomError, match="it holds list"):
        unwrap([torch.ones(1)])


# What is written


@pytest.mark.parametrize("name", ["par_4x", "nbp_hybrid", "var"])
def test_a_folder_gives_back_the_official_weights(name: str, desk: Path) -> None:
    state, config = official(name)
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, "x.pth")
    done = convert_checkpoint("x.pth", "out", config=config)
    assert done.family == FAMILIES[name][0]
    assert f"{len(state)} of {len(state)} tensors equal those of the source bit for bit" in done.notes[-1]
    assert sorted(path.name for path in desk.iterdir()) == ["out", "x.pth"]
    model: Any = load_converted("out")
    direct: Any = from_official(done.family, state, config)
    assert equal(to_official(model), to_official(direct))
    label = torch.tensor([[3], [1]]) if name == "nbp_hybrid" else torch.tensor([3, 1])
    assert torch.equal(model.generate(label, seeds=1), direct.generate(label, seeds=1))
    card = models.read_card(Path("out"))
    assert card["source"] == [
        {"file": "x.pth", "bytes": Path("x.pth").stat().st_size, "sha256": models.digest(Path("x.pth"))}
    ]
    assert card["official_config"] == {**infer(done.family, state), **config}
    assert card["dtype"] == "float32" and card["license"].startswith("not known")
    assert "diffusion_pytorch_model.safetensors" in card["sha256"]


def test_parts_are_joined_and_presets_found_by_file_name(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, config = official("var")
    codebook = {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
    torch.save(
        {
            key: value
            for key, value in state.items()
            if key not in state.keys() & {f"vae.{k}" for k in codebook}
        },
        "var_d16.pth",
    )
    torch.save(codebook | {"encoder.conv_in.weight": torch.ones(1)}, "vae_ch160v4096z32.pth")
    files = ["var_d16.pth", "vae_ch160v4096z32.pth"]
    with pytest.raises(
        TokenloomError, match=r"var_d16\.pth is published without its codebook: give vae_ch160"
    ):
        convert_checkpoint(files[0], "out")
    done = convert_checkpoint(files, "out", config=config)
    assert done.preset == "var_d16.pth" and done.family == "var"
    assert equal(to_official(load_converted("out")), state)
    card = models.read_card(Path("out"))
    assert [one["file"] for one in card["source"]] == files
    assert card["license"] == "MIT"
    assert card["official_sampling"] == {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    assert card["sampling"] == {
        "top_k": 900,
        "top_p": 0.96,
        "nucleus": "ascending",
        "guidance_scale": 2.5,
        "guidance_schedule": "linear",
        "guidance_start": 1.0,
    }
    with pytest.raises(TokenloomError, match="Two of the files hold the same tensors"):
        convert_checkpoint([files[0], *files], "other", config=config)


def test_a_training_checkpoint_with_its_tokenizer_inside(desk: Path) -> None:
    state, config = official("nbp_fp")
    inner = {f"first_stage_model.{name}": torch.ones(2) for name in ("a", "b")}
    torch.save({"state_dict": state | inner, "global_step": 1}, "x.ckpt")
    done = convert_checkpoint("x.ckpt", "out", config=config)
    assert any("left out 2 tensors of first_stage_model.*" in note for note in done.notes)
    assert equal(to_official(load_converted("out")), state)


def test_the_history_of_codes_is_kept(desk: Path) -> None:
    from test_checkpoints_image_cnn import golden

    config, state, _ = golden("llamagen_vq")
    state["quantize.codebook_used"] = torch.arange(65536.0)
    torch.save({"model": {}, "ema": state}, "x.pt")
    convert_checkpoint("x.pt", "out", config=config)
    tokenizer: Any = load_converted("out")
    assert equal(to_official(tokenizer), state)
    assert models.read_card(Path("out"))["pixel_range"] == [-1.0, 1.0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype: str, desk: Path) -> None:
    state, config = official("par_4x")
    save_file(state, "x.safetensors")
    done = convert_checkpoint("x.safetensors", "out", config=config, dtype=dtype)
    assert done.notes[-1].endswith(f"bit for bit after rounding to {dtype}")
    kind = getattr(torch, dtype)
    assert equal(to_official(load_converted("out")), {key: value.to(kind) for key, value in state.items()})
    save_file({key: value.to(kind) for key, value in state.items()}, "half.safetensors")
    again = convert_checkpoint("half.safetensors", "again", config=config)  # stays what it is
    assert "rounding" not in again.notes[-1]
    assert equal(to_official(load_converted("again")), to_official(load_converted("out")))


def test_weights_that_were_written_wrong_are_noticed(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, config = official("par_4x")
    save_file(state, "x.safetensors")
    real = convert.load_converted

    def damaged(folder: Path) -> Any:
        module = real(folder)
        next(module.parameters()).data[0] += 1
        return module

    monkeypatch.setattr(convert, "load_converted", damaged)
    with pytest.raises(TokenloomError, match="differ from the source in 1 tensors"):
        convert_checkpoint("x.safetensors", "out", config=config)
    assert [path.name for path in desk.iterdir()] == ["x.safetensors"]


def test_buffers_of_another_shape_are_named_and_do_not_count(desk: Path) -> None:
    state, config = official("mvar")
    padded = state | {"attn_bias_for_masking": torch.zeros(1, 1, 56, 56)}
    torch.save({"mvar_wo_ddp": padded}, "x.pth")
    done = convert_checkpoint("x.pth", "out", config=config)
    assert any("differ from the file: attn_bias_for_masking" in note for note in done.notes)
    assert equal(to_official(load_converted("out")), state)


# The command


def test_the_command_converts_and_replaces_only_when_told(run: Run, desk: Path) -> None:
    state, config = official("nar_c2i")
    torch.save({"model": state}, "x.pt")
    Path("c.json").write_text(json.dumps({key: config[key] for key in ("n_head", "num_classes")}))
    again = ["x.pt", "-o", "out", "--config", "c.json", "--set", "block_size=16", "--set", "norm_eps=1e-6"]
    first = run(*again)
    assert first.exit_code == 0, first.output
    assert "took 'model'" in first.stdout and "family 'nar'" in first.stdout
    assert first.stdout.splitlines()[-1] == "out: nar"
    before = models.digest(Path("out/card.json"))
    torch.save({"model": {key: -value for key, value in state.items()}}, "x.pt")
    assert json.loads(Path("out/config.json").read_text())["transformer_config"]["norm_eps"] == 1e-6
    second = run(*again)
    assert second.exit_code == 2 and "--force" in second.stderr
    assert models.digest(Path("out/card.json")) == before
    assert run(*again, "--force").exit_code == 0
    assert torch.equal(to_official(load_converted("out"))["norm.weight"], -state["norm.weight"])
    assert sorted(path.name for path in desk.iterdir()) == ["c.json", "out", "x.pt"]


def test_folders_in_use_are_left_alone(run: Run) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    torch.save(official("par_4x")[0], "x.pt")
    for target, part in (
        ("mine", "holds other files"),
        ("x.pt", "is a file"),
        ("x.pt/y", "cannot be written"),
    ):
        result = run("x.pt", "-o", target, "--force", *(f"--set={one}" for one in SETTINGS))
        assert result.exit_code == 2 and part in result.stderr, result.output
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_bad_files(run: Run) -> None:
    state = official("par_4x")[0]
    torch.save({"model": state}, "good.pt")
    save_file(state, "good.safetensors")
    Path("garbage.pth").write_bytes(b"\x00\x01 no weights at all" * 50)
    Path("empty.pth").touch()
    Path("text.safetensors").write_text("no weights")
    for name in ("good.pt", "good.safetensors"):
        whole = Path(name).read_bytes()
        Path(f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    Path("old.pth").write_bytes(pickle.dumps({"model": Foreign()}))
    torch.save({"model": state, "callbacks": {"best": Foreign()}}, "foreign.ckpt")
    torch.save([1, 2], "list.pt")
    Path("folder").mkdir()
    for name, parts in {
        "garbage.pth": ["garbage.pth is damaged or no file of weights"],
        "empty.pth": ["it is empty"],
        "text.safetensors": ["text.safetensors are damaged"],
        "cut-good.pt": ["cut-good.pt is damaged"],
        "cut-good.safetensors": ["truncated"],
        "old.pth": ["old.pth"],
        "foreign.ckpt": ["holds more than weights", "Foreign", "weights_only=False", "save_file"],
        "list.pt": ["no state dict", "list"],
        "folder": ["is a folder"],
        "missing.pt": ["missing.pt is not there"],
    }.items():
        assert_refused(run(name, "-o", "out"), *parts)


def test_bad_settings(run: Run) -> None:
    state = official("llamagen_c2i")[0]
    torch.save(state, "x.pt")
    torch.save(state | {"extra.weight": torch.ones(1)}, "more.pt")
    torch.save({key: value for key, value in state.items() if key != "norm.weight"}, "less.pt")
    torch.save({"some.weight": torch.ones(1)}, "odd.pt")
    Path("list.yaml").write_text("[1, 2]")
    given = ["--family", "llamagen", *(f"--set={one}" for one in SETTINGS)]
    for arguments, parts in (
        (["x.pt"], ["may be of llamagen or dar", "--family"]),
        (["odd.pt"], ["of no family known by its names", "some.weight"]),
        (["x.pt", "--family", "llamagen"], ["n_head, block_size", "--set n_head=", "c2i_B_256.pt"]),
        (["x.pt", "--family", "llamagn"], ["Did you mean 'llamagen'"]),
        (["x.pt", "--family", "var"], ["are those of 'llamagen' or 'dar', not of 'var'"]),
        (["more.pt", *given], ["Unknown keys (1): extra.weight"]),
        (["less.pt", *given], ["Missing keys (1): norm.weight"]),
        (["x.pt", *given, "--set", "n_layer=5"], ["Missing keys"]),
        (["x.pt", "--preset", "c2i_B_257.pt"], ["Unknown preset", "c2i_B_256.pt"]),
        (["x.pt", "--preset", "var_d16.pth", "--family", "llamagen"], ["is of the family 'var'"]),
        (["x.pt", *given, "--dtype", "float8"], ["Unknown dtype", "float16"]),
        (["x.pt", *given, "--config", "missing.yaml"], ["missing.yaml"]),
        (["x.pt", "--config", "list.yaml"], ["list.yaml", "[1, 2]"]),
        (["x.pt", *given, "--set", "n_head"], ["key=value"]),
    ):
        assert_refused(run(*arguments, "-o", "out"), *parts)


def test_folders_that_are_no_conversions_are_refused(desk: Path) -> None:
    with pytest.raises(TokenloomError, match="no converted checkpoint"):
        load_converted(desk)
    state, config = official("par_4x")
    save_file(state, "x.safetensors")
    convert_checkpoint("x.safetensors", "out", config=config)
    weights = Path("out/diffusion_pytorch_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(TokenloomError, match="truncated"):
        load_converted("out")
    weights.write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(TokenloomError, match="SHA-256"):
        load_converted("out")
