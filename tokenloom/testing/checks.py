"""The checks of the suite that concern whole samples: shapes, ranges, batches, repeats, files, dtypes, gradients.

Each check takes a `Bench` and raises `Failure` with advice. Knows nothing of places inside a picture (see `places`).
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import Tensor

from tokenloom.layouts import Layout
from tokenloom.testing.failures import Bench, require
from tokenloom.tokenizers.base import Tokenizer


def attributes(bench: Bench) -> None:
    """`modality`, `layout` and `vocab_size` are set and of the right kind."""
    tokenizer = bench.tokenizer
    for name, kind in (("modality", str), ("layout", Layout), ("vocab_size", int)):
        value = getattr(tokenizer, name, None)
        require(
            isinstance(value, kind),
            f"{name} must be a {kind.__name__}, got {value!r}; set self.{name} in __init__ after super().__init__().",
        )
    require(tokenizer.vocab_size >= 2, f"vocab_size must be at least 2, got {tokenizer.vocab_size}.")


def codes(bench: Bench) -> None:
    """Codes are int64 (B, N) in 0..vocab_size-1."""
    got, wanted = bench.codes, (len(bench.media), bench.tokenizer.layout.size)
    require(isinstance(got, Tensor), f"encode() must return a tensor, got {type(got)}.")
    require(
        got.dtype == torch.long, f"encode() must return int64 codes, got {got.dtype}; end it with .long()."
    )
    require(
        tuple(got.shape) == wanted,
        f"encode() must return codes of shape (B, N) = {wanted}, got {tuple(got.shape)}; flatten them in layout order "
        "and let layout.size be their number.",
    )
    plain = bench.encode(bench.extremes)
    low, high = (int(value) for value in torch.cat([got, plain]).aminmax())
    require(
        low >= 0 and high < bench.tokenizer.vocab_size,
        f"codes must lie in 0..{bench.tokenizer.vocab_size - 1}, got {low}..{high}; "
        "vocab_size must be the number of codes.",
    )


def media(bench: Bench) -> None:
    """Decoded media have the shape of the input, a float dtype, finite values, and the stated range."""
    got = bench.output
    require(got.is_floating_point(), f"decode() must return float media, got {got.dtype}.")
    require(
        got.shape == bench.media.shape,
        f"decode(encode(x)) must have the shape of x, {tuple(bench.media.shape)}, got {tuple(got.shape)}.",
    )
    any_codes = torch.randint_like(bench.codes, min(bench.tokenizer.vocab_size, 2**62))
    got = torch.cat([got, bench.decode(bench.encode(bench.extremes)), bench.decode(any_codes)])
    require(
        bool(got.isfinite().all()),
        "decode() returned NaN or infinity, if not for these samples then for random codes.",
    )
    if not bench.limited:
        return
    low, high = (float(value) for value in got.aminmax())
    slack = bench.tolerance
    require(
        low >= bench.low - slack and high <= bench.high + slack,
        f"decode() must stay in [{bench.low:g}, {bench.high:g}], got [{low:.3g}, {high:.3g}]; clamp at its end, or set "
        "pixel_range to the range that the tokenizer works in.",
    )


def diversity(bench: Bench) -> None:
    """Different samples have different codes; else the other checks see nothing."""
    first = bench.codes[:1]
    require(
        bool((bench.codes != first).any()),
        f"all {len(bench.codes)} different samples have the same codes, so a mistake could not be seen; check that the "
        "encoder's output is not constant, or pass media that the tokenizer tells apart.",
    )
    changed = bench.decode(bench.codes.flip(1) if bench.codes.shape[1] > 1 else bench.codes.roll(1, 0))
    require(
        not torch.equal(changed, bench.output),
        "decode() gives the same media for other codes; check that it uses them.",
    )


def rng_state(bench: Bench) -> None:
    """No call touches the global random numbers, on which everything else in a program may depend."""
    for name, call in (
        ("encode", lambda: bench.encode(bench.media)),
        ("decode", lambda: bench.decode(bench.codes)),
    ):
        before = torch.get_rng_state()
        call()
        require(
            torch.equal(before, torch.get_rng_state()),
            f"{name}() draws from, or sets the seed of, the global random numbers; give it a torch.Generator of its own.",
        )


def determinism(bench: Bench) -> None:
    """The same call gives the same result, whatever the state of the global random numbers."""
    torch.manual_seed(20_001)
    again = bench.encode(bench.media)
    require(
        torch.equal(again, bench.codes),
        "encode() gave other codes for the same media; in evaluation mode it must not draw random numbers "
        "(dropout, noise, sampled posteriors) and must not keep state between calls.",
    )
    torch.manual_seed(20_002)
    require(
        torch.equal(bench.decode(bench.codes), bench.output),
        "decode() gave other media for the same codes; draw its noise from a fixed seed, and keep no state between calls.",
    )


def inputs(bench: Bench) -> None:
    """Arguments are not written to, and memory order does not matter."""
    given, numbers = bench.media.clone(), bench.codes.clone()
    bench.encode(given)
    bench.decode(numbers)
    require(
        torch.equal(given, bench.media),
        "encode() changed the media it was given; work on a copy, not in place.",
    )
    require(
        torch.equal(numbers, bench.codes),
        "decode() changed the codes it was given; work on a copy, not in place.",
    )
    strided = bench.media.transpose(-1, -2).contiguous().transpose(-1, -2)
    require(
        bench.same_codes(bench.encode(strided), bench.codes) == 0,
        "encode() gave other codes for the same values in another memory order; use reshape instead of view, and do not "
        "rely on contiguous input.",
    )


def round_trip(bench: Bench) -> None:
    """`reconstruct` is `decode(encode(x))`, and so is the training pass where there is one."""
    with torch.no_grad():
        whole = bench.tokenizer.reconstruct(bench.media)
    far = bench.far(whole, bench.output)
    require(
        far == 0,
        f"reconstruct(x) differs from decode(encode(x)) by up to {far:.3g}; let reconstruct() call the two.",
    )
    with torch.no_grad():
        result = _training_pass(bench, bench.media)
    if result is None:
        return
    far = bench.far(bench.limit(result), bench.limit(bench.output))
    require(
        far == 0,
        f"the training pass differs from decode(encode(x)) by up to {far:.3g}: the codes do not stand for the vectors that "
        "the decoder was trained on. Compare quantizer.decode(codes) with z_q: order, scale and normalisation.",
    )


def batch(bench: Bench) -> None:
    """A sample has the same codes and media alone, and beside very different samples."""
    crowd = torch.cat([bench.extremes[:1], bench.media, bench.extremes])
    for name, got in (
        ("alone", torch.cat([bench.encode(sample[None]) for sample in bench.media])),
        ("beside extreme samples", bench.encode(crowd)[1:-2]),
    ):
        wrong = bench.same_codes(got, bench.codes)
        require(
            wrong == 0,
            f"samples have other codes {name} than in a batch ({wrong:.1%} differ); nothing may be computed over the batch "
            "axis: look for batch statistics, a global maximum or mean, or a flatten that mixes samples.",
        )
    alone = torch.cat([bench.decode(row[None]) for row in bench.codes])
    far = bench.far(alone, bench.output)
    require(
        far == 0,
        f"codes decode to other media alone than in a batch (up to {far:.3g}); nothing in decode() may be computed over "
        "the batch axis.",
    )


def batch_order(bench: Bench) -> None:
    """Reordering a batch reorders its codes and media."""
    order = torch.arange(len(bench.media), device=bench.media.device).roll(1)
    wrong = bench.same_codes(bench.encode(bench.media[order]), bench.codes[order])
    require(
        wrong == 0,
        f"reordering the batch changes codes ({wrong:.1%} differ): row i of the codes must belong to sample i. Look for a "
        "reshape or transpose that swaps batch and position.",
    )
    far = bench.far(bench.decode(bench.codes[order]), bench.output[order])
    require(
        far == 0,
        f"reordering the codes changes the media (up to {far:.3g}): sample i of the media must belong to row i.",
    )


def bad_codes(bench: Bench) -> None:
    """Codes of the wrong kind are refused with a `ValueError`, not decoded into something."""
    good, size = bench.codes[:1], bench.tokenizer.vocab_size
    cases = {
        f"a code of {size}, which is outside the vocabulary": torch.full_like(good, size),
        "a code of -1": torch.full_like(good, -1),
        "codes as float numbers": good.double(),
        "one code too many": torch.cat([good, good[:, :1]], dim=1),
    }
    if good.shape[1] - 1 not in (0, *bench.tokenizer.lengths):
        cases["one code too few"] = good[:, :-1]
    for name, wrong in cases.items():
        refused = False
        try:
            bench.decode(wrong)
        except ValueError:
            refused = True
        except Exception as error:
            require(
                False,
                f"decode() met {name} with {type(error).__name__} ({error}); call self.check_codes(codes) first, "
                "whose message helps.",
            )
        require(refused, f"decode() accepted {name}; call self.check_codes(codes) at its beginning.")


def _training_pass(bench: Bench, samples: Tensor) -> Tensor | None:
    """What `forward` reconstructs; `None` if the tokenizer has no training pass."""
    if type(bench.tokenizer).forward is torch.nn.Module.forward:
        return None
    result = bench.tokenizer(samples)
    result = result[0] if isinstance(result, tuple) else result
    require(
        isinstance(result, Tensor) and result.shape == samples.shape,
        "forward(x) must return the reconstruction, or a tuple that begins with it, in the shape of x.",
    )
    return result


def gradient(bench: Bench) -> None:
    """The error of the reconstruction reaches the input, and through it the encoder."""
    samples = bench.media.detach().clone().requires_grad_()
    with torch.enable_grad():
        result = _training_pass(bench, samples)
        if result is None:
            return  # a tokenizer that is not trained here
        require(
            result.requires_grad,
            "the reconstruction of forward() has no gradient; do not call encode() and decode() (which run under no_grad) "
            "in forward().",
        )
        (reached,) = torch.autograd.grad(
            (result - samples.detach()).square().mean(), samples, allow_unused=True
        )
    require(
        reached is not None and bool((reached != 0).any()),
        "no gradient of the reconstruction reaches the encoder; pass it through the quantizer with "
        "z + (z_q - z).detach().",
    )
    require(
        reached is None or bool(reached.isfinite().all()),
        "the gradient of the reconstruction is NaN or infinite.",
    )


def _to(tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype) -> Tokenizer:
    """Moves a tokenizer; torch's own method, because that of diffusers warns of every conversion."""
    return torch.nn.Module.to(tokenizer, device, dtype)


def save_and_load(bench: Bench) -> None:
    """`from_pretrained` of what `save_pretrained` wrote is the same tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        bench.tokenizer.save_pretrained(folder)
        again = type(bench.tokenizer).from_pretrained(folder)
    again = _to(again, bench.media.device, bench.media.dtype).eval()
    require(
        again.layout == bench.tokenizer.layout and again.vocab_size == bench.tokenizer.vocab_size,
        "layout or vocab_size are others after saving and loading; decorate __init__ with @register_to_config.",
    )
    with torch.no_grad():
        wrong = bench.same_codes(again.encode(bench.media), bench.codes)
        require(
            wrong == 0,
            f"{wrong:.1%} of the codes are others after saving and loading; state must live in parameters, persistent "
            "buffers or arguments of a constructor under @register_to_config.",
        )
        far = bench.far(again.decode(bench.codes), bench.output)
    require(
        far == 0,
        f"decode() differs by up to {far:.3g} after saving and loading; see the state of the decoder.",
    )


def dtype(bench: Bench) -> None:
    """Weights in bfloat16 give valid codes and finite media of either input dtype."""
    half = _to(copy.deepcopy(bench.tokenizer), bench.media.device, torch.bfloat16)
    for name in (torch.bfloat16, torch.float32):
        with torch.no_grad():
            try:
                got = half.encode(bench.media.to(name))
                output = half.decode(got)
            except RuntimeError as error:
                require(
                    False,
                    f"with bfloat16 weights and {name} media it raised {error!r}; convert media to the dtype of the first "
                    "weight, and codes' vectors to that of the decoder.",
                )
        require(
            got.dtype == torch.long and got.shape == bench.codes.shape,
            f"with bfloat16 weights codes are {got.dtype} {tuple(got.shape)}, expected int64 {tuple(bench.codes.shape)}.",
        )
        low, high = int(got.min()), int(got.max())
        require(
            low >= 0 and high < bench.tokenizer.vocab_size,
            f"with bfloat16 weights codes lie in {low}..{high}; compute codes in float32 (whole numbers above 256 are not "
            "exact in bfloat16).",
        )
        require(
            output.is_floating_point() and bool(output.isfinite().all()),
            "with bfloat16 weights decode() returned NaN or infinity.",
        )


def device(bench: Bench) -> None:
    """On a GPU, where there is one, the codes are the same but for rounding."""
    if not torch.cuda.is_available() or bench.media.is_cuda:
        return
    other = _to(copy.deepcopy(bench.tokenizer), torch.device("cuda"), bench.media.dtype)
    with torch.no_grad():
        got = other.encode(bench.media.cuda())
        output = other.decode(bench.codes.cuda())
    require(
        got.is_cuda and output.is_cuda,
        "on a GPU the result is elsewhere; make new tensors with device=... of the input.",
    )
    wrong = float((got.cpu() != bench.codes).double().mean())
    require(
        wrong < 0.02,
        f"{wrong:.0%} of the codes are others on a GPU; register constants as buffers, so that .to(device) moves them.",
    )
