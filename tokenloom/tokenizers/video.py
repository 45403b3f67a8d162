"""`VideoTokenizer`: clips to a box of codes and back, causal in time, whole or frame by frame.

Causal 3-D convolutions in the family of MAGVIT-v2 (Yu et al. 2023) with scalar quantization: NBP's tokenizer (Ren et al.
2025) and small ones that train on a CPU. Knows clips, a causal network and a quantizer. Knows nothing of generators or files.

Legend: B batch, T frames, H rows and W columns of pixels, t, h, w of codes, N = t h w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.layouts import Layout
from tokenloom.tokenizers.base import Tokenizer
from tokenloom.tokenizers.clips import as_clips, pad_frames
from tokenloom.tokenizers.pixels import Size, as_size, check_values
from tokenloom.tokenizers.quantizers import Quantized, make_quantizer
from tokenloom.tokenizers.video_layers import State, VideoDecoder, VideoEncoder, VideoShape

_PIECE = 8  # frames of codes that are worked on at once, so that memory does not grow with the clip


class VideoTokenizer(Tokenizer):
    """RGB clips to t x h x w codes and back. A frame of codes depends on its own and earlier frames only.

    The first frame is a picture of its own: with a stride of k frames, 1 + n k frames become 1 + n frames of codes, and a
    clip of one frame has the codes of the picture. Clips of other lengths are filled up with their last frame, and pictures
    whose sides are no multiple of the stride with their edge; `decode(codes, frames=T, size=(H, W))` cuts that off again.

    Clips are float (B, T, 3, H, W) in `pixel_range`, the axes of diffusers' video pipelines; uint8 of that shape; or lists of
    PIL pictures, see `tokenloom.tokenizers.clips.as_clips`. `layout` is that of clips of `num_frames` frames of `image_size`;
    `layout_for` gives others.

    The defaults are a network of 3.6 MB for 17 frames of 64x64 pixels, 5 x 8 x 8 codes.

    Args:
        image_size: Side of the frames in pixels, or (height, width).
        num_frames: Frames of the clips that `layout` describes, 1 + n k.
        patch: Side of the squares of pixels that are one place at full resolution.
        widths: Channels of every level, from full to lowest resolution.
        strides: (frames, rows, columns) that become one behind every level but the last.
        blocks: Residual units of every level.
        up_kernel: Side of the kernels in front of upsampling: 3 as published, or 1, which has 27 times fewer weights.
        norm_groups: Groups of the group norms.
        quantizer_type: "fsq" or another quantizer with one code a vector.
        quantizer_options: Keyword options of the quantizer; for "fsq" {"levels": [8, 8, 8, 8]} if not given.
        pixel_range: Lowest and highest value of a pixel.
        clamp: Whether `decode` clamps to `pixel_range`; official weights do not.
    """

    modality = "video"
    parts = {  # noqa: RUF012  (a constant of the class)
        "encoder": ("encoder",),
        "quantizer": ("quantizer",),
        "decoder": ("decoder",),
    }

    @register_to_config
    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        num_frames: int = 17,
        patch: int = 4,
        widths: Sequence[int] = (32, 48, 56),
        strides: Sequence[Sequence[int]] = ((2, 2, 2), (2, 1, 1)),
        blocks: Sequence[int] = (1, 1, 1),
        up_kernel: int = 1,
        norm_groups: int = 8,
        quantizer_type: str = "fsq",
        quantizer_options: dict[str, object] | None = None,
        pixel_range: Sequence[float] = (-1.0, 1.0),
        clamp: bool = True,
    ) -> None:
        super().__init__()
        if quantizer_options is None and quantizer_type == "fsq":
            quantizer_options = {"levels": [8, 8, 8, 8]}
        self.quantizer = make_quantizer(quantizer_type, dict(quantizer_options or {}))
        if self.quantizer.codebooks > 1:
            raise TokenloomError(
                f"VideoTokenizer needs one code a place, but {quantizer_type} gives {self.quantizer.codebooks}."
            )
        self.vocab_size = self.quantizer.codebook_size
        shape = VideoShape(patch, widths, strides, blocks, norm_groups, up_kernel, self.quantizer.dim)
        self.stride = shape.stride
        height, width = as_size(image_size)
        self.image_size: int | Size = height if height == width else (height, width)
        self.num_frames = self.frames_of(self.codes_frames(num_frames))
        if self.num_frames != num_frames:
            raise TokenloomError(
                f"num_frames must be one more than a multiple of the {self.stride[0]} frames a code, got {num_frames}; use "
                f"{self.num_frames}. Clips of other lengths can be encoded all the same."
            )
        self.layout = self.layout_for(num_frames)
        self.pixel_range = (float(pixel_range[0]), float(pixel_range[1]))
        self.clamp = clamp
        self.encoder, self.decoder = VideoEncoder(shape), VideoDecoder(shape)
        self._stream: VideoStream | None = None

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that paints pixels."""
        return self.get_parameter("decoder.conv_out.weight")

    def codes_frames(self, frames: int) -> int:
        """Frames of codes t of a clip of `frames` frames.

        Raises:
            TokenloomError: Unless there is at least one frame.
        """
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise TokenloomError(f"A clip has a whole number of at least 1 frames, got {frames!r}.")
        return 1 + math.ceil((frames - 1) / self.stride[0])

    def frames_of(self, codes_frames: int) -> int:
        """Frames T that so many frames of codes decode to."""
        return 1 + (codes_frames - 1) * self.stride[0]

    def grid_of(self, size: Size) -> Size:
        """Rows and columns of codes of frames of (height, width) pixels."""
        return math.ceil(size[0] / self.stride[1]), math.ceil(size[1] / self.stride[2])

    def layout_for(self, frames: int, size: int | Sequence[int] | None = None) -> Layout:
        """The layout of the codes of a clip: time, row, column.

        Args:
            frames: Frames T of the clip.
            size: Side of its frames or (height, width); `None` = `image_size`.
        """
        return Layout.clip(self.codes_frames(frames), *self.grid_of(self._size(size)))

    def _size(self, size: int | Sequence[int] | None) -> Size:
        return as_size(self.image_size if size is None else size)

    def features(self, clips: Tensor, state: State | None = None) -> Tensor:
        """Continuous vectors (B, N, d) in layout order before quantization of frames (B, T, 3, H, W).

        Args:
            clips: Float frames, T = 1 + n k.
            state: What is kept of earlier pieces; T = n k then, but for the first piece.
        """
        clips = clips.to(self.last_layer.dtype).transpose(1, 2)
        return self.encoder(clips, state).flatten(2).transpose(1, 2)

    def paint_vectors(self, z_q: Tensor, size: Size | None = None, state: State | None = None) -> Tensor:
        """Frames (B, T, 3, H, W), not clamped, of quantized vectors (B, N, d) of frames of `size`."""
        height, width = self._size(size)
        latent = z_q.transpose(1, 2).unflatten(2, (-1, *self.grid_of((height, width))))
        return self.decoder(latent, state).transpose(1, 2)[..., :height, :width]

    def clips(self, media: Any, check: bool = True) -> Tensor:
        """Float frames (B, T, 3, H, W) in `pixel_range` of clips of any accepted kind.

        Args:
            media: Clips, see the class.
            check: Whether NaN is refused, and a wrong range is a warning.
        """
        clips = as_clips(media, self.pixel_range, type(self).__name__, self.last_layer.device)
        if check:
            check_values(clips.flatten(0, 1), self.pixel_range)
        return clips

    def _padded(self, clips: Tensor) -> Tensor:
        rows, columns = self.grid_of((clips.shape[3], clips.shape[4]))
        frames = self.frames_of(self.codes_frames(clips.shape[1]))
        return pad_frames(clips, frames, rows * self.stride[1], columns * self.stride[2])

    def _encode_pieces(self, clips: Tensor, state: State) -> Tensor:
        """Codes (B, n) of padded frames (B, T, 3, H, W) behind those of the state."""
        longest = _PIECE * self.stride[0]
        start = longest if state else 1 + longest
        pieces = clips.tensor_split(list(range(start, clips.shape[1], longest)), dim=1)
        return torch.cat(
            [self.quantizer.encode(self.features(piece, state)).codes for piece in pieces], dim=1
        )

    def _decode_pieces(self, codes: Tensor, size: Size, state: State) -> Tensor:
        """Frames (B, T, 3, H, W) of codes (B, n) behind those of the state."""
        dtype, frame = self.last_layer.dtype, math.prod(self.grid_of(size))
        parts = [
            self.paint_vectors(self.quantizer.decode(piece).to(dtype), size, state)
            for piece in codes.split(_PIECE * frame, dim=1)
        ]
        clips = torch.cat(parts, dim=1)
        return clips.clamp(*self.pixel_range) if self.clamp else clips

    @torch.no_grad()
    def encode(self, media: Any) -> Tensor:
        """Codes (B, N) in the order of `layout_for(T, (H, W))`. Inside `streaming()` of the next frames of a clip.

        Raises:
            TokenloomError: For media of a wrong kind, clips of several lengths or sizes, or NaN. A wrong range is a warning.
        """
        clips = self.clips(media)
        if self._stream is not None:
            return self._stream.encode(clips)
        return self._encode_pieces(self._padded(clips), {})

    @torch.no_grad()
    def decode(
        self, codes: Tensor, frames: int | None = None, size: int | Sequence[int] | None = None
    ) -> Tensor:
        """Frames (B, T, 3, H, W) in `pixel_range` of codes (B, N). Inside `streaming()` the next frames of a clip.

        Args:
            codes: Integer codes in layout order, of any number of whole frames of codes.
            frames: Frames of the clip, where it was filled up; `None` = all that the codes give.
            size: Side of the frames or (height, width); `None` = `image_size`.

        Raises:
            TokenloomError: If the codes are not those of such a clip.
        """
        place = self._size(size)
        if self._stream is not None:
            return self._stream.decode(codes, frames, place)
        self._check(codes, place, None if frames is None else self.codes_frames(frames))
        return self._decode_pieces(codes.long(), place, {})[:, :frames]

    def _check(self, codes: Tensor, size: Size, count: int | None = None) -> None:
        """Raises a clear error unless codes (B, N) are those of `count` frames of codes, or of any number of them."""
        rows, columns = self.grid_of(size)
        given = codes.shape[1] if isinstance(codes, Tensor) and codes.ndim == 2 else 0
        if count is None and given % (rows * columns):
            raise TokenloomError(
                f"Frames of {size} pixels have {rows} x {columns} codes each, but {given} codes are no multiple of that; pass "
                "size=(height, width) if they are of another size."
            )
        self.check_codes(codes, (count or max(1, given // (rows * columns))) * rows * columns)

    @torch.no_grad()
    def reconstruct(self, media: Any) -> Tensor:
        """Frames (B, T, 3, H, W) after encoding and decoding, as many and as large as they were."""
        clips = self.clips(media)
        size = (clips.shape[3], clips.shape[4])
        if self._stream is not None:
            return self._stream.decode(self._stream.encode(clips), None, size)
        return self.decode(self.encode(clips), clips.shape[1], size)

    def forward(self, media: Any) -> tuple[Tensor, Quantized]:
        """Differentiable reconstruction (B, T, 3, H, W), not clamped, and what the quantizer returned (codes (B, N))."""
        clips = self.clips(media, check=False)
        quantized = self.quantizer.encode(self.features(self._padded(clips)))
        painted = self.paint_vectors(quantized.z_q, (clips.shape[3], clips.shape[4]))
        return painted[:, : clips.shape[1]], quantized

    @contextmanager
    def streaming(self) -> Iterator[VideoStream]:
        """A context in which `encode` and `decode` take one batch of clips in pieces of any number of frames.

        The codes of the pieces, and of `finish()` at the end, are those of the whole; so are the frames. Memory does not grow
        with the number of pieces.

        Yields:
            The stream, whose `finish()` gives the codes of the frames that do not fill a frame of codes.

        Raises:
            TokenloomError: If the tokenizer streams already.
        """
        if self._stream is not None:
            raise TokenloomError(
                "This tokenizer streams already; leave the first streaming() before the next."
            )
        self._stream = VideoStream(self)
        try:
            yield self._stream
        finally:
            self._stream = None


class VideoStream:
    """What a tokenizer remembers of the pieces of a clip."""

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        self.tokenizer = tokenizer
        self.seen: State = {}
        self.shown: State = {}
        self.rest: Tensor | None = None
        self.last: Tensor | None = None
        self.form: tuple[int, ...] | None = None
        self.finished = False

    def encode(self, clips: Tensor) -> Tensor:
        """Codes (B, n) of the frames of codes that the next frames (B, T, 3, H, W) complete; n may be 0."""
        tokenizer = self.tokenizer
        if self.finished:
            raise TokenloomError("This stream has been finished; open a new streaming() for the next clip.")
        form = (clips.shape[0], *clips.shape[3:])
        if self.form not in (None, form):
            raise TokenloomError(
                f"A stream keeps its batch and its size: it began with (B, H, W) = {self.form}, got {form}."
            )
        self.form, self.last = form, clips[:, -1:]
        clips = clips if self.rest is None else torch.cat([self.rest, clips], dim=1)
        first, stride = 0 if self.seen else 1, tokenizer.stride[0]
        ready = first + (clips.shape[1] - first) // stride * stride
        self.rest = clips[:, ready:]
        if not ready:
            return torch.zeros(clips.shape[0], 0, dtype=torch.long, device=clips.device)
        rows, columns = tokenizer.grid_of((clips.shape[3], clips.shape[4]))
        padded = pad_frames(
            clips[:, :ready], ready, rows * tokenizer.stride[1], columns * tokenizer.stride[2]
        )
        return tokenizer._encode_pieces(padded, self.seen)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Codes (B, 0 or one frame of codes) of the frames that are left, filled up with the last frame."""
        if self.rest is None or self.last is None:
            raise TokenloomError("Nothing was encoded in this stream, so there is nothing to finish.")
        missing = -self.rest.shape[1] % self.tokenizer.stride[0]
        codes = self.encode(self.last.expand(-1, missing, -1, -1, -1))
        self.finished = True
        return codes

    def decode(self, codes: Tensor, frames: int | None, size: Size) -> Tensor:
        """The next frames (B, T, 3, H, W) of the next frames of codes (B, n); n may be 0."""
        if frames is not None:
            raise TokenloomError("A stream gives all frames of its codes; cut its end yourself.")
        tokenizer = self.tokenizer
        if isinstance(codes, Tensor) and codes.ndim == 2 and not codes.shape[1]:
            return tokenizer.last_layer.new_zeros(codes.shape[0], 0, 3, *size)
        tokenizer._check(codes, size)
        return tokenizer._decode_pieces(codes.long(), size, self.shown)
