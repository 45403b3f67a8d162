"""Kernels for few rows on a processor: built on first use, with PyTorch in their place where that fails."""

from tokenloom.generators.kernels.build import Kernels, kernels
from tokenloom.generators.kernels.linear import MOST_ROWS, QuickDraw, SkinnyLinear
from tokenloom.generators.kernels.stack import RowTransformer

__all__ = ["MOST_ROWS", "Kernels", "QuickDraw", "RowTransformer", "SkinnyLinear", "kernels"]
