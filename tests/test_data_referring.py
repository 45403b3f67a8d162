"""The referring set: its pool from tiny packages, scenes with exact masks, true phrases, frozen scenes, bad records."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import fake_packages
import numpy as np
import pytest
import test_data_photos
from PIL import Image
from referring_pools import write_pool

from tokenloom.data.referring import Example, ReferringScenes, freeze_scenes, read_scenes, scene_example
from tokenloom.data.referring_grounds import shown_by
from tokenloom.data.referring_names import cut_out_name, nameable
from tokenloom.data.referring_phrases import KINDS, absent_phrase, phrases_of, plural, true_phrases
from tokenloom.data.referring_pool import Pool, build_referring, split_of
from tokenloom.data.referring_scenes import Scene, SceneConfig, SceneMaker, Thing
from tokenloom.data.referring_stamps import read_stamps, stamp_category, stamp_name
from tokenloom.errors import TokenloomError
from tokenloom.training.segmentation_task import training_pictures

SMALL = SceneConfig(size=48)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool.open(write_pool(tmp_path_factory.mktemp("pool")))


def scene(*things: Thing, quiet: bool = True) -> Scene:
    return Scene(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), things, quiet)


def texts(made: Scene) -> dict[str, tuple[int, ...]]:
    return {phrase.text: phrase.targets for phrase in true_phrases(made)}


@pytest.fixture
def fruit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the emoji, with one name that can be cut out."""
    plain = fake_packages.package_files

    def with_subgroups(package: str) -> dict[str, Any]:
        files = plain(package)
        if package == "emojibase-data":
            files["en/data.json"][1]["subgroup"] = 42
            files["meta/groups.json"]["subgroups"] = {"42": "food-fruit"}
        return files

    monkeypatch.setattr(fake_packages, "package_files", with_subgroups)


@pytest.mark.usefixtures("fruit")
def test_the_pool_is_built_from_packages(tmp_path: Path) -> None:
    report = build_referring(
        tmp_path / "pool",
        size=32,
        longest=64,
        download=fake_packages.fake_download,
        fetch=test_data_photos._fetch,
    )
    made = Pool.open(tmp_path / "pool")
    assert [item.name for item in made.cut_outs] == ["red apple", "red apple"]
    assert {item.category for item in made.cut_outs} == {"fruit"}
    assert {item.licence for item in made.cut_outs} == {"MIT"}
    assert report.pictures == 2 + len(made.backgrounds) > 2
    with Image.open(tmp_path / "pool" / made.cut_outs[0].file) as picture:
        assert picture.mode in ("RGBA", "RGB") and max(picture.size) == 32
    sources = (tmp_path / "pool" / "SOURCES.md").read_text(encoding="utf-8")
    assert "Ann Artist" in sources and "# Photographs" in sources


def _fetch_stamps(registry: str, package: str, version: str, folder: Path) -> Path:
    if package != "tuxpaint-stamps-default":
        return test_data_photos._fetch(registry, package, version, folder)
    stamps = {
        "animals/birds/crow": ("A crow.\nde.utf8=Eine Kraehe.", True),
        "household/wall": ("A wall.", False),  # opaque
        "symbols/money/coin": ("A coin.", True),
        "food/bread": ("Eat your bread!", True),
    }
    files = {}
    for key, (caption, clear) in stamps.items():
        picture = Image.new("RGBA", (60, 40), (0, 0, 0, 0 if clear else 255))
        picture.paste((200, 30, 30, 255), (5, 5, 55, 35))
        content = io.BytesIO()
        picture.save(content, "PNG")
        files[f"./usr/share/tuxpaint/stamps/{key}.png"] = content.getvalue()
        files[f"./usr/share/tuxpaint/stamps/{key}.txt"] = caption.encode()
    path = folder / f"{package}_{version}_all.deb"
    path.write_bytes(test_data_photos._deb(files))
    return path


@pytest.mark.usefixtures("fruit")
def test_stamps_come_on_demand_with_their_licence(tmp_path: Path) -> None:
    made = {}
    for stamps in (False, True):
        report = build_referring(
            tmp_path / str(stamps),
            size=32,
            longest=64,
            gpl_stamps=stamps,
            download=fake_packages.fake_download,
            fetch=_fetch_stamps,
        )
        made[stamps] = Pool.open(tmp_path / str(stamps))
        assert ("GPL-2" in report.licences) == stamps
        assert sum(report.licences.values()) == report.pictures
        assert ("GNU General" in (tmp_path / str(stamps) / "SOURCES.md").read_text()) == stamps
    (crow,) = [item for item in made[True].cut_outs if item not in made[False].cut_outs]
    assert (crow.name, crow.category, crow.colour, crow.licence) == ("crow", "animal", "red", "GPL-2")
    assert "1 under GPL-2" in training_pictures(made[True])
    with Image.open(tmp_path / "True" / crow.file) as picture:
        assert picture.size == (32, 19)
    with pytest.raises(TokenloomError, match="holds no folder"):
        list(read_stamps(tmp_path, 32))


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A pair of open scissors.", "open scissors"),
        ("A \u201cFuji\u201d apple.", "fuji apple"),
        ("An Adelaide Rosella.", "adelaide rosella"),
        ("A knight\u2019s helmet.", "knight's helmet"),
        ("A very small pumpkin.", "small pumpkin"),
        ("Say cheese!", None),
        ("A stethoscope lets your doctor listen.", None),
        ("A bunny with an Easter egg.", None),
        ("Two flowers.", None),
    ],
)
def test_captions_of_stamps_name_things_or_nothing(caption: str, name: str | None) -> None:
    assert stamp_name(caption) == name


def test_categories_of_stamps() -> None:
    assert stamp_category("animals/mammals/bears", "bear") == "animal"
    assert stamp_category("animals/mammals/bears/toys", "bear") is None
    assert stamp_category("vehicles", "tractor wheel") is None
    assert stamp_category("medical", "tooth") is None


def test_names_and_categories() -> None:
    emoji = [
        {"label": "dog face", "hexcode": "1F436", "subgroup": 1},
        {"label": "feather", "hexcode": "1FAB6", "subgroup": 1},
        {"label": "grinning face", "hexcode": "1F600", "subgroup": 2},
    ]
    found = nameable(emoji, {"1": "animal-mammal", "2": "face-smiling"})
    assert found == {"1f436": ("dog", "animal"), "1fab6": ("feather", None)}
    assert cut_out_name("Two-hump camel") == "two hump camel"
    assert {split_of(f"name {i}", "3d", ("3d", "detailed")) for i in range(80)} == {
        "train",
        "val_style",
        "val",
    }
    assert "val_style" not in {split_of(f"name {i}", "3d", ("3d",)) for i in range(80)}


def test_nothing_that_the_background_shows_is_asked_for(pool: Pool) -> None:
    things = (Thing("apple", "fruit", "red", 0.2, 0.2, 0.5), Thing("frog", "animal", "green", 0.1, 0.5, 0.9))
    plain = np.zeros((8, 8), np.uint8)
    bare = Scene(plain, plain, things, True, ())
    wild = Scene(plain, plain, things, True, ("animal", "fish"))
    orchard = Scene(plain, plain, things, True, ("fruit", "apple", "tree"))
    assert {"the animal", "the fruit", "the frog", "the apple"} <= set(texts(bare))
    assert "the animal" not in texts(wild) and {"the fruit", "the frog"} <= set(texts(wild))
    assert not any("apple" in text or "fruit" in text for text in texts(orchard))
    crowded = Scene(plain, plain, things, True, ("object",))
    assert "the larger object" in texts(bare) and "the larger object" not in texts(crowded)
    maker = SceneMaker(pool, "train", SMALL)
    assert set(maker.absent_names(bare)) == {"apple", "frog", "whale"}
    assert set(maker.absent_names(wild)) == {"apple"}
    assert set(maker.absent_names(orchard)) == {"frog", "whale"}
    assert set(maker.absent_names(Scene(plain, plain, things, False))) == {"apple"}


def test_photographs_that_were_looked_at() -> None:
    assert shown_by("solar4") == () and shown_by("unknown") is None
    assert "object" in (shown_by("pan") or ()) and "object" not in (shown_by("greatWall") or ())
    assert {"animal", "fish"} <= set(shown_by("fish25") or ())
    assert "tool" in (shown_by("igloo") or ()) and "plant" in (shown_by("greatWall") or ())


def test_scenes_repeat_and_differ(pool: Pool) -> None:
    maker, again = SceneMaker(pool, "train", SMALL), SceneMaker(pool, "train", SMALL)
    assert np.array_equal(maker.scene(3).picture, again.scene(3).picture)
    assert not np.array_equal(maker.scene(3).picture, maker.scene(4).picture)
    assert {len(maker.scene(seed).things) for seed in range(30)} == {1, 2, 3, 4}
    assert maker.masks(5).max() >= 1


def test_masks_are_the_visible_pixels(pool: Pool) -> None:
    maker = SceneMaker(pool, "train", SceneConfig(size=48, shadow=0, blur=0, noise=0, jpeg=100))
    made = maker.scene(11)
    inside = made.instances > 0
    plain = made.picture.max(axis=2).astype(int) - made.picture.min(axis=2)
    assert (plain[inside] > 40).mean() > 0.95  # colours of things
    assert (plain[~inside] < 40).mean() > 0.95  # the grey photograph
    for index, thing in enumerate(made.things):
        assert made.mask((index,)).mean() == pytest.approx(thing.area)
    assert not made.mask(()).any()


def test_phrases_are_true() -> None:
    made = scene(
        Thing("apple", "fruit", "red", 0.2, 0.2, 0.5),
        Thing("apple", "fruit", "green", 0.05, 0.8, 0.5),
        Thing("frog", "animal", "green", 0.1, 0.5, 0.9),
    )
    found = texts(made)
    assert found["the red apple"] == (0,) and found["the green apple"] == (1,)
    assert found["the left apple"] == (0,) and found["the right apple"] == (1,)
    assert found["all apples"] == (0, 1) and found["the frog"] == found["the animal"] == (2,)
    assert found["the larger apple"] == (0,) and found["the largest object"] == (0,)
    assert "the apple" not in found and "the upper apple" not in found
    assert "the animal" not in texts(scene(*made.things, quiet=False))


def test_names_inside_names_are_ambiguous() -> None:
    found = texts(
        scene(Thing("dog", "animal", None, 0.1, 0.2, 0.2), Thing("guide dog", "animal", None, 0.1, 0.8, 0.2))
    )
    assert "the dog" not in found and "the guide dog" not in found
    assert found["the left animal"] == (0,)


def test_relations_need_one_candidate() -> None:
    base = Thing("frog", "animal", None, 0.1, 0.5, 0.5)
    left, above = (
        Thing("apple", "fruit", None, 0.1, 0.1, 0.5),
        Thing("apple", "fruit", None, 0.1, 0.5, 0.1),
    )
    found = texts(scene(base, left, above))
    assert found["the apple left of the frog"] == (1,) and found["the apple above the frog"] == (2,)
    assert "the apple left of the frog" not in texts(scene(base, left, left))


def test_absent_phrases_name_nothing_that_is_there() -> None:
    made = scene(Thing("red apple", "fruit", "red", 0.1, 0.5, 0.5))
    for seed in range(40):
        phrase = absent_phrase(made, ("green apple", "red apple", "frog"), random.Random(seed))
        assert phrase is not None and phrase.targets == () and "frog" in phrase.text


def test_an_absent_colour_is_asked_for_only_where_one_is_free() -> None:
    """Four things of one name whose colours are near all others."""
    seen = [Thing("toy", "object", colour) for colour in ("brown", "purple", "green", "pink", "gray")]
    for seed in range(60):
        phrase = absent_phrase(scene(*seen), ("frog",), random.Random(seed))
        assert phrase is not None and "frog" in phrase.text


def test_scenes_of_some_categories(pool: Pool) -> None:
    kinds = sorted({item.category for item in pool.cut_outs if item.split == "train" and item.category})
    maker = SceneMaker(pool, "train", SceneConfig(size=48, categories=[kinds[0]]))  # type: ignore[arg-type]
    assert len(kinds) > 1
    for seed in range(20):
        made = maker.scene(seed)
        assert {thing.category for thing in made.things} == {kinds[0]}
        assert set(maker.absent_names(made)) <= set(maker.names) < {item.name for item in pool.cut_outs}
    with pytest.raises(TokenloomError, match="category of cut-outs"):
        SceneMaker(pool, "train", SceneConfig(categories=("frut",)))


def test_every_kind_occurs_and_absent_ones_are_few(pool: Pool) -> None:
    maker = SceneMaker(pool, "train", SMALL)
    counts = Counter(phrase.kind for seed in range(60) for phrase in scene_example(maker, seed)[1])
    assert set(counts) == set(KINDS)
    assert 0.04 < counts["absent"] / counts.total() < 0.2
    first = scene_example(maker, 1)
    assert phrases_of(first[0], maker.absent_names(first[0]), random.Random("phrases 1")) == first[1]


def test_plurals() -> None:
    assert [plural(name) for name in ("apple", "fox", "cherry", "jeans", "fish")] == [
        "apples",
        "foxes",
        "cherries",
        "jeans",
        "fish",
    ]


def test_the_data_set(pool: Pool) -> None:
    data = ReferringScenes(pool, length=3, phrases=5, config=SMALL, seed=2)
    item = data[2]
    assert item["pixels"].shape == (3, 48, 48) and item["pixels"].abs().max() <= 1
    assert item["masks"].shape == (5, 48, 48) and len(item["texts"]) == 5
    assert data[2]["texts"] == item["texts"]
    with pytest.raises(IndexError):
        data[3]


def test_frozen_scenes_come_back_and_bad_records_are_named(pool: Pool, tmp_path: Path) -> None:
    count = freeze_scenes(pool, tmp_path / "frozen", count=3, config=SMALL)
    examples = [one for one in read_scenes(tmp_path / "frozen") if isinstance(one, Example)]
    assert len(examples) == 6 and sum(len(one.phrases) for one in examples) == count
    maker = SceneMaker(pool, "val_style", SMALL)
    made, phrases = scene_example(maker, 2**40)
    assert examples[0].phrases == tuple(phrases)
    assert np.array_equal(examples[0].masks[0], made.mask(phrases[0].targets))
    (tmp_path / "frozen" / "val-00001.png").unlink()
    lines = (tmp_path / "frozen" / "scenes.jsonl").read_text().splitlines()
    lines[0] = json.dumps(
        {**json.loads(lines[0]), "phrases": [{"text": "x", "kind": "name", "targets": [9]}]}
    )
    (tmp_path / "frozen" / "scenes.jsonl").write_text("\n".join(lines))
    errors = [str(one) for one in read_scenes(tmp_path / "frozen") if isinstance(one, TokenloomError)]
    assert len(errors) == 2
    assert "line 1" in errors[0] and "object 9" in errors[0]
    assert "line 5" in errors[1] and "val-00001.png" in errors[1]


def test_bad_pools_and_settings_are_named(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match=r"holds no pool\.json"):
        Pool.open(tmp_path)
    (tmp_path / "pool.json").write_text('{"cut_outs": [{"file": "a.png", "name": "a"}], "backgrounds": []}')
    with pytest.raises(TokenloomError, match=r"cut_outs\[0\]: there is no 'a\.png'"):
        Pool.open(tmp_path)
    with pytest.raises(TokenloomError, match="vall"):
        SceneMaker(pool, "vall")
    with pytest.raises(TokenloomError, match="size of at least 16"):
        SceneConfig(size=4)
    with pytest.raises(TokenloomError, match="Cannot read"):
        read_scenes(tmp_path)
