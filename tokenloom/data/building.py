"""Builds a data folder beside its final place, so that nothing half-made is ever found there.

Knows folders alone; what is built is the caller's matter.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenloom.errors import TokenloomError

_ABANDONED_SECONDS = 3600.0


@contextmanager
def building(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a scratch folder; its sub-folder "set" becomes `out` when the block ends without an error.

    Args:
        out: The folder to make; it must be missing or empty.

    Yields:
        The scratch folder, on the disk of `out`. Touch it (`os.utime`) at least once an hour: older ones are taken for
        leftovers of killed runs and removed by the next.

    Raises:
        TokenloomError: If `out` is not empty, or for what the system says of folders and files; `out` is then as before.
    """
    target = Path(out).resolve()
    _check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        work = Path(tempfile.mkdtemp(prefix=_work_prefix(target), dir=target.parent))
        try:
            (work / "set").mkdir()
            yield work
            if target.is_dir():
                target.rmdir()
            (work / "set").rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise TokenloomError(
            f"Could not build {str(target)!r} ({error}); nothing of it was left behind. "
            "Check permissions and free space."
        ) from error


def _check_target(target: Path) -> None:
    """Raises if the folder cannot be made because something is there."""
    if target.is_dir():
        if next(target.iterdir(), None) is not None:
            raise TokenloomError(
                f"The folder {str(target)!r} is not empty. Name a new folder, or empty this one first; "
                "nothing was changed."
            )
    elif target.exists():
        raise TokenloomError(f"{str(target)!r} is a file. Name a folder that does not exist yet.")


def _work_prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _remove_abandoned(target: Path) -> None:
    """Removes what killed runs left beside `target`; live runs touch theirs."""
    for path in target.parent.glob(f"{_glob_escape(_work_prefix(target))}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _glob_escape(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
