"""The parts of an evaluation: each measures one thing for a run, keeps its figures, and writes its section of
the report.

Knows how to call the modules of this package; what a figure means is said in the module that computes it.
Shapes: pixels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation import benchmark, codecs, nearest, prompt_following, reconstruction, startup
from tokenloom.evaluation.judge import Judge
from tokenloom.evaluation.pictures import EvaluationSet
from tokenloom.evaluation.retrieval import questions
from tokenloom.evaluation.tables import markdown_table
from tokenloom.media import save_image

PARTS = ("reconstruction", "following", "diversity", "copies", "speed", "startup")
NEEDS_JUDGE = ("following", "diversity")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and on how much.

    Attributes:
        parts: Any of "reconstruction", "following", "diversity", "copies", "speed", "startup".
        groups: Groups of pictures to use (first words suffice: "travel"); None for all.
        codebook_pictures: Training pictures that are also passed through the tokenizer, for the use of its
            codebook; 0 for none.
        codec_pictures: Held-out pictures that the classical codecs code (they are searched, so this takes
            time); 0 leaves them out.
        prompts: Most prompts of each kind; None for all held-out (concept, style) pairs.
        candidates: Names that the judge chooses from.
        seeds_per_prompt: Pictures a prompt where prompt following is measured.
        diversity_prompts: Prompts whose samples are compared with one another.
        diversity_seeds: Pictures for each of those.
        copies_held_out: Most real held-out pictures that calibrate the near-copy threshold.
        quantile: Share of them under the threshold.
        rounds: Timed rounds.
        batch_size: Pictures a call, also the larger batch of the benchmark.
        seed: Decides every choice.
    """

    parts: tuple[str, ...] = PARTS
    groups: tuple[str, ...] | None = None
    codebook_pictures: int = 2000
    codec_pictures: int = 100
    prompts: int | None = None
    candidates: int = 100
    seeds_per_prompt: int = 1
    diversity_prompts: int = 32
    diversity_seeds: int = 8
    copies_held_out: int = 400
    quantile: float = 0.05
    rounds: int = 7
    batch_size: int = 16
    seed: int = 0


@dataclass
class Run:
    """What the parts share, and what they have found so far."""

    pipeline: Any
    tokenizer: Any
    pictures: EvaluationSet
    judge: Judge | None
    config: EvaluationConfig
    out: Path
    baseline: prompt_following.Generate | None
    options: dict[str, Any]
    name: str | None
    figures: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    samples: Tensor | None = None
    prompts: list[str] = field(default_factory=list)

    def through(self, pixels: Tensor) -> Tensor:
        """Passes pictures through the tokenizer."""
        return reconstruction.reconstruct(self.tokenizer, pixels)[0]

    @property
    def generate(self) -> prompt_following.Generate:
        """The pipeline as a function of prompts and seeds."""
        return prompt_following.pipeline_caller(self.pipeline, **self.options)


def _reconstruction(run: Run) -> None:
    """Held-out concepts through the tokenizer, and through the codecs at the same bits."""
    held_out = run.pictures.split("val").groups(run.config.groups)
    result = reconstruction.evaluate_tokenizer(run.tokenizer, held_out.pixels, "this tokenizer")
    rows = [result]
    train = (
        run.pictures.split("train")
        .groups(run.config.groups)
        .sample(run.config.codebook_pictures, run.config.seed)
    )
    if len(train):
        rows.append(
            reconstruction.evaluate_tokenizer(
                run.tokenizer, train.pixels, "this tokenizer, training pictures"
            )
        )
    coded: list[codecs.CodecResult] = []
    if run.config.codec_pictures:
        subset = held_out.sample(run.config.codec_pictures, run.config.seed)
        if len(subset) < len(held_out):
            name = f"this tokenizer, {len(subset)} of these pictures"
            rows.append(reconstruction.evaluate_tokenizer(run.tokenizer, subset.pixels, name))
        coded = codecs.compare_codecs(subset.pixels, result.bits)
    run.figures["reconstruction"] = {
        "tokenizer": [row.as_dict() for row in rows],
        "codecs": [row.as_dict() for row in coded],
    }
    run.sections["Reconstruction of unseen concepts"] = reconstruction.reconstruction_table(rows, coded) + (
        "\nPSNR: mean of the pictures' PSNR in dB; beside it the PSNR of the mean squared error. SSIM: "
        "Gaussian window 11. Codecs: the best PSNR over quality, picture size and chroma sampling whose "
        "payload is within the tokenizer's bits; headers and tables are not charged (`file bits` has them).\n"
    )


def _following(run: Run) -> None:
    """Prompts of seen and of unseen concepts."""
    judge = _judge(run)
    results = []
    for kind in ("seen", "unseen"):
        results.append(
            prompt_following.follow_prompts(
                run.generate,
                judge,
                run.pictures,
                kind,
                groups=run.config.groups,
                candidates=run.config.candidates,
                seeds_per_prompt=run.config.seeds_per_prompt,
                limit=run.config.prompts,
                seed=run.config.seed,
                batch_size=run.config.batch_size,
                through=run.through,
            )
        )
    run.samples = results[0].pixels
    run.prompts = [question.prompt for question in results[0].asked]
    run.figures["following"] = {result.kind: result.as_dict() for result in results}
    notes = [
        f"\n{result.kind}: real pictures after the tokenizer score "
        f"{100 * result.reconstructed.concept:.1f} % (concept) and {100 * result.reconstructed.style:.1f} % "
        f"(style); {result.filled:.0f} of the rivals are training concepts.\n"
        for result in results
        if result.reconstructed is not None
    ]
    run.sections["Prompt following"] = prompt_following.following_table(results) + "".join(notes)


def _diversity(run: Run) -> None:
    """Samples of one prompt against one another."""
    result = prompt_following.measure_diversity(
        run.generate,
        _judge(run),
        run.pictures,
        groups=run.config.groups,
        prompts=run.config.diversity_prompts,
        seeds_per_prompt=run.config.diversity_seeds,
        seed=run.config.seed,
        batch_size=run.config.batch_size,
    )
    run.figures["diversity"] = result.as_dict()
    rows = [
        (f"{result.seeds} seeds of each of {result.prompts} prompts", result.pixels, result.features),
        ("real: one concept, different styles", *result.real_styles),
        ("real: one style, different concepts", *result.real_concepts),
    ]
    table = markdown_table(
        ("mean pairwise distance", "pixels (RMS)", "judge features (1 - cosine)"),
        [(name, f"{near:.4f}", f"{seen:.4f}") for name, near, seen in rows],
    )
    run.sections["Diversity across seeds"] = (
        f"{table}\n{100 * result.same_picture:.1f} % of the pairs of one prompt are nearer than "
        f"{prompt_following.SAME_PICTURE}.\n"
    )


def _copies(run: Run) -> None:
    """Samples of the "seen" prompts against the training pictures, all passed through the tokenizer."""
    if run.samples is None:
        asked = questions(run.pictures, "seen", run.config.groups, 2, run.config.seed)
        run.prompts = [question.prompt for question in asked][: run.config.prompts]
        seeds = [run.config.seed + index for index in range(len(run.prompts))]
        run.samples = prompt_following.generate_pictures(
            run.generate, run.prompts, seeds, run.config.batch_size
        )
    train = run.pictures.split("train").groups(run.config.groups)
    held_out = run.pictures.split("val", "val_style").groups(run.config.groups)
    held_out = held_out.sample(run.config.copies_held_out, run.config.seed)
    result = nearest.count_near_copies(
        run.samples,
        run.through(train.pixels),
        run.through(held_out.pixels),
        run.judge,
        quantile=run.config.quantile,
    )
    run.figures["copies"] = result.as_dict()
    figure = nearest.neighbour_figure(run.samples, train.pixels, result.neighbours, names=run.prompts)
    save_image(figure, run.out / "nearest.png")
    run.sections["Nearest training pictures"] = (
        f"{result.table()}\nRMS on [0, 1], up to 2 pixels of shift and mirroring allowed; training and "
        "held-out pictures were passed through the tokenizer. Threshold: "
        f"{100 * result.quantile:.0f} % of {len(held_out)} real held-out pictures are nearer than it to a "
        f"training picture. Samples also alike in the judge's features: {result.both}.\n\n"
        "![Samples nearest to a training picture, each beside it, nearest first](nearest.png)\n"
    )


def _speed(run: Run) -> None:
    """The model against its own reference decoding, and against a baseline: by default its raster twin."""
    asked = questions(run.pictures, "seen", run.config.groups, 2, run.config.seed)
    texts = [question.prompt for question in asked]
    rivals: list[tuple[str, prompt_following.Generate]] = [
        (
            "this model, reference decoding",
            prompt_following.pipeline_caller(run.pipeline, **{**run.options, "decode": "reference"}),
        )
    ]
    if run.baseline is not None:
        rivals.append(("baseline", run.baseline))
    elif hasattr(getattr(run.pipeline, "generator", None), "order"):
        from tokenloom.evaluation.baseline import raster_reference

        rivals.append(
            ("same size, raster order, reference decoding", raster_reference(run.pipeline, **run.options))
        )
    results = []
    for batch_size in sorted({1, run.config.batch_size}):
        prompts = [texts[index % len(texts)] for index in range(batch_size)]
        seeds = list(range(batch_size))
        for name, rival in rivals:
            results.append(
                benchmark.compare_speed(
                    _call(run.generate, prompts, seeds),
                    _call(rival, prompts, seeds),
                    batch_size,
                    rounds=run.config.rounds,
                    names=("this model", name),
                )
            )
    run.figures["speed"] = [result.as_dict() for result in results]
    machine = results[-1].environment
    run.sections["Speed"] = (
        f"{benchmark.speed_table(results)}\n{machine['cpu']}, {machine['torch_threads']} threads, torch "
        f"{machine['torch']}, load average {machine['load_average']}; {run.config.rounds} rounds in turns. "
        f"Peak memory of this process: {benchmark.peak_rss_mb():.0f} MB.\n"
    )


def _startup(run: Run) -> None:
    """Whole commands in fresh processes."""
    results = startup.measure_startup(run.name or "")
    run.figures["startup"] = [result.as_dict() for result in results]
    run.sections["Commands from process start"] = startup.command_table(results)


def _call(generate: prompt_following.Generate, prompts: list[str], seeds: list[int]) -> Callable[[], object]:
    return lambda: generate(prompts, seeds)


def _judge(run: Run) -> Judge:
    if run.judge is None:
        raise TokenloomError(
            "This part needs a judge, got none. Train one with train_judge and pass its folder."
        )
    return run.judge


MEASURES: dict[str, Callable[[Run], None]] = {
    "reconstruction": _reconstruction,
    "following": _following,
    "diversity": _diversity,
    "copies": _copies,
    "speed": _speed,
    "startup": _startup,
}
