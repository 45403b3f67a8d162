"""Official weights of PAR and NBP: logits, masks, guided steps, greedy codes and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GREEDY, build, close, condition_of, guided_steps_match, read, state_of
from torch import Tensor

from tokenloom.checkpoints import from_official, official_guidance, to_official
from tokenloom.errors import TokenloomError
from tokenloom.generators import Guidance, NextBlockGenerator, Sampling

PAR = ["par_4x", "par_16x"]
CASES = [("par", "par_4x"), ("par", "par_16x"), ("nbp", "nbp_hybrid"), ("nbp", "nbp_fp")]
SPECIAL = 9  # special ids of the hybrid fixture: begin of video, 3 learned rows, 5 classes
GIVEN = 8  # tokens that the frame prediction fixture is given
each = pytest.mark.parametrize(("family", "name"), CASES)
rungs = pytest.mark.parametrize("decode", ["reference", "cached"])


def codes_of(model: NextBlockGenerator, name: str) -> Tensor:
    """The teacher-forced codes of a fixture, in layout order."""
    codes = read(name)[0]["input.ids"]
    return codes[:, model.order.inverse] if name in PAR else codes


def kept(name: str) -> dict[str, Any]:
    """What a generation has to be given."""
    if name != "nbp_fp":
        return {}
    return {"batch_size": 2, "known": read(name)[0]["input.ids"], "keep": torch.arange(24) < GIVEN}


@torch.no_grad()
@each
def test_logits_and_loss(family: str, name: str) -> None:
    model, data = build(family, name), read(name)[0]
    codes = codes_of(model, name)
    logits = model.logits(codes, condition_of(name))
    assert not logits[:, ~model.plan.predicted].any()
    ordered = logits[:, model.order.permutation][:, model.plan.predicted[model.order.permutation]]
    assert close(ordered, data["output.tf_logits"])
    loss = model.loss(codes, condition_of(name))
    torch.testing.assert_close(loss, data["output.tf_loss"][0], rtol=1e-4, atol=0)


@each
def test_masks(family: str, name: str) -> None:
    """Who sees whom, in the official sequence, for the rows that we run."""
    plan, data = build(family, name).plan, read(name)[0]
    want = {
        "nbp_hybrid": "output.tf_attn_mask",
        "nbp_fp": "output.prefix_attn_mask",
    }.get(name, "output.group_mask")
    place = torch.arange(plan.rows) if plan.place is None else plan.place
    official = data[want].reshape(-1, *data[want].shape[-2:])[0]
    rows = (place < len(official)).nonzero().squeeze(1)
    assert len(rows) > 7
    assert torch.equal(plan.mask[rows][:, rows], official[place[rows]][:, place[rows]])


@torch.no_grad()
@each
def test_every_layer(family: str, name: str) -> None:
    model, data = build(family, name), read(name)[0]
    wanted = [key for key in data if key.startswith("output.tf_block.")]
    seen: list[Any] = []
    handles = [
        block.register_forward_hook(lambda *args: seen.append(args[2])) for block in model.transformer.blocks
    ]
    model.logits(codes_of(model, name), condition_of(name))
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 and (len(wanted) == 2 or name == "nbp_fp")
    for index in range(len(wanted)):
        assert close(seen[index], data[f"output.tf_block.{index}"][:, model.plan.place])


@pytest.mark.parametrize("name", PAR)
def test_par_rotary_tables(name: str) -> None:
    model, table = build("par", name), read(name)[0]["output.freqs_cis"]
    torch.testing.assert_close(model.rope_cos, table[model.plan.place, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.rope_sin, table[model.plan.place, :, 1], rtol=0, atol=1e-6)


@rungs
@pytest.mark.parametrize("name", PAR)
def test_par_greedy_codes(name: str, decode: str) -> None:
    model, (data, meta) = build("par", name), read(name)
    gen = meta["gen"]
    for key, settings in (
        ("ids", gen | {"cfg_interval": -1}),
        ("nocfg_ids", {"cfg_scale": 1.0}),
        ("interval_ids", gen),
    ):
        guidance = official_guidance("par", **settings)
        codes = model.generate(condition_of(name), guidance=guidance, sampling=GREEDY, decode=decode)
        assert codes[:, model.order.permutation].tolist() == data[f"output.gen_{key}"].tolist(), key


@pytest.mark.parametrize("name", PAR)
def test_par_guided_logits_of_every_step(name: str) -> None:
    model, data = build("par", name), read(name)[0]
    codes = data["output.gen_ids"].long()[:, model.order.inverse]
    guided_steps_match(model, name, codes, official_guidance("par", cfg_scale=2.0), "gen")


NBP_RUNS = [
    ("gen", {}),
    ("gen_cfg_const", {"cfg_ratio": 0.5, "scale_cfg": False}),
    ("gen_cfg_scaled", {"cfg_ratio": 0.5, "scale_cfg": True, "steps": 9}),
]


@rungs
@pytest.mark.parametrize(("run", "settings"), NBP_RUNS)
def test_nbp_hybrid_greedy_codes(run: str, settings: dict[str, Any], decode: str) -> None:
    """Special ids are predicted too: negative codes, which are fed on."""
    model, want = build("nbp", "nbp_hybrid"), read("nbp_hybrid")[0][f"output.{run}_ids"] - SPECIAL
    codes = model.generate(
        condition_of("nbp_hybrid"),
        guidance=official_guidance("nbp", **settings),
        sampling=GREEDY,
        decode=decode,
    )
    assert codes.tolist() == want.tolist()
    assert run != "gen" or codes.min() < 0


@pytest.mark.parametrize(("run", "settings"), NBP_RUNS)
def test_nbp_hybrid_logits_of_every_step(run: str, settings: dict[str, Any]) -> None:
    codes = read("nbp_hybrid")[0][f"output.{run}_ids"] - SPECIAL
    guidance = official_guidance("nbp", **settings)
    guided_steps_match(build("nbp", "nbp_hybrid"), "nbp_hybrid", codes, guidance, run)


@rungs
@torch.no_grad()
def test_nbp_continues_known_frames(decode: str) -> None:
    model, data = build("nbp", "nbp_fp"), read("nbp_fp")[0]
    codes = model.generate(sampling=GREEDY, decode=decode, **kept("nbp_fp"))
    assert torch.equal(codes[:, :GIVEN], data["input.ids"][:, :GIVEN])
    assert codes[:, GIVEN:].tolist() == data["output.gen_ids"].tolist()
    logits = model.logits(codes)
    for step in range(4):
        start = GIVEN + 4 * step
        assert close(logits[:, start : start + 4], data[f"output.gen_step_logits.{step}"])


def test_nbp_needs_its_first_block() -> None:
    model = build("nbp", "nbp_fp")
    with pytest.raises(TokenloomError, match="predicts 20 of 24 positions from the others"):
        model.generate(batch_size=2)
    with pytest.raises(TokenloomError, match="keep must hold where this generator predicts nothing"):
        model.generate(**(kept("nbp_fp") | {"keep": torch.arange(24) < 3}))


@pytest.mark.parametrize("seeds", [[7], [3, 9, 9, 2**40, 0]], ids=["one", "five"])
@each
def test_rungs_agree_when_sampling(family: str, name: str, seeds: list[int]) -> None:
    model = build(family, name)
    rows = torch.arange(len(seeds)) % 2
    options = (
        {"batch_size": len(seeds)}
        if name == "nbp_fp"
        else {"condition": condition_of(name)[rows], "guidance": 3.0}
    )
    known = codes_of(model, name)[rows]
    keep = model.order.step % 3 == 0
    every = [options | {"known": known, "keep": keep}]
    if name != "nbp_fp":
        every.append(options)
    for choice in every:
        codes = [
            model.generate(**choice, sampling=Sampling(top_k=20), seeds=seeds, decode=decode)
            for decode in ("reference", "cached")
        ]
        assert torch.equal(*codes)
        assert "keep" not in choice or torch.equal(codes[0][:, keep], known[:, keep])


@torch.no_grad()
@each
def test_loss_is_the_sum_of_the_steps(family: str, name: str) -> None:
    """The teacher-forced loss equals what a cached generation that keeps every code pays step by step."""
    model = build(family, name)
    codes, spent, real = codes_of(model, name), [], model._sample

    def pay(logits: Tensor, seeds: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        targets = codes[:, positions, None] + model.special
        spent.append(-logits.log_softmax(-1).gather(-1, targets).squeeze(-1))
        return real(logits, seeds, positions, *rest)

    model._sample = pay
    try:
        everything = torch.ones(codes.shape[1], dtype=torch.bool)
        batch = {"batch_size": 2} if name == "nbp_fp" else {"condition": condition_of(name)}
        model.generate(**batch, known=codes, keep=everything)
    finally:
        del model._sample
    assert len(spent) == model.order.num_steps - (name == "nbp_fp")
    want = model.loss(codes, condition_of(name))
    torch.testing.assert_close(torch.cat(spent, 1).mean(), want, rtol=1e-5, atol=0)


@each
def test_the_way_back(family: str, name: str) -> None:
    old, new = state_of(name), to_official(build(family, name))
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[key]) for key, value in old.items())


@torch.no_grad()
@each
def test_other_dtypes(family: str, name: str) -> None:
    state = {key: value.bfloat16() for key, value in state_of(name).items()}
    model = from_official(family, state, read(name)[1]["config"])
    assert model.logits(codes_of(model, name), condition_of(name)).dtype == torch.bfloat16
    new = to_official(model)
    assert all(torch.equal(value, new[key]) and new[key].dtype == value.dtype for key, value in state.items())


@torch.no_grad()
@each
def test_save_and_load(family: str, name: str, tmp_path: Path) -> None:
    model = build(family, name)
    model.save_pretrained(tmp_path)
    loaded = NextBlockGenerator.from_pretrained(tmp_path)
    codes = codes_of(model, name)
    assert torch.equal(loaded.logits(codes, condition_of(name)), model.logits(codes, condition_of(name)))


@each
def test_bad_keys_are_listed(family: str, name: str) -> None:
    state = state_of(name)
    gone = sorted(state)[0], next(key for key in state if "tok_emb" in key)
    for key in gone:
        del state[key]
    message = rf"Unknown keys \(1\): hat\. Missing keys \(2\): {', '.join(gone)}"
    with pytest.raises(TokenloomError, match=message):
        from_official(family, state | {"hat": torch.zeros(1)}, read(name)[1]["config"])


def test_the_tokenizer_of_a_training_checkpoint_is_left_out() -> None:
    extra = {"first_stage_model.decoder.weight": torch.zeros(3)}
    config = read("nbp_hybrid")[1]["config"]
    model = from_official("nbp", state_of("nbp_hybrid") | extra, config)
    assert to_official(model).keys() == state_of("nbp_hybrid").keys()
    with pytest.raises(TokenloomError, match="either hybrid"):
        from_official("nbp", state_of("nbp_hybrid"), config | {"hybrid": False})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(2), r"shape \(B,\), got torch.float32 \(2,\)"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(B,\), got torch.int64 \(2, 2\)"),
        (torch.tensor([5]), r"0..4 \(-1 = none\), got 5..5"),
    ],
)
def test_bad_nbp_conditions(condition: Tensor, message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        build("nbp", "nbp_hybrid").generate(condition)


@torch.no_grad()
def test_nbp_conditions() -> None:
    model, data = build("nbp", "nbp_hybrid"), read("nbp_hybrid")[0]
    codes, labels = data["input.ids"], data["input.cond"]
    want = model.logits(codes, labels)
    assert torch.equal(model.logits(codes, labels[:, None]), want)
    assert torch.equal(model.logits(codes), model.logits(codes, torch.tensor([-1, -1])))
    assert not close(model.logits(codes), want)


def test_gradients_reach_every_parameter() -> None:
    for family, name in CASES:
        model = from_official(family, state_of(name), read(name)[1]["config"])
        model.loss(codes_of(model, name), condition_of(name)).backward()
        assert [key for key, value in model.named_parameters() if value.grad is None] == []


def test_nbp_guidance() -> None:
    assert official_guidance("nbp") == Guidance()
    assert official_guidance("nbp", cfg_ratio=0.5) == Guidance(1.5)
    assert official_guidance("nbp", cfg_ratio=0.5, scale_cfg=True) == Guidance(1.5, "steps")
    assert official_guidance("par", cfg_scale=1.5, cfg_interval=4) == Guidance(1.5, steps=6, opening=True)
