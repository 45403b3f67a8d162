"""The recipe that compares orders: a tiny budget end to end, its table, and what a second call leaves alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_evaluation_judge import _toy, _write

from tokenloom import ImageVQTokenizer, TokenloomError
from tokenloom.evaluation.judge import train_judge
from tokenloom.evaluation.judge_training import JudgeTraining

RECIPE = Path(__file__).parent.parent / "recipes" / "compare_orders.py"
SIZES = {"steps": 4, "batch-size": 4, "width": 16, "depth": 2, "heads": 2, "held-out": 2, "prompts": 1}
SIZES |= {"candidates": 3, "diversity-prompts": 1, "rounds": 1}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_orders", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a comparison on a dozen pictures, with a tokenizer and a judge that know little."""
    root = tmp_path_factory.mktemp("comparison")
    (root / "pictures").mkdir()
    data = _write(_toy(), root / "pictures")
    torch.manual_seed(0)
    options = {"quantizer_type": "fsq", "quantizer_options": {"levels": [8, 8, 4]}, "patch": 16, "merge": 1}
    shape = {"image_size": 64, "width": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    ImageVQTokenizer(**shape, **options).save_pretrained(root / "tokenizer")
    train_judge(data, root / "judge", 2, training=JudgeTraining(batch_size=6), image_size=32)
    found = [str(root / "out"), "--data", str(data), "--tokenizer", str(root / "tokenizer")]
    found += ["--judge", str(root / "judge")]
    return found + [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]


def test_a_comparison_ends_with_a_table_and_skips_what_is_done(
    recipe: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.main(words)
    out = Path(words[0])
    figures = json.loads((out / "comparison.json").read_text())
    names = [name for name in recipe.ORDERS if name != "next scale"]
    assert list(figures) == names
    forwards = {name: values["likelihood"]["forwards"] for name, values in figures.items()}
    assert list(forwards.values()) == [16, 7, 4, 8, 16, 8]
    for values in figures.values():
        assert 5 < values["likelihood"]["bits_per_token"] < 11  # eight bits a code, hardly trained
        assert values["likelihood"]["tokens"] == 16 and values["speed"]["ratio"]["median"] > 0
    table = (out / "comparison.md").read_text().splitlines()
    assert len(table) > 2 + len(names) and all(row.count("|") == 11 for row in table[: 2 + len(names)])

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a finished part was done again")

    for name in ("train_generator", "follow_prompts", "measure_diversity", "compare_speed"):
        monkeypatch.setattr(recipe, name, refuse)
    (out / "comparison.md").unlink()
    recipe.main(words)
    assert (out / "comparison.md").read_text().splitlines() == table
    with pytest.raises(TokenloomError, match="other settings"):
        recipe.main([*words, "--seed", "3"])
    with pytest.raises(TokenloomError, match="no order 'next tokn'"):
        recipe.main([*words, "--only", "next tokn"])
