"""Reconstruction losses of sound: multi-scale mel and Fourier spectra, and a discriminator over spectrograms.

All take samples (B, 1, S) in [-1, 1]. Knows nothing of tokenizers or loops; `hinge_loss` and `adaptive_weight` of
`tokenloom.training.losses` go with the discriminator.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError

_QUIET = 1e-5  # what logarithms see of silence
_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
_MELS = (5, 10, 20, 40, 80, 160, 320)


def _check_pair(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape or output.ndim != 3 or output.shape[1] != 1:
        raise TokenloomError(
            f"Two sounds of one shape (B, 1, S) are compared, got {tuple(output.shape)} and {tuple(target.shape)}."
        )


def _fill(audio: Tensor, window: int) -> Tensor:
    """Sound filled with silence to what reflection at its edges needs."""
    return F.pad(audio, (0, max(0, window // 2 + 1 - audio.shape[-1])))


class MelLoss(nn.Module):
    """Sum over scales of the mean distance of log10 mel spectra (Kumar et al. 2023, DAC; 15 times that in its training).

    Bands that hold no frequency of a short window are empty in both sounds, and count as equal.

    Args:
        sample_rate: Samples a second.
        windows: Samples of each window; the hop is a quarter of it.
        mels: Bands of each scale.
    """

    def __init__(
        self, sample_rate: int, windows: Sequence[int] = _WINDOWS, mels: Sequence[int] = _MELS
    ) -> None:
        super().__init__()
        if len(windows) != len(mels) or not windows or min(*windows, *mels) < 1 or min(windows) < 4:
            raise TokenloomError(
                f"One number of mel bands a window, of at least 4 samples; got windows {list(windows)}, mels {list(mels)}."
            )
        from torchaudio.transforms import MelSpectrogram

        with warnings.catch_warnings():  # about empty bands
            warnings.simplefilter("ignore")
            self.spectra = nn.ModuleList(
                MelSpectrogram(
                    sample_rate,
                    window,
                    hop_length=window // 4,
                    n_mels=bands,
                    power=1.0,
                    norm="slaney",
                    mel_scale="slaney",
                )
                for window, bands in zip(windows, mels, strict=True)
            )
        self.windows = tuple(windows)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar; gradients flow into `output`."""
        _check_pair(output, target)
        total = output.new_zeros((), dtype=torch.float32)
        for window, spectrum in zip(self.windows, self.spectra, strict=True):
            both = spectrum(_fill(torch.cat([output, target])[:, 0].float(), window))
            ours, wanted = both.clamp(min=_QUIET).log10().chunk(2)
            total = total + F.l1_loss(ours, wanted.detach())
        return total


def stft_loss(output: Tensor, target: Tensor, windows: Sequence[int] = (512, 2048)) -> Tensor:
    """Mean over windows of spectral convergence plus log-magnitude distance (Yamamoto et al. 2020, Parallel WaveGAN).

    Args:
        output: Samples (B, 1, S).
        target: Samples of the same shape.
        windows: Samples of each window; the hop is a quarter of it.

    Returns:
        A scalar; gradients flow into `output`.
    """
    _check_pair(output, target)
    losses = []
    for window in windows:
        ours, wanted = _magnitude(output, window), _magnitude(target, window).detach()
        apart = (ours - wanted).norm() / wanted.norm().clamp(
            min=_QUIET
        )  # of the batch: one of its sounds may be silent
        logs = F.l1_loss(ours.clamp(min=_QUIET).log(), wanted.clamp(min=_QUIET).log())
        losses.append(apart + logs)
    return torch.stack(losses).mean()


def _spectrum(audio: Tensor, window: int) -> Tensor:
    """Complex spectrogram (B, window / 2 + 1, L) of samples (B, 1, S)."""
    shape = torch.hann_window(window, device=audio.device)
    return torch.stft(
        _fill(audio[:, 0].float(), window), window, window // 4, window=shape, return_complex=True
    )


def _magnitude(audio: Tensor, window: int) -> Tensor:
    spectrum = torch.view_as_real(_spectrum(audio, window))
    return spectrum.square().sum(-1).clamp(min=_QUIET**2).sqrt()


class SpectrumDiscriminator(nn.Module):
    """Judges complex spectrograms at several resolutions (Defossez et al. 2022, EnCodec).

    Args:
        width: Channels of its layers.
        windows: Samples of each window.
    """

    def __init__(self, width: int = 16, windows: Sequence[int] = (1024, 512, 256)) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.nets = nn.ModuleList(self._net(width) for _ in windows)

    @staticmethod
    def _net(width: int) -> nn.ModuleList:
        layers = [nn.Conv2d(2, width, (3, 9), padding=(1, 4))]
        layers += [
            nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(spread, 1), padding=(spread, 4))
            for spread in (1, 2, 4)
        ]
        return nn.ModuleList([*layers, nn.Conv2d(width, 1, 3, padding=1)])

    def features(self, audio: Tensor) -> list[list[Tensor]]:
        """The outputs of every layer of every resolution, for samples (B, 1, S); the last of each are logits."""
        results = []
        for window, layers in zip(self.windows, self.nets, strict=True):
            x = torch.view_as_real(_spectrum(audio, window) / window**0.5).permute(
                0, 3, 2, 1
            )  # (B, 2, L, bins)
            maps: list[Tensor] = []
            for layer in layers:  # type: ignore[attr-defined]
                x = layer(x if not maps else F.leaky_relu(x, 0.2))
                maps.append(x)
            results.append(maps)
        return results

    def forward(self, audio: Tensor) -> Tensor:
        """Logits (B, n) of all places of all resolutions."""
        return torch.cat([maps[-1].flatten(1) for maps in self.features(audio)], dim=1)


def feature_loss(output: list[list[Tensor]], target: list[list[Tensor]]) -> Tensor:
    """Mean distance of a discriminator's features, relative to those of the target; logits are left out."""
    losses = [
        F.l1_loss(ours, wanted.detach()) / wanted.detach().abs().mean().clamp(min=_QUIET)
        for ours_maps, wanted_maps in zip(output, target, strict=True)
        for ours, wanted in zip(ours_maps[:-1], wanted_maps[:-1], strict=True)
    ]
    return torch.stack(losses).mean()
