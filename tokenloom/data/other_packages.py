"""Files inside Debian packages and Python wheels, fetched with the registries' own clients.

Knows `apt-get download`, `pip download`, Qt's compiled resources (.rcc) and Debian's machine-readable copyright files.
Knows nothing of what the files show. No script of a package is ever run.
"""

from __future__ import annotations

import fnmatch
import io
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenloom.errors import TokenloomError

Fetch = Callable[[str, str, str, Path], Path]
"""(registry "debian" or "pypi", package, version, existing folder) -> path of the package file inside that folder."""

_TIMEOUT_SECONDS = 600


def fetch_package(registry: str, package: str, version: str, folder: Path) -> Path:
    """Downloads a Debian package (the version of this system's distribution) or a wheel (exactly `version`).

    Raises:
        TokenloomError: If the client is missing or fails.
    """
    if registry == "debian":
        program = shutil.which("apt-get")
        if program is None:
            raise TokenloomError(
                f"The Debian package {package} is fetched with apt-get, which this system does not have. Download it from "
                f"packages.debian.org elsewhere ({package} {version}) and pass its folder as cache."
            )
        command = [program, "download", package]
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            f"{package}=={version}",
        ]
    before = set(folder.iterdir())
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TokenloomError(
            f"Could not download {package} ({error}). Check the network and try again."
        ) from error
    made = sorted(set(folder.iterdir()) - before)
    if result.returncode != 0 or len(made) != 1:
        said = "\n  ".join(result.stderr.strip().splitlines()[-4:])
        raise TokenloomError(
            f"Could not download {package} {version}; {Path(command[0]).name} said:\n  {said}"
        )
    return made[0]


def unpacked_package(
    registry: str, package: str, version: str, cache: Path, folder: Path, fetch: Fetch
) -> Path:
    """A package out of `cache`, or fetched into it, unpacked into the new folder `folder`/`package`, which is returned."""
    kept = sorted(cache.glob(f"{package.replace('-', '[-_]')}[-_]*"))
    file = kept[0] if kept else fetch(registry, package, version, cache)
    return unpack_package(file, folder / package)


def unpack_package(file: Path, folder: Path) -> Path:
    """Unpacks a .deb or a wheel into a new folder, which is returned; names that leave it are refused.

    Raises:
        TokenloomError: If the file is damaged.
    """
    folder.mkdir(parents=True)
    try:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)
            return folder
        with tarfile.open(fileobj=io.BytesIO(_data_of(file.read_bytes()))) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise TokenloomError(
            f"The package file {str(file)!r} cannot be unpacked ({error}). Delete it and run again."
        ) from error
    return folder


def _data_of(content: bytes) -> bytes:
    """The member data.tar.* of a .deb, which is an `ar` archive."""
    if content[:8] != b"!<arch>\n":
        raise ValueError("it is no Debian package")
    position = 8
    while position + 60 <= len(content):
        name, size = content[position : position + 16], int(content[position + 48 : position + 58])
        position += 60
        if name.startswith(b"data.tar"):
            return content[position : position + size]
        position += size + size % 2
    raise ValueError("it has no data.tar")


@dataclass(frozen=True)
class Permission:
    """What a copyright file says of a pattern of files."""

    pattern: str
    licence: str
    holder: str


def read_copyright(text: str) -> list[Permission]:
    """Paragraphs of a Debian copyright file (format 1.0), in order."""
    found = []
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line[:1] not in (" ", "\t") and ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
            elif key:
                fields[key] += f"\n{line.strip()}"
        licence = fields.get("License", "").split("\n")[0]
        holder = " ".join(fields.get("Copyright", "").split())
        found += [
            Permission(pattern, licence, holder) for pattern in fields.get("Files", "").split() if licence
        ]
    return found


def permission_of(name: str, permissions: list[Permission]) -> Permission | None:
    """The last paragraph whose pattern matches a file, as the format says; None if there is none."""
    fitting = [item for item in permissions if fnmatch.fnmatchcase(name, item.pattern)]
    return fitting[-1] if fitting else None


def read_rcc(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a compiled Qt resource (formats 1 to 3; zlib or Zstandard inside).

    Raises:
        TokenloomError: If it is no such file, or it needs the package zstandard, which is not installed.
    """
    if data[:4] != b"qres" or len(data) < 20:
        raise TokenloomError("Expected a compiled Qt resource, which begins with 'qres'.")
    version, tree, contents, names = struct.unpack(">4I", data[4:20])
    size = 14 if version == 1 else 22

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        return data[names + offset + 6 : names + offset + 6 + 2 * length].decode("utf-16-be")

    def walk(node: int, path: str) -> Iterator[tuple[str, bytes]]:
        offset, flags = struct.unpack_from(">IH", data, tree + node * size)
        here = f"{path}/{name_at(offset)}" if node else ""
        if flags & 2:
            count, first = struct.unpack_from(">II", data, tree + node * size + 6)
            for child in range(first, first + count):
                yield from walk(child, here)
            return
        (place,) = struct.unpack_from(">I", data, tree + node * size + 10)
        (length,) = struct.unpack_from(">I", data, contents + place)
        yield here.lstrip("/"), _content(data[contents + place + 4 : contents + place + 4 + length], flags)

    try:
        yield from walk(0, "")
    except (struct.error, zlib.error, UnicodeDecodeError, RecursionError) as error:
        raise TokenloomError(f"The Qt resource is damaged ({error}).") from error


def _content(raw: bytes, flags: int) -> bytes:
    if flags & 1:
        return zlib.decompress(raw[4:])
    if flags & 4:
        try:
            import zstandard
        except ImportError as error:
            raise TokenloomError(
                "This package is compressed with Zstandard: pip install tokenloom[data] (or zstandard)."
            ) from error
        return zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    return raw
