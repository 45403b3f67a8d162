"""train-tokenizer and train, end to end on a dozen pictures: files, log, figures, losses, continuation, bad folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_training import (
    COLOURS,
    FSQ,
    MODEL,
    SHAPES,
    VQ,
    draw,
    draw_folder,
    generator_settings,
    log_rows,
    loop,
    picture_array,
    tokenizer_settings,
    write,
)
from torch import Tensor

from tokenloom import (
    ImageScaleTokenizer,
    ImageVQTokenizer,
    TextToImagePipeline,
    TokenloomError,
    WordTokenizer,
)
from tokenloom.training.config import GeneratorConfig, LoopConfig, TokenizerConfig, from_dict
from tokenloom.training.families import FAMILIES
from tokenloom.training.generator_task import GeneratorTask
from tokenloom.training.loop import Trainer
from tokenloom.training.run import train_generator, train_tokenizer
from tokenloom.training.tokenizer_task import TokenizerTask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures."""
    return draw_folder(tmp_path_factory.mktemp("pictures"))


def tokenizer_task(values: dict[str, Any]) -> TokenizerTask:
    return TokenizerTask(from_dict(TokenizerConfig, values))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """The output folder of a short tokenizer run."""
    root = tmp_path_factory.mktemp("tokenizer")
    config = write(root / "config.yaml", tokenizer_settings(folder, root / "run", augment={"flip": 0.5}))
    assert train_tokenizer(config) == root / "run" / "model"
    return root / "run"


@pytest.fixture(scope="module")
def generated(folder, trained, tmp_path_factory) -> Path:
    """The output folder of a short generator run."""
    root = tmp_path_factory.mktemp("generator")
    extra = {"views": 2, "augment": {"flip": 0.5}, "sampling": {"guidance_scale": 2.0, "top_k": 64}}
    config = write(root / "config.yaml", generator_settings(folder, trained / "model", root / "run", **extra))
    assert train_generator(config) == root / "run" / "model"
    return root / "run"


# Tokenizer


def test_tokenizer_run_leaves_samples_log_and_a_model_that_loads(trained):
    samples = sorted(path.name for path in (trained / "samples").iterdir())
    assert samples == [f"step-{step:08d}.png" for step in (0, 2, 4)]
    with Image.open(trained / "samples" / samples[0]) as sheet:
        assert sheet.width > 12 * 16
        assert sheet.height >= 2 * 16
    log = log_rows(trained)
    assert [row["step"] for row in log] == [2, 4]
    for row in log:
        assert {"l1", "l2", "psnr", "loss", "usage", "perplexity", "dead"} <= row.keys()
        assert 0 < row["usage"] <= 1
        assert row["dead"] == pytest.approx(256 * (1 - row["usage"]), abs=0.01)
        assert 1 <= row["perplexity"] <= 256 * row["usage"] * 1.001
    tokenizer = ImageVQTokenizer.from_pretrained(trained / "model")
    output = tokenizer.reconstruct(torch.zeros(1, 3, 16, 16))
    assert output.shape == (1, 3, 16, 16)


def test_usage_counts_the_codes_of_the_window(folder, tmp_path):
    task = tokenizer_task(tokenizer_settings(folder, tmp_path, loop=loop(log_every=2)))
    for codes, step in ((0, 0), (1, 1), (2, 2), (2, 3)):
        task._count(torch.full((3, 4), codes), step)
        if step in (0, 2):
            assert task.usage == {}
    assert float(task.usage["usage"]) == pytest.approx(1 / 256)
    assert int(task.statistics.counts[0, 2]) == 24
    assert float(task.usage["perplexity"]) == pytest.approx(1)


def test_tokenizer_overfits_a_handful_of_pictures(folder, tmp_path):
    model = {**MODEL, "width": 48, "quantizer_options": {"levels": [8, 8, 8, 8]}}
    task = tokenizer_task(tokenizer_settings(folder, tmp_path, model=model))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=4e-3)
    batch = task.batch(torch.arange(6), torch.Generator())
    for step in range(150):
        loss, logs = task.loss(task.module, batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        optimizer.step()
    assert logs["psnr"] > 25


def test_the_seed_decides_the_first_weights(folder, tmp_path):
    first, again, other = (
        tokenizer_task(tokenizer_settings(folder, tmp_path, loop=loop(seed=seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokenizer.to_code.weight, again.tokenizer.to_code.weight)
    assert not torch.equal(first.tokenizer.to_code.weight, other.tokenizer.to_code.weight)


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {}], ids=["ema", "gradient"])
def test_vq_with_revival_trains_and_resumes(folder, tmp_path, options):
    quantizer = {"codebook_size": 64, "dim": 4, "revive_after": 1, **options}
    values = tokenizer_settings(folder, tmp_path / "run", model={**VQ, "quantizer_options": quantizer})
    config = write(tmp_path / "config.yaml", values)
    train_tokenizer(config)
    train_tokenizer(config, resume="latest", overrides=["loop.steps=6"])
    log = log_rows(tmp_path / "run")
    assert [row["step"] for row in log] == [2, 4, 6]
    assert "commitment" in log[-1]
    model = ImageVQTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.vocab_size == 64


def test_init_from_starts_with_the_weights_of_a_tokenizer(folder, trained, tmp_path):
    values = tokenizer_settings(folder, tmp_path, init_from=str(trained / "model"))
    task = tokenizer_task(values)
    task.module.eval()
    loaded = ImageVQTokenizer.from_pretrained(trained / "model")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(task.tokenizer.reconstruct(pixels), loaded.reconstruct(pixels))
    with pytest.raises(TokenloomError, match="there is no such folder"):
        tokenizer_task({**values, "init_from": str(tmp_path / "nothing")})


def test_unknown_model_options_name_the_closest_match(folder, tmp_path):
    with pytest.raises(TokenloomError, match=r"model option 'widht'.*'width'"):
        tokenizer_task(tokenizer_settings(folder, tmp_path, model={"widht": 3}))


# Loss switches


def gradients(task: TokenizerTask, batch: dict[str, Tensor], step: int = 0) -> Tensor:
    task.module.zero_grad()
    torch.manual_seed(0)
    loss, _ = task.loss(task.module, batch, step)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("structure", {"structure": 0.5}),
        (
            "perceptual",
            {"perceptual": 0.5, "perceptual_backbone": "resnet10t", "perceptual_pretrained": False},
        ),
        ("adversarial", {"adversarial": 0.5, "adversarial_start": 0}),
    ],
)
def test_switches_add_their_loss_and_change_the_gradients(folder, tmp_path, name, switches):
    model = {**FSQ, "image_size": 32, "patch": 8}
    plain = tokenizer_task(tokenizer_settings(folder, tmp_path, model=model))
    task = tokenizer_task(tokenizer_settings(folder, tmp_path, model=model, loss=switches))
    batch = plain.batch(torch.arange(4), torch.Generator())
    before, after = gradients(plain, batch), gradients(task, batch)
    assert after.isfinite().all()
    assert (after - before).norm() > 0.01 * before.norm()
    _, logs = task.loss(task.module, batch, 0)
    assert name in logs
    assert name not in plain.loss(plain.module, batch, 0)[1]


def critic_task(folder: Path, output: Path, start: int = 0) -> tuple[TokenizerTask, Accelerator]:
    switches = {"adversarial": 0.5, "adversarial_start": start}
    task = tokenizer_task(tokenizer_settings(folder, output, loss=switches))
    accelerator = Accelerator(cpu=True)
    task.prepare(accelerator)
    return task, accelerator


def test_the_tokenizer_step_leaves_no_gradient_in_the_discriminator(folder, tmp_path):
    task, accelerator = critic_task(folder, tmp_path)
    batch = task.batch(torch.arange(4), torch.Generator())
    gradients(task, batch)
    assert task.discriminator is not None
    assert all(p.requires_grad and p.grad is None for p in task.discriminator.parameters())
    task.after_step(accelerator, batch, 0)
    once = [p.grad.clone() for p in task.discriminator.parameters()]
    for parameter in task.discriminator.parameters():  # whatever was left there must not count
        parameter.grad = torch.full_like(parameter, 1e3)
    with torch.no_grad():
        twin, _ = critic_task(folder, tmp_path)
    task.discriminator.load_state_dict(twin.discriminator.state_dict())
    task.after_step(accelerator, batch, 0)
    for wanted, parameter in zip(once, task.discriminator.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_the_discriminator_learns_only_from_its_first_step_on(folder, tmp_path):
    task, accelerator = critic_task(folder, tmp_path, start=3)
    batch = task.batch(torch.arange(4), torch.Generator())
    before = [p.detach().clone() for p in task.discriminator.parameters()]
    gradients(task, batch, 2)
    assert task.after_step(accelerator, batch, 2) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, task.discriminator.parameters(), strict=True))
    gradients(task, batch, 3)
    assert task.after_step(accelerator, batch, 3)["critic"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, task.discriminator.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adversarial_training_runs_and_resumes(folder, tmp_path, precision):
    changes = {
        "loss": {"adversarial": 0.5, "adversarial_start": 1},
        "loop": loop(precision=precision, accumulate=2),
    }
    config = write(tmp_path / "config.yaml", tokenizer_settings(folder, tmp_path / "run", **changes))
    train_tokenizer(config)
    train_tokenizer(config, resume="latest", overrides=["loop.steps=6"])
    log = log_rows(tmp_path / "run")
    assert all(torch.tensor([row["critic"], row["adversarial"]]).isfinite().all() for row in log)
    assert [row["step"] for row in log] == [2, 4, 6]


# Generator


def test_generator_run_leaves_a_pipeline_that_makes_pictures(generated):
    assert sorted(path.name for path in (generated / "samples").iterdir())[0] == "step-00000000.png"
    pipe = TextToImagePipeline.from_pretrained(generated / "model")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a red circle", "a zeppelin"], seed=[1, 2]).images
    assert [image.size for image in images] == [(16, 16), (16, 16)]
    assert set(pipe.text_tokenizer.vocabulary) == {*COLOURS, *SHAPES}
    assert pipe.config.sampling == {"guidance_scale": 2.0, "top_k": 64}
    losses = [row["loss"] for row in log_rows(generated)]
    assert losses == pytest.approx([torch.tensor(256.0).log().item()] * 2, abs=1)


def test_generator_loss_falls(folder, trained, tmp_path):
    values = generator_settings(folder, trained / "model", tmp_path, text={"max_length": 4, "drop": 0.0})
    task = GeneratorTask(from_dict(GeneratorConfig, values))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    batch = task.batch(torch.arange(12), torch.Generator())
    losses = []
    for step in range(30):
        loss, _ = task.loss(task.module, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1


def test_init_from_continues_with_the_same_model(folder, generated, trained, tmp_path):
    """The sample grid of step 0 shows what the pipeline itself makes."""
    values = generator_settings(folder, trained / "model", tmp_path, init_from=str(generated / "model"))
    values |= {"sample_prompts": ["a red circle", "a blue square"], "sampling": {"guidance_scale": 2.0}}
    task = GeneratorTask(from_dict(GeneratorConfig, values))
    task.module.eval()
    pipe = TextToImagePipeline.from_pretrained(generated / "model")
    pipe.set_progress_bar_config(disable=True)
    options = {"seed": [0, 0], "guidance_scale": 2.0, "top_k": 0}
    assert torch.equal(
        task._pipeline()(values["sample_prompts"], **options).codes,
        pipe(values["sample_prompts"], **options).codes,
    )
    assert task.words.vocabulary == pipe.text_tokenizer.vocabulary


def test_the_loss_of_held_out_pictures_is_logged_with_every_sheet(folder, trained, tmp_path):
    copy = tmp_path / "pictures"
    shutil.copytree(folder, copy)
    lines = (copy / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) | ({"split": "val"} if index < 5 else {}) for index, line in enumerate(lines)]
    (copy / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = generator_settings(copy, trained / "model", tmp_path / "run", held_out="val")
    config = from_dict(GeneratorConfig, values)
    task = GeneratorTask(config)
    assert task.size == len(lines) - 5
    Trainer(task, config.loop, tmp_path / "run").run()
    found = [row["held_out"] for row in log_rows(tmp_path / "run") if "held_out" in row]
    pictures = [picture_array(copy, row["file"]) for row in rows[:5]]
    codes = task.tokenizer.encode(
        torch.stack([torch.from_numpy(one) for one in pictures]).float() / 127.5 - 1
    )
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run" / "model")
    expected = pipe.generator.loss(codes, pipe.text_tokenizer([row["text"] for row in rows[:5]]))
    assert found[-1] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(TokenloomError, match="vall"):
        GeneratorTask(from_dict(GeneratorConfig, values | {"held_out": "vall"}))


def test_captions_are_dropped_as_often_as_configured(folder, trained, tmp_path):
    for drop, wanted in ((0.0, 0), (1.0, 12)):
        values = generator_settings(folder, trained / "model", tmp_path, text={"drop": drop})
        task = GeneratorTask(from_dict(GeneratorConfig, values))
        condition = task.batch(torch.arange(12), torch.Generator())["condition"]
        assert int((condition == 0).all(1).sum()) == wanted
        assert not (condition == 1).any()


def test_words_of_label_style_and_tags_enter_the_vocabulary(trained, tmp_path):
    draw("red", "circle").save(tmp_path / "a.png")
    line = {
        "file": "a.png",
        "text": "something nice",
        "label": "ball",
        "style": "flat",
        "tags": ["toy", "round"],
    }
    (tmp_path / "captions.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    task = GeneratorTask(
        from_dict(
            GeneratorConfig,
            generator_settings(tmp_path, trained / "model", tmp_path / "o", text={"drop": 0.0}),
        )
    )
    for seed in range(8):
        condition = task.batch(torch.tensor([0]), torch.Generator().manual_seed(seed))["condition"]
        assert not (condition == 1).any()


def test_a_folder_without_captions_trains_a_tokenizer_but_no_generator(trained, tmp_path):
    for colour in COLOURS:
        draw(colour, "circle").save(tmp_path / f"{colour}.png")
    assert tokenizer_task(tokenizer_settings(tmp_path, tmp_path / "run")).size == 4
    values = generator_settings(tmp_path, trained / "model", tmp_path / "run")
    with pytest.raises(
        TokenloomError, match=r'has no captions; add a captions\.jsonl with "file" and "text"'
    ):
        GeneratorTask(from_dict(GeneratorConfig, values))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_generator_trains(folder, trained, tmp_path, precision):
    for name in sorted(FAMILIES.keys() - {"next_scale"}):  # whose tokenizer is of another kind
        values = generator_settings(folder, trained / "model", tmp_path, generator=name)
        task = GeneratorTask(from_dict(GeneratorConfig, values))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = task.loss(task.module, task.batch(torch.arange(4), torch.Generator()), 0)
        loss.backward()
        without = [key for key, p in task.module.named_parameters() if p.grad is None]
        assert without == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": "next_neighbour"}, "'next_neighbor'"),
        ({"generator": "next_scale"}, "ImageVQTokenizer has codes in grid.*no pyramid"),
        (
            {"generator": "next_block", "loss": {"step_weights": [1.0]}},
            "one weight for each of the 4 steps, got 1",
        ),
        ({"generator": "masked", "loss": {"progressive": 0.5}}, "MaskedGenerator has no weights of steps"),
        ({"generator": "next_block", "loss": {"growth": [1, 2]}}, "needs the generator block_diffusion"),
        (
            {"generator": "block_diffusion", "loss": {"growth": [1], "progressive": 0.5}},
            "growth changes the steps",
        ),
        ({"loss": {"step_weigths": [1.0]}}, "'step_weights'"),
        (
            {"generator": "next_block", "model": {"order": "blocks", "order_options": {"blok": 4}}},
            "Unknown option of the order 'blocks' 'blok'.*'block'",
        ),
        (
            {"generator": "block_diffusion", "model": {"rule_config": {"pases": 4}}},
            "'pases'.*'passes'",
        ),
        ({"tokenizer": "nowhere/at/all"}, "No model at nowhere/at/all"),
        (
            {"model": {"transformer": {"width": 16, "heads": 2, "depth": 1}, "share_heads": True}},
            "'share_head'",
        ),
        ({"model": {"transformer": {"width": 16, "heads": 2, "dept": 1}}}, "'depth'"),
        ({"model": {"transformer": {"width": 16, "heads": 2, "depth": 1}, "vocab_size": 3}}, "model option"),
        ({"model": {"transformer": {"width": 16, "heads": 2, "depth": 1}, "order": "rastr"}}, "'raster'"),
    ],
)
def test_mistakes_in_a_generator_config_are_explained(folder, trained, tmp_path, changes, message):
    values = generator_settings(folder, trained / "model", tmp_path) | changes
    with pytest.raises(TokenloomError, match=message):
        GeneratorTask(from_dict(GeneratorConfig, values))


def test_filters_that_leave_nothing_are_explained(folder, tmp_path):
    with pytest.raises(TokenloomError, match="val"):
        tokenizer_task(tokenizer_settings(folder, tmp_path) | {"data": {"root": str(folder), "split": "val"}})
    with pytest.raises(TokenloomError, match="style"):
        tokenizer_task(
            tokenizer_settings(folder, tmp_path) | {"data": {"root": str(folder), "styles": ["flat"]}}
        )
    whole = tokenizer_settings(folder, tmp_path) | {"data": {"root": str(folder), "split": None}}
    assert tokenizer_task(whole).size == 12


def test_the_vocabulary_file_of_a_run_is_readable_by_itself(generated):
    words = WordTokenizer.from_pretrained(generated / "model" / "text_tokenizer")
    assert words("a red circle").count_nonzero() == 2
    assert LoopConfig(**loop()).steps == 4


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ({}, 4),
        ({"order": "random", "order_options": {"steps": 5, "seed": 1}}, 5),
        ({"order": "regions", "order_options": {"n": 4}, "rule_config": {"plan": "groups"}}, 7),
        ({"order_options": {"sequential_first": True}, "rule_config": {"plan": "groups"}}, 7),
        ({"rule_config": {"plan": "shift"}}, 4),
    ],
)
def test_next_block_trains_with_every_plan_and_order(folder, trained, tmp_path, model, steps):
    """Two steps, a sample sheet and a folder that loads; a plan that continues shows continuations."""
    model = {"transformer": {"width": 16, "heads": 2, "depth": 1}, **model}
    values = generator_settings(
        folder, trained / "model", tmp_path / "run", generator="next_block", model=model, loop=loop(steps=2)
    )
    config = write(tmp_path / "config.yaml", values)
    saved = TextToImagePipeline.from_pretrained(train_generator(config))
    assert saved.generator.order.num_steps == steps
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as sheet:
        assert sheet.width > 8 * 16


def test_later_steps_join_the_loss(folder, trained, tmp_path):
    """Progressive scales: the first step alone, then one more at a time, each with its weight."""
    details = {"step_weights": [4.0, 3.0, 2.0, 1.0], "progressive": 0.5}
    values = generator_settings(
        folder,
        trained / "model",
        tmp_path,
        generator="next_block",
        model={"transformer": {"width": 16, "heads": 2, "depth": 1}},
        loss=details,
        loop=loop(steps=12),
    )
    task = GeneratorTask(from_dict(GeneratorConfig, values))
    rows = [task._weights(step).view(4, 4)[:, 0].tolist() for step in (0, 2, 4, 6, 11)]
    assert rows == [[4, 0, 0, 0], [4, 3, 0, 0], [4, 3, 2, 0], [4, 3, 2, 1], [4, 3, 2, 1]]
    batch = task.batch(torch.arange(4), torch.Generator().manual_seed(0))
    task.module.eval()
    loss, _ = task.loss(task.module, batch, 0)
    logits = task.generator.logits(batch["codes"], batch["condition"])[:, :4]
    first = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["codes"][:, :4].flatten())
    torch.testing.assert_close(loss, first * 4 * 4 / 16)


def test_blocks_grow_during_training(folder, trained, tmp_path):
    """Sizes 1, 2, 8 in equal parts of half the training; the model that is saved has the last one."""
    values = generator_settings(
        folder,
        trained / "model",
        tmp_path / "run",
        generator="block_diffusion",
        model={"transformer": {"width": 16, "heads": 2, "depth": 1}},
        loss={"growth": [1, 2, 8]},
        loop=loop(steps=12),
    )
    task = GeneratorTask(from_dict(GeneratorConfig, values))
    assert task.generator.order.num_steps == 16
    batch, seen = task.batch(torch.arange(4), torch.Generator()), []
    for step in range(12):
        task.loss(task.module, batch, step)
        seen.append(16 // task.generator.order.num_steps)
    assert seen == [1, 1, 2, 2] + [8] * 8
    saved = train_generator(write(tmp_path / "config.yaml", values))
    assert TextToImagePipeline.from_pretrained(saved).generator.order.num_steps == 2


def test_next_scale_trains_on_a_tokenizer_of_many_scales(folder, tmp_path):
    """The generator adds up what the tokenizer decodes, and the saved pipeline makes pictures."""
    torch.manual_seed(0)
    tokenizer = ImageScaleTokenizer(
        scales=[1, 2, 4],
        channels=8,
        multipliers=[1, 1, 2],
        blocks=1,
        latent_channels=8,
        norm_groups=4,
        quantizer_options={"codebook_size": 32, "dim": 8, "normalize": False},
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = generator_settings(
        folder,
        tmp_path / "tokenizer",
        tmp_path / "run",
        generator="next_scale",
        model={"transformer": {"width": 16, "heads": 2, "depth": 1, "rope": False}},
        loss={"step_weights": [1.0, 1.0, 0.5], "progressive": 0.5},
    )
    saved = TextToImagePipeline.from_pretrained(train_generator(write(tmp_path / "config.yaml", values)))
    codes = saved.tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    features = saved.generator.features(codes)
    vectors = saved.tokenizer.quantizer.decode(codes)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), vectors)
    (image,) = saved("a red circle", seed=1).images
    assert image.size == (16, 16)
    with pytest.raises(TokenloomError, match="codes lie on a grid, got scales"):
        saved("a red circle", image=image, mask_image=Image.new("L", (16, 16), 255))
