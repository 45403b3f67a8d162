"""AudioTokenizer: shapes, lengths, padding, streams, codebooks, gradients, files, and bad input."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from tokenloom import AudioTokenizer, Layout, TokenloomError
from tokenloom.testing.failures import Bench
from tokenloom.testing.suite import CHECKS
from tokenloom.tokenizers.audio_base import PADDING

SMALL = {"strides": (2, 4), "widths": (4, 8, 12), "latent_channels": 8, "codebooks": 3, "codebook_size": 32}
FORMS = [None, {"depth": 2, "heads": 2, "window": 5}]
HOP = 8


def build(transformer: dict[str, int] | None = None, **options: object) -> AudioTokenizer:
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(**{**SMALL, "sample_rate": 400, "transformer": transformer, **options}).eval()  # type: ignore[arg-type]
    for layer in tokenizer.quantizer.layers:  # codes near the vectors of an untrained encoder
        layer.codebook.mul_(0.3)
    return tokenizer


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def sounds(count: int = 3, samples: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    time = torch.arange(samples) / 400
    pitch = 20 + 100 * torch.rand(count, 1, 1, generator=generator)
    noise = torch.randn(count, 1, samples, generator=generator)
    return 0.4 * (2 * math.pi * pitch * time).sin() + 0.1 * noise


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_rates(form):
    tokenizer = build(form, frames=25)
    assert (tokenizer.hop_length, tokenizer.frame_rate, tokenizer.num_codebooks) == (HOP, 50.0, 3)
    assert tokenizer.bits_per_second() == 50 * 15 and tokenizer.bits_per_second(1) == 250
    assert tokenizer.layout == Layout.frames(25, 3) and tokenizer.bits_per_sample == 25 * 15
    assert tokenizer.layout_for(7, 2) == Layout.frames(7, 2)
    codes = tokenizer.encode(sounds())
    assert codes.shape == (3, 3, 25) and codes.dtype == torch.long and len(codes.unique()) > 10
    audio = tokenizer.decode(codes)
    assert audio.shape == (3, 1, 200) and audio.abs().max() < 1
    assert torch.equal(tokenizer.reconstruct(sounds()), audio)
    assert torch.equal(tokenizer.encode(sounds()[:, 0]), codes)


@pytest.mark.parametrize("rate", [16000, 24000])
def test_the_published_rates_have_fifty_frames_a_second(rate):
    strides = (4, 4, 4, 5) if rate == 16000 else (4, 4, 5, 6)
    tokenizer = AudioTokenizer(rate, strides, (4, 4, 4, 4, 4), latent_channels=4)
    assert tokenizer.frame_rate == 50 and tokenizer.bits_per_second() == 3000


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 100, 199])
def test_the_length_is_exact(samples):
    tokenizer, audio = build(), sounds(2, samples)
    codes = tokenizer.encode(audio)
    assert codes.shape[2] == math.ceil(samples / HOP) == tokenizer.num_frames(samples)
    assert tokenizer.decode(codes, lengths=samples).shape == audio.shape
    assert tokenizer.reconstruct(audio).shape == audio.shape
    assert tokenizer(audio)[0].shape == audio.shape


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_no_code_and_no_sample(form):
    tokenizer, audio, lengths = build(form), sounds(4), [200, 131, 8, 1]
    codes = tokenizer.encode(audio, lengths=lengths)  # behind the lengths stands other sound, not silence
    output = tokenizer.decode(codes, lengths=lengths)
    for row, length in enumerate(lengths):
        frames = tokenizer.num_frames(length)
        alone = tokenizer.encode(audio[row : row + 1, :, :length])
        assert torch.equal(codes[row : row + 1, :, :frames], alone)
        assert bool((codes[row, :, frames:] == PADDING).all())
        near(output[row : row + 1, :, :length], tokenizer.decode(alone, lengths=length))
        assert not output[row, :, length:].any()
    assert torch.equal(tokenizer.decode(codes)[:, :, :131][1], output[1, :, :131])
    assert torch.equal(tokenizer.reconstruct(audio, lengths=torch.tensor(lengths)), output)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[8] * 25, [1, 2, 3, 50, 144], [199, 1], [200], [17] * 11])
def test_pieces_of_a_stream_are_the_whole(form, sizes):
    tokenizer, audio = build(form), sounds()[:, :, : sum(sizes)]
    whole = tokenizer.encode(audio)
    with tokenizer.streaming() as stream:
        pieces = [tokenizer.encode(piece) for piece in audio.split(sizes, dim=2)]
        codes = torch.cat([*pieces, stream.finish()], dim=2)
        sound = torch.cat([tokenizer.decode(piece) for piece in codes.split(3, dim=2)], dim=2)
    assert torch.equal(codes, whole)
    near(sound, tokenizer.decode(whole))
    assert torch.equal(tokenizer.encode(audio), whole)  # the stream has left nothing behind


def test_a_stream_says_something_for_every_frame_at_once():
    tokenizer, audio = build(FORMS[1]), sounds(1)
    whole = tokenizer.reconstruct(audio)
    with tokenizer.streaming():
        for start in range(0, 200, HOP):
            piece = tokenizer.reconstruct(audio[:, :, start : start + HOP])
            near(piece, whole[:, :, start : start + HOP])


@pytest.mark.parametrize("form", FORMS)
def test_long_sound_is_worked_on_in_pieces(form, monkeypatch):
    tokenizer, audio = build(form), sounds(2)
    whole, output = tokenizer.encode(audio), tokenizer.reconstruct(audio)
    seen = []
    tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    monkeypatch.setattr("tokenloom.tokenizers.audio._BLOCK_SECONDS", 0.06)
    assert torch.equal(tokenizer.encode(audio), whole)
    near(tokenizer.reconstruct(audio), output)
    assert max(seen) == 3 * HOP


@pytest.mark.parametrize("form", FORMS)
def test_codes_depend_on_the_past_alone(form):
    tokenizer, audio = build(form), sounds(1)
    codes = tokenizer.encode(audio)
    changed = audio.clone()
    changed[:, :, 96:] = -changed[:, :, 96:]
    other = tokenizer.encode(changed)
    assert torch.equal(other[:, :, :12], codes[:, :, :12]) and not torch.equal(other, codes)
    output = tokenizer.decode(codes)
    codes[:, :, 12:] = (codes[:, :, 12:] + 1) % 32
    near(tokenizer.decode(codes)[:, :, :96], output[:, :, :96])


def test_fewer_codebooks_are_a_prefix_and_a_coarser_sound():
    tokenizer, audio = build(), sounds()
    codes = tokenizer.encode(audio)
    assert torch.equal(tokenizer.encode(audio, num_codebooks=2), codes[:, :2])
    coarse = tokenizer.decode(codes[:, :1])
    assert coarse.shape == audio.shape and not torch.equal(coarse, tokenizer.decode(codes))
    assert torch.equal(tokenizer.reconstruct(audio, num_codebooks=1), coarse)


def test_flat_codes_are_in_layout_order():
    tokenizer = build()
    codes = tokenizer.encode(sounds())[:, :2]
    flat, layout = tokenizer.flatten(codes), tokenizer.layout_for(25, 2)
    assert flat.shape == (3, layout.size)
    time, codebook = layout.coords.unbind(1)
    assert torch.equal(flat, codes[:, codebook, time])
    assert torch.equal(tokenizer.unflatten(flat, 2), codes)
    with pytest.raises(TokenloomError, match="no common layout"):
        tokenizer.flatten(tokenizer.encode(sounds(), lengths=[200, 100, 50]))
    with pytest.raises(TokenloomError, match="multiple of 3"):
        tokenizer.unflatten(flat[:, :50])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_weight(form):
    tokenizer = build(form, quantizer_options={"keep_at_least": None, "options": {}}).train()
    with torch.enable_grad():
        output, quantized = tokenizer(sounds())
        (output.square().mean() + sum(quantized.losses.values())).backward()
    for name, value in tokenizer.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0, name


def test_quantizer_dropout_uses_fewer_codebooks_in_training():
    tokenizer = build().train()
    used = {int((tokenizer(sounds())[1].codes[0, 0] >= 0).sum()) for _ in range(30)}
    assert used == {1, 2, 3}


def test_a_few_steps_of_training_lower_the_error():
    tokenizer, audio = build(quantizer_options={"keep_at_least": None}).train(), sounds(4)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    errors = []
    for _ in range(40):
        with torch.enable_grad():
            output, quantized = tokenizer(audio)
            loss = (output - audio).abs().mean()
            (loss + sum(quantized.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(loss))
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_the_checks_of_the_suite(form):
    """All but those that want codes (B, N): fewer codebooks are no mistake here."""
    tokenizer = build(form)
    bench = Bench(tokenizer, sounds(), (-1.0, 1.0), limited=True)
    for name in CHECKS.keys() - {"codes", "bad codes", "prefixes"}:
        with torch.enable_grad():
            CHECKS[name](bench)


@pytest.mark.parametrize("form", FORMS)
def test_files_restore_everything(form, tmp_path):
    tokenizer, audio = build(form, frames=7), sounds()
    tokenizer.save_pretrained(tmp_path)
    again = AudioTokenizer.from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode(audio), tokenizer.encode(audio))
    assert torch.equal(again.reconstruct(audio), tokenizer.reconstruct(audio))
    assert again.layout == Layout.frames(7, 3)


def test_empty_batches():
    tokenizer = build()
    assert tokenizer.encode(torch.zeros(0, 1, 16)).shape[:2] == (0, 3)
    assert tokenizer.decode(torch.zeros(0, 3, 2, dtype=torch.long)).shape[0] == 0


@pytest.mark.parametrize(
    "audio",
    [
        torch.zeros(1, 2, 100),
        torch.zeros(100),
        torch.zeros(1, 1, 0),
        torch.zeros(1, 100, dtype=torch.short),
        "a.wav",
    ],
    ids=["stereo", "no batch", "empty", "integers", "a name"],
)
def test_sound_of_another_form_is_named(audio):
    with pytest.raises(TokenloomError, match="expects float samples of shape"):
        build().encode(audio)


def test_values_out_of_range_are_named():
    with pytest.raises(TokenloomError, match="NaN"):
        build().encode(torch.full((1, 16), torch.nan))
    with pytest.warns(UserWarning, match="expects"):
        build().encode(torch.full((1, 16), 30000.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().encode(sounds())
        build().encode(torch.zeros(1, 16))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 4, 5, dtype=torch.long), r"k in 1\.\.3"),
        (torch.zeros(1, 0, 5, dtype=torch.long), r"k in 1\.\.3"),
        (torch.zeros(1, 15, dtype=torch.long), "unflatten"),
        (torch.zeros(1, 3, 5), "integer"),
        (torch.full((1, 3, 5), 32), "below the codebook sizes"),
        (torch.full((1, 3, 5), -2), "below the codebook sizes"),
        (torch.tensor([[[0, -1, 0]] * 3]), "last frames only"),
        (torch.tensor([[[0, -1], [0, 0], [0, 0]]]), "in all codebooks"),
    ],
)
def test_wrong_codes_are_named(codes, message):
    with pytest.raises(TokenloomError, match=message):
        build().decode(codes)


def test_a_number_of_codebooks_can_be_asked_for():
    tokenizer = build()
    codes = tokenizer.encode(sounds(), num_codebooks=2)
    tokenizer.check_codes(codes, 2)
    tokenizer.check_codes(codes, range(1, 3))
    with pytest.raises(TokenloomError, match=r"\(3,\) codebooks"):
        tokenizer.check_codes(codes, 3)


def test_wrong_lengths_and_counts_are_named():
    tokenizer, audio = build(), sounds(2)
    for lengths, message in (([200], "2 in all"), ([200, 201], "Length 1"), (0, "Length 0")):
        with pytest.raises(TokenloomError, match=message):
            tokenizer.encode(audio, lengths=lengths)
    with pytest.raises(TokenloomError, match="the codes give"):
        tokenizer.decode(tokenizer.encode(audio), lengths=201)
    for count in (0, 4):
        with pytest.raises(TokenloomError, match=r"1\.\.3"):
            tokenizer.encode(audio, num_codebooks=count)


def test_streams_are_told_what_they_cannot_do():
    tokenizer, audio = build(), sounds(2)
    with tokenizer.streaming() as stream:
        with pytest.raises(TokenloomError, match="Nothing was encoded"):
            stream.finish()
        tokenizer.encode(audio)
        with pytest.raises(TokenloomError, match="began with 2"):
            tokenizer.encode(audio[:1])
        with pytest.raises(TokenloomError, match="outside"):
            tokenizer.encode(audio, lengths=[3, 4])
        with pytest.raises(TokenloomError, match="streams already"), tokenizer.streaming():
            pass
        stream.finish()
        with pytest.raises(TokenloomError, match="finished"):
            tokenizer.encode(audio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4, 8)}, "one more than strides"),
        ({"codebooks": 0}, "at least 1"),
        ({"transformer": {"dept": 2}}, "'depth'"),
        ({"transformer": {"window": 0}}, "window"),
        ({"quantizer_options": {"keep_at_last": 1}}, "'keep_at_least'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(TokenloomError, match=message):
        AudioTokenizer(**{**SMALL, **options})
