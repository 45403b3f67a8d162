"""The conformance suite: every tokenizer passes, tokenizers that are subtly wrong do not, and the advice names the cause."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from test_checkpoints_image_cnn import FAMILIES, golden
from test_checkpoints_image_scale import FAMILIES as SCALE_FAMILIES
from test_checkpoints_image_scale import golden as scale_golden
from torch import Tensor, nn

from tokenloom import (
    ImageCNNTokenizer,
    ImageScaleTokenizer,
    ImageVQTokenizer,
    Layout,
    Tokenizer,
    TokenloomError,
)
from tokenloom.checkpoints import from_official
from tokenloom.testing import TokenizerCheckError, check_tokenizer
from tokenloom.testing.suite import CHECKS
from tokenloom.tokenizers.quantizers import KINDS, Quantized

OPTIONS: dict[str, dict[str, object]] = {
    "bsq": {"dim": 6},
    "fsq": {"levels": [5, 5, 4]},
    "lfq": {"dim": 6},
    "simvq": {"codebook_size": 64, "dim": 4},
    "vq": {"codebook_size": 64, "dim": 4},
}


def small(kind: type[ImageVQTokenizer] = ImageVQTokenizer, **options: object) -> ImageVQTokenizer:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch": 2, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    return kind(**{**shape, "quantizer_options": {"levels": [5, 5, 4]}, **options})  # type: ignore[arg-type]


class Patches(Tokenizer):
    """The smallest tokenizer that someone might write: one grey level a patch."""

    modality = "image"

    @register_to_config
    def __init__(self, image_size: int = 16, patch: int = 4, levels: int = 16) -> None:
        super().__init__()
        self.image_size, self.patch, self.vocab_size = image_size, patch, levels
        self.side = image_size // patch
        self.layout = Layout.grid(self.side, self.side)
        self.gain = nn.Parameter(torch.ones(1))

    def encode(self, media: Tensor) -> Tensor:
        grey = F.avg_pool2d(media * self.gain, self.patch).mean(1)
        return self.order(((grey + 1) / 2 * self.vocab_size).long().clamp(0, self.vocab_size - 1))

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        grey = (self.place(codes) + 0.5) / self.vocab_size * 2 - 1
        picture = grey.to(self.gain.dtype)[:, None].expand(-1, 3, -1, -1)
        return F.interpolate(picture / self.gain, scale_factor=self.patch).clamp(-1, 1)

    def order(self, grid: Tensor) -> Tensor:
        return grid.flatten(1)

    def place(self, codes: Tensor) -> Tensor:
        return codes.unflatten(1, (self.side, self.side))


class Wave(Tokenizer):
    """A tokenizer of something other than pictures."""

    modality = "audio"

    @register_to_config
    def __init__(self, length: int = 32) -> None:
        super().__init__()
        self.layout, self.vocab_size = Layout.line(length), 200
        self.gain = nn.Parameter(torch.ones(1))

    def encode(self, media: Tensor) -> Tensor:
        return (media[:, 0] * self.gain * 20 + 100).round().long().clamp(0, 199)

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return ((codes - 100) / 20).to(self.gain.dtype)[:, None] / self.gain


class Coarse(Tokenizer):
    """A grey level of the whole picture, then what each patch adds to it: 1 or all codes decode."""

    modality = "image"

    @register_to_config
    def __init__(self, image_size: int = 16, side: int = 4) -> None:
        super().__init__()
        self.image_size, self.side, self.vocab_size = image_size, side, 64
        self.layout = Layout.scales([1, side])
        self.gain = nn.Parameter(torch.ones(1))

    @property
    def lengths(self) -> tuple[int, ...]:
        return (1, self.layout.size)

    def encode(self, media: Tensor, *, num_tokens: int | None = None) -> Tensor:
        if num_tokens is not None:
            self.check_num_tokens(num_tokens)
        fine = F.adaptive_avg_pool2d((media * self.gain).mean(1), self.side)
        whole = self.level(fine.mean((1, 2)))
        detail = self.level(self.order(fine - self.grey(whole)[:, None, None]).flatten(1) / 2)
        return torch.cat([whole[:, None], detail], dim=1)[:, :num_tokens]

    def level(self, grey: Tensor) -> Tensor:
        return ((grey + 1) * 32).long().clamp(0, 63)

    def grey(self, codes: Tensor) -> Tensor:
        return ((codes + 0.5) / 32 - 1).to(self.gain.dtype)

    def order(self, maps: Tensor) -> Tensor:
        return maps

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        picture = self.grey(codes[:, :1, None]).expand(-1, self.side, self.side)
        if codes.shape[1] > 1:
            picture = picture + 2 * self.order(self.grey(codes[:, 1:]).unflatten(1, (self.side, -1)))
        picture = picture[:, None].expand(-1, 3, -1, -1) / self.gain
        return F.interpolate(picture, (self.image_size,) * 2).clamp(-1, 1)

    def reconstruct(self, media: Tensor, *, num_tokens: int | None = None) -> Tensor:
        return self.decode(self.encode(media, num_tokens=num_tokens))


# what passes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("residual")])
def test_the_transformer_tokenizer_passes_with_every_quantizer(kind):
    tokenizer = small(quantizer_type=kind, quantizer_options=OPTIONS[kind])
    assert check_tokenizer(tokenizer) == tuple(CHECKS)


@pytest.mark.parametrize("form", ["taming", "maskgit"])
@pytest.mark.parametrize("size", [16, (16, 24), (13, 18)])
def test_the_convolutional_tokenizer_passes(form, size):
    torch.manual_seed(0)
    options: dict[str, object] = {"codebook_size": 64, "dim": 4}
    tokenizer = ImageCNNTokenizer(
        size, 8, (1, 1, 2), 1, latent_channels=8, norm_groups=4, form=form, quantizer_options=options
    )
    check_tokenizer(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_tokenizers_pass(family):
    config, state, _ = golden(family)
    check_tokenizer(from_official(family, state, config))


@pytest.mark.parametrize("family", SCALE_FAMILIES)
def test_official_multi_scale_tokenizers_pass(family):
    config, state, _ = scale_golden(family)
    check_tokenizer(from_official(family, state, config))


@pytest.mark.parametrize("kind", ["vq", "bsq"])
def test_the_multi_scale_tokenizer_passes(kind):
    torch.manual_seed(0)
    options: dict[str, object] = {"codebook_size": 64, "dim": 8} if kind == "vq" else {"dim": 8}
    shape = {"channels": 8, "multipliers": (1, 1, 2), "blocks": 1, "latent_channels": 8, "norm_groups": 4}
    check_tokenizer(
        ImageScaleTokenizer((1, 2, (4, 6)), **shape, quantizer_type=kind, quantizer_options=options)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tokenizer_of_your_own_passes(seed):
    check_tokenizer(Patches(), seed=seed)
    check_tokenizer(Coarse(), seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_decoder_that_looks_far_away_is_no_wrong_order(seed):
    check_tokenizer(small(merge=1), seed=seed)


@pytest.mark.parametrize("size", [8, 12, 32])
def test_the_order_is_seen_on_small_and_large_grids(size):
    check_tokenizer(Patches(size))
    for kind in (ColumnsFirst, Upside):
        with pytest.raises(TokenizerCheckError, match="They look like"):
            check_tokenizer(kind(size))


def test_a_tokenizer_of_other_media_passes():
    media = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))
    check_tokenizer(Wave(), media)


def test_the_suite_leaves_the_tokenizer_as_it_was():
    tokenizer = small().train()
    tokenizer.decoder.eval()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    state = torch.get_rng_state()
    check_tokenizer(tokenizer)
    assert tokenizer.training and tokenizer.encoder.training and not tokenizer.decoder.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in tokenizer.state_dict().items())
    assert all(value.grad is None for value in tokenizer.parameters())


# what does not pass


class ColumnsFirst(Patches):
    def order(self, grid: Tensor) -> Tensor:
        return grid.transpose(1, 2).flatten(1)

    def place(self, codes: Tensor) -> Tensor:
        return super().place(codes).transpose(1, 2)


class Upside(Patches):
    def order(self, grid: Tensor) -> Tensor:
        return grid.flip(1).flatten(1)

    def place(self, codes: Tensor) -> Tensor:
        return super().place(codes).flip(1)


class Shuffled(Patches):
    def order(self, grid: Tensor) -> Tensor:
        return grid.flatten(1)[:, torch.randperm(16, generator=torch.Generator().manual_seed(3))]


class EncodesColumnsFirst(ImageVQTokenizer):
    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels).unflatten(1, (self.grid, self.grid)).transpose(1, 2).flatten(1)


class CentresBatch(ImageVQTokenizer):
    def features(self, pixels: Tensor) -> Tensor:
        z = super().features(pixels)
        return z - 0.1 * z.mean((0, 1), keepdim=True)


class StretchesByBatch(Patches):
    def encode(self, media: Tensor) -> Tensor:
        return super().encode(media / media.abs().max())


class DecodesByBatch(ImageVQTokenizer):
    def decode(self, codes: Tensor) -> Tensor:
        output = super().decode(codes)
        return (output - 0.1 * output.mean(0)).clamp(-1, 1)


class ReversesBatch(Patches):
    def encode(self, media: Tensor) -> Tensor:
        return super().encode(media).flip(0)


class MixesBatchAndPosition(Patches):
    def order(self, grid: Tensor) -> Tensor:
        return grid.flatten(1).T.reshape(len(grid), -1)


class Noisy(ImageVQTokenizer):
    def features(self, pixels: Tensor) -> Tensor:
        z = super().features(pixels)
        return z + 0.5 * torch.randn_like(z)


class NoisyDecoder(Patches):
    def decode(self, codes: Tensor) -> Tensor:
        output = super().decode(codes)
        return (output + 0.1 * torch.randn_like(output)).clamp(-1, 1)


class Unlimited(Patches):
    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes) * 1.5


class Bytes(Patches):
    def decode(self, codes: Tensor) -> Tensor:
        return (super().decode(codes) * 127.5 + 127.5).to(torch.uint8)


class OffByOne(Patches):
    def encode(self, media: Tensor) -> Tensor:
        return super().encode(media) + 1


class Halves(Patches):
    def encode(self, media: Tensor) -> Tensor:
        return super().encode(media).int()


class Grid(Patches):
    def order(self, grid: Tensor) -> Tensor:
        return grid


class Blind(Patches):
    def encode(self, media: Tensor) -> Tensor:
        return super().encode(media) * 0


class Crops(Patches):
    def decode(self, codes: Tensor) -> Tensor:
        return super().decode(codes)[..., :-1]


class Unchecked(Patches):
    def check_codes(self, codes: Tensor, count: int | None = None) -> None:
        """Lets everything pass."""


class WritesInput(Patches):
    def encode(self, media: Tensor) -> Tensor:
        return super().encode(media.mul_(0.9))


class Forgets(Patches):
    @register_to_config
    def __init__(self, image_size: int = 16) -> None:
        super().__init__(image_size)
        self.shift = float(torch.rand(()))

    def encode(self, media: Tensor) -> Tensor:
        return super().encode((media + self.shift).clamp(-1, 1))


class OtherReconstruction(Patches):
    def reconstruct(self, media: Tensor) -> Tensor:
        return media


class Unscaled(ImageVQTokenizer):
    def decode(self, codes: Tensor) -> Tensor:
        return self.paint_vectors(self.quantizer.decode(codes) * 1.1).clamp(-1, 1)


class NoGradient(ImageVQTokenizer):
    def quantize(self, pixels: Tensor) -> Quantized:
        quantized = super().quantize(pixels)
        return quantized._replace(z_q=quantized.z_q.detach())


class Float32Only(ImageVQTokenizer):
    def features(self, pixels: Tensor) -> Tensor:
        z = super().features(pixels)
        return z @ torch.eye(z.shape[-1])


class SetsTheSeed(Patches):
    def encode(self, media: Tensor) -> Tensor:
        torch.manual_seed(0)
        return super().encode(media + 1e-3 * torch.rand_like(media))


class Lenient(Patches):
    def check_codes(self, codes: Tensor, count: int | None = None) -> None:
        super().check_codes(F.pad(codes, (0, 16))[:, :16])

    def place(self, codes: Tensor) -> Tensor:
        return super().place(F.pad(codes, (0, 16))[:, :16])


class CoarseColumnsFirst(Coarse):
    def order(self, maps: Tensor) -> Tensor:
        return maps.transpose(1, 2)


class GivesAll(Coarse):
    def encode(self, media: Tensor, *, num_tokens: int | None = None) -> Tensor:
        return super().encode(media)


class OtherPrefix(Coarse):
    def encode(self, media: Tensor, *, num_tokens: int | None = None) -> Tensor:
        codes = super().encode(media, num_tokens=num_tokens)
        return codes if num_tokens is None else (codes + 5).clamp(max=63)


class NoKeyword(Coarse):
    def encode(self, media: Tensor) -> Tensor:  # type: ignore[override]
        return super().encode(media)


class Remembers(Coarse):
    seen: Tensor | None = None

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        if codes.shape[1] > 1:
            self.seen = codes
        elif self.seen is not None and len(self.seen) == len(codes):
            codes = torch.cat([codes, self.seen[:, 1:]], dim=1)
        return super().decode(codes)


class IgnoresLater(Coarse):
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        return super().decode(codes[:, :1])


class ReconstructsAll(Coarse):
    def reconstruct(self, media: Tensor, *, num_tokens: int | None = None) -> Tensor:
        return super().reconstruct(media)


class AnyNumber(Coarse):
    def check_num_tokens(self, num_tokens: int, lengths: object = None) -> int:
        return num_tokens


class WrongLengths(Coarse):
    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.layout.size, 1)


class Raises(Patches):
    def encode(self, media: Tensor) -> Tensor:
        raise RuntimeError("boom")


class Nameless(Patches):
    modality = None  # type: ignore[assignment]


WRONG = [
    (ColumnsFirst, "code order", "They look like columns first"),
    (Upside, "code order", "They look like rows from below"),
    (Shuffled, "code order", "its effect is elsewhere"),
    (EncodesColumnsFirst, "code order", r"encode\(\).*columns first"),
    (EncodesColumnsFirst, "round trip", "order, scale and normalisation"),
    (CentresBatch, "batch", "computed over the batch"),
    (StretchesByBatch, "batch", "global maximum"),
    (DecodesByBatch, "batch", r"nothing in decode\(\)"),
    (ReversesBatch, "batch order", "row i of the codes must belong to sample i"),
    (MixesBatchAndPosition, "batch order", "swaps batch and position"),
    (Noisy, "determinism", "must not draw random numbers"),
    (NoisyDecoder, "determinism", "fixed seed"),
    (Unlimited, "media", r"must stay in \[-1, 1\].*clamp"),
    (Bytes, "media", "float media, got torch.uint8"),
    (OffByOne, "codes", r"must lie in 0\.\.15, got .*16"),
    (Halves, "codes", r"end it with \.long\(\)"),
    (Grid, "codes", "flatten them in layout order"),
    (Blind, "diversity", "same codes"),
    (Crops, "media", "must have the shape of x"),
    (Unchecked, "bad codes", "call self.check_codes"),
    (WritesInput, "inputs", "not in place"),
    (Forgets, "save and load", "constructor under @register_to_config"),
    (OtherReconstruction, "round trip", r"let reconstruct\(\) call the two"),
    (Unscaled, "round trip", "z_q"),
    (NoGradient, "gradient", r"z \+ \(z_q - z\)\.detach"),
    (Float32Only, "dtype", "dtype of the first weight"),
    (SetsTheSeed, "random numbers", r"encode\(\) draws from.*torch\.Generator"),
    (Lenient, "bad codes", "one code too (many|few)"),
    (CoarseColumnsFirst, "code order", "columns first"),
    (GivesAll, "prefixes", "ignore num_tokens"),
    (OtherPrefix, "prefixes", "must not depend on how many"),
    (NoKeyword, "prefixes", "take the keyword num_tokens=None"),
    (Remembers, "prefixes", "keep no state between calls"),
    (IgnoresLater, "prefixes", "ignore how many codes it was given"),
    (ReconstructsAll, "prefixes", r"pass num_tokens on to encode\(\)"),
    (AnyNumber, "prefixes", r"num_tokens=0\) was accepted"),
    (WrongLengths, "prefixes", "must rise and end"),
    (Raises, "start", "boom"),
    (Nameless, "attributes", "modality must be a str"),
]


@pytest.mark.parametrize(("kind", "check", "advice"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_wrong_is_found_and_named(kind, check, advice):
    tokenizer = small(kind) if issubclass(kind, ImageVQTokenizer) else kind()
    with pytest.raises(TokenizerCheckError, match=rf"(?m)^  {check}: .*{advice}") as caught:
        check_tokenizer(tokenizer)
    assert check in caught.value.failures
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, TokenloomError)


def test_every_check_but_that_of_the_device_fails_for_something():
    assert {check for _, check, _ in WRONG} == {*CHECKS, "start"} - {"device"}


def test_all_failures_are_reported_at_once():
    class Twice(ReversesBatch, Unchecked):
        """Wrong in two ways."""

    with pytest.raises(TokenizerCheckError, match="Twice fails") as caught:
        check_tokenizer(Twice())
    assert {"batch order", "bad codes"} <= caught.value.failures.keys()


def test_the_suite_says_what_it_needs():
    with pytest.raises(TokenloomError, match="pass media="):
        check_tokenizer(Wave())
    with pytest.raises(TokenloomError, match="at least 3 different samples, got 2"):
        check_tokenizer(Patches(), torch.zeros(2, 3, 16, 16))
    with pytest.raises(TokenloomError, match=r"expects a tokenloom\.Tokenizer"):
        check_tokenizer(nn.Linear(1, 1))  # type: ignore[arg-type]
