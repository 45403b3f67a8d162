"""`VideoPipeline` with tiny random networks: words, continuations, known ends, any length, files and bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tokenloom import (
    NextBlockGenerator,
    Sampling,
    TokenloomError,
    VideoPipeline,
    VideoTokenizer,
    WordTokenizer,
    orders,
)
from tokenloom.cli import app
from tokenloom.layouts import Layout
from tokenloom.media_video import read_clip, save_clip
from tokenloom.pipelines.video_windows import video_frames


def make_pipeline(words: bool = True, frames: int = 9) -> VideoPipeline:
    """Windows of 9 frames in 5 frames of codes, 16 x 16 pixels."""
    torch.manual_seed(3)
    tokenizer = VideoTokenizer(
        16, frames, widths=(8, 8), strides=[(2, 1, 1)], blocks=(1, 1), norm_groups=4,
        quantizer_options={"levels": [4, 4]},
    )  # fmt: skip
    text = WordTokenizer.from_captions(["a red frog apple bouncing growing"], 6, 1)
    condition = {"kind": "words", "vocabulary": len(text), "length": 6} if words else {"kind": "none"}
    generator = NextBlockGenerator(
        orders.blocks(tokenizer.layout, (1, 1, 4)).to_config(),
        16,
        {"width": 24, "heads": 2, "depth": 1},
        condition,
    )
    pipe = VideoPipeline(tokenizer.eval(), generator.eval(), text if words else None, {"top_k": 8}, fps=12.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """With words."""
    return make_pipeline()


def clip(count: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    """A square that moves to the right."""
    pictures = []
    for index in range(count):
        picture = Image.new("RGB", size, "navy")
        picture.paste("orange", (index % 8, 4, index % 8 + 6, 10))
        pictures.append(picture)
    return pictures


def test_clips_of_prompts_have_frames_codes_and_seeds(pipe: VideoPipeline) -> None:
    result = pipe(["a red frog", "an apple bouncing"], num_videos_per_prompt=2, seed=5)
    assert [len(one) for one in result.frames] == [9] * 4 and result.frames[0][0].size == (16, 16)
    assert result.codes.shape == (4, 80) and result.seeds == [5, 6, 7, 8] and result.fps == 12
    alone = pipe("an apple bouncing", seed=8, output_type="np")
    assert torch.equal(alone.codes, result.codes[3:])
    assert alone.frames.shape == (1, 9, 16, 16, 3) and 0 <= alone.frames.min() <= alone.frames.max() <= 1
    shown = pipe.tokenizer.decode(alone.codes)[0, 4]
    expected = ((shown + 1) * 127.5).round().permute(1, 2, 0)
    assert np.array_equal((alone.frames[0, 4] * 255).round(), expected.numpy())


def test_fewer_frames_are_the_beginning_of_more(pipe: VideoPipeline) -> None:
    whole, part = (pipe("a frog", num_frames=count, seed=1, output_type="pt").frames for count in (9, 4))
    assert part.shape[1] == 4 and torch.equal(part, whole[:, :4])


@pytest.mark.parametrize("given", [1, 2, 5, 12])
def test_a_clip_goes_on_behind_what_was_given(pipe: VideoPipeline, given: int) -> None:
    frames = clip(given)
    result = pipe("a frog", video=frames, num_frames=given + 7, seed=2)
    assert result.prompt_frames == given and len(result.frames[0]) == given + 7
    assert all(np.array_equal(a, b) for a, b in zip(frames, result.frames[0], strict=False))
    other = pipe("a frog", video=frames, num_frames=given + 7, seed=3)
    assert any(not np.array_equal(a, b) for a, b in zip(result.frames[0], other.frames[0], strict=True))


def test_the_generator_sees_the_end_of_a_clip(pipe: VideoPipeline) -> None:
    seen = []
    pipe("a frog", video=clip(12), num_frames=13, overlap=3, seed=0,
         callback_on_step_end=lambda _, step, left, values: seen.append((step, left, values["codes"].clone())))  # fmt: skip
    last = torch.from_numpy(np.stack([np.asarray(frame) for frame in clip(12)[-5:]])).permute(0, 3, 1, 2)
    codes = pipe.tokenizer.encode(last[None].float() / 127.5 - 1)
    assert torch.equal(seen[-1][2][:, :48], codes)
    assert [step for step, _, _ in seen] == list(range(20)) and seen[-1][1] == 0


def test_any_length_is_windows_that_begin_with_what_they_share(pipe: VideoPipeline) -> None:
    tokenizer, words = pipe.tokenizer, pipe.text_tokenizer(["a frog"])
    rule = {"sampling": Sampling(top_k=8)}
    made = list(
        video_frames(
            tokenizer, pipe.generator, 25, overlap=2, condition=words, seeds=torch.tensor([4]), **rule
        )
    )
    assert [pixels.shape[1] for _, pixels in made] == [9, 6, 6, 4]
    assert [codes.shape[1] // 16 for codes, _ in made] == [5, 3, 3, 2]
    shared = tokenizer.encode(made[0][1][:, -3:])  # two frames of codes
    window = torch.cat([shared, made[1][0]], dim=1)
    assert torch.equal(tokenizer.decode(window)[:, 3:], made[1][1])
    whole = pipe("a frog", num_frames=25, overlap=2, seed=4, output_type="pt")
    assert whole.frames.shape[1] == 25 and torch.equal(whole.codes, torch.cat([c for c, _ in made], dim=1))


def test_streams_give_the_frames_of_the_whole(pipe: VideoPipeline) -> None:
    whole = pipe("a frog", num_frames=40, seed=6, output_type="pt").frames
    pieces = list(pipe("a frog", num_frames=40, seed=6, output_type="pt", stream=True))
    assert len(pieces) > 3 and max(piece.shape[1] for piece in pieces) <= 9
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_thousands_of_frames_come_without_end(pipe: VideoPipeline) -> None:
    stream = pipe("a frog", num_frames=10_000, seed=6, output_type="pt", stream=True)
    assert sum(next(stream).shape[1] for _ in range(5)) == 9 + 4 * 6


def test_a_picture_begins_a_clip(pipe: VideoPipeline, tmp_path: Path) -> None:
    picture = clip(1, (40, 20))[0]
    result = pipe("a frog", image=picture, seed=1)
    assert len(result.frames[0]) == 9 and result.prompt_frames == 1
    assert result.frames[0][0].size == (16, 16)
    picture.save(tmp_path / "a.png")
    again = pipe("a frog", image=tmp_path / "a.png", seed=1)
    assert torch.equal(again.codes, result.codes)


def test_known_ends_are_kept_and_the_likeliest_candidate_is_taken(pipe: VideoPipeline) -> None:
    first, last = clip(8)[0], Image.new("RGB", (16, 16), "white")
    result = pipe("a frog", image=first, last_image=last, num_frames=9, seed=1, candidates=4)
    assert len(result.frames[0]) == 9
    ends = torch.from_numpy(np.stack([np.asarray(first)] * 7 + [np.asarray(last)] * 2)).permute(0, 3, 1, 2)
    draft = pipe.tokenizer.encode(ends[None].float() / 127.5 - 1)
    assert torch.equal(result.codes[:, :16], draft[:, :16])
    assert torch.equal(result.codes[:, -16:], draft[:, -16:])

    @torch.no_grad()
    def fit(codes: torch.Tensor) -> float:
        logits = pipe.generator.logits(codes, pipe.text_tokenizer(["a frog"]))[:, -16:].log_softmax(-1)
        return float(logits.gather(2, codes[:, -16:, None]).sum())

    one = pipe("a frog", image=first, last_image=last, num_frames=9, seed=1, candidates=1)
    assert fit(result.codes) >= fit(one.codes)
    shorter = pipe("a frog", image=first, last_image=last, num_frames=6, seed=1)
    assert len(shorter.frames[0]) == 6


def test_loops_return_to_their_first_frame(pipe: VideoPipeline) -> None:
    result = pipe("a frog", loop=True, seed=1, candidates=2, output_type="pt")
    first = pipe("a frog", num_frames=1, seed=1, output_type="pt").frames * 2 - 1
    held = pipe.tokenizer.encode(first.expand(-1, 9, -1, -1, -1))
    assert torch.equal(result.codes[:, -16:], held[:, -16:]) and torch.equal(
        result.codes[:, :16], held[:, :16]
    )


def test_models_without_words(tmp_path: Path) -> None:
    silent = make_pipeline(words=False)
    silent.save_pretrained(tmp_path / "model")
    opened = VideoPipeline.from_pretrained(tmp_path / "model")
    opened.set_progress_bar_config(disable=True)
    assert opened.text_tokenizer is None
    results = [one(num_videos_per_prompt=2, seed=3).codes for one in (silent, opened)]
    assert torch.equal(*results) and results[0].shape[0] == 2
    with pytest.raises(TokenloomError, match="without words"):
        silent("a frog")


def test_saving_keeps_preset_and_rate(pipe: VideoPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    opened = VideoPipeline.from_pretrained(tmp_path / "model")
    opened.set_progress_bar_config(disable=True)
    assert opened.config["fps"] == 12 and opened.config["sampling"] == {"top_k": 8}
    assert torch.equal(opened("a frog", seed=9).codes, pipe("a frog", seed=9).codes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"video": []}, "at least one frame"),
        ({"video": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]}, "2 sizes"),
        ({"video": torch.rand(1, 4, 3, 16, 16)}, "one clip|One clip"),
        ({"video": torch.rand(4, 3, 16, 16) * 9}, r"\[0, 1\]"),
        ({"video": torch.zeros(4, 3, 0, 16)}, "at least one"),
        ({"video": torch.full((4, 3, 16, 16), torch.nan)}, "nan"),
        ({"video": 5}, "int"),
        ({"video": "nothing.gif"}, "no clip"),
        ({"video": clip(4), "num_frames": 4}, "given already"),
        ({"video": clip(4), "loop": True}, "one of the two"),
        ({"last_image": clip(1)[0]}, "needs image"),
        ({"image": clip(1)[0], "last_image": clip(1)[0], "loop": True}, "no last_image"),
        ({"image": clip(1)[0], "last_image": clip(1)[0], "num_frames": 10}, "3 to 9"),
        ({"loop": True, "stream": True}, "leave out stream"),
        ({"num_frames": 0}, "at least 1"),
        ({"num_frames": 2.5}, "whole number"),
        ({"overlap": 5}, "1 to 4"),
        ({"candidates": 0, "loop": True}, "candidates"),
        ({"output_type": "gif"}, "output_type"),
        ({"guidance_scale": 2.0, "guidance": 3.0}, "either"),
        ({"callback_on_step_end_tensor_inputs": ["preview"]}, "codes"),
    ],
)
def test_bad_arguments_are_refused(pipe: VideoPipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenloomError, match=words):
        pipe("a frog", **options)


@pytest.mark.parametrize("prompt", ["", [], ["a frog", 3], 7])
def test_bad_prompts_are_refused(pipe: VideoPipeline, prompt: Any) -> None:
    with pytest.raises(TokenloomError, match="prompt"):
        pipe(prompt)


def test_components_have_to_fit(pipe: VideoPipeline) -> None:
    other = NextBlockGenerator(
        orders.blocks(Layout.clip(5, 4, 8), (1, 1, 8)).to_config(), 16, {"width": 24, "heads": 2, "depth": 1}
    )
    with pytest.raises(TokenloomError, match="trained together"):
        VideoPipeline(pipe.tokenizer, other)
    with pytest.raises(TokenloomError, match="text_tokenizer"):
        VideoPipeline(pipe.tokenizer, pipe.generator)
    with pytest.raises(TokenloomError, match="top_k"):
        VideoPipeline(pipe.tokenizer, pipe.generator, pipe.text_tokenizer, {"topk": 1})


def test_the_command_makes_and_continues_clips(pipe: VideoPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--seed", "3"]
    made = tmp_path / "out.gif"
    run = CliRunner().invoke(app, ["video", "a red frog", "-o", str(made), *model])
    assert run.exit_code == 0, run.output
    assert "9 frames at 12 a second (seed 3)" in run.output and len(read_clip(made).frames) == 9
    longer = tmp_path / "longer.webp"
    words = ["video", "--continue", str(made), "-o", str(longer), "--frames", "32", *model]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    clips = read_clip(made).frames, read_clip(longer).frames
    assert len(clips[1]) == 32 and "new from frame 9" in run.output
    assert all(np.array_equal(a, b) for a, b in zip(*clips, strict=False))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["video", "a frog", "-o", "out.bmp"], "clip format"),
        (["video", "--continue", "cut.gif", "-o", "x.gif"], "cut.gif"),
        (["video", "a frog", "--frames", "0"], "at least 1"),
        (["video", "a frog", "--fps", "0"], "above 0"),
        (["video", "a frog", "-o", "x.gif", "--fps", "60"], "at most 50"),
        (["video", "--continue", "many", "-o", "x.gif"], "sizes|one size"),
        (["video", "a frog", "--loop", "--frames", "100"], "3 to 9"),
    ],
)
def test_the_command_says_what_is_wrong(
    pipe: VideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    path = save_clip(clip(6, (40, 40)), tmp_path / "cut.gif")
    path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / "many").mkdir()
    for index, size in enumerate(((16, 16), (16, 18))):
        clip(1, size)[0].save(tmp_path / "many" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, [*words, "--model", str(tmp_path / "model")])
    assert run.exit_code != 0 and re.search(said, run.output + str(run.exception))
    assert not (tmp_path / "x.gif").exists() and not (tmp_path / "out.gif").exists()
