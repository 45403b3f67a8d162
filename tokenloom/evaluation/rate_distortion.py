"""Rate and distortion of a tokenizer: what it keeps at each number of tokens, beside classical codecs at the same
bits, with the time and memory it takes.

Follows a fixed protocol: the same pictures for all; nominal bits and bits after an adaptive entropy coder; codecs
are also tried on shrunk pictures (`tokenloom.evaluation.codecs`) and are charged their payload alone. Knows
nothing of training or of the command line.

Shapes: N pictures, T tokens a picture; pixels are uint8 (N, 3, H, W).
"""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.data.dataset import ImageCaptionFolder
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.benchmark import environment
from tokenloom.evaluation.codecs import codec_names, evaluate_codec
from tokenloom.evaluation.perceptual import FeatureNetwork, frechet_distance, lpips
from tokenloom.evaluation.reconstruction import evaluate_tokenizer, reconstruct
from tokenloom.evaluation.tables import markdown_table, plain
from tokenloom.media import write_atomically

_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class RateDistortionConfig:
    """What is measured.

    Attributes:
        tokens: Numbers of tokens a picture; `None` for powers of two up to all of a tokenizer whose prefixes
            decode, and all tokens otherwise.
        codecs: Names of codecs; `None` for all that this Pillow writes.
        codec_pictures: Pictures the codecs code (they are searched, which takes time); 0 leaves codecs out.
        rounds: Timed calls of one picture.
        batch_size: Pictures at a time where time is not measured.
        fid: File of the network of FID, see `tokenloom.evaluation.perceptual`; `None` leaves FID out.
        lpips: The same for LPIPS.
    """

    tokens: tuple[int, ...] | None = None
    codecs: tuple[str, ...] | None = None
    codec_pictures: int = 50
    rounds: int = 9
    batch_size: int = 32
    fid: str | None = None
    lpips: str | None = None


class _Prefix:
    """A tokenizer that keeps the first `count` tokens of a picture of (height, width) `size`."""

    def __init__(self, tokenizer: Any, count: int, size: tuple[int, int]) -> None:
        self.tokenizer, self.count, self.size = tokenizer, count, size
        self.vocab_size, self.device, self.dtype = tokenizer.vocab_size, tokenizer.device, tokenizer.dtype

    def encode(self, pixels: Tensor) -> Tensor:
        return self.tokenizer.encode(pixels)[:, : self.count]

    def decode(self, codes: Tensor) -> Tensor:
        return _decode(self.tokenizer, codes, self.size)


def _decode(tokenizer: Any, codes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures of `size`, which a tokenizer for any size has to be told."""
    return tokenizer.decode(codes, size) if tokenizer.any_size else tokenizer.decode(codes)


def rate_distortion(
    tokenizer: Any, pixels: Tensor, config: RateDistortionConfig | None = None, name: str = "tokenizer"
) -> dict[str, Any]:
    """Measures a tokenizer at several numbers of tokens, and codecs at the same bits.

    Args:
        tokenizer: An image tokenizer.
        pixels: uint8 (N, 3, H, W) of a size the tokenizer takes.
        config: What is measured.
        name: Name for tables and figures.

    Returns:
        A JSON-able dictionary: "name", "points" (one `TokenizerResult` a number of tokens, with "tokens", the PSNR on the
        pictures of the codecs where these are fewer, and "fid" and "lpips" where there are networks), "codecs" (a list for
        each of the points), "speed", "environment".

    Raises:
        TokenloomError: For numbers of tokens the tokenizer does not decode.
    """
    config = config or RateDistortionConfig()
    networks = {
        metric: FeatureNetwork(metric, path)
        for metric, path in (("FID", config.fid), ("LPIPS", config.lpips))
        if path is not None
    }
    points: list[dict[str, Any]] = []
    part = pixels[: config.codec_pictures]
    size = (pixels.shape[2], pixels.shape[3])
    for count in token_counts(tokenizer, pixels[:1], config.tokens):
        prefix = _Prefix(tokenizer, count, size)
        result = evaluate_tokenizer(prefix, pixels, f"{name}, {count} tokens", config.batch_size)
        point = {"tokens": count, **result.as_dict()}
        if 0 < len(part) < len(pixels):
            point["psnr_codec_pictures"] = evaluate_tokenizer(prefix, part, name, config.batch_size).psnr
        points.append(point | _perceptual(networks, prefix, pixels, config.batch_size))
    chosen = config.codecs or codec_names()
    codecs = [
        [evaluate_codec(codec, part, point["bits"]) for codec in chosen] if len(part) else []
        for point in points
    ]
    return {
        "name": name,
        "pictures": len(pixels),
        "size": list(size),
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
        "points": points,
        "codecs": [[result.as_dict() for result in row] for row in codecs],
        "speed": speed(tokenizer, pixels[:1], config.rounds),
        "environment": environment(),
    }


def _perceptual(
    networks: Mapping[str, FeatureNetwork], tokenizer: Any, pixels: Tensor, batch_size: int
) -> dict[str, float]:
    """ "fid" of the output pictures to the originals, and "lpips", as far as there are networks."""
    if not networks:
        return {}
    measures = {"FID": frechet_distance, "LPIPS": lpips}
    decoded, _ = reconstruct(tokenizer, pixels, batch_size)
    return {
        metric.lower(): measures[metric](network(decoded), network(pixels))
        for metric, network in networks.items()
    }


def picture_size(tokenizer: Any, size: int | None) -> int:
    """Side of the pictures a tokenizer is measured with: its own, or `size` where it takes any.

    Raises:
        TokenloomError: If a size was asked for that the tokenizer does not take.
    """
    own = tokenizer.image_size
    if size is None or size == own:
        return own if isinstance(own, int) else max(own)
    if not tokenizer.any_size:
        raise TokenloomError(f"{type(tokenizer).__name__} takes pictures of {own} pixels, got size {size}.")
    return size


def load_pixels(
    images: str | Path, size: int, split: str | None = None, count: int | None = None, seed: int = 0
) -> Tensor:
    """Pictures of a folder as uint8 (N, 3, size, size): the central square of each, shrunk or enlarged.

    Args:
        images: A folder, with or without captions.jsonl.
        size: Side in pixels.
        split: Only pictures of this split of captions.jsonl.
        count: Most pictures; `None` for all.
        seed: Decides which are drawn.
    """
    data = ImageCaptionFolder(images, split=split, size=size, fit="crop")
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    pixels = [((data[int(index)]["pixels"] + 1) * 127.5).round().to(torch.uint8) for index in drawn]
    return torch.stack(pixels)


def token_counts(tokenizer: Any, pixels: Tensor, wanted: Sequence[int] | None) -> list[int]:
    """Numbers of tokens to measure.

    Args:
        tokenizer: An image tokenizer; its `lengths` are the prefixes that decode.
        pixels: A picture, uint8 (1, 3, H, W), to find the number of all tokens.
        wanted: What was asked for, or `None`.

    Raises:
        TokenloomError: If something was asked for that the tokenizer does not decode.
    """
    encoded = tokenizer.encode((pixels.float() / 127.5 - 1).to(tokenizer.device, tokenizer.dtype))
    everything = encoded.shape[1]
    possible = tokenizer.lengths_of((pixels.shape[2], pixels.shape[3]))
    if wanted is None:
        if len(possible) <= 16:
            return list(possible)
        return [count for count in possible if count & (count - 1) == 0 or count == everything]
    for count in wanted:
        if count not in possible:
            few = possible if len(possible) <= 16 else [possible[0], "...", possible[-1]]
            raise TokenloomError(
                f"{type(tokenizer).__name__} does not decode {count} of {everything} tokens; it decodes "
                f"{', '.join(map(str, few))}."
            )
    return sorted(wanted)


def speed(tokenizer: Any, pixels: Tensor, rounds: int) -> dict[str, float | int]:
    """Median milliseconds to encode and to decode one picture, and peak memory of the process so far in 10^6 bytes.

    With one thread on a CPU it is processor time, which other processes do not disturb.
    """
    media = (pixels.float() / 127.5 - 1).to(tokenizer.device, tokenizer.dtype)
    codes, size = tokenizer.encode(media), (media.shape[2], media.shape[3])
    return {
        "encode_ms": _median_ms(lambda: tokenizer.encode(media), rounds, media.device),
        "decode_ms": _median_ms(lambda: _decode(tokenizer, codes, size), rounds, media.device),
        "peak_memory_mb": _peak_memory(media.device),
        "threads": torch.get_num_threads(),
    }


def _median_ms(call: Callable[[], Tensor], rounds: int, device: torch.device) -> float:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times = []
    for index in range(rounds + _WARM_UP):
        started = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= _WARM_UP:
            times.append(1e3 * (clock() - started))
    return statistics.median(times)


def _peak_memory(device: torch.device) -> float:
    """Of the GPU where the tokenizer is on one, else of the process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write_rate_distortion(figures: dict[str, Any], out: str | Path) -> list[Path]:
    """Writes `report.json` and `report.md` into a folder, and `rate_distortion.png` where matplotlib is installed.

    Args:
        figures: What `rate_distortion` returned.
        out: The folder; it is made.

    Returns:
        The paths of the files.
    """
    folder = Path(out)
    timing, (height, width) = figures["speed"], figures["size"]
    text = (
        f"# {figures['name']}\n\n{figures['pictures']} pictures of {width}x{height} pixels; "
        f"{figures['parameters'] / 1e6:.2f} M parameters; encode {timing['encode_ms']:.1f} ms, decode "
        f"{timing['decode_ms']:.1f} ms a picture (one at a time, threads: {timing['threads']}); peak memory "
        f"{timing['peak_memory_mb']:.0f} MB.\n\n{rate_distortion_table(figures)}"
    )
    written = [
        write_atomically(folder / "report.json", json.dumps(plain(figures), indent=1) + "\n"),
        write_atomically(folder / "report.md", text),
    ]
    if importlib.util.find_spec("matplotlib") is not None:
        written.append(plot_rate_distortion(figures, folder / "rate_distortion.png"))
    return written


def rate_distortion_table(figures: dict[str, Any]) -> str:
    """A Markdown table: a row a number of tokens, the codecs at the same bits beside it (the mean of their PSNR)."""
    names = [row["codec"] for row in figures["codecs"][0]]
    measures = [key for key in ("lpips", "fid") if key in figures["points"][0]]
    same = ["psnr_codec_pictures"] if "psnr_codec_pictures" in figures["points"][0] else []
    header = (
        "tokens",
        "bits",
        "entropy coded",
        "PSNR",
        "SSIM",
        *(key.upper() for key in measures),
        "codes used",
        *("PSNR of the codecs' pictures" for _ in same),
        *(name.upper() for name in names),
    )
    rows = []
    for point, codecs in zip(figures["points"], figures["codecs"], strict=True):
        fitted = [f"{row['psnr']:.2f}" if row["fitted"] == row["pictures"] else "-" for row in codecs]
        rows.append(
            (
                point["tokens"],
                f"{point['bits']:.0f}",
                f"{point['adaptive_bits']:.0f}",
                f"{point['psnr']:.2f}",
                f"{point['ssim']:.3f}",
                *(f"{point[key]:.3g}" for key in measures),
                f"{100 * point['codebook']['usage']:.1f} %",
                *(f"{point[key]:.2f}" for key in same),
                *fitted,
            )
        )
    return markdown_table(header, rows)


def plot_rate_distortion(figures: dict[str, Any], path: str | Path) -> Path:
    """Draws PSNR and SSIM over bits a picture into a picture file.

    Args:
        figures: What `rate_distortion` returned.
        path: A .png file.

    Raises:
        TokenloomError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TokenloomError(
            "Figures need matplotlib, which is not installed: pip install tokenloom[figures]"
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("psnr", "ssim"), ("PSNR (dB)", "SSIM"), strict=True):
        points = figures["points"]
        values = [p[key] for p in points]
        axes.plot([p["bits"] for p in points], values, "o-", label=figures["name"])
        axes.plot(
            [p["adaptive_bits"] for p in points], values, "o:", color="C0", label="the same, entropy coded"
        )
        for column in zip(*figures["codecs"], strict=True):
            kept = [row for row in column if row["fitted"] == row["pictures"]]
            axes.plot(
                [row["payload_bits"] for row in kept],
                [row[key] for row in kept],
                ".--",
                label=column[0]["codec"].upper() + " (payload)",
            )
        axes.set(xscale="log" if len(points) > 1 else "linear", xlabel="bits a picture", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write_atomically(path, buffer.getvalue())
