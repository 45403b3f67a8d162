"""Makes scenes for training, in this process or in several; a scene depends on its seed alone.

Knows pools and processes; knows nothing of tokenizers, networks or losses.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from tokenloom.data.referring import TrainingSample, training_sample
from tokenloom.data.referring_pool import Pool
from tokenloom.data.referring_scenes import SceneConfig, SceneMaker
from tokenloom.errors import check_options
from tokenloom.training.segmentation_config import ScenesConfig

_MAKER: list[SceneMaker] = []  # of a worker process


def _start(pool: str, split: str, config: SceneConfig) -> None:
    torch.set_num_threads(1)
    _MAKER[:] = [SceneMaker(Pool.open(pool), split, config)]


def _sample(arguments: tuple[int, int]) -> TrainingSample:
    return training_sample(_MAKER[0], *arguments)


def _instances(seed: int) -> np.ndarray:
    return _MAKER[0].masks(seed)


class SceneSource:
    """Samples of the scenes of a config.

    Args:
        config: Which scenes.
        size: Side of a scene in pixels.
    """

    def __init__(self, config: ScenesConfig, size: int) -> None:
        check_options(SceneConfig, {"size": size, **config.options}, "option of scenes.options")
        self.config = config
        self.settings = SceneConfig(**{**config.options, "size": size})
        self.pool = Pool.open(config.pool)
        self.maker = SceneMaker(self.pool, config.split, self.settings)
        self._workers: ProcessPoolExecutor | None = None

    def samples(self, seeds: list[int], phrases: int) -> list[TrainingSample]:
        """The sample of each seed."""
        return self._map(
            _sample, [(seed, phrases) for seed in seeds], lambda one: training_sample(self.maker, *one)
        )

    def instances(self, seeds: list[int]) -> list[np.ndarray]:
        """The map of objects of each seed, without a picture."""
        return self._map(_instances, seeds, self.maker.masks)

    def _map(self, far: Callable[[Any], Any], values: list[Any], near: Callable[[Any], Any]) -> list[Any]:
        if not self.config.workers:
            return [near(value) for value in values]
        if self._workers is None:
            self._workers = ProcessPoolExecutor(
                self.config.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self.config.pool, self.config.split, self.settings),
            )
        chunk = max(1, len(values) // (2 * self.config.workers))
        return list(self._workers.map(far, values, chunksize=chunk))


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Seeds of scenes, from a generator."""
    return torch.randint(2**62, (count,), generator=generator).tolist()
