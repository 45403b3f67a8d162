"""Whole commands from process start: time, time to the first picture, and peak memory (POSIX systems).

Every command runs in a fresh process of this Python, so imports, loading and warming up count, as they do for
a user. Knows the command line of tokenloom; knows nothing of models.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.tables import markdown_table

_CLI = "from tokenloom.cli import app; app()"


@dataclass(frozen=True)
class CommandRun:
    """One run of a command.

    Attributes:
        name: For the table.
        command: What was run.
        seconds: From process start to its end.
        seconds_to_file: From process start until the watched file appeared; None if none was watched.
        peak_rss_mb: Largest resident memory, in 10^6 bytes.
        exit_status: Of the process.
    """

    name: str
    command: list[str]
    seconds: float
    seconds_to_file: float | None
    peak_rss_mb: float
    exit_status: int

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary."""
        return asdict(self)


def measure_command(
    command: Sequence[str], watch: str | Path | None = None, timeout: float = 600.0, name: str = ""
) -> CommandRun:
    """Runs a command in a fresh process and measures time and peak memory (POSIX systems).

    Args:
        command: Program and arguments; its output is discarded, and shown if it fails.
        watch: A file whose appearance is timed; it must not exist before.
        timeout: Seconds until the process is killed.
        name: For the table; the command itself if empty.

    Raises:
        TokenloomError: If the command cannot be started, fails, takes too long, or does not write the watched
            file.
    """
    watched = Path(watch) if watch is not None else None
    if watched is not None and watched.exists():
        raise TokenloomError(
            f"The appearance of {str(watched)!r} is to be timed, but it exists already. Remove it first."
        )
    arguments = [str(part) for part in command]
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise TokenloomError(
                f"Could not start {arguments[0]!r}: {error.strerror}. Is it installed and on the path?"
            ) from error
        appeared, peak = None, 0
        while True:
            peak = max(peak, _high_water(process.pid))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter() - started
            if appeared is None and watched is not None and watched.exists():
                appeared = now
            if pid:
                break
            if now > timeout:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                raise TokenloomError(
                    f"{' '.join(arguments)!r} took longer than {timeout:.0f} s and was stopped."
                )
            time.sleep(0.002)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        tail = output.read()[-500:].decode(errors="replace")
    if process.returncode != 0 or (watched is not None and appeared is None):
        what = f"exit status {process.returncode}" if process.returncode else f"no file {str(watched)!r}"
        raise TokenloomError(f"{' '.join(arguments)!r} was expected to succeed, got {what}: {tail}")
    peak = peak or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    shown = name or " ".join(arguments)
    return CommandRun(shown, arguments, now, appeared, peak / 1e6, process.returncode)


def _high_water(pid: int) -> int:
    """Peak resident bytes of a running process since it started its program, 0 where the system does not tell.

    The figure that `wait4` gives starts at the size of the process that forked, here this one with its models.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure_startup(
    model: str, prompt: str = "a simple picture of a red apple", runs: int = 3
) -> list[CommandRun]:
    """Measures `import tokenloom`, `tokenloom --help` and `tokenloom generate`, each `runs` times.

    Args:
        model: Name or folder of the model that generates.
        prompt: What it generates.
        runs: Fresh processes of each; the one with the median time is returned. The first run on a machine
            reads files from disk, so take at least 3.

    Returns:
        One run of each of the three commands.
    """
    if runs < 1:
        raise TokenloomError(f"Expected at least 1 run, got {runs}.")
    python = sys.executable
    results = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        generate = [
            python,
            "-c",
            _CLI,
            "generate",
            prompt,
            "-o",
            str(picture),
            "--seed",
            "7",
            "--model",
            model,
        ]
        for name, command, watch in (
            ('python -c "import tokenloom"', [python, "-c", "import tokenloom"], None),
            ("tokenloom --help", [python, "-c", _CLI, "--help"], None),
            (f'tokenloom generate "{prompt}"', generate, picture),
        ):
            taken = []
            for _ in range(runs):
                picture.unlink(missing_ok=True)
                taken.append(measure_command(command, watch, name=name))
            results.append(sorted(taken, key=lambda run: run.seconds)[(runs - 1) // 2])
    return results


def command_table(runs: Sequence[CommandRun]) -> str:
    """One markdown table of whole commands."""
    rows = []
    for run in runs:
        first = "-" if run.seconds_to_file is None else f"{run.seconds_to_file:.2f}"
        rows.append((f"`{run.name}`", f"{run.seconds:.2f}", first, f"{run.peak_rss_mb:.0f}"))
    return markdown_table(("command", "s in all", "s to the first picture", "peak RSS, MB"), rows)
