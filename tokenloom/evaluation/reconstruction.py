"""How well a tokenizer gives pictures back, how it uses its codebook, and the same figures for classical
codecs.

A tokenizer is anything with `encode(pixels) -> codes`, `decode(codes) -> pixels` and `vocab_size`. Its output is rounded to 8 bits before it is measured, as a picture file would be. Two PSNR
are given because they differ by decibels: the mean of the pictures' PSNR, and the PSNR of the mean squared
error over all pictures (easy pictures weigh more in the first).

Shapes: N pictures, T tokens a picture, V codes; pixels are uint8 (N, 3, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.codecs import CodecResult
from tokenloom.evaluation.metrics import mean_squared_error, psnr_of_mse, ssim
from tokenloom.evaluation.pictures import check_pixels
from tokenloom.evaluation.tables import markdown_table

PERFECT_DB = 100.0  # a picture that comes back exactly counts as this many dB, so that a mean exists


class ImageTokenizer(Protocol):
    """What is needed of a tokenizer; pixels are float (B, 3, H, W) in [-1, 1], codes LongTensor (B, T)."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, pixels: Tensor, /) -> Tensor: ...
    def decode(self, codes: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class CodebookUse:
    """How often codes occur in a set of pictures.

    Attributes:
        tokens: Codes that were counted.
        used: Different codes among them.
        dead: Codes of the vocabulary that never occurred.
        usage: Share of the vocabulary that occurred, 0 to 1.
        perplexity: `exp(entropy)` of the histogram: the size of an evenly used codebook with the same
            entropy.
    """

    tokens: int
    used: int
    dead: int
    usage: float
    perplexity: float


@dataclass(frozen=True)
class TokenizerResult:
    """Figures of one tokenizer on one set of pictures.

    Attributes:
        name: For the table.
        pictures: Number of pictures.
        bits: Nominal bits of a picture, `T log2(V)`.
        entropy_bits: Bits of a picture after an ideal order-0 entropy coder that knows this set's histogram.
        adaptive_bits: Bits of a picture after an order-0 coder that starts knowing nothing and learns the histogram
            from the codes it has coded (`adaptive_bits`): what could really be stored.
        psnr: Mean over pictures of each picture's PSNR, in dB.
        psnr_of_mean: PSNR of the mean squared error over all pictures, in dB.
        ssim: Mean over pictures, Gaussian window 11.
        ssim_uniform7: Mean over pictures, uniform window 7.
        codebook: Use of the codebook by these pictures.
    """

    name: str
    pictures: int
    bits: float
    entropy_bits: float
    adaptive_bits: float
    psnr: float
    psnr_of_mean: float
    ssim: float
    ssim_uniform7: float
    codebook: CodebookUse

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary."""
        return asdict(self)


def evaluate_tokenizer(
    tokenizer: ImageTokenizer, pixels: Tensor, name: str = "tokenizer", batch_size: int = 32
) -> TokenizerResult:
    """Encodes and decodes pictures and measures the result.

    Args:
        tokenizer: The tokenizer.
        pixels: uint8 (N, 3, H, W) of the size the tokenizer takes.
        name: Name for the table.
        batch_size: Pictures at a time.

    Returns:
        The figures.
    """
    decoded, codes = reconstruct(tokenizer, pixels, batch_size)
    output, reference = decoded.float() / 255, pixels.float() / 255
    mse = mean_squared_error(output, reference)
    use = codebook_use(codes, tokenizer.vocab_size)
    return TokenizerResult(
        name=name,
        pictures=len(pixels),
        bits=codes.shape[1] * math.log2(tokenizer.vocab_size),
        entropy_bits=codes.shape[1] * math.log2(use.perplexity),
        adaptive_bits=adaptive_bits(codes, tokenizer.vocab_size) / len(codes),
        psnr=float(psnr_of_mse(mse).clamp(max=PERFECT_DB).mean()),
        psnr_of_mean=min(PERFECT_DB, float(psnr_of_mse(mse.mean()))),
        ssim=float(ssim(output, reference).mean()),
        ssim_uniform7=float(ssim(output, reference, "uniform7").mean()),
        codebook=use,
    )


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, pixels: Tensor, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Passes pictures through a tokenizer.

    Args:
        tokenizer: The tokenizer.
        pixels: uint8 (N, 3, H, W).
        batch_size: Pictures at a time.

    Returns:
        The decoded pictures, uint8 (N, 3, H, W), and their codes, LongTensor (N, T).

    Raises:
        TokenloomError: If the tokenizer returns pictures of another shape.
    """
    check_pixels(pixels)
    device, dtype = getattr(tokenizer, "device", "cpu"), getattr(tokenizer, "dtype", torch.float32)
    pictures, codes = [], []
    for part in pixels.split(batch_size):
        part_codes = tokenizer.encode((part.float() / 127.5 - 1).to(device, dtype))
        decoded = tokenizer.decode(part_codes).float().cpu()
        if decoded.shape != part.shape:
            raise TokenloomError(
                f"Expected the tokenizer to return pictures {tuple(part.shape)}, got {tuple(decoded.shape)}. "
                "Load the pictures at the tokenizer's image size."
            )
        pictures.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        codes.append(part_codes.flatten(1).cpu())
    return torch.cat(pictures), torch.cat(codes)


def codebook_use(codes: Tensor, vocab_size: int) -> CodebookUse:
    """Counts the codes of a LongTensor of any shape against a vocabulary.

    Raises:
        TokenloomError: If there are no codes, or codes outside 0..vocab_size - 1.

    Example:
        >>> codebook_use(torch.tensor([0, 1, 0, 1]), 4).perplexity
        2.0
    """
    if codes.numel() == 0 or int(codes.min()) < 0 or int(codes.max()) >= vocab_size:
        raise TokenloomError(
            f"Expected codes in 0..{vocab_size - 1}, got {codes.numel()} codes, some outside or none at all."
        )
    counts = torch.bincount(codes.flatten(), minlength=vocab_size).double()
    share = counts[counts > 0] / counts.sum()
    used = int((counts > 0).sum())
    perplexity = float(torch.exp2(-(share * share.log2()).sum()))
    return CodebookUse(codes.numel(), used, vocab_size - used, used / vocab_size, perplexity)


def adaptive_bits(codes: Tensor, vocab_size: int) -> float:
    """Bits of all codes after ideal arithmetic coding with adaptive counts (Krichevsky and Trofimov 1981).

    Every code is given the probability `(n_c + 1/2) / (n + V/2)` by the n codes before it, n_c of them equal to it;
    the sum has a closed form in log-gamma functions and does not depend on the order.

    Args:
        codes: Integers of any shape in 0..vocab_size - 1.
        vocab_size: V.

    Example:
        >>> adaptive_bits(torch.tensor([1]), 4)
        2.0
    """
    counts = torch.bincount(codes.flatten().cpu(), minlength=vocab_size).double()
    half, total = torch.tensor(0.5).double(), counts.sum()
    start = half * vocab_size
    nats = (
        torch.lgamma(total + start)
        - torch.lgamma(start)
        - (torch.lgamma(counts + half) - torch.lgamma(half)).sum()
    )
    return float(nats / math.log(2))


def reconstruction_table(tokenizers: Sequence[TokenizerResult], codecs: Sequence[CodecResult] = ()) -> str:
    """One markdown table of tokenizers and codecs.

    Codecs are listed with the bits of their payload; the bits of whole files stand beside them. A dash stands
    where a column has no meaning or no picture fitted.
    """
    header = (
        "",
        "bits",
        "file bits",
        "PSNR",
        "PSNR of mean",
        "SSIM",
        "codes used",
        "perplexity",
        "dead codes",
        "pictures",
    )
    rows: list[Sequence[object]] = []
    for result in tokenizers:
        use = result.codebook
        rows.append(
            (
                result.name,
                f"{result.bits:.0f}",
                "-",
                f"{result.psnr:.2f}",
                f"{result.psnr_of_mean:.2f}",
                f"{result.ssim:.3f}",
                f"{100 * use.usage:.1f} %",
                f"{use.perplexity:.0f}",
                use.dead,
                result.pictures,
            )
        )
    for codec in codecs:
        cells = (codec.payload_bits, codec.file_bits, codec.psnr, codec.psnr_of_mean, codec.ssim)
        formats = ("{:.0f}", "{:.0f}", "{:.2f}", "{:.2f}", "{:.3f}")
        shown = [
            "-" if math.isnan(cell) else shape.format(cell)
            for shape, cell in zip(formats, cells, strict=True)
        ]
        limit = f"at most {codec.budget_bits:.0f} {codec.count} bits"
        rows.append(
            (f"{codec.codec.upper()} {limit}", *shown, "-", "-", "-", f"{codec.fitted} of {codec.pictures}")
        )
    return markdown_table(header, rows)
