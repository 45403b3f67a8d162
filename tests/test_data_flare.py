"""The recipe of the Flare sprites, with a package of two tiny creatures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_photos import _deb

from tokenloom import TokenloomError
from tokenloom.data.captions import read_captions
from tokenloom.data.clips import ClipFolder
from tokenloom.data.flare import DIRECTIONS, LICENCE, build_flare, read_animations
from tokenloom.media_video import read_clip

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2012 Somebody
License: {licence}
"""


def table() -> str:
    """Two frames of eight directions; the second one stands two pixels to the right."""
    lines = ["image=images/enemies/imp.png", "", "[run]", "frames=2", "duration=400ms", "type=looped"]
    lines += [
        f"frame={frame},{side},{10 * side},0,10,20,{5 - 2 * frame},18"
        for frame in (0, 1)
        for side in range(8)
    ]
    return "\n".join([*lines, "[spawn]", "frame=0,0,0,0,4,4,2,2", "[hit]", "frame=0,0,0,0,4,4,2,2", ""])


def package(folder: Path, licence: str = LICENCE) -> Path:
    """A Debian package with one sheet and two tables."""
    sheet = Image.new("RGBA", (80, 20), "red")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    mods = "usr/share/games/flare/mods"
    files = {
        "usr/share/doc/flare-game/copyright": COPYRIGHT.format(licence=licence).encode(),
        f"{mods}/core/images/enemies/imp.png": buffer.getvalue(),
        f"{mods}/core/animations/enemies/imp_fire.txt": table().encode(),
        f"{mods}/more/animations/enemies/lost.txt": b"image=images/enemies/nowhere.png\n[run]\n",
    }
    path = folder / "flare-game_1.14-1_all.deb"
    path.write_bytes(_deb(files))
    return path


def fetch(registry: str, name: str, version: str, folder: Path) -> Path:
    """Stands for apt-get."""
    assert (registry, name, version) == ("debian", "flare-game", "1.14-1")
    return package(folder)


def test_clips_say_who_does_what_and_where(tmp_path: Path) -> None:
    report = build_flare(tmp_path / "set", size=32, fetch=fetch)
    captions = read_captions(tmp_path / "set")
    assert report.pictures == 8 and [item.group for item in captions] == list(DIRECTIONS)
    assert captions[0].text == "an imp fire running west" and captions[0].licence == LICENCE
    assert len({item.split for item in captions}) == 1  # a creature and an action are held out as a whole
    frames = [np.asarray(frame) for frame in read_clip(tmp_path / "set" / captions[0].file).frames]
    assert len(frames) == 2 and frames[0].shape == (32, 32, 3)
    places = [np.nonzero(frame[..., 1] < 100)[1].mean() for frame in frames]
    assert places[1] - places[0] == pytest.approx(2 * 32 / 22, abs=0.7)  # the square of 22 pixels became 32
    assert frames[0][0, 0].tolist() == [255, 255, 255]
    assert "share" in (tmp_path / "set" / "SOURCES.md").read_text()
    assert ClipFolder(tmp_path / "set", size=16).clip(0).shape == (2, 3, 16, 16)


def test_a_kept_package_is_used_again(tmp_path: Path) -> None:
    package(tmp_path)

    def never(*_: object) -> Path:
        raise AssertionError("downloaded")

    assert build_flare(tmp_path / "set", cache_dir=tmp_path, fetch=never).pictures == 8


def test_another_licence_is_refused(tmp_path: Path) -> None:
    package(tmp_path, "GPL-3+")
    with pytest.raises(TokenloomError, match="GPL-3"):
        build_flare(tmp_path / "set", cache_dir=tmp_path)
    assert not (tmp_path / "set").exists()
    with pytest.raises(TokenloomError, match="16 to 256"):
        build_flare(tmp_path / "set", size=4)


def test_a_damaged_table_names_its_line() -> None:
    image, found = read_animations(table())
    assert image == "images/enemies/imp.png" and [item.name for item in found] == ["run", "spawn", "hit"]
    assert found[0].length() == 2 and found[0].frames[1, 7] == (70, 0, 10, 20, 3, 18)
    with pytest.raises(TokenloomError, match="frame=0,1,x"):
        read_animations("[run]\nframe=0,1,x")
