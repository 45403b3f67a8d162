"""The optimizers: which parameters decay, which Muon moves, its step against the definition, and exact resume with it."""

from __future__ import annotations

import pytest
import torch
from timm.optim import NAdamW
from tiny_task import TinyTask
from torch import nn

from tokenloom import TokenloomError
from tokenloom.training.config import LoopConfig
from tokenloom.training.loop import Trainer
from tokenloom.training.optimizers import make_optimizer, parameter_groups


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.convolution = nn.Linear(6, 8), nn.Conv2d(2, 4, 3)
        self.words, self.tied = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.tied.weight = self.words.weight
        self.head = nn.Linear(6, 100)
        self.codebook, self.place = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(7, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)


def names(module: nn.Module, group: dict) -> set[str]:
    known = {id(value): name for name, value in module.named_parameters()}
    return {known[id(value)] for value in group["params"]}


def test_vectors_and_codebooks_do_not_decay():
    module = Parts()
    decayed, kept = parameter_groups(module, 0.1)
    matrices = {"linear.weight", "convolution.weight", "words.weight", "head.weight", "place"}
    assert names(module, decayed) == matrices
    assert names(module, kept) == {"linear.bias", "convolution.bias", "head.bias", "codebook"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_muon_moves_matrices_between_hidden_layers_only():
    module = Parts()
    first, second, third = parameter_groups(module, 0.1, hidden=True)
    assert names(module, first) == {"linear.weight", "convolution.weight"}
    assert names(module, second) == {"words.weight", "head.weight", "place"}
    assert names(module, third) == {"linear.bias", "convolution.bias", "head.bias", "codebook"}
    assert [group.get("use_fallback", False) for group in (first, second, third)] == [False, True, True]


def test_a_module_of_one_kind_has_one_group():
    assert [len(parameter_groups(nn.LayerNorm(3), 0.1, hidden=hidden)) for hidden in (False, True)] == [1, 1]


def test_muon_steps_along_the_orthogonalised_gradient_with_the_size_of_adamw():
    torch.manual_seed(0)
    module = nn.Linear(16, 32, bias=False)
    gradient, before = torch.randn(32, 16), module.weight.detach().clone()
    module.weight.grad = gradient.clone()
    make_optimizer("muon", module, 0.01, 0.0, (0.9, 0.95)).step()
    step = before - module.weight.detach()
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    cosine = (step * (left @ right)).sum() / step.norm() / 16**0.5
    assert cosine > 0.98  # five iterations come near the orthogonal factor
    sizes = torch.linalg.svdvals(step) / (0.01 * 0.2 * 32**0.5)
    assert 0.6 < sizes.min() and sizes.max() < 1.4
    assert step.dtype == torch.float32


def test_muon_leaves_the_rest_to_nadamw():
    pair = [nn.LayerNorm(5), nn.LayerNorm(5)]
    muon = make_optimizer("muon", pair[0], 0.01, 0.1, (0.9, 0.95))
    nadamw = NAdamW(parameter_groups(pair[1], 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-7)
    for _ in range(3):
        for module, optimizer in zip(pair, (muon, nadamw), strict=True):
            module.weight.grad, module.bias.grad = torch.arange(5.0) - 2, torch.ones(5)
            optimizer.step()
    torch.testing.assert_close(pair[0].weight, pair[1].weight)
    torch.testing.assert_close(pair[0].bias, pair[1].bias)
    assert (pair[0].bias.abs() > 0.02).all()


def test_resumed_training_with_muon_is_exactly_the_uninterrupted_one(tmp_path):
    def run(output, resume="", **changes):
        values = {"steps": 12, "batch_size": 4, "warmup": 2, "learning_rate": 1e-2, "precision": "no"}
        task = TinyTask()
        trainer = Trainer(
            task, LoopConfig(**values | {"checkpoint_every": 4, "optimizer": "muon"} | changes), output
        )
        if resume:
            trainer.resume(resume)
        trainer.run()
        return [value.detach().clone() for value in task.module.parameters()]

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut")
    resumed = run(tmp_path / "cut", str(tmp_path / "cut" / "checkpoints" / "step-00000008"))
    adamw = run(tmp_path / "adamw", optimizer="adamw")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, adamw, strict=True))


def test_unknown_optimizers_are_named():
    with pytest.raises(TokenloomError, match="muon"):
        LoopConfig(optimizer="mun")
