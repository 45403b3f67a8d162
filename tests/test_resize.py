"""Weights over layouts of other sizes."""

from __future__ import annotations

import pytest
import torch

from tokenloom import Layout, NextNeighborGenerator, NextScaleGenerator, TokenloomError, orders
from tokenloom.generators.resize import resized

SHAPE = {"width": 16, "heads": 2, "depth": 1}


def neighbor(**options: object) -> NextNeighborGenerator:
    torch.manual_seed(0)
    return NextNeighborGenerator(
        orders.neighbors(Layout.grid(4, 4)).to_config(),
        16,
        SHAPE | options,
        {"kind": "class", "num_classes": 3},
    ).eval()


def test_rotary_positions_go_to_any_grid():
    small = neighbor()
    large = resized(small, Layout.grid(3, 6))
    codes = large.generate(torch.tensor([1]), seeds=1)
    assert codes.shape == (1, 18) and large.order.num_steps == 8
    assert torch.equal(codes, large.generate(torch.tensor([1]), seeds=1, decode="reference"))
    back = resized(large, Layout.grid(4, 4))
    assert torch.equal(back.generate(torch.tensor([1]), seeds=1), small.generate(torch.tensor([1]), seeds=1))


def test_learned_positions_are_interpolated_on_request_alone():
    small = neighbor(rope=False, learned_positions=17)
    with pytest.raises(TokenloomError, match=r"positions.*4, 4.*interpolate=True"):
        resized(small, Layout.grid(8, 8))
    table = small.transformer.positions.weight
    ramp = torch.arange(4.0).repeat_interleave(4)  # a position vector that counts rows
    with torch.no_grad():
        table[1:] = ramp[:, None]
    large = resized(small, Layout.grid(8, 4), interpolate=True)
    found = large.transformer.positions.weight
    assert found.shape == (33, 16) and torch.equal(found[0], table[0])  # the row of the class stays
    rows = found[1:, 0].detach().view(8, 4)
    assert torch.allclose(rows[:, :1].expand(-1, 4), rows)  # columns are alike, as before
    assert torch.allclose(rows[2:6, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.1)
    assert large.generate(torch.tensor([1]), seeds=1).shape == (1, 32)
    same = resized(small, Layout.grid(4, 4), interpolate=True)
    assert torch.equal(same.transformer.positions.weight, table)


def test_scales_are_interpolated_map_by_map():
    torch.manual_seed(0)
    order = orders.scales(Layout.scales([1, 2, 3]))
    options = SHAPE | {"rope": False, "modulation": "own"}
    small = NextScaleGenerator(
        order.to_config(), 16, options, {"kind": "class", "num_classes": 3}, rule_config={"channels": 4}
    ).eval()
    wide = Layout.scales([(1, 1), (2, 4), (3, 6)])
    with pytest.raises(TokenloomError, match="interpolate=True"):
        resized(small, wide)
    large = resized(small, wide, interpolate=True)
    assert large.generate(torch.tensor([2]), seeds=1).shape == (1, 27)
    assert torch.equal(large.tokens.places[0], small.tokens.places[0])  # the single place of the first map


def test_other_kinds_of_layouts_are_refused():
    with pytest.raises(TokenloomError, match="of that kind"):
        resized(neighbor(), Layout.line(16))
