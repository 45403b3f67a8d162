"""Names, folders, damaged files and versions, without loading any model."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tokenloom import __version__, models
from tokenloom.errors import TokenloomError


def write_safetensors(path: Path, values: bytes = b"\x00" * 16) -> None:
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline folder of one component, with a card."""
    root = tmp_path / "model"
    (root / "part").mkdir(parents=True)
    index = {"_class_name": "TextToImagePipeline", "part": ["tokenloom", "Part"], "sampling": {"top_k": 3}}
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "part" / "config.json").write_text(json.dumps({"width": 3}))
    write_safetensors(root / "part" / "diffusion_pytorch_model.safetensors")
    models.write_card(root, {"license": "Apache-2.0"})
    return root


def test_a_whole_folder_resolves_to_itself(folder: Path) -> None:
    assert models.resolve(folder) == folder
    assert models.resolve(str(folder)) == folder


def test_card_records_version_and_checksums(folder: Path) -> None:
    card = models.read_card(folder)
    name = "part/diffusion_pytorch_model.safetensors"
    assert card["license"] == "Apache-2.0"
    assert card[models.VERSION_KEY] == __version__
    assert card["sha256"] == {name: models.digest(folder / name)}
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "model_index.json", "part"]


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    path = folder / "part" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        TokenloomError, match=r"diffusion_pytorch_model\.safetensors are damaged.*download that model again"
    ):
        models.resolve(folder)


def test_appended_bytes_are_found(folder: Path) -> None:
    path = folder / "part" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(TokenloomError, match="too long"):
        models.resolve(folder)


@pytest.mark.parametrize(
    "header", [b"{", b"[1, 2]", b'{"w": 3}', b'{"w": {"data_offsets": []}}', b"\xff\xfe"]
)
def test_garbage_headers_are_found(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(TokenloomError, match="header cannot be read"):
        models.check_safetensors(path)


def test_one_flipped_bit_is_found_by_the_checksum(folder: Path) -> None:
    path = folder / "part" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    models.check_safetensors(path)  # its structure is still sound
    with pytest.raises(TokenloomError, match="SHA-256"):
        models.resolve(folder)


def test_missing_parts_are_named(folder: Path) -> None:
    (folder / "part" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TokenloomError, match=r"safetensors is missing, but card\.json lists it"):
        models.resolve(folder)
    (folder / "part" / "config.json").unlink()
    (folder / "part").rmdir()
    with pytest.raises(TokenloomError, match=r"component folder .*part is missing"):
        models.resolve(folder)


def test_invalid_json_is_named(folder: Path) -> None:
    (folder / "part" / "config.json").write_text('{"width": ')
    with pytest.raises(TokenloomError, match=r"config\.json is not valid JSON"):
        models.resolve(folder)


@pytest.mark.parametrize("file", ["model_index.json", "card.json", "part/config.json"])
def test_newer_versions_are_refused_and_older_ones_are_not(folder: Path, file: str) -> None:
    path = folder / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, models.VERSION_KEY: "0.0.9"}))
    assert models.resolve(folder) == folder
    path.write_text(json.dumps({**content, models.VERSION_KEY: "99.1.0"}))
    with pytest.raises(TokenloomError, match=r"written by tokenloom 99\.1\.0.*pip install --upgrade"):
        models.resolve(folder)


@pytest.mark.parametrize(("older", "newer"), [("0.9.0", "0.10.0"), ("1.2", "1.2.1"), ("1.9.9", "2.0.0")])
def test_versions_are_compared_as_numbers(
    older: str, newer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "__version__", older)
    with pytest.raises(TokenloomError):
        models.check_version({models.VERSION_KEY: newer}, tmp_path)
    monkeypatch.setattr(models, "__version__", newer)
    models.check_version({models.VERSION_KEY: older}, tmp_path)


def test_unknown_names_get_the_closest_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(models, "_ASSETS", folder.parent)
    monkeypatch.chdir(tmp_path.parent)
    assert models.resolve("model") == folder
    with pytest.raises(TokenloomError, match=r"Unknown model 'modle'\. Did you mean 'model'"):
        models.resolve("modle")


def test_a_bundled_name_comes_before_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(models, "_ASSETS", folder.parent)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert models.resolve("model") == folder
    with pytest.raises(TokenloomError, match=r"not a saved model: it has neither model_index\.json"):
        models.resolve("./model")


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(TokenloomError, match="Expected the name of a model"):
        models.resolve(name)  # type: ignore[arg-type]


def test_paths_that_are_not_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TokenloomError, match="no such folder"):
        models.resolve("/nowhere/at/all")
    with pytest.raises(TokenloomError, match="no such folder"):
        models.resolve(tmp_path / "nothing")
    with pytest.raises(TokenloomError, match="Give the folder it lies in"):
        models.resolve(folder / "card.json")


def test_hub_ids_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TokenloomError, match="could not be fetched from the Hugging Face hub"):
        models.resolve("some-owner/some-model", cache_dir=tmp_path)


def test_hub_ids_are_downloaded_and_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, object]]] = []

    def download(repo_id: str, **options: object) -> str:
        calls.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.resolve("owner/name", revision="v1") == folder
    assert calls[0][0] == "owner/name"
    assert calls[0][1]["revision"] == "v1"
    assert not any(
        "bin" in str(pattern) or "pt" in str(pattern).split(".") for pattern in calls[0][1]["allow_patterns"]
    )
