"""The judge and what is built on it: retrieval, training on a toy set, following, diversity, copies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenloom.data.captions import Caption
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.judge import Judge, judge_accuracy, train_judge
from tokenloom.evaluation.judge_augment import concept_view, style_view
from tokenloom.evaluation.judge_training import JudgeTraining
from tokenloom.evaluation.nearest import count_near_copies, nearest_training_images, neighbour_figure
from tokenloom.evaluation.pictures import EvaluationSet, as_uint8, prompt_of, to_pil
from tokenloom.evaluation.prompt_following import follow_prompts, following_table, measure_diversity
from tokenloom.evaluation.report import EvaluationConfig, evaluate
from tokenloom.evaluation.retrieval import Question, hits, questions, score

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 20)}
STYLES = ("bars", "dots", "solid")


def _picture(colour: tuple[int, int, int], style: str) -> torch.Tensor:
    picture = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inside = {
        "bars": (rows // 8) % 2 == 0,
        "dots": (rows // 4 + columns // 4) % 2 == 0,
        "solid": (rows > 6) & (rows < 58) & (columns > 6) & (columns < 58),
    }[style]
    for channel, value in enumerate(colour):
        picture[channel][inside] = value
    return picture


def _toy(held_out: tuple[str, str] = ("red", "dots")) -> EvaluationSet:
    """Twelve pictures, four colours in three styles, one pair held out; and an unseen concept."""
    pictures, captions = [], []
    for colour, rgb in COLOURS.items():
        for style in STYLES:
            split = "val_style" if (colour, style) == held_out else "train"
            pictures.append(_picture(rgb, style))
            captions.append(
                Caption(
                    file=f"{style}/{colour}.png",
                    text=f"a {style} picture of {colour} thing",
                    label=f"{colour} thing",
                    style=style,
                    group="objects & things",
                    split=split,
                )
            )
    pictures.append(_picture((230, 120, 20), "solid"))
    captions.append(
        Caption(file="new.png", text="x", label="red yellow", style="solid", group="food", split="val")
    )
    return EvaluationSet(torch.stack(pictures), tuple(captions))


def _write(toy: EvaluationSet, folder: Path) -> Path:
    for pixels, caption in zip(toy.pixels, toy.captions, strict=True):
        (folder / caption.file).parent.mkdir(exist_ok=True)
        to_pil(pixels).save(folder / caption.file)
    (folder / "captions.jsonl").write_text("".join(caption.to_json() + "\n" for caption in toy.captions))
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = _write(_toy(), tmp_path_factory.mktemp("toy"))
    training = JudgeTraining(batch_size=12, learning_rate=3e-3, seed=1)
    trained = train_judge(folder, folder / "judge", 60, training=training, image_size=32)
    loaded = Judge.load(folder / "judge")
    pixels = _toy().pixels
    torch.testing.assert_close(loaded.look(pixels).embedding, trained.look(pixels).embedding)
    assert loaded.card["steps"] == 60
    assert loaded.card["pictures"] == 11  # the training split alone
    return loaded


def test_set_loads_from_a_folder(tmp_path: Path) -> None:
    loaded = EvaluationSet.load(_write(_toy(), tmp_path))
    assert len(loaded) == 13
    assert torch.equal(loaded.pixels, _toy().pixels)
    assert len(loaded.split("train")) == 11
    assert len(loaded.groups(("objects",))) == 12
    assert len(loaded.groups(("objects & things", "food"))) == 13
    assert prompt_of(loaded.captions[0]) == "a bars picture of red thing"
    assert torch.equal(loaded.sample(5, seed=3).pixels, loaded.sample(5, seed=3).pixels)


def test_questions_follow_the_written_rule() -> None:
    toy = _toy()
    (asked,) = questions(toy, "seen", candidates=3)
    assert (asked.name, asked.style, asked.prompt) == ("red thing", "dots", "a dots picture of red thing")
    assert asked.filled == 2  # the pool has one name, so both rivals are training concepts
    assert set(asked.rivals) < {"green thing", "blue thing", "yellow thing"}
    assert questions(toy, "seen", candidates=3) == [asked]
    (unseen,) = questions(toy, "unseen", candidates=4)
    assert unseen.name == "red yellow"
    with pytest.raises(TokenloomError, match="different names"):
        questions(toy, "seen", candidates=9)
    with pytest.raises(TokenloomError, match="seen"):
        questions(toy, "sen")  # type: ignore[arg-type]
    with pytest.raises(TokenloomError, match="at least 2"):
        questions(toy, "seen", candidates=1)
    with pytest.raises(TokenloomError, match="animals"):
        questions(toy, "seen", groups=["animals"])


def test_unseen_questions_need_known_words() -> None:
    toy = _toy()
    strange = Caption(file="z.png", text="z", label="violet thing", style="solid", split="val")
    larger = EvaluationSet(torch.cat([toy.pixels, toy.pixels[:1]]), (*toy.captions, strange))
    assert [question.name for question in questions(larger, "unseen", candidates=3)] == ["red yellow"]


def test_hits_are_counted_by_hand() -> None:
    texts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([0.6, 0.8])}
    asked = [Question(0, "", name, None, tuple(set(texts) - {name}), 0) for name in ("a", "b", "a", "c")]
    vectors = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.8], [0.5, 0.5]])
    found = hits(vectors, texts, asked)
    assert found.tolist() == [True, False, False, True]
    marks = score(found, torch.tensor([True, True, False]))
    assert marks.concept == 0.5
    assert marks.concept_error == pytest.approx(0.25)
    assert marks.style == pytest.approx(2 / 3)
    tie = {"a": texts["a"], "b": texts["a"]}
    assert not hits(vectors[:1], tie, [Question(0, "", "a", None, ("b",), 0)]).any()
    with pytest.raises(TokenloomError, match="one picture"):
        hits(vectors, texts, asked[:1])


def test_judge_learns_a_toy_set(judge: Judge) -> None:
    toy = _toy()
    everything = [Question(i, "", c.label or "", c.style, (), 0) for i, c in enumerate(toy.captions[:12])]
    names = sorted({question.name for question in everything})
    everything = [Question(q.index, "", q.name, q.style, tuple(set(names) - {q.name}), 0) for q in everything]
    marks = judge.mark(toy.pixels[:12], everything)
    assert marks.concept >= 10 / 12  # chance: 3 of 12
    assert marks.style >= 10 / 12  # chance: 4 of 12
    assert judge_accuracy(judge, toy, "seen", candidates=4).concept == 1.0


def test_training_repeats_with_the_seed(tmp_path: Path) -> None:
    folder = _write(_toy(), tmp_path)
    training = JudgeTraining(batch_size=4, seed=5)
    weights = [
        train_judge(folder, tmp_path / name, 2, training=training, image_size=32).network.picture_head.weight
        for name in ("a", "b")
    ]
    assert torch.equal(*weights)
    other = train_judge(
        folder, tmp_path / "c", 2, training=JudgeTraining(batch_size=4, seed=6), image_size=32
    )
    assert not torch.equal(weights[0], other.network.picture_head.weight)


def test_training_continues_from_a_judge_of_the_same_set(judge: Judge, tmp_path: Path) -> None:
    folder = _write(_toy(), tmp_path)
    training = JudgeTraining(batch_size=4, learning_rate=1e-6)
    longer = train_judge(folder, tmp_path / "on", 1, training=training, image_size=32, start=judge)
    assert longer.card["steps"] == judge.card["steps"] + 1
    weights = [j.network.picture_head.weight for j in (judge, longer)]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)
    smaller = _write(_toy().where(lambda caption: caption.style != "bars"), tmp_path)
    with pytest.raises(TokenloomError, match="from the beginning"):
        train_judge(smaller, tmp_path / "on", 1, start=judge)


def test_augmentation_repeats_and_keeps_what_is_seen() -> None:
    pixels = torch.stack([_picture(COLOURS["red"], "solid")] * 4)
    mirrored = torch.ones(4, dtype=torch.bool)
    first, again = (concept_view(pixels, mirrored, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    centre = first[:, :, 24:40, 24:40].mean((2, 3))
    assert (centre[:, 0] > centre[:, 1] + 0.5).all()  # still red
    assert (first[:, :, 0].mean((1, 2)) > 0.4).all()  # still on white
    assert concept_view(pixels, mirrored, torch.Generator(), 0.6875).shape == (4, 3, 44, 44)
    part = style_view(pixels, torch.Generator().manual_seed(2))
    assert part.shape == (4, 3, 40, 40)
    assert part.abs().max() < 1.1


@pytest.mark.parametrize("content", [b"", b"not a judge", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_judge_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "judge.safetensors"
    path.write_bytes(content)
    with pytest.raises(TokenloomError, match="Train it again"):
        Judge.load(path)


def test_one_name_is_not_enough_to_train(tmp_path: Path) -> None:
    toy = _toy().where(lambda caption: caption.label == "blue thing")
    with pytest.raises(TokenloomError, match="two names"):
        train_judge(_write(toy, tmp_path), tmp_path / "judge", 1)


def _perfect(prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """Draws what is asked for, with a little noise from the seed, as floats in [0, 1]."""
    made = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        words = prompt.split()
        noise = 0.02 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
        made.append((_picture(COLOURS[words[4]], words[1]) / 255 - noise).clamp(0, 1))
    return torch.stack(made)


def test_prompt_following_tells_a_good_generator_from_a_bad_one(judge: Judge) -> None:
    toy = _toy()
    good = follow_prompts(
        _perfect, judge, toy, candidates=4, seeds_per_prompt=3, through=lambda pixels: pixels
    )
    assert good.generated.concept == good.ceiling.concept == 1.0
    assert good.generated.pictures == 3
    assert good.concept_ratio == 1.0
    assert good.reconstructed == good.ceiling
    wrong = follow_prompts(
        lambda p, s: [to_pil(_picture(COLOURS["blue"], "bars"))] * len(p), judge, toy, candidates=4
    )
    assert wrong.generated.concept == 0.0
    assert wrong.as_dict()["concept_ratio"] == 0.0
    assert "100.0 ± 0.0 %" in following_table([good])
    with pytest.raises(TokenloomError, match="one a prompt"):
        follow_prompts(lambda p, s: torch.zeros(2, 3, 64, 64), judge, toy, candidates=4)


def test_diversity_shows_a_memorised_answer(judge: Judge) -> None:
    toy = _toy()
    varied = measure_diversity(_perfect, judge, toy, prompts=1, seeds_per_prompt=3)
    fixed = measure_diversity(
        lambda prompts, seeds: torch.zeros(len(prompts), 3, 64, 64), judge, toy, prompts=1, seeds_per_prompt=3
    )
    assert 0.003 < varied.pixels < 0.02
    assert fixed.pixels == 0.0
    assert fixed.features == pytest.approx(0.0, abs=1e-6)
    assert fixed.same_picture == 1.0
    assert varied.real_styles[0] > 0.1
    assert varied.real_concepts[0] > 0.1
    assert 0 < varied.as_dict()["to_real_styles"][0] < 1


class _Pipeline:
    """A pipeline around `_perfect`, with a tokenizer that keeps one bit of each value."""

    class tokenizer:
        image_size, vocab_size, bits_per_image = 64, 2, 3 * 64 * 64.0

        @staticmethod
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return (pixels > 0).long().flatten(1)

        @staticmethod
        def decode(codes: torch.Tensor) -> torch.Tensor:
            return codes.view(-1, 3, 64, 64) * 2.0 - 1

    def __call__(self, prompts: list[str], seed: list[int], output_type: str) -> SimpleNamespace:
        return SimpleNamespace(images=_perfect(prompts, seed))


def test_report_with_a_judge(judge: Judge, tmp_path: Path) -> None:
    config = EvaluationConfig(
        parts=("following", "diversity", "copies"), candidates=3, seeds_per_prompt=2, diversity_seeds=3
    )
    figures = evaluate(_Pipeline(), _toy(), tmp_path, judge=judge, config=config)
    seen = figures["following"]["seen"]
    assert seen["generated"]["concept"] == seen["ceiling"]["concept"] == 1.0
    assert seen["reconstructed"]["pictures"] == figures["diversity"]["prompts"] == 1
    assert figures["copies"]["samples"] == 2
    text = (tmp_path / "report.md").read_text()
    assert "seen concepts, unseen (concept, style) pairs, 3 candidates | 2 | 100.0" in text
    assert "real: one concept, different styles" in text


def test_nearest_finds_a_planted_copy() -> None:
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(70, 3, 4, 4, generator=random)
    pictures = (255 * torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")).to(torch.uint8)
    smooth, fresh = pictures[:40], pictures[40:]
    copied = smooth[17].flip(2).roll(1, 1)  # mirrored, one row lower
    found = nearest_training_images(copied[None], smooth, shortlist=8)
    assert found.index.tolist() == [17]
    assert float(found.distance) < 0.05
    stiff = nearest_training_images(copied[None], smooth, shift=0, mirror=False, shortlist=8)
    assert float(stiff.distance) > 2 * float(found.distance)
    result = count_near_copies(torch.cat([fresh[:5], copied[None]]), smooth, fresh[5:], quantile=0.001)
    assert result.near_copies == 1
    assert int(result.neighbours.index[5]) == 17
    assert 0.05 < result.pixel_threshold < result.held_out_median_distance
    figure = neighbour_figure(
        fresh[:4], smooth, nearest_training_images(fresh[:4], smooth), pairs=4, columns=2
    )
    assert figure.width > 4 * 64
    assert "1 (16.7 %)" in result.table()


def test_nearest_with_a_judge_and_other_sizes(judge: Judge) -> None:
    toy = _toy()
    train, new = toy.split("train"), toy.split("val", "val_style")
    result = count_near_copies(train.pixels[:2], train.pixels, new.pixels, judge)
    assert (result.near_copies, result.alike, result.both) == (2, 2, 2)
    with pytest.raises(TokenloomError, match="one size"):
        nearest_training_images(train.pixels[:, :, :32, :32], train.pixels)
    with pytest.raises(TokenloomError, match="quantile"):
        count_near_copies(train.pixels, train.pixels, new.pixels, quantile=2.0)


def test_as_uint8_takes_what_pipelines_return() -> None:
    pixels = _toy().pixels[:2]
    assert torch.equal(as_uint8([to_pil(picture) for picture in pixels]), pixels)
    assert torch.equal(as_uint8(pixels.float() / 255), pixels)
    with pytest.raises(TokenloomError, match="PIL"):
        as_uint8("pictures")
