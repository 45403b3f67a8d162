"""The recipe of the telephone prompts: recorded speech of five languages. Share-alike: ask for it by name.

Reads the sounds of the telephone system Asterisk (Debian packages asterisk-core-sounds-*-g722, CC-BY-SA-3.0 and CC-BY-3.0).
Phrases are held out by what they say, in all languages at once, and one voice is held out as a whole. Knows the packages and
how their files are named. Knows nothing of tokens.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenloom.data.building import building
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.chorales import SOURCES_FILE, SoundReport
from tokenloom.data.other_packages import (
    Fetch,
    fetch_package,
    permission_of,
    read_copyright,
    unpack_package,
)
from tokenloom.data.splits import TRAIN, VAL, hash_fraction
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media_audio import resample, save_audio

VERSION = "1.6.1-1"
LICENCES = ("CC-BY-SA-3.0", "CC-BY-3.0")
VAL_VOICE = "val_voice"
"""Everything that the held-out voice says."""
HELD_OUT = 0.08
"""Share of the phrases that are for validation."""

Decode = Callable[[bytes], "np.ndarray"]
"""The content of a G.722 file -> int16 samples (S,) at 16 kHz."""

_RATE = 16000
_FRAME = 320  # 20 ms, in which loudness is judged
_FLOOR = 10 ** (-45 / 20)  # of the loudest frame; what is quieter at both ends is cut away
_MARGIN = 3  # frames that are kept around what is louder
_PEAK = 0.7
_SHORTEST = 0.25  # seconds
_NO_SPEECH = re.compile(r"(silence/.*|beep.*|.*-2tone|tt-monkeys.*)")
_LABELS = ("digits/", "letters/", "phonetic/")
_MENU = re.compile(r"^(dictate/|followme/)?(vm|conf|confbridge|queue|agent|dir|priv|privacy|spy)-")
_ENDING = re.compile(r"(-?(menu)?\d+|s)$")


@dataclass(frozen=True)
class Voice:
    """A voice of the prompts.

    Attributes:
        name: Who speaks.
        speaker: "a woman" or "a man".
        language: In English.
        pattern: A file name that the copyright file knows this voice by.
        page: Where the voice is at home, for the credits.
    """

    name: str
    speaker: str
    language: str
    pattern: str
    page: str


VOICES = {
    "en": Voice("Allison Smith", "a woman", "English", "en-x", "theivrvoice.com"),
    "es": Voice("Allison Smith", "a woman", "Spanish", "es-x", "theivrvoice.com"),
    "fr": Voice("June Wallack", "a woman", "French", "fr-x", "junewallack.com"),
    "it": Voice("Carlo Flora", "a man", "Italian", "it-x", "carloflora.com"),
    "ru": Voice("Maxim Topal (provider)", "a woman", "Russian", "ru-x", "ivrvoice.ru"),
}


def build_speech(
    out: str | os.PathLike[str],
    *,
    sample_rate: int = _RATE,
    held_out: str | None = "fr",
    limit: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    fetch: Fetch = fetch_package,
    decode: Decode | None = None,
) -> SoundReport:
    """Downloads the packages and writes a folder of spoken prompts.

    Args:
        out: The folder to make; it must not exist or be empty. It gets LANGUAGE/NAME.flac, captions.jsonl and SOURCES.md.
        sample_rate: Samples a second.
        held_out: Language whose voice is for validation alone (split "val_voice"); `None` for none.
        limit: Take no more prompts of each language than this; `None` for all.
        cache_dir: Where downloaded packages are kept for the next time; `None` keeps nothing.
        fetch: Replaces the client of the registry.
        decode: Replaces the package G722.

    Returns:
        The counts.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, a package is missing, fails to download or has another
            licence than expected. `out` is then as it was before.
    """
    started = time.monotonic()
    if held_out is not None and held_out not in VOICES:
        raise unknown_name("language", held_out, VOICES)
    if sample_rate < 8000 or (limit is not None and limit < 1):
        raise TokenloomError(
            f"Expected at least 8000 samples a second and a limit of at least 1 prompt, got {sample_rate} and {limit}."
        )
    reader = _decoder() if decode is None else decode
    captions: list[Caption] = []
    credits = []
    with building(out) as work:
        cache = Path(cache_dir) if cache_dir is not None else work / "packages"
        cache.mkdir(parents=True, exist_ok=True)
        for language, voice in VOICES.items():
            os.utime(work)  # shows other runs that this one is alive
            package = f"asterisk-core-sounds-{language}-g722"
            kept = sorted(cache.glob(f"{package}_*.deb"))
            file = kept[-1] if kept else fetch("debian", package, VERSION, cache)
            root = unpack_package(file, work / package)
            licence = _licence(root / f"usr/share/doc/{package}/copyright", voice)
            credits.append((language, voice, licence))
            for prompt, path in _prompts(root, package)[:limit]:
                sound = clean(reader(path.read_bytes()))
                if len(sound) < _SHORTEST * _RATE:
                    continue
                caption = _caption(language, prompt, licence, held_out, len(sound) / _RATE)
                target = work / "set" / caption.file
                target.parent.mkdir(parents=True, exist_ok=True)
                save_audio(resample(sound, _RATE, sample_rate), target, sample_rate)
                captions.append(caption)
        if not captions:
            raise TokenloomError(f"The packages hold no speech; use version {VERSION}.")
        write_captions(work / "set", captions)
        (work / "set" / SOURCES_FILE).write_text(_sources(credits), encoding="utf-8")
    return SoundReport.of(out, captions, started)


def clean(samples: np.ndarray) -> torch.Tensor:
    """Cuts silence away at both ends, and brings the peak to 0.7.

    Args:
        samples: int16 (S,) at 16 kHz.

    Returns:
        float32 (S',) with S' <= S; (0,) if there is nothing but silence.
    """
    audio = torch.from_numpy(np.asarray(samples, dtype=np.int16).astype(np.float32) / 32768)
    whole = len(audio) // _FRAME * _FRAME
    loud = audio[:whole].view(-1, _FRAME).square().mean(1).sqrt()
    if not whole or float(loud.max()) < 1e-4:
        return audio[:0]
    heard = (loud > _FLOOR * loud.max()).nonzero()[:, 0]
    first, last = max(0, int(heard[0]) - _MARGIN), int(heard[-1]) + 1 + _MARGIN
    audio = audio[first * _FRAME : last * _FRAME]
    audio = audio - audio.mean()
    return audio * (_PEAK / audio.abs().max())


def phrase_of(prompt: str) -> str:
    """What a prompt says, as far as its name tells: "vm-minutes" and "queue-minute" are one phrase, "digits/7" is its own."""
    if prompt.startswith(_LABELS):
        return prompt
    return _ENDING.sub("", _MENU.sub("", prompt)).casefold()


def split_of(language: str, prompt: str, held_out: str | None) -> str:
    """ "val_voice" for the held-out voice, "val" for about one phrase in twelve in all other languages, else "train"."""
    if language == held_out:
        return VAL_VOICE
    return VAL if hash_fraction(f"prompt {phrase_of(prompt)}") < HELD_OUT else TRAIN


def _decoder() -> Decode:
    try:
        from G722 import G722
    except ImportError as error:
        raise TokenloomError(
            "The prompts are G.722 files, which need the package G722: pip install tokenloom[data] (or G722)."
        ) from error
    return lambda content: np.asarray(G722(_RATE, 64000).decode(content), dtype=np.int16)


def _licence(file: Path, voice: Voice) -> str:
    """The licence that the copyright file of a package states for a voice."""
    try:
        permission = permission_of(voice.pattern, read_copyright(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise TokenloomError(
            f"The package has no copyright file ({error.strerror}); use version {VERSION}."
        ) from error
    if permission is None or permission.licence not in LICENCES:
        raise TokenloomError(
            f"The {voice.language} prompts were expected under {' or '.join(LICENCES)}, but say {permission}. Use version "
            f"{VERSION}."
        )
    return permission.licence


def _prompts(root: Path, package: str) -> list[tuple[str, Path]]:
    """(name without ending, file) of the spoken prompts of a package, in the order of their names."""
    found: list[tuple[str, Path]] = []
    for folder in sorted((root / "usr/share/asterisk/sounds").glob("*")):
        found += _named(folder)
    if not found:
        raise TokenloomError(f"{package} holds no sounds; use version {VERSION}.")
    return [(name, path) for name, path in sorted(found) if not _NO_SPEECH.fullmatch(name)]


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*.g722"):
        yield path.relative_to(folder).with_suffix("").as_posix(), path


def _caption(language: str, prompt: str, licence: str, held_out: str | None, seconds: float) -> Caption:
    voice = VOICES[language]
    words = " ".join(re.split(r"[-/_]+", prompt)).lower()
    return Caption(
        file=f"{language}/{prompt.replace('/', '-')}.flac",
        text=f"{voice.speaker} speaking {voice.language}, {words}",
        label=words,
        style=voice.name,
        group=voice.language,
        concept=phrase_of(prompt),
        licence=licence,
        source=f"asterisk-core-sounds-{language}-g722@{VERSION}",
        split=split_of(language, prompt, held_out),
        extra={"prompt": prompt, "seconds": round(seconds, 3)},
    )


def _sources(credits: list[tuple[str, Voice, str]]) -> str:
    lines = "\n".join(
        f"* {voice.language} ({language}): {voice.name}, {voice.page}; {licence}"
        for language, voice, licence in credits
    )
    return (
        f"# Sources of these sounds\n\nPrompts of the telephone system Asterisk (asterisk.org), from the Debian packages "
        f"asterisk-core-sounds-*-g722 {VERSION}, with contributions by Digium, Inc. Voices:\n\n{lines}\n\n"
        "Licences: CC-BY-SA-3.0 (https://creativecommons.org/licenses/by-sa/3.0/) and CC-BY-3.0 "
        "(https://creativecommons.org/licenses/by/3.0/), as above. Whoever shares these sounds, or work made of them, has to "
        "name the voices and, for CC-BY-SA-3.0, to use the same licence. These are voices of living people: a model that "
        "learnt from them imitates them, and nobody may be led to believe that they said what it says.\n\n"
        "Changes: decoded from G.722, silence cut away at both ends, brought to one peak, stored as FLAC. Tones, silence "
        "and animals were left out.\n"
    )
