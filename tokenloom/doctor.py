"""Looks at the machine and the installation, and says what works: versions, devices, number formats, models.

Every check is independent: one that fails is reported and the others still run. Knows nothing of how to repair a
machine beyond one line of advice for each finding.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from tokenloom import __version__, models
from tokenloom.errors import TokenloomError

_PACKAGES = ("torch", "torchvision", "torchaudio", "diffusers", "timm", "einops", "accelerate", "safetensors")
_MORE_PACKAGES = ("huggingface_hub", "numpy", "pillow", "soundfile", "pyyaml", "typer", "rich")
_NOISE = (0, 1, 2)  # seed, position, vocabulary id of the numerics check


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: What was looked at.
        status: "ok", "note" (worth knowing, nothing is broken) or "fail".
        text: What was found, and for a failure how to repair it.
    """

    topic: str
    status: str
    text: str


def examine() -> Iterator[Finding]:
    """Runs every check and yields its findings as they come."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _threads,
        _compiler,
        _devices,
        _numerics,
        _models,
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation can fail in any way; the report must go on
            topic = check.__name__.strip("_")
            yield Finding(topic, "fail", f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    yield Finding(
        "tokenloom",
        "ok",
        f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    )
    missing = [name for name in _PACKAGES + _MORE_PACKAGES if _version(name) is None]
    present = [f"{name} {_version(name)}" for name in _PACKAGES if name not in missing]
    yield Finding("packages", "ok", ", ".join(present))
    if missing:
        yield Finding(
            "packages", "fail", f"missing: {', '.join(missing)}. Run pip install --upgrade tokenloom."
        )
    extra = _version("transformers")
    text = (
        f"transformers {extra}"
        if extra
        else "transformers is not installed; only the hub-codecs extra needs it"
    )
    yield Finding("extras", "ok" if extra else "note", text)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _threads() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"{threads} threads on {cores} available cores"
    if threads > cores:
        yield Finding("threads", "note", f"{text}. Fewer are faster here: set OMP_NUM_THREADS={cores}.")
    else:
        yield Finding("threads", "ok", text)


def _compiler() -> Iterator[Finding]:
    names = ["cl"] if sys.platform == "win32" else [os.environ.get("CXX", "c++"), "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found:
        yield Finding("compiler", "ok", f"{found} (torch.compile can be used on the CPU)")
    else:
        yield Finding(
            "compiler", "note", "no C++ compiler: torch.compile has no CPU kernels. Nothing else needs one."
        )


def _devices() -> Iterator[Finding]:
    import torch

    for device in _device_names():
        name = (
            torch.cuda.get_device_name(device)
            if device.startswith("cuda")
            else platform.processor() or "generic"
        )
        formats = [str(dtype).removeprefix("torch.") for dtype in _usable_dtypes(device)]
        status = "ok" if "float32" in formats else "fail"
        yield Finding(
            device, status, f"{name}; matrix products in {', '.join(formats) or 'no number format'}"
        )


def _device_names() -> list[str]:
    import torch

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def _usable_dtypes(device: str) -> list[object]:
    """Returns the number formats in which a small matrix product runs and is right."""
    import torch

    usable: list[object] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            product = torch.full((8, 8), 0.5, device=device, dtype=dtype) @ torch.ones(
                8, 8, device=device, dtype=dtype
            )
        except RuntimeError:
            continue
        if bool((product == 4).all()):
            usable.append(dtype)
    return usable


def _numerics() -> Iterator[Finding]:
    """Compares every device with the CPU in float64: noise must be equal, matrix products and attention close."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    from tokenloom.rng import noise

    ids = torch.arange(4096)
    expected_noise = noise(_NOISE[0], _NOISE[1], ids)
    q, k, v = (noise(seed, 3, ids).reshape(1, 2, 32, 64) - 0.5 for seed in range(3))
    expected = attention(q.double(), k.double(), v.double())
    for device in _device_names():
        same = torch.equal(noise(_NOISE[0], _NOISE[1], ids.to(device)).cpu(), expected_noise)
        got = attention(q.to(device), k.to(device), v.to(device)).cpu().double()
        error = float((got - expected).abs().max())
        good = same and error < 1e-4
        text = f"noise {'equal' if same else 'DIFFERS'}, attention within {error:.1e} of float64"
        advice = (
            "" if good else ". Results on this device cannot be trusted: use another one, or update torch."
        )
        yield Finding(f"numerics {device}", "ok" if good else "fail", text + advice)


def _models() -> Iterator[Finding]:
    infos = models.bundled()
    if not infos:
        yield Finding(
            "models", "fail", "no bundled model. Reinstall: pip install --force-reinstall tokenloom."
        )
    for info in infos.values():
        try:
            models.check(info.path)
        except TokenloomError as error:
            yield Finding(info.name, "fail", str(error))
        else:
            sums = "checksums match" if info.card.get("sha256") else "no checksums in its card"
            yield Finding(info.name, "ok", f"{info.num_bytes / 1e6:.1f} MB of weights, {sums}")
