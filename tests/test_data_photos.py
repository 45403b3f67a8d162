"""The recipe of the photographs, on small packages made here."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import zstandard
from PIL import Image

from tokenloom.data.captions import read_captions
from tokenloom.data.other_packages import permission_of, read_copyright, read_rcc, unpack_package
from tokenloom.data.photos import build_photos
from tokenloom.errors import TokenloomError

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020, Somebody
License: GPL-3+

Files: 16.04/sea.jpg
 src/activities/erase/resource/bee.jpg
Copyright: 2018, Ann
           2019, Bob
License: CC-BY-4.0
 The whole text.

Files: 16.04/hill.jpg
Copyright: 2018, Cid
License: CC-BY-SA-4.0
"""


def _picture(colour: str, format: str, size: tuple[int, int] = (200, 120)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def _deb(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"xyz", "data.tar.xz": buffer.getvalue()}
    out = b"!<arch>\n"
    for name, content in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def _rcc(path: list[str], contents: dict[str, tuple[bytes, int]]) -> bytes:
    """A resource file of format 2: folders `path` inside one another, the files in the last."""
    names, data, nodes = b"", b"", []

    def add(name: str) -> int:
        nonlocal names
        place = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return place

    for depth, folder in enumerate(["", *path]):
        count = len(contents) if depth == len(path) else 1
        nodes.append(struct.pack(">IHIIQ", add(folder), 2, count, depth + 1, 0))
    for name, (content, flags) in contents.items():
        nodes.append(struct.pack(">IHHHIQ", add(name), flags, 0, 0, len(data), 0))
        data += struct.pack(">I", len(content)) + content
    tree = b"".join(nodes)
    start = 20
    return (
        struct.pack(">4s4I", b"qres", 2, start + len(data) + len(names), start, start + len(data))
        + data
        + names
        + tree
    )


def _fetch(registry: str, package: str, version: str, folder: Path) -> Path:
    copyright = {f"./usr/share/doc/{package}/copyright": COPYRIGHT.encode()}
    if package.startswith("lomiri"):
        names = ("sea", "hill", "other")
        files = {
            f"./usr/share/backgrounds/{name}.jpg": _picture("navy", "JPEG", (3000, 1500)) for name in names
        }
        content = _deb(copyright | files)
    elif registry == "debian":
        erase = ["gcompris", "src", "activities", "erase", "resource"]
        pictures = {
            "bee.webp": (struct.pack(">I", 0) + zlib.compress(_picture("red", "WEBP")), 1),
            "gorilla.webp": (_picture("black", "WEBP"), 0),
        }
        content = _deb(copyright | {"./usr/share/gcompris-qt/rcc/erase.rcc": _rcc(erase, pictures)})
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in ("china.jpg", "flower.jpg"):
                archive.writestr(f"sklearn/datasets/images/{name}", _picture("green", "JPEG"))
            for name in ("coffee.png", "rocket.jpg", "chelsea.png"):
                archive.writestr(f"skimage/data/{name}", _picture("brown", "PNG"))
        content = buffer.getvalue()
    file = folder / f"{package}_{version}.{'deb' if registry == 'debian' else 'whl'}"
    file.write_bytes(content)
    return file


def test_only_permissive_photographs_are_taken(tmp_path: Path) -> None:
    report = build_photos(tmp_path / "set", fetch=_fetch, longest=256)
    captions = {caption.concept: caption for caption in read_captions(tmp_path / "set")}
    assert set(captions) == {"sea", "bee", "china", "flower", "coffee", "rocket", "chelsea"}
    assert report.pictures == 7 and sum(report.splits.values()) == 7
    assert captions["bee"].licence == "CC-BY-4.0"
    with Image.open(tmp_path / "set" / "sea.webp") as picture:
        assert picture.size == (256, 128)
    assert "2018, Ann 2019, Bob" in (tmp_path / "set" / "SOURCES.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_crops_keep_the_split_of_their_photograph_and_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_photos(tmp_path / name, crops=3, size=32, fetch=_fetch, cache_dir=tmp_path / "cache")
    captions = read_captions(tmp_path / "a")
    assert len(captions) == 21
    for concept in {caption.concept for caption in captions}:
        assert len({caption.split for caption in captions if caption.concept == concept}) == 1
    for caption in captions:
        content = (tmp_path / "a" / caption.file).read_bytes()
        assert content == (tmp_path / "b" / caption.file).read_bytes()
    with Image.open(tmp_path / "a" / captions[0].file) as picture:
        assert picture.size == (32, 32)


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    def broken(registry: str, package: str, version: str, folder: Path) -> Path:
        (folder / f"{package}_{version}.deb").write_bytes(b"!<arch>\nnot a package")
        return folder / f"{package}_{version}.deb"

    with pytest.raises(TokenloomError, match="cannot be unpacked"):
        build_photos(tmp_path / "set", fetch=broken)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TokenloomError, match="crops=-1"):
        build_photos(tmp_path / "set", crops=-1, fetch=_fetch)


def test_members_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.deb").write_bytes(_deb({"../evil.txt": b"x"}))
    with pytest.raises(TokenloomError, match="cannot be unpacked"):
        unpack_package(tmp_path / "evil.deb", tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()


def test_the_last_fitting_paragraph_of_a_copyright_file_counts() -> None:
    permissions = read_copyright(COPYRIGHT)
    assert permission_of("16.04/sea.jpg", permissions).licence == "CC-BY-4.0"  # type: ignore[union-attr]
    assert permission_of("16.04/hill.jpg", permissions).licence == "CC-BY-SA-4.0"  # type: ignore[union-attr]
    assert permission_of("anything", permissions).licence == "GPL-3+"  # type: ignore[union-attr]
    assert permission_of("anything", []) is None


def test_resources_are_read_whole_or_refused() -> None:
    packed = zstandard.ZstdCompressor().compress(b"content")
    data = _rcc(["a", "b"], {"c.txt": (packed, 4), "d.txt": (b"plain", 0)})
    assert dict(read_rcc(data)) == {"a/b/c.txt": b"content", "a/b/d.txt": b"plain"}
    with pytest.raises(TokenloomError, match="compiled Qt resource"):
        list(read_rcc(b"PK\x03\x04"))
    with pytest.raises(TokenloomError, match="damaged"):
        list(read_rcc(data[:-20]))
