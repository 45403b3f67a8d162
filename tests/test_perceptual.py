"""FID and LPIPS: the formulas, and files of networks that are or are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_networks import Means
from torch import Tensor, nn

from tokenloom import TokenloomError
from tokenloom.evaluation.perceptual import FeatureNetwork, frechet_distance, lpips


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


def root_of_product(left: Tensor, right: Tensor) -> Tensor:
    """Trace of the square root of the product of two covariances, by its eigenvalues."""
    return torch.linalg.eigvals(left.T.cov() @ right.T.cov()).real.clamp(min=0).sqrt().sum()


@pytest.mark.parametrize("rows", [(40, 60), (3, 5)])
def test_frechet_distance_is_the_published_formula(rows: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(count, 6, generator=generator).double() for count in rows)
    right = right @ torch.randn(6, 6, generator=generator).double() + 1
    expected = (left.mean(0) - right.mean(0)).square().sum() + left.T.cov().trace() + right.T.cov().trace()
    expected = expected - 2 * root_of_product(left, right)
    assert frechet_distance(left, right) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-9)
    with pytest.raises(TokenloomError, match="at least 2 pictures"):
        frechet_distance(left[:1], right)


def test_networks_are_asked_for_what_the_metric_needs(network: Path) -> None:
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    for metric in ("FID", "LPIPS"):
        features = FeatureNetwork(metric, network)(pixels)
        assert features.shape == (20, 3)
        torch.testing.assert_close(features.float(), pixels.float().mean((2, 3)) / 255, atol=0.02, rtol=0)
    assert lpips(torch.zeros(2, 3), torch.tensor([[1.0, 2, 2], [0, 0, 0]])) == 4.5


def test_files_that_are_no_such_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match=r"does not come with tokenloom.*inception-2015-12-05\.pt"):
        FeatureNetwork("FID", tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(TokenloomError, match="no TorchScript file"):
        FeatureNetwork("LPIPS", tmp_path / "text.pt")
    torch.jit.script(nn.Conv2d(3, 3, 1)).save(str(tmp_path / "other.pt"))
    with pytest.raises(TokenloomError, match=r"network of LPIPS.*vgg16\.pt"):
        FeatureNetwork("LPIPS", tmp_path / "other.pt")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
