"""TextToImagePipeline with tiny random components: seeds, batches, files, inpainting, previews, and bad input."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import LENGTH, WORDS, tiny_generator, tiny_pipeline, tiny_tokenizer

from tokenloom import Guidance, TextToImagePipeline, TokenloomError, WordTokenizer, media, models
from tokenloom.pipelines import inputs
from tokenloom.pipelines.preset import merge_settings
from tokenloom.tokenizers.text import split_words

PROMPT = "a simple picture of a red apple"
OTHER = "a detailed picture of a lion"


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return tiny_pipeline(guidance_scale=2.0, temperature=0.9)


@pytest.fixture(scope="module")
def saved(pipe: TextToImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.array(image).astype(int) for image in images])


# Calls


def test_seed_list_gives_the_images_of_those_seeds(pipe: TextToImagePipeline) -> None:
    both = pipe(PROMPT, seed=[1, 2], num_images_per_prompt=2)
    first, second = pipe(PROMPT, seed=1), pipe(PROMPT, seed=2)
    assert both.seeds == [1, 2]
    assert torch.equal(both.codes, torch.cat([first.codes, second.codes]))
    assert not torch.equal(first.codes, second.codes)
    assert np.abs(levels(both.images) - levels(first.images + second.images)).max() <= 1


def test_an_int_seed_counts_up_over_prompts(pipe: TextToImagePipeline) -> None:
    result = pipe([PROMPT, OTHER], seed=5, num_images_per_prompt=2)
    assert result.seeds == [5, 6, 7, 8]
    alone = pipe(OTHER, seed=[7, 8], num_images_per_prompt=2)
    assert torch.equal(result.codes[2:], alone.codes)


@pytest.mark.parametrize("others", [0, 1, 6])
def test_codes_do_not_depend_on_the_batch(pipe: TextToImagePipeline, others: int) -> None:
    alone = pipe(PROMPT, seed=99)
    batch = pipe([OTHER] * others + [PROMPT], seed=[*range(others), 99])
    assert torch.equal(batch.codes[-1], alone.codes[0])
    assert np.abs(levels(batch.images[-1:]) - levels(alone.images)).max() <= 1


def test_the_prompt_matters(pipe: TextToImagePipeline) -> None:
    assert not torch.equal(pipe(PROMPT, seed=3).codes, pipe(OTHER, seed=3).codes)


def test_decode_rungs_agree(pipe: TextToImagePipeline) -> None:
    results = [
        pipe(PROMPT, seed=[4, 5], num_images_per_prompt=2, decode=rung) for rung in ("reference", "cached")
    ]
    assert torch.equal(results[0].codes, results[1].codes)


def test_without_a_seed_images_differ_and_their_seeds_repeat_them(pipe: TextToImagePipeline) -> None:
    first, second = pipe(PROMPT), pipe(PROMPT)
    assert first.seeds != second.seeds
    assert torch.equal(pipe(PROMPT, seed=first.seeds).codes, first.codes)


def test_torch_generators_give_seeds(pipe: TextToImagePipeline) -> None:
    def make(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    one = pipe(PROMPT, generator=make(1), num_images_per_prompt=2)
    assert one.seeds == torch.randint(2**63 - 1, (2,), generator=make(1)).tolist()
    assert torch.equal(one.codes, pipe(PROMPT, seed=one.seeds, num_images_per_prompt=2).codes)
    several = pipe(PROMPT, generator=[make(1), make(2)], num_images_per_prompt=2)
    assert several.seeds == [torch.randint(2**63 - 1, (1,), generator=make(seed)).item() for seed in (1, 2)]


def test_the_largest_seed_is_a_seed(pipe: TextToImagePipeline) -> None:
    result = pipe(PROMPT, seed=2**64 - 1)
    assert result.seeds == [2**64 - 1]


def test_output_types_hold_the_same_pictures(pipe: TextToImagePipeline) -> None:
    results = {kind: pipe(PROMPT, seed=1, output_type=kind) for kind in ("pil", "np", "pt", "codes")}
    assert torch.equal(results["codes"].images, results["pil"].codes)
    assert results["np"].images.shape == (1, 16, 16, 3)
    assert results["pt"].images.shape == (1, 3, 16, 16)
    assert 0 <= results["np"].images.min() <= results["np"].images.max() <= 1
    assert np.array_equal((results["np"].images * 255).round().astype(int), levels(results["pil"].images))
    assert np.array_equal(results["pt"].images.permute(0, 2, 3, 1).numpy(), results["np"].images)


def test_return_dict_false_gives_a_tuple(pipe: TextToImagePipeline) -> None:
    images, codes, seeds = pipe(PROMPT, seed=1, return_dict=False)
    assert seeds == [1]
    assert torch.equal(codes, pipe(PROMPT, seed=1).codes)
    assert len(images) == 1


# Settings


def test_the_preset_is_used_and_can_be_overridden(pipe: TextToImagePipeline) -> None:
    def codes(**settings: Any) -> torch.Tensor:
        return pipe(PROMPT, seed=list(range(8)), num_images_per_prompt=8, **settings).codes

    preset = codes()
    assert torch.equal(preset, codes(guidance_scale=2.0, temperature=0.9))
    assert torch.equal(preset, codes(guidance=2.0))
    assert not torch.equal(preset, codes(guidance_scale=1.0))
    assert not torch.equal(preset, codes(temperature=2.0))
    assert torch.equal(codes(temperature=0), codes(top_k=1))
    assert torch.equal(
        codes(guidance=Guidance(3.0, "linear")), codes(guidance=lambda progress: 1 + 2 * progress)
    )


def test_preset_keys_reach_guidance_and_sampling() -> None:
    preset = {
        "guidance_scale": 3.0,
        "guidance_schedule": "linear",
        "guidance_start": 2.0,
        "top_k": 5,
        "top_p": 0.5,
    }
    pipe = tiny_pipeline(**preset, guidance_interval=[0.0, 0.5], nucleus="ascending")
    guidance, sampling = merge_settings(pipe.config["sampling"])
    assert (guidance.scale, guidance.schedule, guidance.start) == (3.0, "linear", 2.0)
    assert guidance.interval == (0.0, 0.5)
    assert (sampling.top_k, sampling.top_p, sampling.nucleus) == (5, 0.5, "ascending")
    assert merge_settings(pipe.config["sampling"], 1.0)[0].enabled is False


def test_an_unknown_preset_key_gets_the_closest_match() -> None:
    with pytest.raises(TokenloomError, match="Did you mean 'temperature'"):
        tiny_pipeline(temperatur=1.0)


# Files


def test_save_and_load_give_the_same_images(pipe: TextToImagePipeline, saved: Path) -> None:
    loaded = TextToImagePipeline.from_pretrained(saved)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.text_tokenizer, WordTokenizer)
    assert loaded.config.sampling == {"guidance_scale": 2.0, "temperature": 0.9}
    assert torch.equal(loaded(PROMPT, seed=3).codes, pipe(PROMPT, seed=3).codes)


def test_the_index_names_components_of_the_package_and_no_machine(saved: Path) -> None:
    again = TextToImagePipeline.from_pretrained(saved)
    copy = saved.parent / "copy"
    again.save_pretrained(copy)
    index = json.loads((copy / "model_index.json").read_text())
    assert index["tokenizer"] == ["tokenloom", "ImageVQTokenizer"]
    assert index["generator"] == ["tokenloom", "NextNeighborGenerator"]
    assert index["text_tokenizer"] == ["tokenloom", "WordTokenizer"]
    assert index[models.VERSION_KEY]
    for path in copy.rglob("*.json"):
        assert str(saved.parent) not in path.read_text()


def test_a_tokenizer_alone_is_no_pipeline(saved: Path) -> None:
    with pytest.raises(TokenloomError, match=r"one component, of class ImageVQTokenizer.*load_tokenizer"):
        TextToImagePipeline.from_pretrained(saved / "tokenizer")


def test_components_can_be_passed_to_from_pretrained(saved: Path) -> None:
    own = tiny_tokenizer(seed=5)
    loaded = TextToImagePipeline.from_pretrained(saved, tokenizer=own)
    assert loaded.tokenizer is own
    assert set(loaded.components) == {"tokenizer", "generator", "text_tokenizer"}


def test_the_weight_record_travels_with_the_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.card = {"license": "Apache-2.0", "figures": {"psnr": 20.5}}
    pipe.save_pretrained(tmp_path / "m")
    card = TextToImagePipeline.from_pretrained(tmp_path / "m").card
    assert card["figures"] == {"psnr": 20.5}
    assert set(card["sha256"]) == {
        f"{part}/diffusion_pytorch_model.safetensors" for part in ("generator", "tokenizer")
    }


def test_saving_over_a_model_replaces_all_of_it(tmp_path: Path) -> None:
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "m")
    second = tiny_pipeline(seed=2)
    second.save_pretrained(tmp_path / "m")
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "m")
    for name, weight in second.generator.state_dict().items():
        assert torch.equal(loaded.generator.state_dict()[name], weight)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: TextToImagePipeline
) -> None:
    pipe.save_pretrained(tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()}

    def fail(self: WordTokenizer, folder: str, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WordTokenizer, "save_pretrained", fail)
    with pytest.raises(TokenloomError, match="No space left on device"):
        tiny_pipeline(seed=9).save_pretrained(tmp_path / "m")
    assert {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TokenloomError, match="cannot be saved in"):
        pipe.save_pretrained(tmp_path / "file" / "model")


def test_truncated_weights_are_named(saved: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(saved)
    pipe.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "generator" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        TokenloomError, match=r"generator/diffusion_pytorch_model\.safetensors are damaged: it is truncated"
    ):
        TextToImagePipeline.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_loading_in_bfloat16(saved: Path, name: str) -> None:
    options: dict[str, Any] = {name: torch.bfloat16}
    loaded = TextToImagePipeline.from_pretrained(saved, **options)
    loaded.set_progress_bar_config(disable=True)
    assert {weight.dtype for weight in loaded.generator.parameters()} == {torch.bfloat16}
    first, second = loaded(PROMPT, seed=1), loaded(PROMPT, seed=1)
    assert torch.equal(first.codes, second.codes)
    assert first.images[0].size == (16, 16)


def test_a_dtype_that_is_none(saved: Path) -> None:
    with pytest.raises(TokenloomError, match=r"such as torch\.bfloat16, or \"auto\", got 'bf16'"):
        TextToImagePipeline.from_pretrained(saved, dtype="bf16")


# Known codes and inpainting


def test_known_codes_are_kept(pipe: TextToImagePipeline) -> None:
    known = torch.arange(16)
    keep = known % 3 == 0
    codes = pipe(PROMPT, seed=[1, 2], num_images_per_prompt=2, known=known, keep=keep).codes
    assert torch.equal(codes[:, keep], known[keep].expand(2, -1))
    assert not torch.equal(codes[0], codes[1])


def test_a_black_mask_keeps_everything_and_a_white_one_nothing(pipe: TextToImagePipeline) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    black, white = Image.new("L", image.size, 0), Image.new("L", image.size, 255)
    square = image.crop((8, 0, 40, 32)).resize((16, 16), Image.Resampling.LANCZOS)
    codes = pipe.tokenizer.encode(media.to_pixels(square))
    assert torch.equal(pipe(PROMPT, seed=1, image=image, mask_image=black).codes, codes)
    assert torch.equal(pipe(PROMPT, seed=1, image=image, mask_image=white).codes, pipe(PROMPT, seed=1).codes)


def test_one_white_pixel_repaints_its_whole_token_and_no_other() -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.putpixel((17, 63), 255)  # column 1 and row 3 of a 4x4 grid
    _, keep = inputs.prepare_inpainting(Image.new("RGB", (64, 64)), mask, 16, (4, 4))
    assert (~keep).nonzero()[:, 1].tolist() == [3 * 4 + 1]


def test_a_tiny_mask_still_covers_the_grid() -> None:
    mask = Image.new("L", (2, 2), 0)
    mask.putpixel((1, 0), 255)
    _, keep = inputs.prepare_inpainting(Image.new("RGB", (2, 2)), mask, 16, (4, 4))
    assert (~keep).reshape(4, 4).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_inpainting_takes_paths(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(tmp_path / "i.png")
    Image.new("1", (20, 20), 0).save(tmp_path / "m.png")
    result = pipe(PROMPT, seed=1, image=str(tmp_path / "i.png"), mask_image=tmp_path / "m.png")
    assert result.images[0].size == (16, 16)


# Steps


def test_callbacks_see_every_step(pipe: TextToImagePipeline) -> None:
    steps: list[tuple[int, int, int]] = []
    previews: list[Image.Image] = []

    def callback(
        got: TextToImagePipeline, index: int, timestep: int, values: dict[str, Any]
    ) -> dict[str, Any]:
        assert got is pipe
        assert values["codes"].shape == (2, 16)
        steps.append((index, timestep, int(values["committed"].sum())))
        previews.extend(values["preview"]())
        return {}

    result = pipe(PROMPT, seed=1, num_images_per_prompt=2, callback_on_step_end=callback)
    count = pipe.generator.order.num_steps
    assert [step[:2] for step in steps] == [(index, count - index - 1) for index in range(count)]
    done = [step[2] for step in steps]
    assert done == sorted(set(done))
    assert done[-1] == 16
    assert np.array_equal(levels(previews[-2:]), levels(result.images))


def test_callbacks_get_only_what_they_ask_for(pipe: TextToImagePipeline) -> None:
    seen: set[str] = set()
    pipe(
        PROMPT,
        seed=1,
        callback_on_step_end=lambda pipe, index, timestep, values: seen.update(values),
        callback_on_step_end_tensor_inputs=["codes"],
    )
    assert seen == {"codes"}
    with pytest.raises(TokenloomError, match="Did you mean 'codes'"):
        pipe(PROMPT, callback_on_step_end_tensor_inputs=["code"])


def test_progress_bar_counts_the_steps(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = TextToImagePipeline.from_pretrained(saved)
    count = loaded.generator.order.num_steps
    capsys.readouterr()
    loaded(PROMPT, seed=1)
    assert f"{count}/{count}" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize("prompt", ["", "   ", [PROMPT, ""]])
def test_empty_prompts(pipe: TextToImagePipeline, prompt: Any) -> None:
    with pytest.raises(TokenloomError, match=r"is empty\. Describe the picture"):
        pipe(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([PROMPT, 3], r"every prompt to be a str, got int \('3'\) at position 1"),
        ([PROMPT, None], "got NoneType"),
        (None, "Expected a prompt"),
        (7, "got int"),
        ([], "got an empty list"),
    ],
)
def test_prompts_that_are_no_text(pipe: TextToImagePipeline, prompt: Any, message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        pipe(prompt)


def test_long_prompts_are_cut_with_a_warning(
    pipe: TextToImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    text = ("a red apple, a lion " * 900)[:10_000]
    with caplog.at_level(logging.WARNING):
        long = pipe(text, seed=1)
    assert f"has {len(split_words(text))} words; the model reads the first {LENGTH}" in caplog.text
    assert len(caplog.text) < 1000
    assert torch.equal(long.codes, pipe("red apple lion red apple lion", seed=1).codes)


def test_one_word_of_ten_thousand_letters(
    pipe: TextToImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pipe("x" * 10_000, seed=1)
    assert "does not know" in caplog.text
    assert len(caplog.text) < 1000


def test_unknown_words_degrade(pipe: TextToImagePipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = pipe("a zyzzyva eating a qwijibo", seed=1)
    assert len(result.images) == 1
    assert "does not know" in caplog.text
    assert "'zyzzyva'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipe(PROMPT, seed=1)
    assert caplog.text == ""


def test_prompts_of_filler_words_are_the_null_condition(
    pipe: TextToImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = pipe("a picture of the", seed=1)
    assert "no word that the model reads" in caplog.text
    assert torch.equal(
        result.codes, pipe.generator.generate(seeds=[1], sampling=merge_settings(pipe.config["sampling"])[1])
    )


@pytest.mark.parametrize("prompt", ["\x00\x07", "émoji 🦁 ЛЕВ 獅子", "!!!", "a\nred\tapple"])
def test_odd_characters_do_not_crash(pipe: TextToImagePipeline, prompt: str) -> None:
    assert len(pipe(prompt, seed=1).images) == 1


@pytest.mark.parametrize("count", [0, -3, 1.5, True, "2", None])
def test_counts_below_one(pipe: TextToImagePipeline, count: Any) -> None:
    with pytest.raises(TokenloomError, match="num_images_per_prompt to be a whole number of at least 1"):
        pipe(PROMPT, num_images_per_prompt=count)


@pytest.mark.parametrize("seed", [2**64, -1, [1, 2**70], [1], [1, 2, 3], 1.5, "7"])
def test_seeds_that_are_none(pipe: TextToImagePipeline, seed: Any) -> None:
    with pytest.raises(TokenloomError, match="seed"):
        pipe(PROMPT, seed=seed, num_images_per_prompt=2)


def test_generators_that_do_not_fit(pipe: TextToImagePipeline) -> None:
    generator = torch.Generator()
    for given, message in (([generator], "one generator for each of the 2"), (7, "torch.Generator")):
        with pytest.raises(TokenloomError, match=message):
            pipe(PROMPT, num_images_per_prompt=2, generator=given)
    with pytest.raises(TokenloomError, match="either seed or generator"):
        pipe(PROMPT, seed=1, generator=generator)


def test_a_mask_of_another_size(pipe: TextToImagePipeline) -> None:
    image, mask = Image.new("RGB", (32, 32)), Image.new("L", (32, 31))
    with pytest.raises(TokenloomError, match=r"size of image \(32x32\), got 32x31\. Resize the mask"):
        pipe(PROMPT, image=image, mask_image=mask)


@pytest.mark.parametrize(
    "given", [["image"], ["mask_image"], ["known"], ["keep"], ["image", "mask_image", "known", "keep"]]
)
def test_halves_of_pairs(pipe: TextToImagePipeline, given: list[str]) -> None:
    values = {
        "image": Image.new("RGB", (16, 16)),
        "mask_image": Image.new("L", (16, 16)),
        "known": torch.zeros(16, dtype=torch.long),
        "keep": torch.ones(16, dtype=torch.bool),
    }
    with pytest.raises(TokenloomError, match="Expected"):
        pipe(PROMPT, **{name: values[name] for name in given})


@pytest.mark.parametrize("shape", [(15,), (3, 16), (16, 1), ()])
def test_known_codes_of_another_shape(pipe: TextToImagePipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(TokenloomError, match=r"Expected known to be .*\(16,\)"):
        pipe(PROMPT, known=torch.zeros(shape, dtype=torch.long), keep=torch.ones(16, dtype=torch.bool))


def test_an_image_that_is_none(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(TokenloomError, match="not a picture"):
        pipe(PROMPT, image=tmp_path / "x.png", mask_image=Image.new("L", (4, 4)))
    with pytest.raises(TokenloomError, match=r"got ndarray.*Image\.fromarray"):
        pipe(PROMPT, image=np.zeros((4, 4, 3)), mask_image=Image.new("L", (4, 4)))


def test_choices_get_the_closest_match(pipe: TextToImagePipeline) -> None:
    with pytest.raises(TokenloomError, match="Did you mean 'pil'"):
        pipe(PROMPT, output_type="pill")
    with pytest.raises(TokenloomError, match="Did you mean 'cached'"):
        pipe(PROMPT, decode="cachd")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"guidance_scale": float("nan")},
        {"guidance_scale": 2.0, "guidance": 2.0},
    ],
)
def test_settings_out_of_range(pipe: TextToImagePipeline, settings: dict[str, Any]) -> None:
    with pytest.raises(TokenloomError):
        pipe(PROMPT, **settings)


def test_components_that_do_not_fit() -> None:
    from tokenloom import ImageVQTokenizer

    other = ImageVQTokenizer(16, 2, 2, 16, 1, 1, 2, quantizer_options={"levels": [3, 3]})
    with pytest.raises(TokenloomError, match="trained together"):
        TextToImagePipeline(other, tiny_generator(), WordTokenizer(WORDS, LENGTH))
