"""Downloading and unpacking packages: clear failures, nothing outside the folder."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from tokenloom.data import registry_packages as packages
from tokenloom.errors import TokenloomError


def tarball(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_unpack_drops_the_package_folder_and_takes_what_is_wanted(tmp_path: Path) -> None:
    path = tarball(
        tmp_path / "p.tgz", ("package/a.json", b"{}"), ("package/en/b.json", b"[1]"), ("package/c", b"")
    )
    assert files(packages.unpack(path, tmp_path / "all")) == ["a.json", "c", "en/b.json"]
    some = packages.unpack(path, tmp_path / "some", ["en/b.json"])
    assert files(some) == ["en/b.json"]
    assert packages.read_json(some / "en/b.json") == [1]
    with pytest.raises(TokenloomError, match=r"has no x\.json"):
        packages.unpack(path, tmp_path / "none", ["x.json"])
    with pytest.raises(TokenloomError, match="Expected JSON in the package file 'c'"):
        packages.read_json(tmp_path / "all" / "c")


@pytest.mark.parametrize(
    "member",
    [
        ("package/../../evil", b"x"),
        ("/evil", b"x"),
        ("package\\..\\..\\evil", b"x"),
        ("C:\\evil", b"x"),
        special("package/link", tarfile.SYMTYPE, "/etc"),
        special("package/link", tarfile.LNKTYPE, "../../evil"),
        special("package/pipe", tarfile.FIFOTYPE),
    ],
    ids=str,
)
def test_dangerous_members_are_refused(tmp_path: Path, member: tuple[str, bytes | tarfile.TarInfo]) -> None:
    path = tarball(tmp_path / "p.tgz", member, ("package/link/inside", b"x"))
    with pytest.raises(TokenloomError, match="Do not use this package file"):
        packages.unpack(path, tmp_path / "deep" / "out", ["wanted.json"])
    assert files(tmp_path) == ["p.tgz"]


def test_too_much_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_MAX_UNPACKED_BYTES", 10)
    path = tarball(tmp_path / "p.tgz", ("package/a", b"123456"), ("package/b", b"123456"))
    with pytest.raises(TokenloomError, match="more than 10 bytes"):
        packages.unpack(path, tmp_path / "out")


def test_a_damaged_tarball_says_what_to_do(tmp_path: Path) -> None:
    path = tarball(tmp_path / "p.tgz", ("package/a", os.urandom(5000)))
    data = path.read_bytes()
    path.write_bytes(data[:2500])
    with pytest.raises(TokenloomError, match="Delete it and run again"):
        packages.unpack(path, tmp_path / "cut")
    path.write_bytes(data[:1000] + bytes(500) + data[1500:])
    with pytest.raises(TokenloomError, match="Delete it and run again"):
        packages.unpack(path, tmp_path / "changed")
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(TokenloomError, match="Delete it and run again"):
        packages.unpack(path, tmp_path / "page")


def test_fetch_downloads_once_and_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    calls = []

    def download(package: str, version: str, folder: Path) -> Path:
        calls.append((package, version))
        (folder / "half").write_bytes(b"half")
        if version == "0":
            raise TokenloomError("no network")
        return tarball(folder / "x.tgz", ("package/a", b"1"))

    cache = tmp_path / "cache"
    with pytest.raises(TokenloomError, match="no network"):
        packages.fetch("@scope/name", "0", cache, download)
    assert list(cache.iterdir()) == []
    path = packages.fetch("@scope/name", "1", cache, download)
    assert packages.fetch("@scope/name", "1", cache, download) == path
    assert files(cache) == ["scope-name-1.tgz"]
    assert calls == [("@scope/name", "0"), ("@scope/name", "1")]


def test_missing_npm_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TokenloomError, match="needs the program npm, which is not on the PATH"):
        packages.npm_pack("name", "1.0.0", tmp_path)


def fake_npm(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program named npm, written in Python, first on the PATH."""
    (folder / "fake.py").write_text(f"import sys, pathlib\n{body}")
    windows = sys.platform == "win32"
    script = folder / ("npm.cmd" if windows else "npm")
    command = f'"{sys.executable}" "{folder / "fake.py"}"'
    script.write_text(f"@{command} %*\n" if windows else f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_npm_is_asked_for_the_pinned_version_without_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "arguments = sys.argv[1:]\n"
        "folder = pathlib.Path(arguments[arguments.index('--pack-destination') + 1])\n"
        "(folder / 'scope-name-1.0.0.tgz').write_text(' '.join(arguments))\n"
    )
    (tmp_path / "bin").mkdir()
    fake_npm(tmp_path / "bin", body, monkeypatch)
    path = packages.npm_pack("@scope/name", "1.0.0", tmp_path)
    assert path == tmp_path / "scope-name-1.0.0.tgz"
    assert path.read_text().startswith("pack @scope/name@1.0.0 ")
    assert "--ignore-scripts" in path.read_text()


def test_what_npm_said_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "print('npm warn noise', file=sys.stderr)\nsys.exit('npm error 404 no such version')"
    fake_npm(tmp_path, body, monkeypatch)
    with pytest.raises(TokenloomError, match="could not download name@9") as caught:
        packages.npm_pack("name", "9", tmp_path)
    assert "404 no such version" in str(caught.value)
    assert "noise" not in str(caught.value)


def test_npm_that_makes_no_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path, "", monkeypatch)
    with pytest.raises(TokenloomError, match=r"npm said:\s+nothing \(exit status 0\)"):
        packages.npm_pack("name", "9", tmp_path)
