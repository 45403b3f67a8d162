"""ImageStepTokenizer: previews from prefixes, steps and their codes, batches, training, sizes, files, and bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import ImageStepTokenizer, Layout, TokenloomError
from tokenloom.testing import check_tokenizer

STACK: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}


def build(**options: Any) -> ImageStepTokenizer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "registers": 8,
        "steps": 4,
        "encoder_config": STACK | {"patch": 4},
        "condition_config": STACK,
        "painter_config": STACK | {"patch": 4},
        "quantizer_options": {"codebook_size": 64, "dim": 4},
    }
    return ImageStepTokenizer(16, **settings | options).eval()


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def count_steps(tokenizer: ImageStepTokenizer, codes: Tensor) -> int:
    calls = []
    hook = tokenizer.painter.register_forward_hook(lambda *_: calls.append(1))
    tokenizer.decode(codes)
    hook.remove()
    return len(calls)


def test_shapes_and_ranges():
    tokenizer = build()
    assert tokenizer.layout == Layout.line(8)
    codes = tokenizer.encode(pictures(3))
    assert codes.shape == (3, 8)
    assert len(codes.unique()) > 3
    output = tokenizer.decode(codes)
    assert output.shape == (3, 3, 16, 16)
    assert output.abs().max() <= 1
    assert torch.equal(tokenizer.reconstruct(pictures(3)), output)


def test_a_prefix_takes_the_steps_that_its_codes_reach():
    tokenizer = build()
    codes = tokenizer.encode(pictures(2))
    assert [count_steps(tokenizer, codes[:, :count]) for count in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    painted = [tokenizer.decode(codes[:, :count]) for count in range(1, 9)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(painted))
    assert torch.equal(tokenizer.reconstruct(pictures(2), num_tokens=5), painted[4])


def test_a_step_sees_its_own_group_alone():
    tokenizer = build()
    codes = tokenizer.encode(pictures(1))
    groups = []
    hook = tokenizer.painter.register_forward_hook(lambda _, given, __: groups.append(given[2]))
    tokenizer.decode(codes)
    hook.remove()
    tokens = tokenizer.conditioner(tokenizer.quantizer.decode(codes))
    assert all(torch.equal(group, tokens[:, 2 * step : 2 * step + 2]) for step, group in enumerate(groups))


def test_codes_and_condition_are_causal():
    tokenizer = build()
    before = tokenizer.features(pictures(1))
    with torch.no_grad():
        tokenizer.encoder.queries[5:] += 1
    after = tokenizer.features(pictures(1))
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-4
    codes = tokenizer.encode(pictures(1))
    whole = tokenizer.conditioner(tokenizer.quantizer.decode(codes))
    part = tokenizer.conditioner(tokenizer.quantizer.decode(codes[:, :3]))
    torch.testing.assert_close(part, whole[:, :3])


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, [0, 2, 4, 6]),
        ({"steps": 8, "groups": 4}, [0, 2, 2, 4, 4, 6, 6, 6]),
        ({"groups": 2}, [0, 4, 4, 4]),
        ({"group_size": 5}, [0, 2, 3, 3]),
    ],
)
def test_groups_of_steps(options, starts):
    """Step s has time s / steps; its group begins at that time, rounded to a group, in codes."""
    tokenizer = build(**options)
    times = torch.arange(tokenizer.steps) / tokenizer.steps
    assert tokenizer._first(times).tolist() == starts


def test_a_picture_is_the_same_in_any_batch():
    tokenizer, batch = build(), pictures(4)
    codes = tokenizer.encode(batch)
    assert torch.equal(torch.cat([tokenizer.encode(picture[None]) for picture in batch]), codes)
    alone = torch.cat([tokenizer.decode(row[None]) for row in codes])
    torch.testing.assert_close(alone, tokenizer.decode(codes), atol=1e-5, rtol=1e-5)
    both = tokenizer.decode(codes[:2], seeds=[5, 6])
    torch.testing.assert_close(both[1:], tokenizer.decode(codes[1:2], seeds=6), atol=1e-5, rtol=1e-5)
    assert (both - tokenizer.decode(codes[:2])).abs().amax((1, 2, 3)).min() > 1e-3


def test_orders_differ_after_the_first_step():
    tokenizer = build()
    codes = tokenizer.encode(pictures(1))
    assert torch.equal(tokenizer.decode(codes[:, :2], order=1), tokenizer.decode(codes[:, :2]))
    assert not torch.equal(tokenizer.decode(codes, order=1), tokenizer.decode(codes))


def test_evaluation_pass_is_the_reconstruction():
    tokenizer = build()
    with torch.no_grad():
        output, quantized = tokenizer(pictures(2))
    assert torch.equal(output.clamp(-1, 1), tokenizer.reconstruct(pictures(2)))
    assert torch.equal(quantized.codes, tokenizer.encode(pictures(2)))


def test_a_perfect_velocity_has_no_loss_and_points_at_the_picture(monkeypatch):
    tokenizer, pixels, noise = build(), pictures(3), torch.randn(3, 3, 16, 16)
    monkeypatch.setattr(tokenizer.painter, "forward", lambda *_: (0.6 * pixels - noise, None))
    painted, loss = tokenizer.flow(pixels, torch.zeros(3, 2, 16), torch.tensor([0.0, 0.4, 0.9]), noise)
    assert float(loss) == 0
    torch.testing.assert_close(painted, pixels, atol=1e-5, rtol=1e-5)


def test_codebook_losses_count_the_codes_up_to_the_time():
    tokenizer = build()
    z = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    quantized = tokenizer.quantizer.encode(z)
    whole = tokenizer._codebook_losses(z, quantized.codes, torch.tensor([7, 7]))
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(whole[name], quantized.losses[name])
    part = tokenizer._codebook_losses(z, quantized.codes, torch.tensor([1, 3]))
    units = torch.nn.functional.normalize(z, dim=-1)
    errors = (units - tokenizer.quantizer.decode(quantized.codes)).square().mean(-1)
    torch.testing.assert_close(part["codebook"], (errors[0, :2].sum() + errors[1, :4].sum()) / 6)


def test_gradient_reaches_every_weight():
    tokenizer = build().train()
    output, quantized = tokenizer(pictures(1).expand(24, -1, -1, -1))
    sum(quantized.losses.values(), output.square().mean()).backward()
    missing = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_it_learns_a_few_pictures():
    tokenizer = build().train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    batch = pictures(2, 4, 4).repeat(8, 1, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    errors = []
    for _ in range(40):
        losses = tokenizer(batch)[1].losses
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        errors.append(float(losses["flow"].detach()))
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])


def test_pictures_of_any_size():
    tokenizer = build()
    assert tokenizer.reconstruct(pictures(2, 9, 30)).shape == (2, 3, 9, 30)


def test_features_for_another_network():
    shape = STACK | {"patch": 2, "align_width": 12, "align_features": 5, "align_grid": 4}
    tokenizer = build(painter_config=shape)
    tokens = tokenizer.conditioner(tokenizer.quantizer.decode(tokenizer.encode(pictures(2))))
    velocity, features = tokenizer.painter(pictures(2), torch.zeros(2), tokens[:, :2])
    assert velocity.shape == (2, 3, 16, 16)
    assert features.shape == (2, 16, 5)  # 8x8 patches, averaged to 4x4


def test_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageStepTokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(pictures(2))
    assert torch.equal(loaded.encode(pictures(2)), codes)
    assert torch.equal(loaded.decode(codes[:, :3]), tokenizer.decode(codes[:, :3]))


def test_the_contract_is_kept():
    assert {"batch", "gradient", "save and load", "dtype"} <= set(check_tokenizer(build(), batch_size=3))


@pytest.mark.parametrize(
    "codes", [torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 4), torch.zeros(1, 0).long()]
)
def test_codes_of_a_wrong_kind_are_refused(codes):
    with pytest.raises(TokenloomError, match=r"integer codes of shape \(B, k\), k = 1\.\.8"):
        build().decode(codes)


def test_bad_input_is_refused():
    tokenizer, broken = build(), pictures(1)
    broken[0, 0, 3, 3] = torch.inf
    with pytest.raises(TokenloomError, match="NaN or infinity"):
        tokenizer.encode(broken)
    with pytest.raises(TokenloomError, match=r"must lie in 0\.\.63"):
        tokenizer.decode(torch.full((1, 8), 64))
    with pytest.raises(TokenloomError, match="order must be 1"):
        tokenizer.decode(torch.zeros(1, 8, dtype=torch.long), order=3)
    with pytest.raises(TokenloomError, match=r"1\.\.8 codes, not num_tokens=9"):
        tokenizer.encode(pictures(1), num_tokens=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"group_size": 9}, "1 <= group_size <= registers"),
        ({"rows": 4}, "registers <= rows"),
        ({"encoder_config": {"ranks": 3}}, "Unknown option of encoder_config 'ranks'.*'rank'"),
        ({"painter_config": {"deviation": 0}}, "deviation and shift must be above 0"),
        ({"painter_config": {"modulated_head": True}}, "modulated_head needs shared_time"),
        ({"condition_config": {"heads": 0}}, "width and heads must be at least 1"),
        ({"quantizer_options": {"codebook": 3}}, "Unknown option of quantizer_options 'codebook'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TokenloomError, match=message):
        build(**options)
