"""MiMo-Audio: golden codes, sound, patches and logits, exact ways back, batches, lengths, bad input."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from golden_tokenizers import near, read
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenloom import MimoAudioTokenizer, Sampling, TokenloomError
from tokenloom.checkpoints import from_official, to_official
from tokenloom.generators import PatchNetworks

FAMILIES = ["mimo_audio_tokenizer", "mimo_audio_patch"]
GREEDY = Sampling(temperature=0)


@lru_cache
def build(family: str) -> Any:
    config, state, _ = read(family)
    return from_official(family, state, config)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def published_batch() -> tuple[Tensor, Tensor]:
    values = read("mimo_audio_tokenizer")[2]
    lengths = values["input.mel_lengths"]
    return pad_sequence(list(values["input.mel"].split(lengths.tolist())), batch_first=True), lengths


def packed(rows: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:count] for row, count in zip(rows, lengths, strict=True)])


def sounds(count: int = 2, samples: int = 1600) -> Tensor:
    return 0.1 * torch.randn(count, 1, samples, generator=torch.Generator().manual_seed(2))


def test_published_codes_of_a_batch():
    tokenizer, values = build("mimo_audio_tokenizer"), read("mimo_audio_tokenizer")[2]
    mel, lengths = published_batch()
    vectors, counts = tokenizer.features(mel, lengths)
    assert torch.equal(counts, values["output.lengths"])
    near(packed(vectors, counts), values["output.features_packed"])
    codes = tokenizer.encode_mel(mel, lengths)
    assert torch.equal(packed(codes.transpose(1, 2), counts).T, values["output.codes"])
    first = tokenizer.encode_mel(mel, lengths, num_codebooks=4)
    assert torch.equal(packed(first.transpose(1, 2), counts).T, values["output.codes_first4"])
    quantized = tokenizer.quantizer.decode(codes.transpose(1, 2))
    near(quantized, values["output.quantized_padded"])
    near(tokenizer.sound(quantized, counts), values["output.wave_batch"])


def test_published_sound():
    tokenizer, values = build("mimo_audio_tokenizer"), read("mimo_audio_tokenizer")[2]
    codes = values["output.codes"][None, :, : int(values["output.lengths"][0])]
    near(tokenizer.decode(codes), values["output.wave"])
    near(tokenizer.decode(codes[:, :4]), values["output.wave_first4"])


def test_published_patches():
    networks, values = build("mimo_audio_patch"), read("mimo_audio_patch")[2]
    config, ids = read("mimo_audio_patch")[0], values["input.input_ids"]
    near(networks.embed(ids[:, 1:], ids[:, 0, :: config["group"]]), values["output.input_embeds"])
    vectors = values["input.llm_hidden"][:, 0]
    near(networks.decoder.start(vectors)[:, None], values["output.local_hidden"])
    codes = networks.generate(vectors, torch.zeros(len(vectors), dtype=torch.long), GREEDY)
    assert torch.equal(codes.transpose(1, 2), values["output.patch_tokens"])
    logits = networks.logits(vectors, codes)
    for book, size in enumerate(config["speech_vocab"]):
        near(logits[:, book, :, : size - 1], values[f"output.logits.{book}"][..., : size - 1])
        assert bool((logits[:, book, :, size - 1 :] == -torch.inf).all())


def test_the_names_of_the_published_configuration():
    config, state, values = read("mimo_audio_patch")
    names = {"local_attn_heads": 4, "group_size": 4, "delay_pattern": "0-1-2-3", "input_full_attention": True}
    networks: Any = from_official("mimo_audio_patch", state, {**names, "rope_theta": 640000, "empty_idx": 49})
    assert networks.config == build("mimo_audio_patch").config and config["group"] == 4
    ids = values["input.input_ids"]
    near(networks.embed(ids[:, 1:], ids[:, 0, ::4]), values["output.input_embeds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_exact(family):
    state, official = read(family)[1], to_official(build(family))
    assert official.keys() == state.keys()
    assert all(torch.equal(official[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_do_not_fit_are_all_named(family):
    config, state, _ = read(family)
    gone = sorted(name for name in state if name.endswith("q_proj.weight"))[-2:]
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): extra\. Missing keys \(2\)"):
        from_official(
            family, {k: v for k, v in state.items() if k not in gone} | {"extra": torch.zeros(1)}, config
        )


def test_padding_changes_no_code_and_no_sample():
    tokenizer, audio, lengths = build("mimo_audio_tokenizer"), sounds(3), [1600, 900, 37]
    codes = tokenizer.encode(audio, lengths=lengths)
    output = tokenizer.decode(codes, lengths=lengths)
    assert output.shape == audio.shape
    for row, length in enumerate(lengths):
        frames, alone = tokenizer.num_frames(length), tokenizer.encode(audio[row : row + 1, :, :length])
        assert alone.shape[2] == frames
        assert torch.equal(codes[row : row + 1, :, :frames], alone)
        near(output[row : row + 1, :, :length], tokenizer.decode(alone, lengths=length))
        assert not output[row, :, length:].any()


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 1000])
def test_the_length_is_exact(samples):
    tokenizer, audio = build("mimo_audio_tokenizer"), sounds(1, samples)
    assert tokenizer.encode(audio).shape == (1, 6, tokenizer.num_frames(samples))
    assert tokenizer.reconstruct(audio).shape == audio.shape
    assert (tokenizer.sample_rate, tokenizer.frame_rate) == (1600, 25.0)


def test_codebooks_of_different_sizes():
    tokenizer = build("mimo_audio_tokenizer")
    assert tokenizer.codebook_sizes == (32, 32, 16, 16, 16, 16) and tokenizer.vocab_size == 32
    assert tokenizer.bits_per_second(3) == 25 * 14
    codes = torch.full((1, 6, 2), 16)
    with pytest.raises(TokenloomError, match="below the codebook sizes"):
        tokenizer.decode(codes)
    assert tokenizer.decode(codes[:, :2]).shape == (1, 1, 128)


def test_the_published_shape():
    with torch.device("meta"):
        tokenizer = MimoAudioTokenizer()
    assert (
        tokenizer.frame_rate == 25
        and tokenizer.bits_per_second(8) == 1550
        and tokenizer.bits_per_second() == 3650
    )
    assert round(sum(value.numel() for value in tokenizer.parameters()) / 1e9, 1) == 1.3


@pytest.mark.parametrize("family", FAMILIES)
def test_files_restore_everything(family, tmp_path):
    module = build(family)
    module.save_pretrained(tmp_path)
    again = type(module).from_pretrained(tmp_path).eval()
    if family == "mimo_audio_tokenizer":
        assert torch.equal(again.encode(sounds()), module.encode(sounds()))
        assert torch.equal(again.reconstruct(sounds()), module.reconstruct(sounds()))
    else:
        vectors, seeds = read(family)[2]["input.llm_hidden"][:, 0], torch.tensor([1, 2])
        assert torch.equal(again.generate(vectors, seeds), module.generate(vectors, seeds))


def small(order: dict[str, Any], causal: bool = False) -> PatchNetworks:
    torch.manual_seed(0)
    shape = {"width": 16, "heads": 2, "depth": 2}
    networks = PatchNetworks(3, [5, 7], 12, shape, {**shape, "width": 24}, order, causal, text_vocab=9).eval()
    for value in networks.parameters():
        if value.ndim > 1:
            value.normal_(std=0.4)
    return networks


ORDERS: list[dict[str, Any]] = [
    {"name": "delay"},
    {"name": "flat"},
    {"name": "parallel"},
    {"name": "coarse_first", "options": {"together": True}},
    {"name": "delay", "options": {"delays": [0, 2]}},
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_patches_are_written_as_they_are_taught(order):
    """Step by step with a cache draws what the teacher-forced logits say, in every order."""
    networks = small(order)
    vectors = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    codes = networks.generate(vectors, torch.arange(4), GREEDY)
    assert codes.shape == (4, 2, 3) and len(codes.unique()) > 3
    logits = networks.logits(vectors, codes)
    assert torch.equal(logits.argmax(-1), codes)
    step = networks.decoder.order.step.view(3, 2).T
    for book, time in ((0, 0), (1, 1)):
        changed = codes.clone()
        changed[:, book, time] = (changed[:, book, time] + 1) % 5
        same = step <= step[book, time]
        torch.testing.assert_close(networks.logits(vectors, changed)[:, same], logits[:, same])


def test_patches_do_not_see_each_other():
    networks = small(ORDERS[0])
    codes = torch.randint(5, (1, 2, 9), generator=torch.Generator().manual_seed(1))
    rows = networks.embed(codes)
    assert rows.shape == (1, 3, 12)
    torch.testing.assert_close(networks.embed(codes[:, :, 3:6]), rows[:, 1:2])
    words = torch.tensor([[0, 4, 0]])
    mixed = networks.embed(codes, words)
    torch.testing.assert_close(mixed[:, [0, 2]], rows[:, [0, 2]])
    torch.testing.assert_close(mixed[:, 1], networks.text.weight[4][None])


def test_a_causal_encoder_reads_frames_in_order():
    codes = torch.randint(5, (1, 2, 3), generator=torch.Generator().manual_seed(1))
    changed = codes.clone()
    changed[:, :, 2] = (changed[:, :, 2] + 1) % 5
    for causal in (True, False):
        networks = small(ORDERS[0], causal)
        networks.encoder.out.weight[:, 16:] = 0  # only the first frame of a patch comes out
        equal = torch.allclose(networks.embed(codes), networks.embed(changed), atol=1e-6)
        assert equal == causal


def test_no_code_is_silent():
    networks = small(ORDERS[0])
    none = torch.full((1, 2, 3), -1)
    assert torch.equal(networks.embed(none), networks.embed(torch.tensor([[[5] * 3, [7] * 3]])))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 2, 4, dtype=torch.long), "multiple of 3"),
        (torch.zeros(1, 3, 3, dtype=torch.long), r"\(B, 2, T\)"),
        (torch.zeros(1, 2, 3), "integer"),
        (torch.full((1, 2, 3), 8), "below"),
    ],
)
def test_wrong_codes_are_named(codes, message):
    with pytest.raises(TokenloomError, match=message):
        small(ORDERS[0]).embed(codes)


def test_wrong_settings_are_named():
    config, state, _ = read("mimo_audio_tokenizer")
    with pytest.raises(TokenloomError, match="rope_type"):
        from_official("mimo_audio_tokenizer", state, {**config["mimo"], "rope_type": "yarn"})
    with pytest.raises(TokenloomError, match="'encoder'"):
        MimoAudioTokenizer({"encodr": [1, 2, 3]})
    with pytest.raises(TokenloomError, match="one word a patch"):
        small(ORDERS[0]).embed(torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
