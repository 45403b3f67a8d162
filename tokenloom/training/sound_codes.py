"""Codes of the training sounds, worked out once and kept in a file if a folder for it is given.

Every sound is encoded as a whole, so that the codes in its middle know what came before, as those of a long prompt do. A
file is named after everything the codes depend on, so that an old one is never mistaken for a new one.

Shapes: M sounds, K codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenloom.data.sounds import SoundFolder, near, windows
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.audio import AudioTokenizer


class SoundCodes:
    """Codes of many sounds, one after the other.

    Args:
        codes: int16 (K, frames of all sounds).
        starts: LongTensor (M + 1,): sound i is `codes[:, starts[i] : starts[i + 1]]`.
    """

    def __init__(self, codes: Tensor, starts: Tensor) -> None:
        self.codes, self.starts = codes, starts

    def windows(self, frames: int) -> Tensor:
        """Windows of `frames` frames, LongTensor (W, 2), see `tokenloom.data.sounds.windows`; short sounds have none.

        Raises:
            TokenloomError: If no sound is long enough.
        """
        found = windows(self.starts, frames)
        found = found[self.starts.diff()[found[:, 0]] >= frames]
        if not len(found):
            raise TokenloomError(
                f"No sound has {frames} frames; the longest has {int(self.starts.diff().max())}. Lower `frames`, or join "
                "short sounds."
            )
        return found

    def crops(self, chosen: Tensor, frames: int, generator: torch.Generator) -> Tensor:
        """Random pieces near the given windows, LongTensor (B, frames K) in layout order."""
        places = near(self.starts, chosen, frames, generator)
        pieces = [self.codes[:, start : start + frames].T.flatten() for start, _ in places]
        return torch.stack(pieces).long()


def sound_codes(
    codec: AudioTokenizer, sounds: SoundFolder, codebooks: int | None, cache: str | None
) -> SoundCodes:
    """Codes of all sounds, from the folder `cache` if they are there.

    Args:
        codec: The trained codec, at the rate of the sounds.
        sounds: The sounds.
        codebooks: The first so many codebooks; `None` for all.
        cache: Folder, made if missing; `None` keeps nothing.
    """
    if cache is None:
        return _encode(codec, sounds, codebooks)
    path = Path(cache) / f"{_fingerprint(codec, sounds, codebooks)}.safetensors"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made = _encode(codec, sounds, codebooks)
            handle, scratch = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
            os.close(handle)
            save_file({"codes": made.codes.contiguous(), "starts": made.starts}, scratch)
            Path(scratch).replace(path)
        except OSError as error:
            raise TokenloomError(f"The code cache {cache!r} cannot be written ({error}).") from error
    values = load_file(path)
    return SoundCodes(values["codes"], values["starts"])


@torch.no_grad()
def _encode(codec: AudioTokenizer, sounds: SoundFolder, codebooks: int | None) -> SoundCodes:
    parts = [
        codec.encode(sounds.sound(index)[None].to(codec.device), num_codebooks=codebooks)[0].short().cpu()
        for index in range(len(sounds))
    ]
    starts = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)
    return SoundCodes(torch.cat(parts, dim=1), starts)


def _fingerprint(codec: AudioTokenizer, sounds: SoundFolder, codebooks: int | None) -> str:
    """32 hexadecimal digits of everything the codes depend on."""
    settings = [type(codec).__name__, dict(codec.config), codebooks, sounds.starts.tolist()]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for block in sounds.samples.split(1 << 24):
        found.update(block.contiguous().numpy())
    for name, value in sorted(codec.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().float().cpu().contiguous().numpy())
    return found.hexdigest()[:32]
