"""HiMTok: published codes, masks of every prefix, sequences of a language model, losses, and the way back."""

from __future__ import annotations

import pytest
import torch
from golden_tokenizers import near, read
from torch import Tensor

from tokenloom import MaskTokenizer, TokenloomError
from tokenloom.checkpoints import from_official, to_official
from tokenloom.tokenizers.mask_words import MaskWords
from tokenloom.training.mask_losses import blurred_target, hierarchical_loss, soft_mask_loss

TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def tokenizer() -> MaskTokenizer:
    config, state, _ = read("himtok")
    return from_official("himtok", state, config)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return read("himtok")[2]


@pytest.fixture(scope="module")
def words() -> MaskWords:
    config = read("himtok")[0]
    return MaskWords(
        start=config["tt_start"],
        end=config["tt_end"],
        first=config["tt_index_start"],
        levels=config["num_latent_tokens"],
        codes=config["codebook_size"],
    )


def as_published(vectors: Tensor) -> Tensor:
    return vectors.transpose(1, 2).unsqueeze(2)


def test_published_codes(tokenizer, values):
    masks = values["input.mask"]
    near(as_published(tokenizer.features(masks)), values["output.z"], TOLERANCE)
    quantized = tokenizer.quantize(masks)
    assert torch.equal(quantized.codes, values["output.tokens"])
    assert torch.equal(tokenizer.encode(masks > 0.5), values["output.tokens"])
    assert torch.equal(tokenizer.encode((255 * masks).byte()), values["output.tokens"])
    near(as_published(quantized.z_q), values["output.quantized"], TOLERANCE)
    near(quantized.losses["codebook"], values["output.codebook_loss"], TOLERANCE)
    near(quantized.losses["commitment"], values["output.commitment_loss"], TOLERANCE)
    near(tokenizer.quantizer.projected(), values["output.codebook"], TOLERANCE)


def test_registers_see_patches_and_earlier_registers(tokenizer, values):
    assert torch.equal(~tokenizer.encoder.visible, values["output.attention_mask"].bool())


def test_published_masks_of_every_length(tokenizer, values):
    codes = values["output.tokens"]
    near(tokenizer.raw(tokenizer.quantizer.decode(codes)), values["output.decoder_raw"], TOLERANCE)
    for length in read("himtok")[0]["levels"]:
        wanted = values[f"output.mask_from_{length}_tokens"].squeeze(1)
        near(tokenizer.decode(codes, length).sigmoid(), wanted, TOLERANCE)
        near(tokenizer.decode(codes[:, :length], output="probabilities"), wanted, TOLERANCE)
        assert torch.equal(tokenizer.decode(codes, length, output="mask"), wanted > 0.5)
        logits, _ = tokenizer(values["input.mask"], torch.full((2,), length))
        near(logits.sigmoid(), wanted, TOLERANCE)


def test_masks_that_are_not_square(tokenizer, values):
    wide = values["input.wide_mask_u8"]
    prepared = tokenizer.prepare(wide).expand(-1, 3, -1, -1)
    near(prepared, values["output.prepared_wide"], TOLERANCE)
    codes = tokenizer.encode(wide)
    assert torch.equal(codes, values["output.tokens_wide"])
    assert tokenizer.decode(codes, size=(30, 48)).shape == (1, 30, 48)


def test_published_sequences(tokenizer, values, words):
    codes = tokenizer.encode(values["input.lm.target_masks"])
    ids, labels = words.insert(values["input.lm.input_ids"], values["input.lm.labels"], codes)
    assert torch.equal(ids, values["output.lm.input_ids"])
    assert torch.equal(labels, values["output.lm.labels"])
    parsed, found = words.parse(ids)
    assert torch.equal(parsed, values["output.lm.parsed_tokens"])
    assert torch.equal(found, values["output.lm.valid"].bool())
    probabilities, found = words.probabilities(values["input.lm.logits"], labels)
    assert torch.equal(found, values["output.lm.valid"].bool())
    near(probabilities, values["output.lm.probs"], TOLERANCE)


def test_published_soft_masks_and_losses(tokenizer, values):
    soft = tokenizer.decode_probabilities(values["output.lm.probs"])
    near(soft, values["output.lm.soft_mask"].squeeze(1), TOLERANCE)
    found = values["output.lm.valid"].bool()
    masks = values["input.lm.target_masks"][found]
    near(soft_mask_loss(soft[found], masks, together=True), values["output.lm.mask_loss"], TOLERANCE)
    cuts = values["output.lm.cut_lengths"].tolist()
    loss = hierarchical_loss(tokenizer, values["output.lm.probs"][found], masks, cuts, official=True)
    near(loss, values["output.lm.hierarchical_loss"], TOLERANCE)
    for cut in (-1, 1, 4):
        near(blurred_target(masks, cut), values[f"output.lm.blurred_target.{cut}"], TOLERANCE)


def test_without_the_slips_every_level_counts(tokenizer, values):
    found = values["output.lm.valid"].bool()
    masks, given = values["input.lm.target_masks"][found], values["output.lm.probs"][found]
    both = hierarchical_loss(tokenizer, given, masks, [2, 8])
    each = [hierarchical_loss(tokenizer, given, masks, [level]) for level in (2, 8)]
    torch.testing.assert_close(both, sum(each) / 2)
    whole = soft_mask_loss(tokenizer.decode_probabilities(given), masks)
    torch.testing.assert_close(each[1], whole)


def test_the_way_back_is_exact(tokenizer):
    official, state = to_official(tokenizer), read("himtok")[1]
    assert official.keys() == state.keys()
    assert all(torch.equal(official[key], value) for key, value in state.items())


def test_every_weight_is_used(values):
    config, state, _ = read("himtok")
    tokenizer, random = from_official("himtok", state, config), torch.Generator().manual_seed(5)
    masks, codes = values["input.mask"][:1], values["output.tokens"][:1]

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        return tokenizer.features(masks), tokenizer.decode(codes, 7), tokenizer.quantizer.projected()

    with torch.no_grad():
        before = outputs()
        for key, weight in tokenizer.named_parameters():
            kept = weight.clone()
            weight += torch.randn(weight.shape, generator=random)
            assert any((a - b).abs().max() > 1e-4 for a, b in zip(outputs(), before, strict=True)), key
            weight.copy_(kept)


def test_weights_in_a_published_container(values):
    config, state, _ = read("himtok")
    wrapped = {"model": {f"module.{name}": value for name, value in state.items()}}
    tokenizer = from_official("himtok", wrapped, config)  # type: ignore[arg-type]
    assert torch.equal(tokenizer.encode(values["input.mask"]), values["output.tokens"])


def test_weights_that_do_not_fit_are_all_named():
    config, state, _ = read("himtok")
    gone = ("latent_tokens", "quantize.embedding_proj.weight")
    with pytest.raises(TokenloomError, match="latent_tokens"):
        from_official("himtok", {key: value for key, value in state.items() if key not in gone}, config)
    with pytest.raises(TokenloomError, match=r"Missing keys \(1\): quantize\.embedding_proj"):
        from_official("himtok", {key: value for key, value in state.items() if key != gone[1]}, config)
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): sam"):
        from_official("himtok", state | {"sam": torch.zeros(1)}, config)
    with pytest.raises(TokenloomError, match="mask_token"):
        from_official("himtok", state | {"decoder.mask_token": torch.zeros(1, 2, 32)}, config)


def test_blurs_outside_the_official_range_are_refused(values):
    for cut in (-2, 48):
        with pytest.raises(TokenloomError, match="-1 to 47"):
            blurred_target(values["input.mask"], cut)
