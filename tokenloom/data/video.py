"""The recipe of the moving cut-outs: a pool of pictures, and frozen clips with captions and tracks for evaluation.

    OUT/captions.jsonl   one record a clip: file, text, label (the thing), style (the motion), split, licence, source; "seed",
                         "plain", and "track": [[x, y, share], ...], a frame each, see `tokenloom.data.moving.MovingClip`
    OUT/SPLIT/*.webp     the clips, lossless
    OUT/pool/            the pool that clips for training are made from on line, where it was not given
    OUT/SOURCES.md       credits and licences

Knows pools, clips and folders. Knows nothing of tokens.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tokenloom.data import registry_packages
from tokenloom.data.balls import add_balls
from tokenloom.data.building import building
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.emoji import SOURCES_FILE, BuildReport
from tokenloom.data.moving import VAL_PAIR, MotionConfig, MotionMaker, MovingClip
from tokenloom.data.other_packages import Fetch, fetch_package
from tokenloom.data.referring_pool import Pool, build_referring
from tokenloom.data.splits import TRAIN, VAL, VAL_STYLE
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media_video import save_clip

POOL_FOLDER = "pool"
CLIP_SPLITS = (TRAIN, VAL_STYLE, VAL, VAL_PAIR)
FPS = 8.0
_DRAWN = 96  # pixels, the longest side of a cut-out in a pool built here


def clip_seed(seed: int, index: int) -> int:
    """The seed of a clip of a data set."""
    return seed * 2**40 + index


def build_video(
    out: str | os.PathLike[str],
    *,
    pool: str | os.PathLike[str] | None = None,
    count: int = 200,
    splits: Sequence[str] = (VAL_STYLE, VAL, VAL_PAIR),
    config: MotionConfig | None = None,
    seed: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    download: registry_packages.Download | None = None,
    fetch: Fetch = fetch_package,
) -> BuildReport:
    """Writes the pool and frozen clips.

    Args:
        out: The folder to make; it must not exist or be empty.
        pool: A pool that is there already (`tokenloom data referring`); `None` builds one in `out`/pool, with
            balls of plain colours among its things.
        count: Clips of each split; 0 for the pool alone.
        splits: Which of "train", "val_style", "val" and "val_pair".
        config: How clips are made.
        seed: Decides the clips. Training takes seed 0, so that other seeds share no clip with it.
        cache_dir: Where downloaded packages are kept for the next time; `None` keeps nothing.
        download: Replaces `npm pack`.
        fetch: Replaces the clients of the other registries.

    Returns:
        A `BuildReport`; its pictures are clips, its styles the motions.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, or a download fails. `out` is then as it was before.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise TokenloomError(f"Expected a count of at least 0 clips, got {count!r}.")
    for split in splits:
        if split not in CLIP_SPLITS:
            raise unknown_name("split of the clips", split, CLIP_SPLITS)
    started, captions = time.monotonic(), []
    with building(out) as work:
        target = work / "set"
        if pool is None:
            build_referring(
                target / POOL_FOLDER, size=_DRAWN, cache_dir=cache_dir, download=download, fetch=fetch
            )
            add_balls(target / POOL_FOLDER, _DRAWN)
        found = Pool.open(target / POOL_FOLDER if pool is None else pool)
        if (found.folder / SOURCES_FILE).is_file():
            shutil.copyfile(found.folder / SOURCES_FILE, target / SOURCES_FILE)
        for split in splits if count else ():
            os.utime(work)
            captions += _freeze(target, MotionMaker(found, split, config), count, seed)
        if captions:
            write_captions(target, captions)
    return BuildReport.of(out, captions, started)


def _freeze(target: Path, maker: MotionMaker, count: int, seed: int) -> list[Caption]:
    """Writes `count` clips of a split into a folder of its name; returns their records."""
    captions = []
    for index in range(count):
        clip = maker.clip(clip_seed(seed, index))
        file = f"{maker.split}/{index:05d}.webp"
        save_clip([Image.fromarray(frame) for frame in clip.frames], target / file, FPS)
        captions.append(_record(clip, file, maker.split, clip_seed(seed, index)))
    return captions


def _record(clip: MovingClip, file: str, split: str, seed: int) -> Caption:
    track = [[round(float(value), 4) for value in place] for place in clip.track]
    licences = sorted({licence for licence, _ in clip.source if licence})
    return Caption(
        file=file,
        text=clip.text,
        label=clip.thing,
        style=clip.motion,
        split=split,
        licence=" AND ".join(licences) or None,
        source=", ".join(sorted({source for _, source in clip.source if source})) or None,
        extra={"seed": seed, "plain": clip.plain, "track": track},
    )
