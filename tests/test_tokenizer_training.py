"""Training of any image tokenizer: classes by name, official weights, frozen parts, figures per scale, warnings, losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from test_checkpoints_image_scale import golden
from torch import Tensor, nn

from tokenloom import ImageCNNTokenizer, ImageScaleTokenizer, ImageVQTokenizer, Layout, TokenloomError
from tokenloom.checkpoints import from_official
from tokenloom.tokenizers import registry
from tokenloom.tokenizers.registry import load_tokenizer, register_tokenizer, tokenizer_class
from tokenloom.training.config import TokenizerConfig, from_dict
from tokenloom.training.freezing import freeze
from tokenloom.training.loop import Trainer, not_finite
from tokenloom.training.losses import LeCam
from tokenloom.training.statistics import CodeStatistics
from tokenloom.training.tokenizer_task import TokenizerTask

CNN: dict[str, Any] = {
    "channels": 8,
    "multipliers": [1, 1, 2],
    "blocks": 1,
    "latent_channels": 8,
    "norm_groups": 4,
}
EMA: dict[str, Any] = {"codebook_size": 32, "dim": 8, "normalize": False, "ema_decay": 0.9}
SCALES = {"tokenizer": "image_scale", "model": {"scales": [1, 2, 4], **CNN, "quantizer_options": EMA}}
GRID = {
    "tokenizer": "image_cnn",
    "model": {
        "image_size": 16,
        **CNN,
        "pixel_range": [0.0, 1.0],
        "quantizer_options": {"codebook_size": 32, "dim": 8},
    },
}
PLAIN = {
    "model": {
        "image_size": 16,
        "patch": 4,
        "merge": 1,
        "width": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "heads": 2,
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    pixels = torch.randint(256, (8, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    lines = []
    for index, values in enumerate(pixels):
        Image.fromarray(values.numpy()).resize((16, 16)).save(root / f"{index}.png")
        lines.append(json.dumps({"file": f"{index}.png", "text": "noise"}))
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def task(folder: Path, output: Path, *parts: dict[str, Any], **changes: Any) -> TokenizerTask:
    loop = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup": 1, "precision": "no", "ema": 0.5}
    loop |= {"log_every": 1, "sample_every": 3, "checkpoint_every": 3}
    values: dict[str, Any] = {"output": str(output), "data": {"root": str(folder)}, "loop": loop}
    for part in parts:
        values |= part
    return TokenizerTask(from_dict(TokenizerConfig, values | changes))


def train(made: TokenizerTask) -> list[dict[str, float]]:
    """Runs a task and returns its log."""
    output = Path(made.config.output)
    Trainer(made, made.config.loop, output).run()
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# classes


@pytest.mark.filterwarnings("ignore:Step")
@pytest.mark.parametrize(
    ("settings", "kind"),
    [(SCALES, ImageScaleTokenizer), (GRID, ImageCNNTokenizer), (PLAIN, ImageVQTokenizer)],
)
def test_every_class_trains_and_loads(folder, tmp_path, settings, kind):
    made = task(
        folder, tmp_path / "run", settings, loss={"adversarial": 0.1, "adversarial_start": 0, "lecam": 0.01}
    )
    log = train(made)
    assert all(row["loss"] > 0 and row["critic"] > 0 for row in log)
    again = load_tokenizer(tmp_path / "run" / "model")
    assert type(again) is kind and again.layout == made.tokenizer.layout
    with Image.open(tmp_path / "run" / "samples" / "step-00000000.png") as sheet:
        rows = 1 + len(again.lengths)
        assert sheet.height >= rows * 16 and sheet.height < (rows + 1) * 24 + 8
    if kind is ImageScaleTokenizer:
        assert {"usage", "usage.scale_0", "perplexity.scale_2", "dead.scale_1"} <= log[-1].keys()
        assert log[-1]["usage.scale_0"] <= 4 / 32


def test_a_range_of_its_own_is_trained_in_that_range(folder, tmp_path):
    made = task(folder, tmp_path, GRID)
    seen: list[Tensor] = []
    made.tokenizer.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = made.batch(torch.arange(4), torch.Generator())
    _, logs = made.loss(made.module, batch, 0)
    assert batch["pixels"].min() < -0.5 and seen[0].min() >= 0 and seen[0].max() <= 1
    with torch.no_grad():
        output = made.tokenizer((batch["pixels"] + 1) / 2)[0] * 2 - 1
    torch.testing.assert_close(logs["l2"], (output - batch["pixels"]).square().mean())


def test_a_class_of_your_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "TOKENIZERS", dict(registry.TOKENIZERS))

    class Mine(ImageVQTokenizer):
        @register_to_config
        def __init__(self, width: int = 16) -> None:
            super().__init__(16, 4, 1, width, 1, 1, 2)

    with pytest.raises(TokenloomError, match="'image_vq'"):
        tokenizer_class("image_qv")
    register_tokenizer("mine", Mine)
    assert tokenizer_class("mine") is Mine
    made = task(folder, tmp_path, tokenizer="mine", model={"width": 32})
    assert type(made.tokenizer) is Mine and made.tokenizer.config["width"] == 32
    made.save(tmp_path / "model")
    assert type(load_tokenizer(tmp_path / "model")) is Mine
    with pytest.raises(TokenloomError, match="already belongs"):
        register_tokenizer("image_vq", Mine)
    with pytest.raises(TokenloomError, match="subclass of ImageTokenizer"):
        register_tokenizer("linear", nn.Linear)  # type: ignore[arg-type]
    del registry.TOKENIZERS["mine"]
    with pytest.raises(TokenloomError, match="register_tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_pictures_that_are_not_square_are_named(folder, tmp_path):
    with pytest.raises(TokenloomError, match=r"image_size \(16, 32\)"):
        task(folder, tmp_path, tokenizer="image_scale", model={"scales": [1, [4, 8]], **CNN})


# official weights and frozen parts


@pytest.mark.filterwarnings("ignore:Step")
def test_official_weights_are_tuned_with_unchanged_codes(folder, tmp_path):
    config, state, values = golden("var_vq")
    official = from_official("var_vq", state, config)
    official.save_pretrained(tmp_path / "official")
    made = task(
        folder, tmp_path / "run", init_from=str(tmp_path / "official"), freeze=["encoder", "quantizer"]
    )
    assert type(made.tokenizer) is ImageScaleTokenizer and made.tokenizer.image_size == 80
    train(made)
    tuned = load_tokenizer(tmp_path / "run" / "model").eval()
    pixels = values["input.image"]
    assert torch.equal(tuned.encode(pixels), values["output.tokens"])
    assert not torch.equal(tuned.decode(values["output.tokens"]), official.decode(values["output.tokens"]))
    for name, value in official.state_dict().items():
        if name.startswith(("encoder", "to_code", "quantizer")):
            assert torch.equal(tuned.state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:Step")
@pytest.mark.parametrize("settings", [SCALES, PLAIN])
def test_frozen_codebooks_of_averages_stay(folder, tmp_path, settings):
    model = settings["model"]
    if settings is PLAIN:
        options = {**EMA, "revive_after": 1}
        settings = {"model": {**model, "quantizer_type": "vq", "quantizer_options": options}}
    made = task(folder, tmp_path / "run", settings, freeze=["encoder", "quantizer"])
    before = {name: value.clone() for name, value in made.tokenizer.state_dict().items()}
    train(made)
    after = made.tokenizer.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(before[name], value)}
    assert changed and not changed & {"encoder", "stem", "to_code", "quantizer"}


def test_names_to_freeze():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert freeze(module, []) == []
    assert freeze(module, ["1.0"]) == [module[1][0]]
    assert [value.requires_grad for value in module.parameters()] == [True, True, False, False]
    freeze(module, ["0.weight"])
    assert [value.requires_grad for value in module.parameters()] == [False, True, False, False]
    for name in ("encodr", "1.00", ""):
        with pytest.raises(TokenloomError, match=f"part to freeze '{name}'"):
            freeze(module, [name], {"encoder": ("0",)})
    with pytest.raises(TokenloomError, match="Nothing is left to train"):
        freeze(module, ["encoder"], {"encoder": ("0", "1")})


# figures and warnings


def test_figures_of_every_scale_and_codebook():
    statistics = CodeStatistics(Layout.scales([1, 2]), 8)
    statistics.update(torch.tensor([[0, 1, 1, 2, 2], [0, 3, 3, 3, -1]]))
    figures = statistics.figures()
    assert (figures["usage"], figures["dead"]) == (4 / 8, 4)
    assert (figures["usage.scale_0"], figures["perplexity.scale_0"]) == (1 / 8, pytest.approx(1))
    assert figures["usage.scale_1"] == 3 / 8
    assert int(statistics.counts.sum()) == 9
    statistics.update(torch.tensor([[5]]))  # a prefix
    assert int(statistics.counts[0, 5]) == 1
    statistics.clear()
    assert not statistics.counts.any()
    frames = CodeStatistics(Layout.frames(2, 3), 4)
    frames.update(torch.tensor([[0, 1, 2, 0, 1, 3]]))
    assert [frames.figures()[f"usage.codebook_{index}"] for index in range(3)] == [0.25, 0.25, 0.5]
    assert set(CodeStatistics(Layout.grid(2, 2), 4).figures()) == {"usage", "perplexity", "dead"}


def test_bits_of_large_vocabularies():
    statistics = CodeStatistics(Layout.line(40), 1 << 40)
    generator = torch.Generator().manual_seed(0)
    statistics.update(torch.randint(1 << 40, (50, 40), generator=generator))
    assert statistics.figures()["bit_entropy"] > 0.99 and statistics.concerns() == []
    statistics.clear()
    statistics.update(torch.full((50, 40), 5))
    assert statistics.figures()["bit_entropy"] == 0
    assert "0.00 bits of information" in statistics.concerns()[0]


def test_what_looks_wrong_is_told_once_until_it_is_gone():
    statistics = CodeStatistics(Layout.scales([1, 4]), 16)
    even, low = torch.arange(64).view(-1, 1) % 16, torch.zeros(64, 1, dtype=torch.long)

    def window(fine: Tensor) -> list[str]:
        statistics.clear()
        statistics.update(torch.cat([low % 16, fine.expand(-1, 16)], dim=1))
        return [text for text in statistics.concerns() if "scale_1" in text]

    assert window(even) == []
    both = window(low)
    assert len(both) == 2 and "evenly drawn ones reach" in both[0] and "fell from 16.0 to 1.0" in both[1]
    assert window(low) == [] and window(even) == [] and len(window(low)) == 2
    short = CodeStatistics(Layout.line(4), 1000)
    short.update(torch.zeros(10, 4, dtype=torch.long))
    assert short.concerns() == []  # too few codes to say


def test_training_warns_of_codes_that_are_not_used(folder, tmp_path):
    made = task(folder, tmp_path, SCALES)
    with pytest.warns(UserWarning, match=r"Step 1: Codebook, scale_2: .* codes were used"):
        made._count(torch.zeros(4, 21, dtype=torch.long), 0)


# losses


def test_lecam_holds_the_answers_near_their_averages():
    lecam = LeCam(decay=0.5)
    real, fake = torch.full((4, 1), 2.0), torch.full((4, 1), -2.0)
    first = lecam(real, fake)  # averages become 1 and -1: (2 + 1)^2 + (1 + 2)^2
    torch.testing.assert_close(first, torch.tensor(18.0))
    assert lecam(torch.zeros(4, 1), torch.zeros(4, 1)) < first
    assert set(lecam.state_dict()) == {"real", "fake"}


def test_the_weight_of_the_entropy_loss(folder, tmp_path):
    made = task(folder, tmp_path, GRID, loss={"entropy": 0.3})
    batch = made.batch(torch.arange(4), torch.Generator())
    _, logs = made.loss(made.module, batch, 0)
    assert made.tokenizer.quantizer.entropy_weight == 0.3 and float(logs["entropy"]) != 0
    with pytest.raises(TokenloomError, match="needs a quantizer with an entropy loss"):
        task(folder, tmp_path, PLAIN, loss={"entropy": 0.3})


def test_tensors_that_are_not_finite_are_named(folder, tmp_path):
    assert not_finite(
        {"a": torch.tensor([1.0, float("inf")]), "b": torch.ones(1), "c": torch.ones(1).long()}, "x "
    ) == ["x a"]
    made = task(folder, tmp_path / "run", PLAIN)
    with torch.no_grad():
        made.tokenizer.decoder.norm.weight[0] = float("nan")
    with pytest.raises(TokenloomError, match=r"not finite: l1, l2, psnr, weight decoder\.norm\.weight"):
        train(made)
