"""Made-up npm packages for the emoji recipe: three plain squares in every style, without torch or pytest."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tokenloom.data.emoji import BuildReport, build_emoji

COLOURS = {"grinning-face": "#ff0000", "red-apple": "#00ff00", "waving-hand": "#0000ff"}


def icons(run_together: bool) -> dict[str, Any]:
    bodies = {name: f'<path fill="{colour}" d="M0 0h32v32H0z"/>' for name, colour in COLOURS.items()}
    if run_together:
        bodies = {name.replace("-", ""): body for name, body in bodies.items()}
    return {
        "prefix": "tiny",
        "icons": {name: {"body": body} for name, body in bodies.items()},
        "width": 32,
        "height": 32,
    }


def package_files(package: str) -> dict[str, Any]:
    """What the made-up package of a name holds."""
    if package == "emojibase-data":
        emoji_list = [
            {"label": "grinning face", "hexcode": "1F600", "tags": ["happy", "smile"], "group": 0},
            {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit"], "group": 4},
            {"label": "waving hand", "hexcode": "1F44B", "group": 1, "skins": [{"hexcode": "1F44B-1F3FB"}]},
            {"label": "light skin tone", "hexcode": "1F3FB", "group": 2},
            {"label": "regional indicator A", "hexcode": "1F1E6"},
        ]
        groups = {"0": "smileys-emotion", "1": "people-body", "2": "component", "4": "food-drink"}
        return {
            "en/data.json": emoji_list,
            "meta/groups.json": {"groups": groups},
            "package.json": {},
            "LICENSE": "Be kind.",
        }
    chars = {
        "1f600": "grinning-face",
        "1f34e": "red-apple",
        "1f44b": "waving-hand",
        "1f44b-1f3fb": "waving-hand",
    }
    spdx = "CC-BY-SA-4.0" if package.endswith("openmoji") else "MIT"
    info = {"name": "Tiny", "author": {"name": "Ann Artist"}, "license": {"spdx": spdx}}
    return {"icons.json": icons(package.endswith("fxemoji")), "chars.json": chars, "info.json": info}


def fake_download(package: str, version: str, folder: Path) -> Path:
    path = folder / f"{package.replace('/', '-')}-{version}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in package_files(package).items():
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def build(out: str | Path, **options: Any) -> BuildReport:
    """Runs the recipe on the made-up packages, at 16 pixels."""
    return build_emoji(out, **{"size": 16, "progress": False, "download": fake_download, **options})
