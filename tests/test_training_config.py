"""Training configs: errors that name the key, overrides, and the committed recipes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from tokenloom import MaskTokenizer, TokenloomError
from tokenloom.layouts import Layout
from tokenloom.pyramid import ResidualPyramid
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.registry import TOKENIZERS, tokenizer_class
from tokenloom.training.config import (
    GeneratorConfig,
    LoopConfig,
    TextConfig,
    TokenizerConfig,
    from_dict,
    load_config,
)
from tokenloom.training.families import build_generator, build_order
from tokenloom.training.segmentation_config import MaskTokenizerConfig, SegmentationConfig

RECIPES = [
    path
    for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    if not path.stem.startswith(
        ("chorales", "masks128", "video64")
    )  # those of sound, masks and clips have configs of their own
]
MINIMAL = "output: out\ndata: {root: pictures}\n"


def load(tmp_path: Path, text: str, overrides: list[str] | None = None) -> TokenizerConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(TokenizerConfig, path, overrides)


def test_defaults(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert config.output == "out"
    assert config.data.root == "pictures"
    assert config.data.split == "train"
    assert config.loop == LoopConfig()


@pytest.mark.parametrize(
    ("text", "wrong", "close", "place"),
    [
        (MINIMAL + "lop: {}", "'lop'", "'loop'", ""),
        (MINIMAL + "loop: {learning_rat: 1}", "'learning_rat'", "'learning_rate'", "loop.learning_rat"),
        (MINIMAL + "augment: {flp: 1}", "'flp'", "'flip'", "augment.flp"),
        ("output: out\ndata: {root: x, splt: val}", "'splt'", "'split'", "data.splt"),
        (MINIMAL + "3: 4", "3", "Known:", ""),
    ],
)
def test_unknown_keys_name_the_closest_match_and_their_place(tmp_path, text, wrong, close, place):
    with pytest.raises(TokenloomError) as error:
        load(tmp_path, text)
    for part in ("Unknown configuration key", wrong, close, place):
        assert part in str(error.value)


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(TokenloomError, match="The config lacks the required keys: output, data"):
        load(tmp_path, "loop: {steps: 3}")
    with pytest.raises(TokenloomError, match="data lacks the required keys: root"):
        load(tmp_path, "output: out\ndata: {}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: {steps: many}", r"loop\.steps must be of type int, got 'many'"),
        ("loop: {steps: 2.5}", r"loop\.steps must be of type int, got 2\.5"),
        ("loop: {steps: true}", r"loop\.steps must be of type int, got True"),
        ("loop: {learning_rate: fast}", r"loop\.learning_rate must be of type float, got 'fast'"),
        ("loop: {learning_rate: false}", r"loop\.learning_rate must be of type float, got False"),
        ("loop: {betas: 0.9}", r"loop\.betas must be of type list"),
        ("loop: {betas: [0.9, x]}", r"loop\.betas\[1\] must be of type float, got 'x'"),
        ("loop: {compile: 1}", r"loop\.compile must be of type bool"),
        ("loop: [1]", r"loop must be a mapping of keys to values, got \[1\]"),
        ("model: [1]", r"model must be of type dict"),
        ("init_from: 3", r"init_from must be of type str, got 3"),
        ("loop: {schedule: cosin}", "'cosine'"),
        ("loop: {precision: fp8}", "loop.precision 'fp8'"),
    ],
)
def test_wrong_types_and_names_are_explained(tmp_path, text, message):
    with pytest.raises(TokenloomError, match=message):
        load(tmp_path, MINIMAL + text)


@pytest.mark.parametrize(
    "text",
    """steps: 0 / batch_size: -1 / keep: 0 / log_every: 0 / checkpoint_every: 0 / sample_every: 0 / accumulate: 0
    learning_rate: -1 / learning_rate: .nan / learning_rate: .inf / warmup: -1 / clip: -1 / ema: 1.5 / cooldown: 2
    seed: -1 / seed: 4294967296 / betas: [0.9]
    betas: [2, 0] / betas: [0.9, 1.0] / betas: [-0.1, 0.9]""".replace("\n", "/").split("/"),
)
def test_numbers_out_of_range_are_explained(tmp_path, text):
    key = text.partition(":")[0].strip()
    with pytest.raises(TokenloomError, match=rf"loop\.{key}.* must be"):
        load(tmp_path, MINIMAL + f"loop: {{{text}}}")


def test_text_and_views_out_of_range_are_explained():
    with pytest.raises(TokenloomError, match=r"text\.drop must be between 0 and 1, got 1\.5"):
        from_dict(TextConfig, {"drop": 1.5}, "text")
    with pytest.raises(TokenloomError, match=r"text\.max_length must be"):
        from_dict(TextConfig, {"max_length": 0}, "text")
    with pytest.raises(TokenloomError, match="views must be"):
        from_dict(GeneratorConfig, {"output": "o", "tokenizer": "t", "data": {"root": "r"}, "views": -1})


def test_numbers_that_yaml_reads_as_text(tmp_path):
    config = load(tmp_path, MINIMAL + "loop: {learning_rate: 1e-3, weight_decay: 2, betas: [9e-1, 0.95]}")
    assert config.loop.learning_rate == 1e-3
    assert config.loop.weight_decay == 2.0
    assert config.loop.betas == [0.9, 0.95]


def test_null_means_none_where_it_may(tmp_path):
    config = load(tmp_path, "output: out\ndata: {root: x, split: null, groups: [a, b]}\ninit_from: null")
    assert config.data.split is None
    assert config.data.groups == ["a", "b"]
    assert config.init_from is None
    with pytest.raises(TokenloomError, match="output must be of type str, got None"):
        load(tmp_path, "output: null\ndata: {root: x}")


def test_overrides(tmp_path):
    changes = ["loop.steps=7", "data.styles=[flat]", "loss.l1=1e-2", "output=x=y", "model.width=32"]
    config = load(tmp_path, MINIMAL, changes)
    assert config.loop.steps == 7
    assert config.data.styles == ["flat"]
    assert config.loss.l1 == 0.01
    assert config.output == "x=y"
    assert config.model == {"width": 32}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.steps", "must look like key.key=value"),
        ("loop.stepz=3", "'steps'"),
        ("output.deep=3", "not a mapping"),
        ("output.deep.deeper=3", "not a mapping"),
        ("loop.steps=[1", "not valid YAML"),
        ("loop.steps=x", r"loop\.steps must be of type int"),
    ],
)
def test_bad_overrides_are_explained(tmp_path, override, message):
    with pytest.raises(TokenloomError, match=message):
        load(tmp_path, MINIMAL, [override])


@pytest.mark.parametrize("text", ["", "- a\n- b", "just text", "null"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(TokenloomError, match="must be a mapping"):
        load(tmp_path, text)
    with pytest.raises(TokenloomError, match="not a mapping"):
        load(tmp_path, text, ["output=x"])


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(TokenloomError, match="not valid YAML"):
        load(tmp_path, "output: [1\ndata: }")
    with pytest.raises(TokenloomError, match=r"Cannot read the config .*missing\.yaml"):
        load_config(TokenizerConfig, tmp_path / "missing.yaml")
    with pytest.raises(TokenloomError, match="Cannot read the config"):
        load_config(TokenizerConfig, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81\xd8")
    with pytest.raises(TokenloomError, match="not valid YAML"):
        load_config(TokenizerConfig, tmp_path / "binary.yaml")


def is_tokenizer(path: Path) -> bool:
    """Whether a recipe trains a tokenizer; that of a generator names a folder under "tokenizer"."""
    return yaml.safe_load(path.read_text(encoding="utf-8")).get("tokenizer") in (None, *TOKENIZERS)


def tokenizer_of(path: Path) -> ImageTokenizer:
    """The tokenizer of a recipe, with its first weights."""
    config = load_config(TokenizerConfig, path)
    return tokenizer_class(config.tokenizer)(**config.model)


def test_there_are_recipes():
    assert {is_tokenizer(path) for path in RECIPES} == {True, False}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_builds_its_model(path):
    if is_tokenizer(path):
        tokenizer = tokenizer_of(path)
        assert tokenizer.image_size == 64
        assert sum(p.numel() for p in tokenizer.parameters()) < 12e6
        return
    config = load_config(GeneratorConfig, path)
    recipe = next(item for item in RECIPES if f"/{item.stem}/" in f"/{config.tokenizer}/")
    tokenizer = tokenizer_of(recipe)
    words = {"kind": "words", "vocabulary": 100, "length": config.text.max_length}
    generator = build_generator(config.generator, tokenizer, words, config.model)
    assert generator.order.layout == tokenizer.layout
    assert sum(p.numel() for p in generator.parameters()) < 12e6


def test_the_recipes_of_masks_are_valid():
    folder = Path(__file__).parent.parent / "recipes"
    settings = load_config(MaskTokenizerConfig, folder / "masks128-tokenizer.yaml")
    with torch.device("meta"):
        tokenizer = MaskTokenizer(**settings.model)
    assert (tokenizer.image_size, tokenizer.levels) == (128, 32)
    assert sum(value.numel() for value in tokenizer.parameters()) < 3e6
    phrases, unet = (
        load_config(SegmentationConfig, folder / f"masks128-{name}.yaml") for name in ("phrases", "unet")
    )
    assert (phrases.segmenter, unet.segmenter) == ("tokens", "unet")


def scale_tokenizer() -> SimpleNamespace:
    """What next-scale prediction asks of a tokenizer: a layout, a vocabulary, a pyramid and the vectors of its codes."""
    layout = Layout.scales([1, 2, 4])
    pyramid = ResidualPyramid(layout.maps, 12, 6, phis=2, ratio=0.25, kernel=5)
    inner = SimpleNamespace(decode=lambda codes: pyramid.codes(codes))
    quantizer = SimpleNamespace(pyramid=pyramid, inner=inner)
    return SimpleNamespace(layout=layout, vocab_size=12, quantizer=quantizer, device=torch.device("cpu"))


def test_next_scale_takes_the_pyramid_of_the_tokenizer():
    tokenizer, words = scale_tokenizer(), {"kind": "words", "vocabulary": 9, "length": 3}
    options = {"transformer": {"width": 16, "heads": 2, "depth": 1, "rope": False}}
    generator = build_generator("next_scale", tokenizer, words, options)
    ours, theirs = generator.tokens.pyramid.state_dict(), tokenizer.quantizer.pyramid.state_dict()
    assert (
        all(torch.equal(value, theirs[name]) for name, value in ours.items()) and ours.keys() == theirs.keys()
    )
    codes = torch.randint(12, (2, 21))
    torch.testing.assert_close(generator.features(codes), tokenizer.quantizer.pyramid.decode(codes))
    generator.loss(codes, torch.tensor([[1, 2, 0], [3, 0, 0]])).backward()
    tokenizer.quantizer.pyramid.up = "bilinear"
    assert build_generator("next_scale", tokenizer, words, options).tokens.pyramid.up == "bilinear"
    with pytest.raises(TokenloomError, match="enlarges them by 'bilinear'"):
        generator.take_pyramid(tokenizer.quantizer.pyramid, tokenizer.quantizer.pyramid.codes.weight)


@pytest.mark.parametrize(
    ("layout", "name", "order"),
    [
        (Layout.grid(4, 6), "next_block", {"name": "blocks", "block": 6}),
        (Layout.line(24), "block_diffusion", {"name": "blocks", "block": 4}),
        (Layout.line(7), "next_block", {"name": "blocks", "block": 1}),
        (Layout.frames(5, 3), "next_block", {"name": "blocks", "block": 3}),
        (Layout.clip(2, 3, 4), "next_neighbor", {"name": "neighbors"}),
        (Layout.grid(4, 4), "masked", {"name": "random", "steps": 8}),
    ],
)
def test_default_orders_fit_the_layout(layout, name, order):
    built = build_order(name, layout, {})
    assert {"name": built.name, **{key: dict(built.options)[key] for key in order if key != "name"}} == order
    assert build_order(name, layout, {"order": "raster"}).num_steps == layout.size
