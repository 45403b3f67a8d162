"""Moving cut-outs, folders of clips and the recipe that freezes clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from referring_pools import write_pool

from tokenloom import TokenloomError
from tokenloom.data.balls import BALL, COLOURS, KINDS, add_balls, draw_ball
from tokenloom.data.captions import read_captions
from tokenloom.data.clips import ClipFolder
from tokenloom.data.moving import MOTIONS, MotionConfig, MotionMaker, is_unseen_motion, with_article
from tokenloom.data.referring_names import colour_of
from tokenloom.data.referring_pool import Pool
from tokenloom.data.video import build_video, clip_seed
from tokenloom.media_video import read_clip, save_clip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """A tiny pool."""
    return Pool.open(write_pool(tmp_path_factory.mktemp("pool")))


def maker(pool: Pool, motion: str, **options: float) -> MotionMaker:
    """Clips of one motion on plain colours."""
    config = MotionConfig(size=48, frames=9, plain=1.0, motions=(motion,), **options)  # type: ignore[arg-type]
    return MotionMaker(pool, "val", config)


def test_a_clip_is_a_function_of_its_seed(pool: Pool) -> None:
    config = MotionConfig(size=32, frames=5)
    first, again = MotionMaker(pool, "train", config), MotionMaker(pool, "train", config)
    first.clip(3)  # what was made before does not matter
    one, other = first.clip(7), again.clip(7)
    assert np.array_equal(one.frames, other.frames) and one.text == other.text
    assert one.frames.shape == (5, 32, 32, 3) and one.frames.dtype == np.uint8
    assert not np.array_equal(one.frames, first.clip(8).frames)


@pytest.mark.parametrize("motion", MOTIONS)
def test_tracks_tell_what_the_captions_say(pool: Pool, motion: str) -> None:
    clips = maker(pool, motion)
    for seed in range(6):
        clip = clips.clip(seed)
        x, y, share = clip.track.T
        assert clip.motion == motion and any(clip.text.endswith(said) for said in MOTIONS[motion])
        moved = {"right": x[-1] - x[0], "left": x[0] - x[-1], "down": y[-1] - y[0], "up": y[0] - y[-1]}
        if motion in moved:
            assert moved[motion] > 0.15
        elif motion in ("growing", "shrinking"):
            assert (share[-1] / share[0] > 2) == (motion == "growing")
        elif motion in ("bouncing", "circling"):
            assert np.ptp(y) > 0.05 and abs(y[-1] - y[0]) < 0.35
        else:
            assert max(np.ptp(x), np.ptp(y)) < 0.06
        if motion == "still":
            assert np.array_equal(clip.frames[0], clip.frames[-1])


def test_tracks_are_where_the_pixels_are(pool: Pool) -> None:
    clip = maker(pool, "right").clip(2)
    ground = clip.frames[:, 0, 0].astype(float)
    mask = np.abs(clip.frames - ground[:, None, None]).max(axis=3) > 40
    columns = np.array([np.nonzero(frame)[1].mean() + 0.5 for frame in mask]) / 48
    assert np.abs(columns - clip.track[:, 0]).max() < 0.02
    assert np.abs(mask.mean(axis=(1, 2)) - clip.track[:, 2]).max() < 0.05


def test_held_out_pairs_are_never_trained_on(pool: Pool) -> None:
    train, unseen = MotionMaker(pool, "train"), MotionMaker(pool, "val_pair")
    for seed in range(60):
        known, new = train.clip(seed), unseen.clip(seed)
        assert not is_unseen_motion(known.thing, known.motion)
        assert is_unseen_motion(new.thing, new.motion) and new.thing in train.things
    assert MotionMaker(pool, "val").things == ("plum",)
    words = " ".join(train.texts()).split()
    assert set(" ".join(train.clip(seed).text for seed in range(40)).split()) <= set(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"motions": ("flying",)}, "motion"),
        ({"size": 8}, "at least 16"),
        ({"largest": 0.2}, "smallest"),
        ({"plain": 1.5}, "chance"),
        ({"frames": 1}, "at least 2 frames"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(TokenloomError, match=words):
        MotionConfig(**options)  # type: ignore[arg-type]


def test_unknown_categories_and_splits_are_refused(pool: Pool) -> None:
    with pytest.raises(TokenloomError, match="fruit"):
        MotionMaker(pool, "train", MotionConfig(categories=("fruits",)))
    with pytest.raises(TokenloomError, match="split"):
        MotionMaker(pool, "test")


def test_articles() -> None:
    assert [with_article(name) for name in ("apple", "bus", "grapes", "red ball", "glass")] == [
        "an apple",
        "a bus",
        "grapes",
        "a red ball",
        "a glass",
    ]


def test_the_recipe_freezes_clips_with_tracks(pool: Pool, tmp_path: Path) -> None:
    config = MotionConfig(size=32, frames=5, plain=1.0)
    out = tmp_path / "clips"
    report = build_video(out, pool=pool.folder, count=3, splits=("val", "val_pair"), config=config, seed=4)
    captions = read_captions(out)
    assert report.pictures == 6 and report.splits == {"val": 3, "val_pair": 3}
    clip = MotionMaker(pool, "val", config).clip(clip_seed(4, 1))
    record = captions[1]
    assert (record.text, record.label, record.style) == (clip.text, clip.thing, clip.motion)
    assert np.allclose(record.extra["track"], clip.track, atol=1e-4) and record.extra["plain"] is True
    read = np.stack([np.asarray(frame) for frame in read_clip(out / record.file).frames])
    assert len(read) == 5 and np.array_equal(read, clip.frames)  # lossless
    folder = ClipFolder(out, "val_pair", size=32)
    assert len(folder) == 3 and folder.clip(0).shape == (5, 3, 32, 32)


def test_the_recipe_leaves_what_is_there(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(TokenloomError, match="not empty"):
        build_video(tmp_path, pool=pool.folder, count=1)
    with pytest.raises(TokenloomError, match="split"):
        build_video(tmp_path / "new", pool=pool.folder, splits=("vall",))
    with pytest.raises(TokenloomError, match="at least 0"):
        build_video(tmp_path / "new", pool=pool.folder, count=-1)
    assert not (tmp_path / "new").exists()


def frames(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Grey frames that become lighter."""
    return [Image.new("RGB", size, (30 * index,) * 3) for index in range(count)]


def test_folders_of_frames_are_clips(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("two", 12)):
        (tmp_path / name).mkdir()
        for index, frame in enumerate(frames(count, (20, 30))):
            frame.save(tmp_path / name / f"{index}.png")
    folder = ClipFolder(tmp_path, size=16)
    assert [caption.file for caption in folder.captions] == ["one", "two"]
    assert folder.clip(1).shape == (12, 3, 16, 16)
    assert folder.window(0, 5)[:, 0, 0, 0].tolist() == [0, 30, 60, 60, 60]
    starts = {int(folder.window(1, 5, torch.Generator().manual_seed(s))[0, 0, 0, 0]) for s in range(20)}
    assert len(starts) > 3


def test_captions_name_files_and_folders(tmp_path: Path) -> None:
    save_clip(frames(3, (16, 16)), tmp_path / "a.gif")
    (tmp_path / "b").mkdir()
    frames(1, (16, 16))[0].save(tmp_path / "b" / "0.png")
    lines = [
        {"file": "a.gif", "text": "up", "track": [[0, 0, 0]]},
        {"file": "b", "text": "down", "split": "val"},
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = ClipFolder(tmp_path, size=16)
    assert len(folder) == 2 and folder.captions[0].extra["track"] == [[0, 0, 0]]
    assert len(ClipFolder(tmp_path, "val", 16)) == 1
    (tmp_path / "a.gif").unlink()
    with pytest.raises(TokenloomError, match=r"a\.gif"):
        ClipFolder(tmp_path)


def test_a_truncated_clip_names_its_file(tmp_path: Path) -> None:
    path = save_clip(frames(8, (32, 32)), tmp_path / "cut.gif")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TokenloomError, match=r"cut\.gif"):
        ClipFolder(tmp_path).clip(0)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="clip"):
        ClipFolder(tmp_path)
    with pytest.raises(TokenloomError, match="size"):
        ClipFolder(tmp_path, size=0)


def test_balls_have_the_colour_that_they_are_called_by(tmp_path: Path) -> None:
    folder = write_pool(tmp_path / "pool")
    before = len(Pool.open(folder).cut_outs)
    assert add_balls(folder, size=32) == len(COLOURS) * len(KINDS) and add_balls(folder) == 0
    assert "CC0-1.0" in (folder / "SOURCES.md").read_text()
    balls = [item for item in Pool.open(folder).cut_outs if item.category == BALL]
    assert len(balls) == len(Pool.open(folder).cut_outs) - before
    assert {item.colour for item in balls if item.split == "train"} == set(COLOURS)
    for item in balls:
        picture = Pool.open(folder).picture(item.file, "RGBA")
        assert picture.size == (32, 32) and picture.getpixel((0, 0))[3] == 0
        if "banded" not in item.file:
            assert colour_of(picture) == item.colour
    clips = MotionMaker(Pool.open(folder), "train", MotionConfig(categories=(BALL,), colour=1.0))
    texts = {clips.clip(seed).text for seed in range(200)}
    assert clips.things == ("ball",) and "a red ball bouncing" in texts


def test_unknown_balls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="colour of a ball"):
        draw_ball("crimson")
    with pytest.raises(TokenloomError, match="kind of ball"):
        draw_ball("red", "mat")
    with pytest.raises(TokenloomError, match="8 pixels"):
        draw_ball("red", size=4)
    with pytest.raises(TokenloomError, match="pool"):
        add_balls(tmp_path)
