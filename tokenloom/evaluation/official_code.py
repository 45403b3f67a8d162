"""Official repositories beside tokenloom: models of published shapes with random weights, and their own samplers.

A repository is given by the folder of its checkout and is no part of tokenloom; nothing of it is copied. Its modules are
imported for the time of a call and taken out of `sys.modules` again, because repositories share names. Knows how each
repository is called; knows nothing of timing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name

Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Official:
    """An official model as its repository runs it.

    Attributes:
        state: Its state dict, as `tokenloom.checkpoints.from_official` takes it.
        greedy: Labels (B,) to the codes (B, N) that it picks without randomness.
        generate: Labels (B,) to samples, with the published settings; what is timed.
        decodes: Whether `generate` also decodes to pixels.
        tokenizer_state: State dict of the tokenizer, where it belongs to the generator.
    """

    state: Mapping[str, Tensor]
    greedy: Draw
    generate: Callable[[Tensor], Any]
    decodes: bool = False
    tokenizer_state: Mapping[str, Tensor] | None = None


@contextmanager
def _imports_from(folder: Path, roots: tuple[str, ...]) -> Iterator[None]:
    """Puts a checkout first on the path, and forgets its modules afterwards."""

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in roots}

    others = take()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        take()
        sys.modules.update(others)


def _checkout(path: Path, name: str, inner: str, needed: str) -> Path:
    folder = path / name / inner if (path / name).is_dir() else path / inner
    if not (folder / needed).is_file():
        raise TokenloomError(
            f"Found no checkout of {name} in {path}: expected {name}/{inner}{'/' if inner else ''}{needed}. "
            f"Clone the repository into that folder, or leave the family out."
        )
    return folder


def _fill(module: nn.Module) -> None:
    """Output matrices that are zero at the start become random, so that there is something to choose from."""
    for value in module.parameters():
        if value.ndim > 1 and not bool(value.any()):
            nn.init.normal_(value, std=0.02)


def _gpt(folder: Path, config: Mapping[str, Any], sampling: Mapping[str, Any], quiet: bool) -> Official:
    with _imports_from(folder, ("autoregressive", "utils", "tokenizer", "language", "dataset")):
        shapes: Any = importlib.import_module("autoregressive.models.gpt")
        loop: Any = importlib.import_module("autoregressive.models.generate")
    if quiet:
        loop.tqdm = iter  # its progress bar
    names = (
        "n_layer",
        "n_head",
        "dim",
        "block_size",
        "vocab_size",
        "num_classes",
        "cls_token_num",
        "model_type",
    )
    model = shapes.Transformer(shapes.ModelArgs(**{name: config[name] for name in names})).eval()
    _fill(model)
    settings = {name: sampling[name] for name in ("cfg_scale", "temperature", "top_k", "top_p")}
    count = config["block_size"]

    def run(labels: Tensor, draw: bool) -> Tensor:
        return loop.generate(model, labels, count, **settings, sample_logits=draw).long()

    return Official(model.state_dict(), lambda labels: run(labels, False), lambda labels: run(labels, True))


def _llamagen(path: Path, config: Mapping[str, Any], sampling: Mapping[str, Any]) -> Official:
    folder = _checkout(path, "LlamaGen", "", "autoregressive/models/generate.py")
    return _gpt(folder, config, sampling, quiet=False)


def _nar(path: Path, config: Mapping[str, Any], sampling: Mapping[str, Any]) -> Official:
    folder = _checkout(path, "NAR", "NAR-images", "autoregressive/models/generate.py")
    settings = {"cfg_scale": 2.0, **sampling}
    return _gpt(folder, config, settings, quiet=True)


def _var(path: Path, config: Mapping[str, Any], sampling: Mapping[str, Any]) -> Official:
    folder = _checkout(path, "VAR", "", "models/var.py")
    with _imports_from(folder, ("models", "utils", "dist")):
        loop: Any = importlib.import_module("models.var")
    scales = tuple(config["patch_nums"])
    vae = loop.VQVAE(
        vocab_size=config["vocab_size"], z_channels=config["Cvae"], test_mode=True, v_patch_nums=scales
    )
    names = (
        "num_classes",
        "depth",
        "embed_dim",
        "num_heads",
        "mlp_ratio",
        "norm_eps",
        "shared_aln",
        "attn_l2_norm",
    )
    model = loop.VAR(vae_local=vae, patch_nums=scales, **{name: config[name] for name in names}).eval()
    model.init_weights(init_adaln=0.5, init_adaln_gamma=0.1, init_head=0.02, init_std=-1)
    picked: list[Tensor] = []
    draw = loop.sample_with_top_k_top_p_

    def greedy(labels: Tensor) -> Tensor:
        def first(logits: Tensor, **_: Any) -> Tensor:
            picked.append(logits.argmax(-1))
            return picked[-1][..., None]

        picked.clear()
        loop.sample_with_top_k_top_p_ = first
        try:
            model.autoregressive_infer_cfg(len(labels), labels, cfg=sampling["cfg"])
        finally:
            loop.sample_with_top_k_top_p_ = draw
        return torch.cat(picked, dim=1)

    def generate(labels: Tensor) -> Tensor:
        return model.autoregressive_infer_cfg(len(labels), labels, g_seed=0, **sampling)

    quantizer = {f"vae.quantize.{name}": value for name, value in vae.quantize.state_dict().items()}
    return Official({**model.state_dict(), **quantizer}, greedy, generate, True, vae.state_dict())


_LOADERS: dict[str, Callable[..., Official]] = {"llamagen": _llamagen, "nar": _nar, "var": _var}


def official(
    family: str, path: Path, config: Mapping[str, Any], sampling: Mapping[str, Any], seed: int = 0
) -> Official:
    """An official model with random weights.

    Args:
        family: "llamagen", "nar" or "var".
        path: Folder that holds the checkout under its own name, or the checkout itself.
        config: The official constructor's arguments, as in the presets.
        sampling: The official sampler's settings.
        seed: Of the weights.

    Raises:
        TokenloomError: For an unknown family, or where there is no checkout.
    """
    if family not in _LOADERS:
        raise unknown_name("family with official code", family, _LOADERS)
    torch.manual_seed(seed)
    return _LOADERS[family](Path(path), config, sampling)
