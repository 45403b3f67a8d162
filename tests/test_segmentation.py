"""Segmentation by phrase: codes of answers, ranges, the condition, training, and the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from referring_pools import write_pool

from tokenloom import MaskTokenizer, PictureEncoder, RangedTokenGenerator, SegmentationPipeline, WordTokenizer
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.film_unet import FilmUNet
from tokenloom.generators import PictureWords, Sampling, orders
from tokenloom.generators.picture_condition import PictureCondition
from tokenloom.layouts import Layout
from tokenloom.pipelines.segmentation import overlay
from tokenloom.tokenizers import AnswerCodes
from tokenloom.tokenizers.boxes import masks_to_boxes
from tokenloom.training.phrase_rows import shared_logits
from tokenloom.training.run import train_segmentation

SHAPE = {"width": 24, "depth": 1, "heads": 2, "patch": 8}
WORDS = ["apple", "green", "dog", "all"]


def make_pipeline(frame_codes: int = 0, bins: int = 8) -> SegmentationPipeline:
    torch.manual_seed(0)
    quantizer = {"codebook_size": 16, "dim": 4}
    tokenizer = MaskTokenizer(32, 4, SHAPE, SHAPE, quantizer, frame_codes=frame_codes, frame_side=16).eval()
    encoder = PictureEncoder(32, 8, width=24, depth=1, heads=2).eval()
    answers = AnswerCodes.of(tokenizer, bins)
    condition = {"kind": "picture", "rows": encoder.rows, "features": 24, "vocabulary": 6, "words": 5}
    generator = RangedTokenGenerator(
        order_config=orders.raster(Layout.line(answers.length)).to_config(),
        vocab_size=answers.vocabulary,
        transformer_config={"width": 24, "heads": 2, "depth": 1},
        condition_config=condition,
        rule_config={"ranges": answers.ranges},
    ).eval()
    pipe = SegmentationPipeline(tokenizer, generator, encoder, WordTokenizer(WORDS, 5), bins=bins)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> SegmentationPipeline:
    return make_pipeline()


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (30, 48, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_answers_come_back() -> None:
    answers = AnswerCodes(levels=3, masks=10, bins=9)
    boxes = torch.tensor([[0.0, 4.0, 8.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    codes = torch.tensor([[1, 2, 3], [9, 9, 9]])
    line = answers.join(boxes, (8, 8), codes)
    assert line.tolist() == [[19, 10, 14, 18, 18, 1, 2, 3], [20, 10, 10, 10, 10, 9, 9, 9]]
    said, masks = answers.split(line, (16, 16))
    assert said.tolist() == [[0, 8, 16, 16], [0, 0, 0, 0]]
    assert torch.equal(masks, codes)
    crossed = line.clone()
    crossed[0, 1], crossed[0, 3] = 18, 10
    assert answers.split(crossed, (8, 8))[0][0].tolist() == [0, 4, 8, 8]


def test_frames_follow_from_boxes() -> None:
    torch.manual_seed(0)
    tokenizer = MaskTokenizer(32, 4, SHAPE, SHAPE, {"codebook_size": 16}, frame_codes=2, frame_side=16).eval()
    assert tokenizer.frame is not None
    answers = AnswerCodes.of(tokenizer, tokenizer.frame.steps + 1)
    assert answers.length == 7 and answers.ranges[2] == [2, 0, 18]
    assert [answers.steps(count) for count in (1, 2, 3, 4)] == [6, 6, 6, 7]
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, 3:20, 9:30], masks[1] = True, True
    codes = tokenizer.encode(masks)
    line = answers.join(masks_to_boxes(masks), (32, 32), codes)
    assert torch.equal(answers.split(line, (32, 32))[1], codes)  # full and empty masks as well
    line[0, 0] = answers.nothing
    boxes, codes = answers.split(line, (32, 32))
    assert boxes[0].tolist() == [0] * 4 and codes[0].tolist() == [tokenizer.empty_code] * 4


def test_a_pipeline_with_frames(picture: Image.Image) -> None:
    """The first codes of masks are the boxes that were given or made; prefixes are the beginning of the whole."""
    framed = make_pipeline(2, bins=5)
    given = framed(picture, boxes=[[8, 4, 32, 20]] * 16, temperature=1.0)
    frame = framed.tokenizer.frame
    shown = given.codes[given.codes[:, 0] < 16]  # the others are empty or full
    assert given.codes.shape == (16, 4) and len(shown) > 4 and frame is not None and frame.steps == 4
    near = torch.tensor([[12, 0, 36, 24]]).float()  # the nearest of four steps of 12 pixels
    assert torch.equal(frame.decode(shown[:, :2], 48), near.expand(len(shown), -1))
    whole = framed(picture, ["the apple", "all dogs"])
    for count in (1, 2, 3):
        part = framed(picture, ["the apple", "all dogs"], mask_tokens=count)
        assert torch.equal(part.codes, whole.codes[:, :count]) and part.masks.shape == whole.masks.shape
        assert bool(((part.scores > 0) & (part.scores <= 1)).all())


def test_codes_stay_in_their_ranges(pipe: SegmentationPipeline) -> None:
    generator, answers = pipe.generator, pipe.answers
    torch.manual_seed(1)
    condition = PictureWords(torch.randn(6, pipe.picture_encoder.rows, 24), torch.randint(0, 6, (6, 5)))
    sampling = Sampling(temperature=50.0)
    made = generator.generate(condition, sampling=sampling, seeds=3, guidance=1.5)
    assert int(made[:, :5].min()) >= answers.masks and int(made[:, 5:].max()) < answers.masks
    assert (
        set(made[:, 0].tolist()) <= {answers.there, answers.nothing}
        and int(made[:, 1:5].max()) < answers.there
    )
    again = generator.generate(condition, sampling=sampling, seeds=3, guidance=1.5, decode="reference")
    assert torch.equal(made, again)
    chances = generator.logits(made, condition).softmax(-1)
    assert chances[:, :5, : answers.masks].sum() == 0 and chances[:, 5:, answers.masks :].sum() == 0
    assert bool(generator.loss(made, condition).isfinite())


def test_ranges_and_conditions_are_checked(pipe: SegmentationPipeline) -> None:
    options = dict(pipe.generator.config)
    keys = ("order_config", "vocab_size", "transformer_config", "condition_config")
    plain = {key: options[key] for key in keys}
    with pytest.raises(TokenloomError, match="ranges are for 2 positions"):
        RangedTokenGenerator(**plain, rule_config={"ranges": [[2, 0, 5]]})
    with pytest.raises(TokenloomError, match="low < high"):
        RangedTokenGenerator(**plain, rule_config={"ranges": [[8, 5, 5]]})
    words = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(TokenloomError, match="PictureWords"):
        pipe.generator.generate(words)
    with pytest.raises(TokenloomError, match="repeat the features"):
        pipe.generator.generate(PictureWords(torch.zeros(1, pipe.picture_encoder.rows, 24), words))


def test_the_output_fits_the_picture(pipe: SegmentationPipeline, picture: Image.Image) -> None:
    output = pipe(picture, ["the apple", "all green dogs"])
    assert isinstance(output.masks, torch.Tensor)
    assert output.masks.shape == (2, 30, 48) and output.masks.dtype == torch.bool
    assert output.codes.shape == (2, 4) and output.boxes.shape == (2, 4) and output.size == (30, 48)
    assert bool(((output.scores > 0) & (output.scores <= 1)).all())
    assert bool((output.boxes[:, 2] <= 48).all()) and bool((output.boxes[:, 3] <= 30).all())
    encoded = pipe.encode_picture(picture)
    alone = pipe(encoded, "all green dogs")
    assert torch.equal(alone.codes[0], output.codes[1])
    assert len(pipe(picture, "apple", output_type="pil").masks) == 1
    assert pipe(picture, "apple", output_type="np").masks.dtype == bool
    masks, scores, boxes, codes = pipe(picture, "apple", return_dict=False)  # type: ignore[misc]
    assert torch.equal(masks[0], output.masks[0]) and len(scores) == len(boxes) == len(codes) == 1


def test_fewer_codes_and_other_sizes(pipe: SegmentationPipeline, picture: Image.Image) -> None:
    output = pipe(picture, "apple", mask_tokens=1)
    (found,) = pipe.post_process(output, [(60, 96)], mask_tokens=1)
    assert found["mask"].shape == (60, 96)
    assert torch.equal(pipe.post_process(output, mask_tokens=1)[0]["mask"], output.masks[0])
    assert torch.allclose(found["box"], output.boxes[0] * 2)
    assert pipe.post_process(output, threshold=1.1) == []
    with pytest.raises(TokenloomError, match="target size for each"):
        pipe.post_process(output, [(1, 1), (2, 2)])
    with pytest.raises(TokenloomError, match="num_tokens=5"):
        pipe(picture, "apple", mask_tokens=5)


@pytest.mark.parametrize("decode", ["cached", "reference", "parallel"])
def test_a_call_for_fewer_codes_stops_early(
    pipe: SegmentationPipeline, picture: Image.Image, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0
    plain = RangedTokenGenerator.run_rows

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return plain(*arguments, **options)

    monkeypatch.setattr(RangedTokenGenerator, "run_rows", counted)
    options: dict[str, Any] = {"seed": 7, "temperature": 1.0, "decode": decode}
    whole = pipe(picture, ["apple", "dog"], **options)
    before, forwards = forwards, 0
    short = pipe(picture, ["apple", "dog"], mask_tokens=2, **options)
    assert torch.equal(short.codes, whole.codes[:, :2]) and torch.equal(short.boxes, whole.boxes)
    masks = pipe.tokenizer.decode(whole.codes, 2, whole.size, output="mask")
    assert torch.equal(torch.as_tensor(short.masks), masks)
    if decode != "parallel":
        assert (before, forwards) == (5 + 4 + 1, 5 + 2 + 1)  # box, mask, and the scores
    else:
        assert forwards <= before
    with pytest.raises(TokenloomError, match=r"1\.\.9, got 10"):
        pipe.generator.generate(batch_size=1, steps=10)


def test_several_pictures_run_together_and_each_is_encoded_once(
    pipe: SegmentationPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = PictureEncoder.forward

    def counted(self: PictureEncoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(PictureEncoder, "forward", counted)
    other = Image.new("RGB", (20, 40), "green")
    phrases = [["the apple", "all dogs"], "the green apple"]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    first, second = pipe([picture, other], phrases, **options)
    assert seen == [2]
    for got, image, asked in ((first, picture, phrases[0]), (second, other, phrases[1])):
        alone = pipe(image, asked, **options)
        assert torch.equal(got.codes, alone.codes) and torch.equal(got.masks, alone.masks)
        assert torch.allclose(got.boxes, alone.boxes) and torch.allclose(got.scores, alone.scores)
    assert second.masks.shape == (1, 40, 20)
    seen.clear()
    mixed = pipe([pipe.encode_picture(picture), other], "the dog")
    assert seen == [1, 1] and [len(one.codes) for one in mixed] == [1, 1]
    boxed = pipe([picture, other], boxes=[[[0, 0, 48, 24], [5, 5, 20, 20]], [[0, 0, 20, 20]]])
    assert torch.equal(boxed[1].codes, pipe(other, boxes=[[0, 0, 20, 20]]).codes) and len(boxed[0].codes) == 2
    ((masks, *_),) = pipe([other], ["dog"], return_dict=False)
    assert masks.shape == (1, 40, 20)
    for images, asked, message in (
        ([], "dog", "at least one picture"),
        ([picture, other], ["dog"], "2 pictures there must be a list with the phrases of each, got 1"),
        ([picture, other], ["dog", ""], "Picture 1: .*empty"),
        ([picture, other], ["dog", 3], "Picture 1: "),
    ):
        with pytest.raises(TokenloomError, match=message):
            pipe(images, asked)
    with pytest.raises(TokenloomError, match="come with boxes or none"):
        pipe([picture, other], ["dog", "dog"], boxes=[[[0, 0, 9, 9]], None])


def test_a_box_is_a_prompt(pipe: SegmentationPipeline, picture: Image.Image) -> None:
    output = pipe(picture, boxes=[[0, 0, 48, 24]])
    assert torch.allclose(output.boxes[0], torch.tensor([0.0, 0.0, 48.0, 24.0]), atol=48 / 7 / 2)
    with pytest.raises(TokenloomError, match="in the picture"):
        pipe(picture, boxes=[[0, 0, 60, 24]])
    with pytest.raises(TokenloomError, match="x0 < x1"):
        pipe(picture, boxes=[[10, 0, 5, 24]])
    with pytest.raises(TokenloomError, match="one box a phrase"):
        pipe(picture, ["apple", "dog"], boxes=[[0, 0, 5, 24]])


def test_nothing_is_an_empty_mask(pipe: SegmentationPipeline) -> None:
    codes = torch.full((1, 4), pipe.tokenizer.empty_code)
    assert not pipe._render(codes, (7, 9), "np").any()  # type: ignore[union-attr]


def test_alpha_and_rotation_are_handled(pipe: SegmentationPipeline) -> None:
    tall = Image.new("RGBA", (20, 40), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (20, 40), "white")
    turned.info["exif"] = exif.tobytes()
    assert pipe(tall, "apple").size == (40, 20)
    white = pipe.encode_picture(Image.new("RGB", (20, 40), "white"))
    assert torch.equal(pipe.encode_picture(tall).features, white.features)
    turned.getexif()[0x0112] = 6
    assert pipe.encode_picture(turned).size == (20, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "zyx qwv"}, "knows no word"),
        ({"prompt": []}, "at least one prompt"),
        ({}, "got neither"),
        ({"prompt": "apple", "output_type": "pill"}, "pil"),
    ],
)
def test_bad_arguments(
    pipe: SegmentationPipeline, picture: Image.Image, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenloomError, match=message):
        pipe(picture, **arguments)


def test_saved_pipelines_answer_alike(
    pipe: SegmentationPipeline, picture: Image.Image, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    again = SegmentationPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(picture, "the dog").codes, pipe(picture, "the dog").codes)
    weights = next((tmp_path / "model" / "generator").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(TokenloomError, match="truncated"):
        SegmentationPipeline.from_pretrained(tmp_path / "model")


def test_parts_of_other_models_are_refused(pipe: SegmentationPipeline) -> None:
    with pytest.raises(TokenloomError, match="trained together"):
        SegmentationPipeline(
            pipe.tokenizer, pipe.generator, pipe.picture_encoder, pipe.text_tokenizer, bins=9
        )


def test_overlay_colours_the_mask(picture: Image.Image) -> None:
    mask = np.zeros((1, 30, 48), bool)
    mask[0, 10:20, 10:20] = True
    shown = np.asarray(overlay(picture, mask))
    assert np.array_equal(shown[0], np.asarray(picture)[0])
    assert tuple(shown[10, 10]) == (230, 40, 40)
    with pytest.raises(TokenloomError, match="as the picture"):
        overlay(picture, mask[:, :5])


def test_encoders() -> None:
    assert PictureEncoder(32, 4, width=16, depth=1, heads=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 16)
    with pytest.raises(TokenloomError, match="power of two"):
        PictureEncoder(32, 6)
    with pytest.raises(TokenloomError, match="backbone"):
        PictureEncoder(32, backbone="no_such_net")
    encoder = PictureEncoder(64, backbone="resnet10t")
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, encoder.rows, encoder.features)


@pytest.mark.parametrize(("segmenter", "frame"), [("tokens", 0), ("tokens", 2), ("unet", 0)])
def test_both_models_train(segmenter: str, frame: int, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool")
    tokenizer = MaskTokenizer(32, 4, SHAPE, SHAPE, frame_codes=frame, frame_side=16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = {
        "output": str(tmp_path / "run"),
        "scenes": {"pool": str(pool), "length": 20},
        "segmenter": segmenter,
        "tokenizer": str(tmp_path / "tokenizer"),
        "encoder": {"stride": 8, "width": 24, "depth": 1, "heads": 2},
        "transformer": {"width": 24, "heads": 2, "depth": 1},
        "unet": {"image_size": 32, "channels": [8, 16], "phrase": 16},
        "phrases": 2,
        "mask_loss": 0.5,
        "place_loss": 0.5,
        "loop": {"steps": 3, "batch_size": 4, "warmup": 1, "log_every": 1, "ema": 0.5},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    folder = train_segmentation(tmp_path / "c.yaml")
    image = Image.new("RGB", (40, 32), "red")
    if segmenter == "tokens":
        pipe = SegmentationPipeline.from_pretrained(folder)
        assert pipe(image, "the apple").masks.shape == (1, 32, 40)  # type: ignore[union-attr]
    else:
        network, words = FilmUNet.from_pretrained(folder), WordTokenizer.from_pretrained(folder)
        assert network.segment(image, ["the apple", "the frog"], words).shape == (2, 32, 40)
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert ("names" in row) == (segmenter == "tokens")


@pytest.mark.parametrize("learned", [0, 30])
@pytest.mark.parametrize("pointing", [False, True])
def test_phrases_share_the_rows_of_their_picture(
    pipe: SegmentationPipeline, learned: int, pointing: bool
) -> None:
    torch.manual_seed(2)
    options = {key: value for key, value in pipe.generator.config.items() if not key.startswith("_")}
    shape = {"width": 24, "heads": 2, "depth": 2, "learned_positions": learned}
    told = {**options["condition_config"], "pointing": pointing}
    changes = {"transformer_config": shape, "causal_prefix": True, "condition_config": told}
    generator = RangedTokenGenerator(**{**options, **changes})
    features, words = torch.randn(2, 16, 24), torch.randint(0, 6, (6, 5))
    low, high = pipe.answers.masks, pipe.answers.vocabulary
    answers = torch.cat((torch.randint(low, high, (6, 5)), torch.randint(0, low, (6, 4))), dim=1)
    alone = generator.logits(answers, PictureWords(features.repeat_interleave(3, 0), words))
    shared = shared_logits(generator, features, words, answers)
    assert shared.shape == alone.shape and torch.allclose(shared, alone, atol=1e-5)
    changed = shared_logits(generator, features, words.index_fill(0, torch.tensor([1]), 3), answers)
    assert torch.equal(changed[[0, 2]], shared[[0, 2]]) and not torch.equal(changed[1], shared[1])
    with pytest.raises(TokenloomError, match="causal_prefix"):
        shared_logits(pipe.generator, features, words, answers)


def pointing(width: int, words: int) -> PictureCondition:
    """A condition of 4 places whose features say a word by its number, and nothing where they are zeros."""
    torch.manual_seed(0)
    condition = PictureCondition(4, 8, 6, words, width, factor=8, pointing=True)
    with torch.no_grad():
        condition.words.table.weight.copy_(torch.eye(6, 8) * 5)
        condition.name.weight.copy_(torch.eye(8))
        condition.name.bias.zero_()
        condition.name_bias[0] = 9.0
    return condition


def test_words_point_at_the_places_that_name_them() -> None:
    """The row of a word changes with what places say of this word and those before it, not of later ones."""
    condition = pointing(16, 3)
    shown = torch.zeros(1, 4, 8)
    shown[0, 2, 3] = 9.0  # place 2 shows word 3
    assert condition.named(shown).argmax(-1)[0, 2] == 3
    words = torch.tensor([[3, 4, 0], [1, 3, 2], [0, 0, 0]])
    nothing, rows = condition.say(torch.zeros(1, 4, 8), words), condition.say(shown, words)
    changed = (rows - nothing).abs().amax(-1) > 1e-2
    assert changed.tolist() == [[True] * 3, [True] * 3, [False] * 3]  # all rows of words see the picture
    with torch.no_grad():
        condition.see.weight.zero_()  # what is seen there: also for the rows behind the word, "no word" among them
        nothing, alone = condition.say(torch.zeros(1, 4, 8), words), condition.say(shown, words)
    changed = (alone - nothing).abs().amax(-1) > 1e-2
    assert changed.tolist() == [[True, False, False], [False, True, False], [False] * 3]
    moved = shown[:, [0, 2, 1, 3]]
    assert not torch.allclose(condition.say(moved, words)[0, 0], rows[0, 0])
    plain = condition.words(words, 3, words.device)
    assert torch.equal(alone[0, 2], plain[0, 2]) and torch.equal(rows[2], plain[2])


def test_words_together_choose_the_places_that_are_seen() -> None:
    """ "green apple" sees the place that names both, and a word that no place names leaves the others to choose."""
    condition = pointing(4, 4)
    with torch.no_grad():
        condition.point.weight.zero_()
        condition.see.weight.copy_(torch.eye(4))
        shown = torch.zeros(1, 4, 8)
        shown[0, 0, 2] = shown[0, 1, [2, 3]] = shown[0, 2, 3] = 9.0  # place 1 shows both words
        words = torch.tensor([[5, 2, 3, 0], [5, 5, 0, 0]])
        seen = condition.say(shown, words) - condition.words(words, 2, words.device)
        looks = condition.look(shown)[0]
    for row in seen[0, 2:]:
        apart = (looks - row).abs().amax(-1)
        assert int(apart.argmin()) == 1 and float(apart.amin()) < 0.1 * float(apart[[0, 2, 3]].amin())
    assert torch.allclose(seen[1, 3], looks.mean(0), atol=1e-2)


def test_a_unet_of_patches_writes_every_pixel() -> None:
    network = FilmUNet(32, [8, 16], 16, 6, 5, patch=4)
    words = torch.randint(0, 6, (2, 5))
    assert network(torch.zeros(2, 3, 32, 32), words).shape == (2, 32, 32)
    with pytest.raises(TokenloomError, match="divisible by patch"):
        FilmUNet(32, [8, 16], patch=5)
