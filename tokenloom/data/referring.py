"""The referring set as a torch data set, and frozen scenes on the disk for evaluation.

Scenes are made on line: sample i of a data set is a function of (pool, split, settings, seed, i). A frozen folder holds

    scenes.jsonl   one record a scene: {"file", "instances", "split", "phrases": [{"text", "kind", "targets"}], ...}
    NAME.png       the picture, lossless
    NAME.i.png     grey levels: 0 is background, i + 1 is object i

Knows scenes, phrases and folders; knows nothing of tokenizers or networks.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenloom.data.building import building
from tokenloom.data.referring_phrases import Phrase, draw_phrases, phrases_of
from tokenloom.data.referring_pool import Pool
from tokenloom.data.referring_scenes import Scene, SceneConfig, SceneMaker
from tokenloom.errors import TokenloomError
from tokenloom.media import open_image

SCENES_FILE = "scenes.jsonl"


@dataclass(frozen=True)
class Example:
    """A picture with phrases and the mask that each means.

    Attributes:
        name: Names the record in messages.
        picture: RGB.
        phrases: The phrases, texts and kinds.
        masks: Bool (n, H, W), one a phrase; empty where a phrase means nothing.
        split: "val_style" (known names), "val" (unknown names), or what a file says.
        instances: uint8 (H, W) of all objects, 0 = background; `None` where they are not known.
    """

    name: str
    picture: Image.Image
    phrases: tuple[Phrase, ...]
    masks: np.ndarray
    split: str
    instances: np.ndarray | None = None


class TrainingSample(NamedTuple):
    """A scene with some phrases.

    Attributes:
        picture: uint8 (S, S, 3).
        texts: n phrases.
        masks: Bool (n, S, S), what each means.
        instances: uint8 (S, S): 0 is background, i + 1 is visible object i.
        things: The words of each object: colour, name and category, as far as they are known.
    """

    picture: np.ndarray
    texts: list[str]
    masks: np.ndarray
    instances: np.ndarray
    things: list[str]


def scene_example(maker: SceneMaker, seed: int) -> tuple[Scene, list[Phrase]]:
    """A scene with all its phrases, for evaluation."""
    scene = maker.scene(seed)
    return scene, phrases_of(scene, maker.absent_names(scene), random.Random(f"phrases {seed}"))


def training_sample(maker: SceneMaker, seed: int, count: int) -> TrainingSample:
    """A scene for training, with `count` phrases."""
    scene = maker.scene(seed)
    phrases = draw_phrases(scene, maker.absent_names(scene), count, random.Random(f"phrases {seed}"))
    masks = np.stack([scene.mask(phrase.targets) for phrase in phrases])
    texts = [phrase.text for phrase in phrases]
    things = [" ".join(filter(None, (thing.colour, thing.name, thing.category))) for thing in scene.things]
    return TrainingSample(scene.picture, texts, masks, scene.instances, things)


class ReferringScenes(Dataset[dict[str, Any]]):
    """Scenes with phrases and masks, made when they are asked for.

    Args:
        pool: Folder of a pool, or the pool.
        split: "train", "val_style" or "val".
        length: Number of scenes.
        phrases: Phrases a scene.
        config: How scenes are made.
        seed: With the index, decides everything about a scene.
    """

    def __init__(
        self,
        pool: Pool | str | os.PathLike[str],
        split: str = "train",
        length: int = 10000,
        phrases: int = 4,
        config: SceneConfig | None = None,
        seed: int = 0,
    ) -> None:
        if length < 1 or phrases < 1:
            raise TokenloomError(
                f"Expected at least one scene and one phrase, got length={length}, phrases={phrases}."
            )
        pool = pool if isinstance(pool, Pool) else Pool.open(pool)
        self.maker, self.length, self.phrases, self.seed = (
            SceneMaker(pool, split, config),
            length,
            phrases,
            seed,
        )

    def __len__(self) -> int:
        """Number of scenes."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"pixels": float (3, S, S) in [-1, 1], "texts": list of str, "masks": bool (n, S, S)} of a scene."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        made = training_sample(self.maker, scene_seed(self.seed, index), self.phrases)
        return {
            "pixels": picture_pixels(made.picture),
            "texts": made.texts,
            "masks": torch.from_numpy(made.masks),
        }


def scene_seed(seed: int, index: int) -> int:
    """The seed of a scene of a data set."""
    return seed * 2**40 + index


def picture_pixels(picture: np.ndarray) -> Tensor:
    """Float (3, H, W) in [-1, 1] of a picture uint8 (H, W, 3)."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1


def freeze_scenes(
    pool: Pool | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    count: int = 500,
    splits: Sequence[str] = ("val_style", "val"),
    config: SceneConfig | None = None,
    seed: int = 1,
) -> int:
    """Writes scenes with all their phrases into a folder.

    Args:
        pool: Folder of a pool, or the pool.
        out: The folder to make; it must not exist or be empty.
        count: Scenes of each split.
        splits: Which splits.
        config: How scenes are made.
        seed: Decides the scenes.

    Returns:
        How many phrases there are.
    """
    if count < 1:
        raise TokenloomError(f"Expected a count of at least 1 scene, got {count}.")
    pool = pool if isinstance(pool, Pool) else Pool.open(pool)
    lines, phrases = [], 0
    with building(out) as work:
        for split in splits:
            maker = SceneMaker(pool, split, config)
            for index in range(count):
                scene, found = scene_example(maker, scene_seed(seed, index))
                name = f"{split}-{index:05d}"
                Image.fromarray(scene.picture).save(work / "set" / f"{name}.png")
                Image.fromarray(scene.instances).save(work / "set" / f"{name}.i.png")
                records = [vars(phrase) for phrase in found]
                line = {"file": f"{name}.png", "instances": f"{name}.i.png", "split": split}
                lines.append(json.dumps({**line, "phrases": records}))
                phrases += len(found)
            os.utime(work)
        (work / "set" / SCENES_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return phrases


def read_scenes(folder: str | os.PathLike[str]) -> Iterator[Example | TokenloomError]:
    """The frozen scenes of a folder, one after the other; for a bad record the error that names it, then the next.

    Raises:
        TokenloomError: At once, if the folder has no scenes.jsonl.
    """
    root = Path(folder)
    try:
        lines = (root / SCENES_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenloomError(
            f"Cannot read {str(root / SCENES_FILE)!r} ({error}). Write scenes with: tokenloom data referring-scenes POOL FOLDER."
        ) from None
    return (_read_scene(root, number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _read_scene(root: Path, number: int, line: str) -> Example | TokenloomError:
    place = f"{str(root / SCENES_FILE)!r}, line {number}"
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("phrases", []), list):
            raise TokenloomError("expected an object with file, instances and a list of phrases")
        phrases = tuple(
            Phrase(str(p["text"]), str(p["kind"]), tuple(int(t) for t in p["targets"]))
            for p in record["phrases"]
        )
        picture = open_image(root / record["file"])
        with Image.open(root / record["instances"]) as opened:
            instances = np.array(opened.convert("L"))
        if instances.shape != (picture.height, picture.width):
            raise TokenloomError(f"the instances have another size than {record['file']!r}")
        if any(target < 0 for phrase in phrases for target in phrase.targets):
            raise TokenloomError("a phrase means an object below 0")
        last = max((target for phrase in phrases for target in phrase.targets), default=-1)
        if last >= instances.max(initial=0):
            raise TokenloomError(f"a phrase means object {last}, which the instances do not show")
        masks = [np.isin(instances, [t + 1 for t in phrase.targets]) for phrase in phrases]
        stacked = np.stack(masks) if masks else np.zeros((0, *instances.shape), dtype=bool)
        return Example(record["file"], picture, phrases, stacked, str(record.get("split", "val")), instances)
    except KeyError as error:
        return TokenloomError(f"{place}: the key {error} is missing.")
    except (ValueError, TypeError, OSError) as error:  # TokenloomError is a ValueError
        return TokenloomError(f"{place}: {error}")
