"""Pictures to rows of features, for models that look at a picture: a small network of its own, or a timm backbone.

Knows pixels; knows nothing of phrases, masks or generators.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.layers import Block, BlockConfig, make_norm

_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for timm's backbones


class PictureEncoder(ModelMixin, ConfigMixin):
    """Features (B, P, F) of square pictures, P = (image_size / stride)^2 in rows from the upper left.

    Attributes:
        rows: P.
        features: F.

    Args:
        image_size: Side S of the pictures.
        stride: Pixels of a feature and side, a power of two: so many convolutions of stride 2. Of a backbone, its own.
        width: F of the small network: convolutions, then transformer blocks over all places.
        depth: Number of blocks.
        heads: Attention heads.
        backbone: Name of a timm model in the place of the small network; its last map of features counts.
        pretrained: Whether timm loads its published weights; saved encoders hold them.
    """

    config_name = "config.json"  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        stride: int = 8,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        backbone: str | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.network: nn.Module
        if backbone is not None:
            self.network, self.features, grid = _backbone(backbone, pretrained, image_size)
            self.blocks = nn.ModuleList()
            self.register_to_config(pretrained=False)  # a saved folder holds the weights itself
        else:
            levels = round(math.log2(max(stride, 1)))
            if stride < 2 or 2**levels != stride or image_size % stride:
                raise TokenloomError(
                    f"stride must be a power of two from 2 on that divides image_size, got stride={stride} and "
                    f"image_size={image_size}."
                )
            self.features, grid = width, image_size // stride
            self.network = _stem(levels, width)
            shape = BlockConfig(width=width, heads=heads, mlp="gelu", norm="layer", qkv_bias=True)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(depth))
            self.place = nn.Parameter(torch.randn(1, grid * grid, width) * 0.02)
            self.norm = make_norm("layer", width, 1e-5, True)
        self.rows = grid * grid

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, P, F) of pixels (B, 3, S, S) in [-1, 1]."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            raise TokenloomError(
                f"Pixels must be (B, 3, {self.image_size}, {self.image_size}), got {tuple(pixels.shape)}."
            )
        if not len(self.blocks):
            mean, spread = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _SPREAD))
            return self.network(((pixels + 1) / 2 - mean) / spread)[-1].flatten(2).transpose(1, 2)
        x = self.network(pixels).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _stem(levels: int, width: int) -> nn.Sequential:
    """Convolutions of stride 2, each followed by one of stride 1, that reach the width at the end."""
    layers: list[nn.Module] = []
    channels = 3
    for level in range(levels):
        wider = max(16, width // 2 ** (levels - 1 - level))
        layers += [
            nn.Conv2d(channels, wider, 3, 2, 1),
            nn.GroupNorm(1, wider),
            nn.GELU(),
            nn.Conv2d(wider, wider, 3, 1, 1),
            nn.GroupNorm(1, wider),
            nn.GELU(),
        ]
        channels = wider
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


def _backbone(name: str, pretrained: bool, size: int) -> tuple[nn.Module, int, int]:
    """A timm model that gives maps of features, the channels of the last map, and its side for pictures of a size."""
    try:
        import timm
    except ImportError:
        raise TokenloomError("A backbone by name needs timm; run: pip install timm.") from None
    try:
        model = timm.create_model(name, pretrained=pretrained, features_only=True)
    except Exception as error:  # timm raises types of several libraries
        raise TokenloomError(
            f"timm cannot make the backbone {name!r} with maps of features ({error}); choose one of timm.list_models()."
        ) from error
    with torch.no_grad():
        last = model.eval()(torch.zeros(1, 3, size, size))[-1]
    if last.ndim != 4 or last.shape[2] != last.shape[3]:
        raise TokenloomError(
            f"The backbone {name!r} gives features {tuple(last.shape)}; a square map (B, F, h, h) is needed."
        )
    return model, last.shape[1], last.shape[2]
