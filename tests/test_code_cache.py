"""Codes of training pictures: kept once a view, read again from a folder, or made anew for every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import FSQ, draw_folder, generator_settings, picture_array

from tokenloom import ImageVQTokenizer
from tokenloom.training.augment import augment
from tokenloom.training.code_cache import cached_codes, encode_views
from tokenloom.training.config import GeneratorConfig, from_dict
from tokenloom.training.generator_task import GeneratorTask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures."""
    return draw_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with random weights."""
    root = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    ImageVQTokenizer(**FSQ).save_pretrained(root)
    return root


def test_codes_are_cached_once_per_view(folder, tokenizer, tmp_path):
    values = generator_settings(folder, tokenizer, tmp_path, views=3, augment={"shift": 0.3})
    config = from_dict(GeneratorConfig, values)
    task = GeneratorTask(config)
    assert task.codes.shape == (12, 3, 16)
    pixels = torch.stack([torch.from_numpy(picture_array(folder, item.file)) for item in task.captions])
    plain = task.tokenizer.encode(pixels.float() / 127.5 - 1)
    assert torch.equal(task.codes[:, 0].long(), plain)
    assert not torch.equal(task.codes[:, 1], task.codes[:, 0])
    assert torch.equal(encode_views(task.tokenizer, pixels, config, batch_size=12), task.codes)


def test_codes_in_a_folder_are_read_again_until_anything_they_depend_on_changes(
    folder, tokenizer, tmp_path, monkeypatch
):
    calls: list[int] = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return encode_views(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("tokenloom.training.code_cache.encode_views", counted)
    options = {"views": 2, "augment": {"shift": 0.3}, "code_cache": str(tmp_path / "codes")}
    settings = generator_settings(folder, tokenizer, tmp_path, **options)
    first, again = (GeneratorTask(from_dict(GeneratorConfig, settings)) for _ in range(2))
    assert len(calls) == 1 and torch.equal(first.codes, again.codes)
    changed = from_dict(GeneratorConfig, settings | {"augment": {"shift": 0.2}})
    assert not torch.equal(GeneratorTask(changed).codes, first.codes)
    with torch.no_grad():
        again.tokenizer.from_code.bias.add_(1)
    pixels = torch.stack([torch.from_numpy(picture_array(folder, item.file)) for item in first.captions])
    cached_codes(again.tokenizer, pixels, first.config)
    assert len(calls) == 3
    assert len(list((tmp_path / "codes").iterdir())) == 3  # and no file that is half written


def test_without_views_every_batch_is_changed_and_encoded_anew(folder, tokenizer, tmp_path):
    values = generator_settings(folder, tokenizer, tmp_path, views=0, augment={"shift": 0.3})
    task = GeneratorTask(from_dict(GeneratorConfig, values))
    first, again, other = (
        task.batch(torch.arange(12), torch.Generator().manual_seed(seed))["codes"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    pixels = torch.stack([torch.from_numpy(picture_array(folder, item.file)) for item in task.captions])
    changed = augment(pixels.float() / 127.5 - 1, task.config.augment, torch.Generator().manual_seed(1))
    assert torch.equal(first, task.tokenizer.encode(changed))
