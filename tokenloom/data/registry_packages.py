"""Fetches published npm packages with npm itself, and unpacks them without trusting them.

Knows how to run `npm pack` and how to read a tarball. Knows nothing of what the packages hold. No script of a
package is ever run.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tokenloom.errors import TokenloomError

Download = Callable[[str, str, Path], Path]
"""(package, version, existing folder) -> path of the tarball, inside that folder."""

_TIMEOUT_SECONDS = 600
_MAX_UNPACKED_BYTES = 1 << 30


def npm_pack(package: str, version: str, folder: Path) -> Path:
    """Downloads a package with `npm pack`; npm checks the content against the registry's hash.

    Args:
        package: The name, with its scope ("@iconify-json/noto").
        version: The exact version ("1.2.9").
        folder: Where the tarball goes; it must exist.

    Returns:
        The path of the tarball.

    Raises:
        TokenloomError: If npm is not installed, fails, or takes longer than ten minutes.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise TokenloomError(
            f"Downloading {package}@{version} needs the program npm, which is not on the PATH. "
            "Install Node.js (it comes with npm) and try again."
        )
    command = [
        npm,
        "pack",
        f"{package}@{version}",
        "--json",
        "--ignore-scripts",
        "--pack-destination",
        str(folder),
    ]
    before = set(folder.glob("*.tgz"))
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TokenloomError(
            f"npm could not download {package}@{version} ({error}). Check the network and try again."
        ) from error
    made = sorted(set(folder.glob("*.tgz")) - before)
    if result.returncode != 0 or len(made) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip() and "warn" not in line][-6:]
        said = "\n  ".join(lines) or f"nothing (exit status {result.returncode})"
        raise TokenloomError(
            f"npm could not download {package}@{version}. Check the network and npm's registry setting, "
            "then try again. "
            f"npm said:\n  {said}"
        )
    return made[0]


def fetch(package: str, version: str, cache: Path, download: Download | None = None) -> Path:
    """Returns the tarball of a package from a cache folder, downloading it first if it is not there.

    Args:
        package: The name, with its scope.
        version: The exact version.
        cache: The folder of tarballs; made if missing. A tarball appears in it only when it is complete.
        download: Replaces `npm_pack`.

    Returns:
        The path of the tarball in the cache.

    Raises:
        TokenloomError: If the download fails.
    """
    target = cache / f"{package.replace('@', '').replace('/', '-')}-{version}.tgz"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        (download or npm_pack)(package, version, Path(folder)).replace(target)
    return target


def unpack(tarball: Path, folder: Path, wanted: Collection[str] | None = None) -> Path:
    """Unpacks the regular files of a package.

    Names that leave the folder are refused, as are links, devices and more than 1 GiB of content; permissions
    are not taken over.

    Args:
        tarball: A .tgz made by `npm pack`.
        folder: An empty or missing folder.
        wanted: Unpack only these files, named relative to the package ("info.json"); None unpacks all. Other
            members are checked all the same.

    Returns:
        The folder, which holds the files of the package without npm's "package/" prefix.

    Raises:
        TokenloomError: If the tarball is damaged or holds anything that is refused, or a wanted file is not
            in it.
    """
    missing = set(wanted or ())
    left = _MAX_UNPACKED_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with gzip.open(tarball) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = _safe_name(member, tarball)
                if member.isdir() or (wanted is not None and name not in wanted):
                    continue
                left -= member.size
                if left < 0:
                    raise TokenloomError(
                        f"{str(tarball)!r} unpacks to more than {_MAX_UNPACKED_BYTES:,} bytes; refused."
                    )
                _write_member(archive, member, folder / name)
                missing.discard(name)
            while stream.read(1 << 20):
                pass  # to the end, where gzip compares its checksum
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise TokenloomError(
            f"The package file {str(tarball)!r} is damaged ({error}). "
            "Delete it and run again, so that it is downloaded anew."
        ) from error
    if missing:
        raise TokenloomError(
            f"The package file {str(tarball)!r} has no {', '.join(sorted(missing))}. "
            "Is it the right package and version?"
        )
    return folder


def read_json(path: Path) -> Any:
    """Reads a JSON file of a package.

    Raises:
        TokenloomError: If it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenloomError(
            f"Expected JSON in the package file {path.name!r}, but it cannot be read ({error})."
        ) from error


def _safe_name(member: tarfile.TarInfo, tarball: Path) -> str:
    """Returns a member's name without its first folder, or raises if it is dangerous."""
    windows = PureWindowsPath(member.name)
    parts = PurePosixPath(member.name).parts
    outside = member.name.startswith("/") or windows.drive or windows.root or ".." in windows.parts
    if outside or not parts or not (member.isreg() or member.isdir()):
        raise TokenloomError(
            f"{str(tarball)!r} holds {member.name!r}, which leaves its folder or is a link or device; "
            "nothing more is unpacked. "
            "Do not use this package file."
        )
    return "/".join(parts[1:]) or "."


def _write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise tarfile.ReadError(f"no content for {member.name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
