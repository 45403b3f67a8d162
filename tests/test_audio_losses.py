"""Losses of sound: golden mel distance, zero at equality, order, gradients, short sound, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.training.audio_losses import MelLoss, SpectrumDiscriminator, feature_loss, stft_loss

GOLDEN = load_file(Path(__file__).parent / "fixtures" / "metrics_audio.safetensors")


def speech(name: str = "speech", samples: int = 48000) -> Tensor:
    return GOLDEN[f"input.{name}"][None, :, :samples]


def test_published_mel_distance():
    got = MelLoss(16000)(speech("speech_degraded"), speech())
    torch.testing.assert_close(got, GOLDEN["output.mel_distance"].view(()), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("loss", [MelLoss(16000), stft_loss], ids=["mel", "stft"])
def test_distance_grows_with_noise_and_is_zero_at_equality(loss):
    audio = speech(samples=8000)
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(0))
    assert float(loss(audio, audio)) == 0
    distances = [float(loss(audio + size * noise, audio)) for size in (0.001, 0.01, 0.1)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("loss", [MelLoss(16000), stft_loss], ids=["mel", "stft"])
@pytest.mark.parametrize("samples", [1, 100, 4000])
def test_gradients_are_finite_even_for_silence_and_short_sound(loss, samples):
    for start in (torch.zeros(1, 1, samples), speech(samples=samples) + 0.1):
        output = start.clone().requires_grad_()
        loss(output, speech("speech_degraded", samples) + 0.05).backward()
        assert output.grad is not None and output.grad.isfinite().all()
    assert output.grad.abs().sum() > 0


def test_following_the_gradient_comes_nearer():
    target, output = speech(samples=4000), torch.zeros(1, 1, 4000)
    output = (
        output + 0.01 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    loss, optimizer = MelLoss(16000), torch.optim.Adam([output], 1e-2)
    first = float(loss(output, target))
    for _ in range(20):
        optimizer.zero_grad()
        loss(output, target).backward()
        optimizer.step()
    assert float(loss(output, target)) < 0.7 * first


def test_the_discriminator_sees_all_resolutions():
    torch.manual_seed(0)
    critic, real = SpectrumDiscriminator(4, (256, 128)), speech(samples=4000)
    fake = (0.5 * speech("speech_degraded", 4000)).requires_grad_()
    assert critic(real).shape[0] == 1 and critic(real).ndim == 2
    features = critic.features(real)
    assert [len(maps) for maps in features] == [5, 5]
    assert float(feature_loss(features, features)) == 0
    feature_loss(critic.features(fake), features).backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    (1 - critic(real)).relu().mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in critic.parameters())


def test_wrong_arguments_are_named():
    with pytest.raises(TokenloomError, match="one shape"):
        stft_loss(torch.zeros(1, 1, 100), torch.zeros(1, 1, 101))
    with pytest.raises(TokenloomError, match="one shape"):
        MelLoss(16000)(torch.zeros(1, 100), torch.zeros(1, 100))
    with pytest.raises(TokenloomError, match="mel bands"):
        MelLoss(16000, (64, 128), (5,))
