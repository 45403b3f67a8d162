"""Quality and speed measurements: metrics, codec baselines, the judge, prompt following, near-copies and the
benchmark.

Knows tokenizers and pipelines only through the calls they offer (`encode`, `decode`, a callable from prompts
and seeds to pictures); it never looks inside a generator. Nothing is imported until it is asked for, so
`import tokenloom.evaluation` is cheap.
"""

from __future__ import annotations

from tokenloom.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "EvaluationConfig": "report",
        "EvaluationSet": "pictures",
        "Judge": "judge",
        "codec_names": "codecs",
        "compare_speed": "benchmark",
        "count_near_copies": "nearest",
        "evaluate": "report",
        "evaluate_codec": "codecs",
        "evaluate_tokenizer": "reconstruction",
        "follow_prompts": "prompt_following",
        "judge_accuracy": "judge",
        "mean_pairwise_distance": "metrics",
        "measure_command": "startup",
        "measure_diversity": "prompt_following",
        "measure_startup": "startup",
        "nearest_training_images": "nearest",
        "pipeline_caller": "prompt_following",
        "psnr": "metrics",
        "raster_reference": "baseline",
        "reconstruction_table": "reconstruction",
        "ssim": "metrics",
        "train_judge": "judge",
    },
)
