"""Converts published checkpoint files to tokenloom folders, and loads these.

A folder holds `config.json`, safetensors, and `card.json`: family, source files with their SHA-256 sums, licence, official
constructor arguments and sampling settings, and what `to_official` needs besides the weights. It is written beside the
target, read back, compared with the source, and only then moved into place. Knows no family: adapters and tables do.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenloom
from tokenloom.checkpoints import families, from_official, to_official
from tokenloom.checkpoints.files import Weights, join, part_of, read_weights
from tokenloom.checkpoints.guidance import guided_families, official_guidance
from tokenloom.checkpoints.presets import NUCLEUS, PRESETS, Preset, find_preset, preset
from tokenloom.checkpoints.recognise import check_config, guess_families, infer
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.models import (
    CARD_FILE,
    VERSION_KEY,
    check_digests,
    check_safetensors,
    check_version,
    digest,
    read_card,
    replace_folder,
    write_card,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONFIG_FILE = "config.json"
_EXTRA_FILE = "official.safetensors"  # tensors that `to_official` returns and no weight of ours holds
_KEPT = "official_"  # attributes under which adapters keep what no weight of ours holds
_INNER = "first_stage_model."  # a tokenizer inside a generator's training checkpoint


@dataclass
class Conversion:
    """What `convert_checkpoint` did.

    Attributes:
        folder: The folder written.
        family: Family of the weights.
        preset: Name of the preset that filled in settings, or `None`.
        config: The official constructor's arguments that were used.
        notes: What was found and done, in sentences.
    """

    folder: Path
    family: str
    preset: str | None
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    preset_name: str | None = None,
    ema: bool = True,
    dtype: str | None = None,
    force: bool = False,
) -> Conversion:
    """Converts a published checkpoint to a tokenloom folder.

    Args:
        paths: The file (.safetensors, .pth, .pt, .ckpt, .bin), or the files of a model that is published in parts.
        output: Folder to write.
        family: One of `families()`; guessed from the names of the weights if they tell.
        config: The official constructor's arguments, over those of the preset and those that the weights show.
        preset_name: A name of `PRESETS`; found by the names of the files if not given.
        ema: Whether averaged weights are taken where a file holds both.
        dtype: "float32", "float16" or "bfloat16"; as in the file if not given.
        force: Whether an earlier conversion in `output` is replaced.

    Returns:
        What was done. The folder has been read back, and its weights are those of the file, bit for bit.

    Raises:
        TokenloomError: For a file that cannot be read safely, an unknown or unclear family, missing arguments, weights
            that do not fit, or an output folder in use. Nothing is written then.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    target = Path(output).expanduser().absolute()
    _check_target(target, force)
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if family is not None and family not in families():
        raise unknown_name("checkpoint family", family, families())
    if not files:
        raise TokenloomError("Expected at least one file of weights, got none.")
    chosen = None if preset_name is None else preset(preset_name)
    if family and chosen and chosen.family != family:
        raise TokenloomError(
            f"The preset {preset_name} is of the family {chosen.family!r}, not {family!r}; give one of the two."
        )
    found = _read(files, ema, family or (chosen.family if chosen else None))
    candidates = (family,) if family else guess_families(found.state, found.containers)
    if chosen is None:
        preset_name, chosen = _match(files, candidates)
    kind = _family(family, chosen, candidates, found)
    known = {**(chosen.config if chosen else {}), **infer(kind, found.state), **(config or {})}
    if preset_name:
        found.notes.append(f"settings of the preset {preset_name}")
    _check_parts(chosen, files, found.state)
    module = _build(kind, found, known)
    _cast(module, dtype)
    card = _card(kind, chosen, preset_name, known, files, module)
    _write(module, target, card, found)
    return Conversion(target, kind, preset_name, known, found.notes)


def load_converted(folder: str | Path) -> nn.Module:
    """Loads what `convert_checkpoint` wrote, in the dtype it was written in; `to_official` gives the official weights.

    Args:
        folder: The folder.

    Raises:
        TokenloomError: If it is no such folder, is damaged, or was written by a newer version.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / CARD_FILE).is_file():
        raise TokenloomError(
            f"{folder} is no converted checkpoint: expected {CONFIG_FILE} and {CARD_FILE} in it. Make one with "
            "`tokenloom convert FILE -o FOLDER`."
        )
    card = read_card(folder)
    check_version(card, folder / CARD_FILE)
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
    check_digests(folder, card)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    kind: Any = getattr(tokenloom, config["_class_name"])
    module: nn.Module = kind.from_pretrained(str(folder), torch_dtype=DTYPES[card["dtype"]]).eval()
    kept = dict(card["official"])
    if (folder / _EXTRA_FILE).is_file():
        kept |= load_file(folder / _EXTRA_FILE)
    for name, value in kept.items():
        setattr(module, f"{_KEPT}{name}", value)
    return module


# What is converted


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise TokenloomError(f"Expected a folder to write, but {target} is a file. Choose another name.")
    inside = {path.name for path in target.iterdir()}
    if inside and not {CONFIG_FILE, CARD_FILE} <= inside:
        raise TokenloomError(f"{target} holds other files. Choose an empty folder or a new name.")
    if inside and not force:
        raise TokenloomError(
            f"{target} already holds a converted checkpoint. Replace it with --force, or choose another folder."
        )


def _read(files: Sequence[Path], ema: bool, family: str | None) -> Weights:
    """All weights of the files; the tokenizer inside a generator's file alone, where that is what is asked for."""
    parts = [read_weights(path, ema) for path in files]
    for part in parts:
        inner = part_of(part.state, _INNER)
        outer = [key for key in part.state if not key.startswith(_INNER)]
        if inner and (not outer or (family is not None and family in guess_families(inner))):
            part.state = inner
            part.notes.append(f"took {len(inner)} tensors of {_INNER}*")
        elif inner:
            part.notes.append(
                f"left out {len(inner)} tensors of {_INNER}*: convert them with their own --family"
            )
    state, notes = join([part.state for part in parts])
    containers = [name for part in parts for name in part.containers]
    return Weights(state, containers, [note for part in parts for note in part.notes] + notes)


def _match(files: Sequence[Path], candidates: Sequence[str]) -> tuple[str | None, Preset | None]:
    """The preset that a file is called after, if its family is one that the weights may be of."""
    for path in files:
        name = find_preset(path)
        if name is not None and (not candidates or preset(name).family in candidates):
            return name, preset(name)
    return None, None


def _family(given: str | None, chosen: Preset | None, candidates: Sequence[str], found: Weights) -> str:
    if given is not None:
        kind = given
    elif chosen is not None:
        kind = chosen.family
    elif len(candidates) == 1:
        kind = candidates[0]
        found.notes.append(f"the names of the tensors are those of the family {kind!r}")
    else:
        what = f"may be of {' or '.join(candidates)}" if candidates else "are of no family known by its names"
        raise TokenloomError(
            f"The weights {what}; say which with --family. Families: {', '.join(families())}. Some of their tensors: "
            f"{', '.join(sorted(found.state)[:5])}."
        )
    if kind not in families():
        raise TokenloomError(
            f"The weights are of the family {kind!r}, which this version does not convert. It converts "
            f"{', '.join(families())}."
        )
    return kind


def _hint(family: str) -> str:
    names = [name for name, one in PRESETS.items() if one.family == family]
    return f" Presets of this family, for --preset: {', '.join(names)}." if names else ""


def _check_parts(chosen: Preset | None, files: Sequence[Path], state: Mapping[str, Tensor]) -> None:
    if chosen and chosen.beside and len(files) == 1 and not any(key.startswith("vae.") for key in state):
        raise TokenloomError(
            f"{files[0].name} is published without its codebook: give {chosen.beside} as well, "
            f"`tokenloom convert {files[0].name} {chosen.beside} -o FOLDER`."
        )


def _build(family: str, found: Weights, config: Mapping[str, Any]) -> nn.Module:
    try:
        check_config(family, config, _hint(family))
        module = from_official(family, found.state, config)
    except TokenloomError as error:
        likely = guess_families(found.state, found.containers)
        if not likely or family in likely:
            raise
        raise TokenloomError(
            f"The names of these tensors are those of {' or '.join(map(repr, likely))}, not of {family!r}. {error}"
        ) from error
    if not hasattr(module, "save_pretrained") or not hasattr(tokenloom, type(module).__name__):
        raise TokenloomError(
            f"A {type(module).__name__} of the family {family!r} cannot be saved as a folder."
        )
    return module


def _cast(module: nn.Module, dtype: str | None) -> None:
    """One dtype for all floating weights: the one asked for, or the widest of the file."""
    found = {value.dtype for value in module.state_dict().values() if value.is_floating_point()}
    wanted = DTYPES[dtype] if dtype else found.pop() if len(found) == 1 else torch.float32
    nn.Module.to(module, wanted if wanted in DTYPES.values() else torch.float32)


# The folder


def _dtype_of(module: nn.Module) -> str:
    value = next(value for value in module.state_dict().values() if value.is_floating_point())
    return next(name for name, dtype in DTYPES.items() if dtype == value.dtype)


def _card(
    family: str,
    chosen: Preset | None,
    preset_name: str | None,
    config: Mapping[str, Any],
    files: Sequence[Path],
    module: nn.Module,
) -> dict[str, Any]:
    """The weight record."""
    sampling = dict(chosen.sampling) if chosen else {}
    pixels = getattr(module, "pixel_range", None) or (chosen.pixel_range if chosen else None)
    card = {
        "description": f"Converted from {', '.join(path.name for path in files)}.",
        "family": family,
        "preset": preset_name,
        "license": chosen.licence if chosen else "not known: ask the publisher of the weights",
        "source": [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)} for path in files
        ],
        "official_config": dict(config),
        "official_sampling": sampling,
        "sampling": _sampling(family, sampling),
        "pixel_range": None if pixels is None else list(pixels),
        "parameters": sum(value.numel() for value in module.parameters()),
        "dtype": _dtype_of(module),
        "note": chosen.note if chosen else "",
    }
    return {key: value for key, value in card.items() if value not in (None, "", {})}


def _sampling(family: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Published settings in our terms, as pipelines keep them; what has no counterpart there is left out."""
    result = {key: settings[key] for key in ("temperature", "top_k") if key in settings}
    if settings.get("top_p"):
        result |= {"top_p": settings["top_p"], "nucleus": NUCLEUS.get(family, "descending")}
    guided = {key: value for key, value in settings.items() if key.startswith(("cfg", "scale_cfg"))}
    if guided and family in guided_families():
        rule = official_guidance(family, **guided)
        if isinstance(rule.schedule, str):
            values = (rule.scale, rule.schedule, rule.start)
            result |= dict(
                zip(("guidance_scale", "guidance_schedule", "guidance_start"), values, strict=True)
            )
    return result


def _write(module: nn.Module, target: Path, card: dict[str, Any], found: Weights) -> None:
    """Writes a folder beside the target, compares it with the source, and moves it into place."""
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        _save(module, scratch, card)
        _verify(scratch, found)
        scratch.chmod(0o755)
        replace_folder(scratch, target)
    except OSError as error:
        raise TokenloomError(
            f"The folder {target} cannot be written: {error.strerror or error}. Choose another one."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _save(module: nn.Module, folder: Path, card: dict[str, Any]) -> None:
    saved: Any = module
    saved.save_pretrained(str(folder))
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config[VERSION_KEY] = tokenloom.__version__
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    kept = {name[len(_KEPT) :]: value for name, value in vars(module).items() if name.startswith(_KEPT)}
    tensors = {name: value.contiguous() for name, value in kept.items() if isinstance(value, Tensor)}
    if tensors:
        save_file(tensors, folder / _EXTRA_FILE)
    plain = {name: value for name, value in kept.items() if name not in tensors}
    write_card(folder, {**card, "official": plain})


def _verify(folder: Path, found: Weights) -> None:
    """Compares the official weights of a written folder with those of the source, and notes the result.

    Raises:
        TokenloomError: If a weight differs.
    """
    module = load_converted(folder)
    dtype = DTYPES[read_card(folder)["dtype"]]
    official = to_official(module)
    shared = [key for key in found.state if key in official]
    different = [key for key in shared if not _same(found.state[key], official[key], dtype)]
    if different:
        held = _held(module, official)
        if wrong := [key for key in different if key in held]:
            raise TokenloomError(
                f"The written weights differ from the source in {len(wrong)} tensors ({', '.join(wrong[:5])}). "
                "Nothing was kept; please report this with the name of the file."
            )
        found.notes.append(f"buffers that are derived here and differ from the file: {', '.join(different)}")
    left = [key for key in found.state if key not in official]
    if left:
        found.notes.append(f"left out {len(left)} tensors that no model holds: {', '.join(left[:5])}")
    rounded = any(value.is_floating_point() and value.dtype != dtype for value in found.state.values())
    found.notes.append(
        f"read back: {len(shared) - len(different)} of {len(shared)} tensors equal those of the source bit for bit"
        + (f" after rounding to {read_card(folder)['dtype']}" if rounded else "")
    )


def _same(source: Tensor, official: Tensor, dtype: torch.dtype) -> bool:
    if source.is_floating_point() and official.dtype == dtype:
        source = source.to(dtype)
    return source.dtype == official.dtype and torch.equal(source, official)


@torch.no_grad()
def _held(module: nn.Module, official: Mapping[str, Tensor]) -> set[str]:
    """Names of the official tensors that follow the module's own weights: those that change when these do."""
    for value in module.state_dict().values():
        value.fill_(torch.nan if value.is_floating_point() else 0)
    return {key for key, value in to_official(module).items() if not torch.equal(value, official[key])}
