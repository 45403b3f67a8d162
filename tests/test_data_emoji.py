"""The emoji recipe from tiny made-up packages to a finished folder, and what interruptions leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_packages
import pytest
from fake_packages import build
from PIL import Image

from tokenloom.data import emoji, render
from tokenloom.data.captions import read_captions
from tokenloom.data.dataset import ImageCaptionFolder
from tokenloom.data.emoji_sources import STYLE_SOURCES
from tokenloom.data.splits import is_unseen_concept
from tokenloom.errors import TokenloomError

BASE_STYLES = ["3d", "blob", "detailed", "flat", "glossy", "muted", "simple"]


def test_the_whole_recipe(tmp_path: Path) -> None:
    out = tmp_path / "set"
    report = build(out)
    captions = read_captions(out)
    assert report.folder == out.resolve()
    assert report.pictures == len(captions) == 21
    assert report.styles == dict.fromkeys(report.styles, 3)
    assert sorted(report.styles) == BASE_STYLES
    assert report.groups == {"food & drink": 7, "people & body": 7, "smileys & emotion": 7}
    assert sum(report.splits.values()) == 21
    apple = next(caption for caption in captions if caption.file == "flat/1f34e.webp")
    assert apple.to_json() == json.dumps(
        {
            "file": "flat/1f34e.webp",
            "text": "a flat picture of red apple",
            "label": "red apple",
            "tags": ["fruit"],
            "style": "flat",
            "group": "food & drink",
            "concept": "1f34e",
            "licence": "MIT",
            "source": "@iconify-json/fluent-emoji-flat@1.2.6",
            "split": apple.split,
        }
    )
    assert {path.name for path in tmp_path.iterdir()} == {"set"}
    assert {path.name for path in out.iterdir()} == {*BASE_STYLES, "captions.jsonl", "SOURCES.md"}
    sources = (out / "SOURCES.md").read_text(encoding="utf-8")
    assert sources.count("Ann Artist") == 7
    assert "Be kind." in sources
    assert "emojibase-data@17.0.0" in sources


def test_the_folder_trains(tmp_path: Path) -> None:
    build(tmp_path / "set", format="png")
    data = ImageCaptionFolder(tmp_path / "set", size=16, styles=["muted"])
    index = data.texts().index("a muted picture of red apple")
    assert tuple(data.stack()[index, :, 8, 8].tolist()) == (0, 255, 0)


def test_splits_follow_the_concept(tmp_path: Path) -> None:
    build(tmp_path / "set")
    for caption in read_captions(tmp_path / "set"):
        assert (caption.split == "val") == is_unseen_concept(str(caption.concept))


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    folders = [build(tmp_path / name).folder for name in "ab"]
    contents = [
        {path.relative_to(f): path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in folders
    ]
    assert contents[0] == contents[1]


def test_share_alike_only_when_asked(tmp_path: Path) -> None:
    report = build(tmp_path / "set", include_share_alike=True)
    assert report.styles["outlined"] == 3
    outlined = [caption for caption in read_captions(tmp_path / "set") if caption.style == "outlined"]
    assert {caption.licence for caption in outlined} == {"CC-BY-SA-4.0"}
    assert outlined[0].text.startswith("an outlined picture of")
    assert "Share-alike styles (outlined)" in (tmp_path / "set" / "SOURCES.md").read_text(encoding="utf-8")


def test_packages_are_kept_only_with_a_cache(tmp_path: Path) -> None:
    build(tmp_path / "a", cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.tgz"))) == 1 + len(STYLE_SOURCES) - 1

    def offline(package: str, version: str, folder: Path) -> Path:
        raise TokenloomError("no network")

    assert build(tmp_path / "b", cache_dir=tmp_path / "cache", download=offline).pictures == 21
    with pytest.raises(TokenloomError, match="no network"):
        build(tmp_path / "c", download=offline)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "cache"}


def test_a_folder_with_content_is_refused_untouched(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    build(out)  # an empty folder is fine
    before = sorted(out.rglob("*"))
    with pytest.raises(TokenloomError, match="is not empty"):
        build(out)
    assert sorted(out.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(TokenloomError, match="is a file"):
        build(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "from 1 to 1024"),
        ({"size": 64.0}, "from 1 to 1024"),
        ({"format": "webb"}, "Did you mean 'webp'"),
        ({"quality": 101}, "from 1 to 100"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        build(tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_npm_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TokenloomError, match="npm, which is not on the PATH"):
        build(tmp_path / "set", download=None)
    assert list(tmp_path.iterdir()) == []


def test_missing_renderer_is_told_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(TokenloomError, match=r"pip install tokenloom\[data\]"):
        build(tmp_path / "set", download=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), MemoryError])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    drawn = []

    def draw(svg: str, size: int) -> Image.Image:
        drawn.append(svg)
        if len(drawn) == 8:
            raise error
        return render.render_svg(svg, size)

    monkeypatch.setattr(emoji, "render_svg", draw)
    expected = TokenloomError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        build(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_set_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import fake_packages\n"
        "from tokenloom.data import emoji\n"
        "def stuck(svg, size):\n"
        "    print('drawing', flush=True)\n"
        "    time.sleep(600)\n"
        "emoji.render_svg = stuck\n"
        f"fake_packages.build({str(tmp_path / 'set')!r})\n"
    )
    root = str(Path(emoji.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "drawing\n"
        process.kill()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".set.building-") for path in left] == [True]
    build(tmp_path / "set")
    assert left[0].exists()  # too fresh: it might belong to a live run
    long_ago = time.time() - 7200
    os.utime(left[0], (long_ago, long_ago))
    with pytest.raises(TokenloomError, match="not empty"):
        build(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / "first")
    build(tmp_path / "set")
    assert {path.name for path in tmp_path.iterdir()} == {"set", "first"}


def test_changed_packages_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fake_packages.package_files

    def without_licence(package: str) -> dict[str, Any]:
        return {**original(package), "info.json": {"name": "Tiny"}}

    def renamed(package: str) -> dict[str, Any]:
        return {**original(package), "chars.json": {"1f600": "other-name"}}

    monkeypatch.setattr(fake_packages, "package_files", without_licence)
    with pytest.raises(TokenloomError, match="states no licence"):
        build(tmp_path / "set")
    monkeypatch.setattr(fake_packages, "package_files", renamed)
    with pytest.raises(TokenloomError, match="No icon of @iconify-json/fluent-emoji-flat"):
        build(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def corner_set() -> dict[str, Any]:
    """An icon with a red top left quarter, in an oblong and in turned versions."""
    corner = '<path fill="#f00" d="M0 0h8v8H0z"/>'
    return {
        "prefix": "corners",
        "icons": {
            "plain": {"body": corner},
            "tall": {"body": '<path fill="#f00" d="M0 0h8v16H0z"/>', "width": 8},
            "bodiless": {},
            "broken": {"body": "<path"},
        },
        "aliases": {
            "flip": {"parent": "plain", "hFlip": True},
            "twice": {"parent": "flip", "hFlip": True},
            "down": {"parent": "plain", "vFlip": True},
            "turn": {"parent": "plain", "rotate": 1},
            "half": {"parent": "turn", "rotate": 1},
            "ring": {"parent": "ring"},
        },
    }


@pytest.mark.parametrize(
    ("name", "corner"),
    [
        ("plain", (0, 0)),
        ("flip", (1, 0)),
        ("twice", (0, 0)),
        ("down", (0, 1)),
        ("turn", (1, 0)),
        ("half", (1, 1)),
    ],
)
def test_aliases_flip_and_turn(name: str, corner: tuple[int, int]) -> None:
    picture = render.render_svg(render.icon_svg(corner_set(), name), 16)
    red = [(x, y) for x in (0, 1) for y in (0, 1) if picture.getpixel((3 + 9 * x, 3 + 9 * y)) == (255, 0, 0)]
    assert red == [corner]


def test_oblong_icons_stand_in_the_middle() -> None:
    picture = render.render_svg(render.icon_svg(corner_set(), "tall"), 16)
    assert [picture.getpixel((x, 8))[1] > 250 for x in (1, 8, 14)] == [True, False, True]


def test_wrong_icons_are_errors() -> None:
    with pytest.raises(TokenloomError, match="Did you mean 'plain'"):
        render.icon_svg(corner_set(), "plane")
    with pytest.raises(TokenloomError, match="form a ring"):
        render.icon_svg(corner_set(), "ring")
    with pytest.raises(TokenloomError, match="has no body"):
        render.icon_svg(corner_set(), "bodiless")
    with pytest.raises(TokenloomError, match="refused an SVG picture"):
        render.render_svg(render.icon_svg(corner_set(), "broken"), 16)
