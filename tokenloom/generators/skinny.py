"""Matrix products with few rows on a processor: a small C kernel, built on first use, and its int8 variant.

A step of a generation multiplies one to eight rows by large weight matrices, so its time is that of reading weights. Matrix
libraries are made for many rows; `docs/lab-notes.md` has the figures. The kernel is compiled by the C compiler of the machine
into the user's cache folder. Where there is no compiler, the build fails, a file in the cache is broken, or its results are
wrong, `kernels()` is `None` and callers use `F.linear`. Knows matrices; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = {False: 4, True: 8}
"""Rows up to which the kernel is used, by whether weights are int8."""
_PARALLEL = 1 << 18  # weights below which one thread is used
_TIMEOUT = 60

_SOURCE = r"""
#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
typedef float v8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef int8_t b8u __attribute__((vector_size(8), aligned(1), may_alias));
static inline v8 load_f32(const float *p) { return (v8)*(const v8u *)p; }
#ifdef __AVX2__ /* three times as fast as what gcc makes of the general form */
static inline v8 load_i8(const int8_t *p) {
  return (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else
static inline v8 load_i8(const int8_t *p) { return __builtin_convertvector(*(const b8u *)p, v8); }
#endif
static inline float total(v8 a) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }

#define TILE(NAME, TYPE, LOAD, M, R)                                                                        \
  static inline void NAME(const float *x, const TYPE *w, const float *scale, const float *bias, float *y,   \
                          long outputs, long width) {                                                       \
    v8 sums[M][R];                                                                                          \
    for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) sums[m][r] = (v8){0};                           \
    long k = 0;                                                                                             \
    for (; k + 8 <= width; k += 8) {                                                                        \
      v8 in[M];                                                                                             \
      for (int m = 0; m < M; m++) in[m] = load_f32(x + m * width + k);                                      \
      for (int r = 0; r < R; r++) {                                                                         \
        v8 weight = LOAD(w + r * width + k);                                                                \
        for (int m = 0; m < M; m++) sums[m][r] += in[m] * weight;                                           \
      }                                                                                                     \
    }                                                                                                       \
    for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) {                                               \
      float sum = total(sums[m][r]);                                                                        \
      for (long j = k; j < width; j++) sum += x[m * width + j] * w[r * width + j];                          \
      if (scale) sum *= scale[r];                                                                           \
      y[m * outputs + r] = bias ? sum + bias[r] : sum;                                                      \
    }                                                                                                       \
  }

#define RUN(NAME, R)                                                                                        \
  for (; r + R <= count; r += R)                                                                            \
    NAME(x + m * width, w + (o + r) * width, scale ? scale + o + r : 0, bias ? bias + o + r : 0,            \
         y + m * outputs + o + r, outputs, width);

#define KERNEL(KIND, TYPE)                                                                                  \
  TILE(KIND##_1_8, TYPE, load_##KIND, 1, 8) TILE(KIND##_1_1, TYPE, load_##KIND, 1, 1)                       \
  TILE(KIND##_2_4, TYPE, load_##KIND, 2, 4) TILE(KIND##_2_1, TYPE, load_##KIND, 2, 1)                       \
  TILE(KIND##_3_2, TYPE, load_##KIND, 3, 2) TILE(KIND##_3_1, TYPE, load_##KIND, 3, 1)                       \
  TILE(KIND##_4_2, TYPE, load_##KIND, 4, 2) TILE(KIND##_4_1, TYPE, load_##KIND, 4, 1)                       \
  void skinny_##KIND(const float *x, const TYPE *w, const float *scale, const float *bias, float *y,        \
                     long rows, long outputs, long width, int threads) {                                    \
    PARALLEL                                                                                                \
    for (long o = 0; o < outputs; o += 8) {                                                                 \
      long count = outputs - o < 8 ? outputs - o : 8;                                                       \
      for (long m = 0; m < rows; m += 4) {                                                                  \
        long r = 0;                                                                                         \
        switch (rows - m) {                                                                                 \
          case 1: RUN(KIND##_1_8, 8) RUN(KIND##_1_1, 1) break;                                              \
          case 2: RUN(KIND##_2_4, 4) RUN(KIND##_2_1, 1) break;                                              \
          case 3: RUN(KIND##_3_2, 2) RUN(KIND##_3_1, 1) break;                                              \
          default: RUN(KIND##_4_2, 2) RUN(KIND##_4_1, 1)                                                    \
        }                                                                                                   \
      }                                                                                                     \
    }                                                                                                       \
  }

#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1)")
#else
#define PARALLEL
#endif
KERNEL(f32, float)
KERNEL(i8, int8_t)
"""
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


class Kernels:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._f32, self._i8 = library.skinny_f32, library.skinny_i8
        for function in (self._f32, self._i8):
            function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3 + [ctypes.c_int]
            function.restype = None

    def linear(self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """`F.linear` of few rows.

        Args:
            x: float32 (..., K).
            weight: float32 or int8 (O, K), contiguous.
            scale: float32 (O,) by which int8 rows are multiplied; `None` for float32.
            bias: float32 (O,) or `None`.

        Returns:
            float32 (..., O).
        """
        x = x.contiguous()
        outputs, width = weight.shape
        y = x.new_empty((*x.shape[:-1], outputs))
        threads = torch.get_num_threads() if weight.numel() >= _PARALLEL else 1
        function = self._f32 if weight.dtype == torch.float32 else self._i8
        function(
            x.data_ptr(),
            weight.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // width,
            outputs,
            width,
            threads,
        )
        return y


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The kernels of this machine, built on the first call of a process where the cache has none; `None` without."""
    if os.environ.get("TOKENLOOM_KERNELS", "1") == "0" or ctypes.sizeof(ctypes.c_long) != 8:
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
    named = "\n".join((_SOURCE, *_FLAGS, compiler, platform.machine(), processor))
    return folder / "tokenloom" / f"skinny-{hashlib.sha256(named.encode()).hexdigest()[:16]}.so"


def _build(compiler: str, path: Path) -> bool:
    """Compiles beside `path` and moves the result there when it is whole; with OpenMP where the compiler has it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder) / "skinny.c", Path(folder) / "skinny.so"
        source.write_text(_SOURCE)
        for more in (("-fopenmp",), ()):
            command = [compiler, *_FLAGS, *more, str(source), "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode == 0:
                made.replace(path)
                return True
    return False


def _correct(loaded: Kernels) -> bool:
    """Whether results of all row counts agree with PyTorch's, on odd sizes."""
    width, outputs = 37, 29
    weight = torch.arange(width * outputs, dtype=torch.float32).remainder(23).sub(11).view(outputs, width) / 8
    bias, ones = torch.arange(outputs, dtype=torch.float32), torch.full((outputs,), 0.125)
    for rows in range(1, 9):
        x = torch.arange(rows * width, dtype=torch.float32).remainder(17).sub(8).view(rows, width) / 4
        want = F.linear(x, weight, bias)
        codes = (weight * 8).to(torch.int8)
        for got in (loaded.linear(x, weight, None, bias), loaded.linear(x, codes, ones, bias)):
            if not torch.allclose(got, want, atol=1e-3):
                return False
    return True


class SkinnyLinear(nn.Module):
    """A linear layer that shares the parameters of another one and runs few rows with the kernel.

    Args:
        linear: The layer.
        loaded: The kernels.
        int8: Whether few rows read weights rounded to int8, one scale an output. Rows beyond `MOST_ROWS` always use the
            weights as they are.
    """

    def __init__(self, linear: nn.Linear, loaded: Kernels, int8: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.loaded, self.int8, self.most = loaded, int8, MOST_ROWS[int8]
        self._rounded: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., K) to (..., O)."""
        weight, bias = self.weight, self.bias
        few = 0 < x.numel() <= self.most * x.shape[-1]
        if not few or not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu":
            return F.linear(x, weight, bias)
        if not self.int8:
            if not weight.is_contiguous():
                return F.linear(x, weight, bias)
            return self.loaded.linear(x, weight, None, bias)
        codes, scale = self.rounded()
        return self.loaded.linear(x, codes, scale, bias)

    def rounded(self) -> tuple[Tensor, Tensor]:
        """int8 codes (O, K) and scales (O,) of the weights, worked out again when they change."""
        state = (self.weight.data_ptr(), self.weight._version)
        if self._rounded is None or self._rounded[0] != state:
            weight = self.weight.detach()
            scale = weight.abs().amax(1).clamp(min=1e-12) / 127
            codes = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous()
            self._rounded = (state, codes, scale)
        return self._rounded[1], self._rounded[2]
