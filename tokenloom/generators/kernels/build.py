"""The C kernels of `rows.c`: built on first use, loaded, and looked at before they are trusted.

They are compiled by the C compiler of the machine into the user's cache folder. Where there is no compiler, the build fails, a
file in the cache is broken, or results are wrong, `kernels()` is `None` and callers use PyTorch. Knows matrices and rows of
logits; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.rng import gumbel

_SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_TIMEOUT = 60


class Linear(ctypes.Structure):
    """`linear_t`: weights (O, K), float32 or with a scale int8, and a bias; `whole`: rows are rounded to int8, too."""

    _fields_: ClassVar[Sequence[Any]] = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("whole", ctypes.c_int64),
    )

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None, bias: Tensor | None, whole: bool = False) -> Linear:
        """The structure of tensors that the caller keeps alive."""
        return cls(weight.data_ptr(), address(scale), address(bias), *weight.shape, whole)


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a tensor lie; `None` for none."""
    return None if tensor is None else tensor.data_ptr()


class Kernels:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        pointer, count, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._linear, self.stack, self._draw = (
            getattr(self.library, f"rows_{name}") for name in ("linear", "stack", "draw")
        )
        self._linear.argtypes, self._linear.restype = [pointer] * 3 + [count, whole], None
        self.stack.argtypes, self.stack.restype = [pointer] * 3 + [whole], whole
        self._draw.argtypes = [pointer] * 4 + [count] * 3 + [ctypes.c_float]
        self._draw.restype = whole

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, whole: bool = False
    ) -> Tensor:
        """`F.linear` of few rows.

        Args:
            x: float32 (..., K).
            weight: float32 or int8 (O, K), contiguous.
            scale: float32 (O,) by which int8 rows are multiplied; `None` for float32.
            bias: float32 (O,) or `None`.
            whole: Whether rows of x are rounded to int8 as well; with int8 weights of -127 to 127 alone.

        Returns:
            float32 (..., O).
        """
        return self.product(x, Linear.of(weight, scale, bias, whole))

    def product(self, x: Tensor, by: Linear) -> Tensor:
        """`linear` with a structure that was made before."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], by.outputs))
        rows = x.numel() // by.width
        self._linear(ctypes.addressof(by), x.data_ptr(), y.data_ptr(), rows, torch.get_num_threads())
        return y

    def draw(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int
    ) -> Tensor | None:
        """`sample_tokens` without top-p.

        Args:
            logits: float32 (B, n, V).
            seeds: LongTensor (B,).
            positions: LongTensor (n,) or (B, n).
            temperature: Above 0.
            top_k: 0 keeps every id.

        Returns:
            LongTensor (B, n); `None` for logits that are unusable, or where memory is short.
        """
        batch, count, vocabulary = logits.shape
        logits = logits.contiguous()
        every = seeds[:, None].expand(batch, count).contiguous()
        places = positions.expand(batch, count).contiguous()
        ids = torch.empty_like(every)
        failed = self._draw(
            logits.data_ptr(),
            every.data_ptr(),
            places.data_ptr(),
            ids.data_ptr(),
            batch * count,
            vocabulary,
            top_k,
            temperature,
        )
        return None if failed else ids


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The kernels of this machine, built on the first call of a process where the cache has none; `None` without."""
    if os.environ.get("TOKENLOOM_KERNELS", "1") == "0":
        return None
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    try:
        path = _library_path(compiler or "")
        for attempt in range(2):
            if attempt or not path.is_file():
                if compiler is None or not _build(compiler, path):
                    return None
            try:
                loaded = Kernels(path)
            except (OSError, AttributeError):  # cut off half way, or another file: build it again
                continue
            return loaded if _correct(loaded) else None
    except OSError:
        return None
    return None


def _library_path(compiler: str) -> Path:
    """Where the library of this source, compiler and processor lies."""
    root = os.environ.get("TOKENLOOM_CACHE") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(root) if root else Path.home() / ".cache"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(
            sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        )
    except OSError:
        processor = platform.processor()
    named = "\n".join((_SOURCE.read_text(), *_FLAGS, compiler, platform.machine(), processor))
    return folder / "tokenloom" / f"rows-{hashlib.sha256(named.encode()).hexdigest()[:16]}.so"


def _build(compiler: str, path: Path) -> bool:
    """Compiles beside `path` and moves the result there when it is whole; with OpenMP where the compiler has it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "rows.so"
        for more in (("-fopenmp",), ()):
            command = [compiler, *_FLAGS, *more, str(_SOURCE), "-o", str(made), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode == 0:
                made.replace(path)
                return True
    return False


def _correct(loaded: Kernels) -> bool:
    """Whether products of all row counts agree with PyTorch's, on odd sizes, and draws with the noise of `tokenloom.rng`."""
    width, outputs = 77, 29
    weight = torch.arange(width * outputs, dtype=torch.float32).remainder(23).sub(11).view(outputs, width) / 8
    bias, ones = torch.arange(outputs, dtype=torch.float32), torch.full((outputs,), 0.125)
    for rows in range(1, 9):
        x = torch.arange(rows * width, dtype=torch.float32).remainder(19).sub(9).view(rows, width) / 4
        want = F.linear(x, weight, bias)
        codes = (weight * 8).to(torch.int8)
        for got in (loaded.linear(x, weight, None, bias), loaded.linear(x, codes, ones, bias)):
            if not torch.allclose(got, want, atol=1e-3):
                return False
        step = x.abs().amax(1, keepdim=True) / 127
        got, want = (
            loaded.linear(x, codes, ones, bias, True),
            F.linear((x / step).round() * step, weight, bias),
        )
        if not torch.allclose(got, want, atol=1e-3):
            return False
    seeds, positions = torch.tensor([3, -5]), torch.arange(31)
    noisy = gumbel(seeds[:, None, None], positions[None, :, None], torch.arange(512))
    drawn = loaded.draw(torch.zeros(2, 31, 512), seeds, positions, 1.0, 0)
    return drawn is not None and torch.equal(drawn, noisy.argmax(-1))
