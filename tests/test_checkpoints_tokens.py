"""Official weights of LlamaGen, D-AR and NAR: logits, guided steps, greedy codes and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import GREEDY, build, close, condition_of, guided_steps_match, null_of, read, state_of

from tokenloom.checkpoints import families, from_official, official_guidance, to_official
from tokenloom.errors import TokenloomError
from tokenloom.generators import CaptionFeatures, Guidance, Sampling

CASES = [
    ("llamagen", "llamagen_c2i"),
    ("llamagen", "llamagen_t2i"),
    ("nar", "nar_c2i"),
    ("nar", "nar_t2i"),
    ("nar_video", "nar_video"),
    ("dar", "dar_gpt"),
]
CAPTIONS = [("llamagen", "llamagen_t2i"), ("nar", "nar_t2i")]
each = pytest.mark.parametrize(("family", "name"), CASES)
captioned = pytest.mark.parametrize(("family", "name"), CAPTIONS)


def test_the_families_are_known() -> None:
    assert {family for family, _ in CASES} <= set(families())


@torch.no_grad()
@each
def test_logits_and_loss(family: str, name: str) -> None:
    model, data = build(family, name), read(name)[0]
    logits = model.logits(data["input.ids"], condition_of(name))
    assert close(logits, data["output.tf_logits"])
    loss = model.loss(data["input.ids"], condition_of(name))
    torch.testing.assert_close(loss, data["output.tf_loss"][0], rtol=1e-4, atol=0)


@torch.no_grad()
@captioned
def test_samples_that_are_not_valid_do_not_count_in_the_loss(family: str, name: str) -> None:
    model, data = build(family, name), read(name)[0]
    codes, captions = data["input.ids"], condition_of(name)

    def loss(*valid: int) -> torch.Tensor:
        return model.loss(codes, CaptionFeatures(captions.features, captions.mask, torch.tensor(valid)))

    published = CaptionFeatures(captions.features, captions.mask, data["input.valid"])
    torch.testing.assert_close(model.loss(codes, published), data["output.tf_loss"][0], rtol=1e-4, atol=0)
    alone = model.loss(codes[:1], CaptionFeatures(captions.features[:1], captions.mask[:1]))
    torch.testing.assert_close(loss(1, 0), alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(1, 1), model.loss(codes, captions))
    assert loss(0, 0) == 0
    with pytest.raises(TokenloomError, match=r"valid must be \(2,\), got \(3,\)"):
        model.generate(CaptionFeatures(captions.features, captions.mask, torch.ones(3)))


@torch.no_grad()
@each
def test_every_layer(family: str, name: str) -> None:
    """Outputs of the blocks, at all rows that both sides run."""
    model, data = build(family, name), read(name)[0]
    seen: list[Any] = []
    handles = [
        block.register_forward_hook(lambda *args: seen.append(args[2])) for block in model.transformer.blocks
    ]
    model.logits(data["input.ids"], condition_of(name))
    for handle in handles:
        handle.remove()
    prefix = model.condition.length
    places = torch.cat((torch.arange(prefix), prefix + model.plan.position[prefix:]))
    assert len(seen) == sum(key.startswith("output.tf_block.") for key in data) > 1
    for index, got in enumerate(seen):
        want = data[f"output.tf_block.{index}"][:, places]
        if name in dict(map(reversed, CAPTIONS)):  # rows of padding are seen by nobody
            kept = read(name)[0]["input.emb_masks"].bool()
            kept = torch.cat((kept, torch.ones(len(kept), len(places) - prefix, dtype=torch.bool)), 1)
            got, want = got[kept], want[kept]
        assert close(got, want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llamagen_c2i", "nar_c2i", "llamagen_t2i", "dar_gpt"])
def test_rotary_tables(name: str) -> None:
    model, table = build(dict(map(reversed, CASES))[name], name), read(name)[0]["output.freqs_cis"]
    prefix = model.condition.length
    places = torch.cat((torch.arange(prefix), prefix + model.plan.position[prefix:]))
    torch.testing.assert_close(model.rope_cos, table[places, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.rope_sin, table[places, :, 1], rtol=0, atol=1e-6)


@captioned
def test_the_mask_of_padded_captions(family: str, name: str) -> None:
    """The official training mask, for the rows that we run."""
    model, data = build(family, name), read(name)[0]
    plan, prefix = model.plan, model.condition.length
    visible = model.condition.visible(condition_of(name))
    mask = plan.mask_for(visible, torch.arange(plan.rows), plan.rows, plan.mask)
    places = torch.cat((torch.arange(prefix), prefix + plan.position[prefix:]))
    assert torch.equal(mask[:, 0], data["input.train_mask"][:, places][:, :, places])


@pytest.mark.parametrize("decode", ["reference", "cached"])
@each
def test_greedy_codes(family: str, name: str, decode: str) -> None:
    model, (data, meta) = build(family, name), read(name)
    gen = meta["gen"]
    runs = {"ids": gen | {"cfg_interval": None}, "nocfg_ids": {"cfg_scale": 1.0}}
    if gen.get("cfg_interval"):
        runs["interval_ids"] = gen
    for key, settings in runs.items():
        guidance = official_guidance(family, **settings)
        codes = model.generate(condition_of(name), guidance=guidance, sampling=GREEDY, decode=decode)
        assert codes.tolist() == data[f"output.gen_{key}"].tolist(), key


@each
def test_guided_logits_of_every_step(family: str, name: str) -> None:
    data, meta = read(name)
    guidance = official_guidance(family, cfg_scale=meta["gen"]["cfg_scale"])
    guided_steps_match(build(family, name), name, data["output.gen_ids"].long(), guidance, "gen")


@pytest.mark.parametrize("seeds", [[7], [3, 9, 9, 2**40, 0]], ids=["one", "five"])
@each
def test_rungs_agree_when_sampling(family: str, name: str, seeds: list[int]) -> None:
    model, condition = build(family, name), condition_of(name)
    rows = torch.arange(len(seeds)) % 2
    if isinstance(condition, CaptionFeatures):
        condition = CaptionFeatures(condition.features[rows], condition.mask[rows])
    else:
        condition = condition[rows]
    keep = torch.zeros(model.order.layout.size, dtype=torch.bool)
    keep[3:6] = True
    known = torch.randint(
        model.vocab_size, (len(seeds), len(keep)), generator=torch.Generator().manual_seed(1)
    )
    for options in ({}, {"known": known, "keep": keep}):
        codes = [
            model.generate(
                condition, guidance=3.0, sampling=Sampling(top_k=20), seeds=seeds, decode=decode, **options
            )
            for decode in ("reference", "cached")
        ]
        assert torch.equal(*codes)
    assert torch.equal(codes[0][:, 3:6], known[:, 3:6])


@torch.no_grad()
@captioned
def test_padding_changes_nothing(family: str, name: str) -> None:
    """Whatever stands in rows of padding; and a caption alone equals itself in a batch."""
    model, condition, codes = build(family, name), condition_of(name), read(name)[0]["input.ids"]
    want = model.logits(codes, condition)
    noise = torch.randn(condition.shape, generator=torch.Generator().manual_seed(0))
    filled = torch.where(condition.mask.bool()[..., None], condition.features, noise)
    assert close(model.logits(codes, CaptionFeatures(filled, condition.mask)), want)
    assert not close(model.logits(codes, CaptionFeatures(filled)), want)
    alone = CaptionFeatures(condition.features[1:], condition.mask[1:])
    assert close(model.logits(codes[1:], alone), want[1:])


@torch.no_grad()
@captioned
def test_a_mask_that_hides_nothing_is_no_mask(family: str, name: str) -> None:
    model, features = build(family, name), condition_of(name).features
    full = CaptionFeatures(features, torch.ones(features.shape[:2]))
    assert model.condition.visible(full) is None
    codes = read(name)[0]["input.ids"]
    assert torch.equal(model.logits(codes, full), model.logits(codes, CaptionFeatures(features)))


@torch.no_grad()
@captioned
def test_no_caption_is_the_absent_one(family: str, name: str) -> None:
    model, codes = build(family, name), read(name)[0]["input.ids"]
    absent = state_of(name)["cls_embedding.uncond_embedding"]
    want = model.logits(codes, CaptionFeatures(absent.expand(2, -1, -1)))
    assert torch.equal(model.logits(codes), want)
    assert not close(
        model.logits(codes, null_of(model, name)), want
    )  # guidance keeps the mask of the caption


@each
def test_the_way_back(family: str, name: str) -> None:
    old, new = state_of(name), to_official(build(family, name))
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[key]) and value.dtype == new[key].dtype for key, value in old.items())


@each
def test_derivable_buffers_are_ignored_and_the_dtype_stays(family: str, name: str) -> None:
    state = {key: value.bfloat16() for key, value in state_of(name).items()}
    extra = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(1)}
    model = from_official(family, state | extra, read(name)[1]["config"])
    assert model.dtype == torch.bfloat16 and not model.training
    new = to_official(model)
    assert new.keys() == state.keys() and all(torch.equal(value, new[key]) for key, value in state.items())


@each
def test_bad_keys_are_listed(family: str, name: str) -> None:
    config, state = read(name)[1]["config"], state_of(name)
    del state["layers.1.attention.wo.weight"]
    del state["layers.0.ffn_norm.weight"]
    state |= {"layers.7.bias": torch.zeros(1), "hat": torch.zeros(1)}
    message = (
        r"Unknown keys \(2\): hat, layers.7.bias. Missing keys \(2\): layers.0.ffn_norm.weight, layers.1"
    )
    with pytest.raises(TokenloomError, match=message):
        from_official(family, state, config)


@each
def test_bad_shapes_are_listed(family: str, name: str) -> None:
    config, state = read(name)[1]["config"], state_of(name)
    state["layers.1.attention.wo.weight"] = torch.zeros(3, 3)
    message = r"attention.out.weight \(from layers.1.attention.wo.weight\) is \(3, 3\), expected \(64, 64\)"
    with pytest.raises(TokenloomError, match=message):
        from_official(family, state, config)


def test_bad_configurations() -> None:
    state = state_of("llamagen_c2i")
    with pytest.raises(TokenloomError, match="needs 'n_layer'"):
        from_official("llamagen", state, {"n_head": 4, "block_size": 16})
    with pytest.raises(TokenloomError, match="square number, got 15"):
        from_official("llamagen", state, {"n_head": 4, "block_size": 15, "n_layer": 2})
    with pytest.raises(TokenloomError, match=r"Missing keys \(18\): cls_embedding"):
        from_official("llamagen", {}, {"n_head": 4, "block_size": 16, "n_layer": 2})
    with pytest.raises(TokenloomError, match=r"Unknown checkpoint family 'llamgen'.*'llamagen'"):
        from_official("llamgen", state, {})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(2, dtype=torch.long), "takes CaptionFeatures"),
        (CaptionFeatures(torch.zeros(2, 5, 24)), r"\(B, 6, 24\), got torch.float32 \(2, 5, 24\)"),
        (CaptionFeatures(torch.zeros(2, 6, 24), torch.ones(2, 5)), r"mask must be \(2, 6\), got \(2, 5\)"),
        (CaptionFeatures(torch.zeros(1, 6, 24), torch.tensor([[1, 1, 1, 1, 1, 0]])), "padded on the left"),
    ],
)
def test_bad_captions(condition: Any, message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        build("llamagen", "llamagen_t2i").generate(condition)


@torch.no_grad()
def test_a_model_without_null_class() -> None:
    """Without label dropout the official table has no null row."""
    state, (data, meta) = state_of("llamagen_c2i"), read("llamagen_c2i")
    state["cls_embedding.embedding_table.weight"] = state["cls_embedding.embedding_table.weight"][:10]
    model = from_official("llamagen", state, meta["config"] | {"class_dropout_prob": 0.0})
    assert close(model.logits(data["input.ids"], data["input.cond"]), data["output.tf_logits"])
    with pytest.raises(TokenloomError, match="without a null class"):
        model.generate(data["input.cond"], guidance=2.0)
    with pytest.raises(TokenloomError, match=r"0..9.*got 10..10"):
        model.generate(torch.tensor([10]))


@torch.no_grad()
def test_gradients_reach_every_parameter() -> None:
    data = read("nar_t2i")[0]
    model = from_official("nar", state_of("nar_t2i"), read("nar_t2i")[1]["config"])
    with torch.enable_grad():
        logits = model.logits(data["input.ids"], condition_of("nar_t2i"))
        F.cross_entropy(logits.flatten(0, 1), data["input.ids"].flatten()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


# ---- guidance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "want"),
    [
        ("llamagen", {"cfg_scale": 4.0, "cfg_interval": -1, "top_k": 2000}, Guidance(4.0)),
        ("llamagen", {"cfg": "1.75"}, Guidance(1.75)),
        ("llamagen", {"cfg_scale": 0.5}, Guidance(1.0)),
        ("llamagen", {"cfg_scale": 2, "cfg_interval": 0}, Guidance(2.0, steps=2)),
        ("nar", {"cfg_scale": 2.0, "cfg_interval": 4}, Guidance(2.0, tokens=4)),
        ("dar", {"cfg_scale": "1.2,8.0"}, Guidance(8.0, "linear", 1.2)),
        ("dar", {"cfg_scale": "1.0,4"}, Guidance(4.0, "linear", 1.001)),
        ("dar", {"cfg_scale": 3.0}, Guidance(3.0)),
        ("nar_video", {}, Guidance()),
    ],
)
def test_official_guidance(family: str, settings: dict[str, Any], want: Guidance) -> None:
    assert official_guidance(family, **settings) == want


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {}, "'llamagen'"),
        ("nar", {"cfg_scal": 2}, "'cfg_scale'"),
        ("nar", {"cfg_scale": 2, "cfg": 2}, "cfg_scale and as cfg"),
        ("nar", {"cfg_scale": "much"}, "is a number, got 'much'"),
        ("dar", {"cfg_scale": "1,2,3"}, "two numbers"),
    ],
)
def test_bad_guidance(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        official_guidance(family, **settings)


def test_guidance_by_tokens_and_steps() -> None:
    brief = Guidance(3.0, steps=2)
    assert [brief.at(0.0, step=step) for step in (0, 1, 2)] == [3.0, 3.0, 1.0]
    limited = Guidance(3.0, tokens=4)
    assert [limited.at(0.5, made=made) for made in (0, 4, 5)] == [3.0, 3.0, 1.0]
    opening = Guidance(3.0, steps=1, opening=True)
    steps = {0: (0, 1), 1: (1, 1), 2: (2, 2), 3: (4, 2)}
    scales = [opening.at(0.0, step=step, made=made, count=count) for step, (made, count) in steps.items()]
    assert scales == [3.0, 1.0, 3.0, 1.0]
    growing = Guidance(1.5, "steps")
    assert growing.enabled and [growing.at(0.0, step=step) for step in (0, 1, 4)] == [1.0, 1.5, 3.0]
    with pytest.raises(TokenloomError, match="whole number from 0 up, got -1"):
        Guidance(tokens=-1)
