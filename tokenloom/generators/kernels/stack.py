"""A transformer that runs few rows in one call of C, all blocks at once.

At a step of few rows PyTorch spends most of its time between operations. `RowTransformer` shares the parameters of a
`Transformer`; rows that the kernel does not cover (many rows, adaLN, cross-attention, gradients, other number formats) run
as before. Knows the shared transformer; knows nothing of codes or orders.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenloom.generators.cache import Cache, CacheLayer
from tokenloom.generators.kernels.build import Kernels, Linear, address
from tokenloom.generators.kernels.linear import SkinnyLinear
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.layers import MLPS, Block

MOST_ROWS, MOST_WIDE_ROWS, WIDE = 32, 16, 512
"""Rows of all samples up to which one call is made, and those from a width on where a matrix library is faster again."""
_QK_NORMS = (None, "l2", "layer", "rms")
_BLOCK_TENSORS = ("norm1", "norm2", "query", "key")


class _Block(ctypes.Structure):
    _fields_: ClassVar[Sequence[Any]] = (
        *((f"{name}_{part}", ctypes.c_void_p) for name in _BLOCK_TENSORS for part in ("weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("log_scale", "scale1", "scale2")),
        *((name, Linear) for name in ("qkv", "out", "up", "down")),
    )


class _Shape(ctypes.Structure):
    _fields_: ClassVar[Sequence[Any]] = (
        *(
            (name, ctypes.c_int64)
            for name in ("width", "heads", "kv_heads", "head", "hidden", "depth", "centred", "mlp", "qk_norm")
        ),
        ("halves", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _Call(ctypes.Structure):
    _fields_: ClassVar[Sequence[Any]] = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "cos", "sin", "mask", "keys", "values", "taps", "tapped", "last")
        ),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "start", "capacity", "masks", "count")),
    )


class RowTransformer(Transformer):
    """A `Transformer` with the parameters of another one. Make one with `RowTransformer.of`."""

    loaded: Kernels
    kept: tuple[Any, ...] | None  # what does not change between calls
    rounded: list[SkinnyLinear]  # layers with int8 weights

    @classmethod
    def of(cls, transformer: Transformer, loaded: Kernels) -> RowTransformer | None:
        """The transformer over the same modules; `None` for kinds of blocks that the kernel does not have.

        Args:
            transformer: Its linear layers are `SkinnyLinear` already; those of another form than float32 keep it here.
            loaded: The kernels.
        """
        config = transformer.config
        weights = list(transformer.parameters())
        plain = all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights)
        if config.modulation or config.cross_attention or config.final_modulation or not plain:
            return None
        return cls._over(transformer, loaded) if _right(loaded) else None

    @classmethod
    def _over(cls, transformer: Transformer, loaded: Kernels) -> RowTransformer:
        made = cls.__new__(cls)
        made.__dict__.update(transformer.__dict__)
        made.loaded, made.kept = loaded, None
        made.rounded = [
            layer for layer in made.blocks.modules() if isinstance(layer, SkinnyLinear) and layer.int8
        ]
        return made

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """Runs the stack; arguments and results are those of `Transformer`."""
        if self._covers(x, options):
            return self._run(x, **options)
        return super().forward(x, **options)

    def _covers(self, x: Tensor, options: dict[str, Any]) -> bool:
        most = MOST_ROWS if self.config.width < WIDE else MOST_WIDE_ROWS
        few = x.ndim == 3 and 0 < x.shape[0] * x.shape[1] <= most
        if not few or self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        cache = options.get("cache")
        if cache is not None and (type(cache) is not Cache or cache.layers[0].keys.dtype != torch.float32):
            return False
        rope, mask = options.get("rope"), options.get("mask")
        flat = rope is None or (rope[0].ndim == 2 and rope[0].dtype == torch.float32)
        alike = mask is None or (mask.dtype == torch.bool and (mask.ndim < 4 or mask.shape[1] == 1))
        return flat and alike and options.get("context") is None

    def _run(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        **unused: Any,
    ) -> tuple[Tensor, ...]:
        if self.config.learned_positions and position_ids is not None:
            x = x + self.positions(position_ids)
        x = x.clone(memory_format=torch.contiguous_format)
        batch, rows, width = x.shape
        start = 0 if cache is None else cache.length
        layers = self._room(cache, batch, start + rows)
        addresses = ctypes.c_void_p * len(layers)
        keys = addresses(*(layer.keys.data_ptr() for layer in layers))
        values = addresses(*(layer.values.data_ptr() for layer in layers))
        if mask is not None:
            shape = (mask.shape[0] if mask.ndim == 4 else 1, 1, rows, start + rows)
            mask = mask.expand(shape).contiguous()
        turned = (None, None) if rope is None else tuple(table.contiguous() for table in rope)
        shape_of, blocks, tapped, last = self._structures()
        taps = x.new_empty((len(tapped), batch, rows, width))
        call = _Call(
            x.data_ptr(),
            *(address(table) for table in turned),
            address(mask),
            ctypes.addressof(keys),
            ctypes.addressof(values),
            taps.data_ptr(),
            tapped.data_ptr(),
            None if last is None else ctypes.addressof(last),
            batch,
            rows,
            start,
            layers[0].keys.shape[2],
            1 if mask is None else mask.shape[0],
            len(taps),
        )
        failed = self.loaded.stack(
            ctypes.addressof(shape_of),
            ctypes.addressof(blocks),
            ctypes.addressof(call),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"There is no memory for {batch * rows} rows of {self.config.depth} blocks.")
        return taps.unbind(0)

    def _room(self, cache: Cache | None, batch: int, rows: int) -> list[CacheLayer]:
        """Keys and values of every block, with room for `rows` rows; without a cache all share one, as none reads another's."""
        config = self.config
        if cache is not None:
            cache.layers[0].check(rows)
            return cache.layers
        place, heads = torch.device("cpu"), config.num_kv_heads
        return Cache(1, batch, heads, rows, config.head_size, place, torch.float32).layers * config.depth

    def _structures(self) -> tuple[_Shape, Any, Tensor, Any]:
        """What does not change between calls; worked out again when weights that are rounded change."""
        mark = tuple(layer.weight._version for layer in self.rounded)
        if self.kept is None or self.kept[0] != mark:
            config, first = self.config, self.blocks[0].get_submodule("attention")
            scale = first.scale if first.scale is not None else config.head_size**-0.5
            shape = _Shape(
                config.width,
                config.heads,
                config.num_kv_heads,
                config.head_size,
                config.hidden,
                config.depth,
                config.norm == "layer",
                MLPS.index(config.mlp),
                _QK_NORMS.index(config.qk_norm),
                config.rope_halves,
                config.norm_eps,
                scale,
            )
            blocks = (_Block * config.depth)(*(_block(block) for block in self.blocks))
            last = [address(getattr(norm, part, None)) for norm in self.norms for part in ("weight", "bias")]
            norms = (ctypes.c_void_p * len(last))(*last) if config.final_norm else None
            self.kept = (mark, shape, blocks, torch.tensor(config.taps), norms)
        return self.kept[1:]


@lru_cache(maxsize=1)
def _right(loaded: Kernels) -> bool:
    """Whether two blocks give what PyTorch gives."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        plain = Transformer(TransformerConfig(width=24, heads=2, depth=2, qkv_bias=True)).eval()
        x, rope = torch.randn(2, 3, 24), plain.rope(torch.arange(3)[:, None])
        (want,) = plain(x, rope=rope)
        for block in plain.blocks:
            for owner, names in ((block.attention, ("qkv", "out")), (block.mlp, ("up", "down"))):
                for name in names:
                    setattr(owner, name, SkinnyLinear(getattr(owner, name), loaded))
        (got,) = RowTransformer._over(plain, loaded)(x, rope=rope)
    return torch.allclose(got, want, atol=1e-4)


def _block(block: nn.Module) -> _Block:
    """Addresses of the parameters of a `tokenloom.layers.Block`."""
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.mlp
    norms = (block.norm1, block.norm2, *(getattr(attention, name, None) for name in ("q_norm", "k_norm")))
    parts = [address(getattr(norm, part, None)) for norm in norms for part in ("weight", "bias")]
    rest = (
        getattr(owner, name, None)
        for owner, name in ((attention, "log_scale"), (block, "scale1"), (block, "scale2"))
    )
    layers: tuple[Any, ...] = (attention.qkv, attention.out, mlp.up, mlp.down)
    return _Block(*parts, *(address(part) for part in rest), *(layer.structure() for layer in layers))
