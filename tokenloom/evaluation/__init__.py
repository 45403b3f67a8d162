"""Quality and speed measurements: metrics, codec baselines, the judge, prompt following, near-copies and the
benchmark.

Knows tokenizers and pipelines only through the calls they offer (`encode`, `decode`, a callable from prompts
and seeds to pictures); it never looks inside a generator. Nothing is imported until it is asked for, so
`import tokenloom.evaluation` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "psnr": "metrics",
    "ssim": "metrics",
    "mean_pairwise_distance": "metrics",
    "EvaluationSet": "pictures",
    "evaluate_codec": "codecs",
    "codec_names": "codecs",
    "evaluate_tokenizer": "reconstruction",
    "reconstruction_table": "reconstruction",
    "Judge": "judge",
    "train_judge": "judge",
    "judge_accuracy": "judge",
    "follow_prompts": "prompt_following",
    "measure_diversity": "prompt_following",
    "pipeline_caller": "prompt_following",
    "nearest_training_images": "nearest",
    "count_near_copies": "nearest",
    "compare_speed": "benchmark",
    "raster_reference": "baseline",
    "measure_command": "startup",
    "measure_startup": "startup",
    "evaluate": "report",
    "EvaluationConfig": "report",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports the module that defines `name` on first use."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
