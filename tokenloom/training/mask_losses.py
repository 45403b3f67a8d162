"""Losses of mask tokenizers: coarse targets for short prefixes, weight on outlines, soft masks of predicted codes.

Masks are float (B, H, W) in [0, 1], and so are soft masks. Knows mask tokenizers; knows nothing of loops, words or files.
Sources: HiMTok (Wang et al. 2025) and its published code, whose slips are reproduced only where `official` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.mask import MaskTokenizer

_EPS = 1e-6
_EDGE_WEIGHT = 4.0  # of outlines at full length
_COARSEST = 16  # the coarsest target has 1/16 of the resolution
_DICE_WEIGHT = 0.25


def bce_loss(soft: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of soft masks in nats, finite also for sure mistakes."""
    soft = soft.float().clamp(_EPS, 1 - _EPS)
    return -(target * soft.log() + (1 - target) * (1 - soft).log()).mean()


def dice_loss(soft: Tensor, target: Tensor, together: bool = False) -> Tensor:
    """1 - Dice coefficient, averaged over masks; with `together` that of all masks as one, as the official code."""
    soft = soft.float().clamp(_EPS, 1 - _EPS)
    axes = (0, 1, 2) if together else (1, 2)
    shared, both = (soft * target).sum(axes), soft.sum(axes) + target.sum(axes)
    return (1 - (2 * shared + _EPS) / (both + _EPS)).mean()


def soft_mask_loss(soft: Tensor, target: Tensor, together: bool = False) -> Tensor:
    """Cross-entropy plus a quarter of the Dice loss."""
    return bce_loss(soft, target) + _DICE_WEIGHT * dice_loss(soft, target, together)


def coarse_target(masks: Tensor, kept: Tensor, levels: int) -> Tensor:
    """What a prefix of each mask's codes shall decode to: the mask at a lower resolution.

    A prefix of `l` codes out of K is to show a mask of S pixels at `(l / K)^1.5 S` pixels, at least S / 16.

    Args:
        masks: (B, S, S) float.
        kept: LongTensor (B,) of prefix lengths l, 0 to K.
        levels: K.

    Returns:
        (B, S, S) float: the masks themselves where l = K.
    """
    size, result = masks.shape[-1], masks.clone()
    for length in kept.unique().tolist():
        side = max(1, size // _COARSEST, round((length / levels) ** 1.5 * size))
        if side < size:
            rows = (kept == length).nonzero().squeeze(1).to(masks.device)
            small = F.interpolate(masks[rows, None], (side, side), mode="bilinear", antialias=True)
            result[rows] = F.interpolate(small, (size, size), mode="bilinear")[:, 0]
    return result


def edge_map(masks: Tensor, width: int = 5) -> Tensor:
    """Outlines (B, H, W) in [0, 1]: the range of values in a window of `width` pixels."""
    half = width // 2
    return F.max_pool2d(masks, width, 1, half) + F.max_pool2d(-masks, width, 1, half)


def _slopes(masks: Tensor) -> Tensor:
    """Length of the gradient (B, H, W), from central differences."""
    padded = F.pad(masks[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    return (down.square() + right.square() + _EPS).sqrt()


def reconstruction_losses(logits: Tensor, masks: Tensor, kept: Tensor, levels: int) -> dict[str, Tensor]:
    """How far logits are from the coarse targets of their prefixes.

    Args:
        logits: (B, S, S), decoded from the first `kept` codes of each mask.
        masks: (B, S, S) float.
        kept: LongTensor (B,) of prefix lengths.
        levels: K.

    Returns:
        Means: "l2" (squared error; outlines weigh up to 1 + 4 l / K times as much, squared), "edge" (squared and
        smooth absolute error of slopes, times 4 l / K), "bce" and "dice".
    """
    target = coarse_target(masks, kept, levels)
    soft = logits.float().sigmoid()
    share = (_EDGE_WEIGHT * kept.to(masks.device) / levels)[:, None, None]
    weight = (1 + share * edge_map(target)).square()
    slopes, wanted = _slopes(soft), _slopes(target)
    far = F.mse_loss(slopes, wanted, reduction="none") + F.smooth_l1_loss(
        slopes, wanted, beta=0.4, reduction="none"
    )
    return {
        "l2": (weight * (soft - target).square()).mean(),
        "edge": (share * far).mean() / 2,
        "bce": F.binary_cross_entropy_with_logits(logits.float(), target),
        "dice": dice_loss(soft, target),
    }


def draw_lengths(batch: int, levels: int, generator: torch.Generator, whole: float = 0.25) -> Tensor:
    """LongTensor (B,) of prefix lengths, each from 1 to K alike; a share `whole` of them is K."""
    lengths = torch.randint(1, levels + 1, (batch,), generator=generator)
    return lengths.masked_fill(torch.rand(batch, generator=generator) < whole, levels)


def tokenizer_loss(
    tokenizer: MaskTokenizer,
    masks: Tensor,
    kept: Tensor,
    weights: dict[str, float] | None = None,
    soft: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One training pass of a mask tokenizer, each mask decoded from a prefix of its own length and compared inside its frame.

    Args:
        tokenizer: In training mode.
        masks: (B, S, S) float in [0, 1] at the tokenizer's size.
        kept: LongTensor (B,) of prefix lengths (`draw_lengths`).
        weights: Factors of the parts of `reconstruction_losses`; by default 1 each. The quantizer's losses come with
            their own.
        soft: BoolTensor (B,), which masks skip the quantizer.

    Returns:
        The loss and its parts, detached.
    """
    if tuple(masks.shape[1:]) != (tokenizer.image_size, tokenizer.image_size):
        raise TokenloomError(
            f"Training masks must be (B, {tokenizer.image_size}, {tokenizer.image_size}), got {tuple(masks.shape)}; "
            "resize them with tokenizer.prepare(masks)[:, 0]."
        )
    seen, logits, quantized = tokenizer.on_canvas(masks, kept, soft)
    inner = (kept - (tokenizer.levels - tokenizer.shapes)).clamp(min=0)
    parts = reconstruction_losses(logits, seen, inner, tokenizer.shapes)
    factors = dict.fromkeys(parts, 1.0) | (weights or {})
    if unknown := sorted(factors.keys() - parts.keys()):
        raise TokenloomError(f"There is no loss {', '.join(unknown)}; known: {', '.join(parts)}.")
    total = torch.stack([factors[name] * value for name, value in parts.items()]).sum()
    total = total + sum(quantized.losses.values())
    return total, {name: value.detach() for name, value in (parts | quantized.losses).items()}


def draw_levels(levels: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` different prefix lengths out of 1..K, short ones more often: with a chance of 1 / (l + 8)."""
    if not 1 <= count <= levels:
        raise TokenloomError(f"Between 1 and {levels} levels can be drawn, got {count}.")
    chances = 1 / (torch.arange(1, levels + 1) + 8.0)
    return (torch.multinomial(chances, count, generator=generator) + 1).tolist()


def hierarchical_loss(
    tokenizer: MaskTokenizer,
    probabilities: Tensor,
    masks: Tensor,
    levels: Sequence[int],
    official: bool = False,
) -> Tensor:
    """How well predicted codes decode from several prefixes; the mean over the levels.

    Args:
        tokenizer: Decodes the probabilities.
        probabilities: (B, K, vocab_size) of a generator's codes.
        masks: (B, S, S) float.
        levels: Prefix lengths, 1 to K (`draw_levels`).
        official: Parity with the published code: `levels` are its cut lengths, -1 among them; probabilities behind the
            cut are zero instead of absent; targets are blurred masks; and only the last level counts, times their
            number.

    Returns:
        A scalar.
    """
    if not official:
        losses = []
        for level in levels:
            target = coarse_target(masks, torch.full((len(masks),), level), tokenizer.levels)
            losses.append(soft_mask_loss(tokenizer.decode_probabilities(probabilities, level), target))
        return torch.stack(losses).mean()
    cut = torch.zeros_like(probabilities)
    cut[:, : levels[-1]] = probabilities[:, : levels[-1]]
    target = blurred_target(masks, levels[-1])
    return len(levels) * soft_mask_loss(tokenizer.decode_probabilities(cut), target, together=True)


def blurred_target(masks: Tensor, cut: int) -> Tensor:
    """The official target of a cut length: a Gaussian blur with sigma 100 / (cut + 2) - 2, divided by its maximum.

    Args:
        masks: (B, H, W) float.
        cut: -1 to 47.

    Returns:
        (B, H, W) float, of which the largest value of each mask is 1 unless it is empty.
    """
    sigma = 100 / (cut + 2) - 2 if cut > -2 else 0.0
    if sigma <= 0:
        raise TokenloomError(f"The official blur is defined for cut lengths of -1 to 47, got {cut}.")
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-torch.arange(-reach, reach + 1, device=masks.device).square() / (2 * sigma**2))
    bell = (bell / bell.sum()).to(masks.dtype)
    blurred = F.conv2d(masks[:, None], bell.view(1, 1, -1, 1), padding=(reach, 0))
    blurred = F.conv2d(blurred, bell.view(1, 1, 1, -1), padding=(0, reach))[:, 0]
    return blurred / blurred.amax((1, 2), keepdim=True).clamp(min=_EPS)
