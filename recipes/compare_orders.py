"""Compares orders on one set of pictures: same tokenizer, width, depth and training budget; writes one table.

python recipes/compare_orders.py runs/orders --data data/emoji64 --tokenizer runs/emoji64-tokenizer/model --judge runs/judge

Every order is trained, then measured: forwards a picture, seconds a picture (batch 1, in turns with the first order),
teacher-forced bits a token and a picture on held-out pictures, the judge's marks for following prompts, diversity. Figures
are kept in the output folder part by part; called again with the same settings, finished parts are skipped and a training
that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from tokenloom import TextToImagePipeline, TokenloomError
from tokenloom.evaluation import (
    EvaluationSet,
    Judge,
    compare_speed,
    follow_prompts,
    measure_diversity,
    pipeline_caller,
)
from tokenloom.evaluation.tables import markdown_table, plain
from tokenloom.media import write_atomically
from tokenloom.training.data import open_tokenizer
from tokenloom.training.run import train_generator

# Name in the table: name of the generator, options of the model, of the transformer.
ORDERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "next token (raster)": ("next_token", {}, {}),
    "next neighbor": ("next_neighbor", {}, {"taps": "last two"}),
    "next block (rows)": ("next_block", {}, {}),
    "next block (random sets)": (
        "next_block",
        {"order": "random", "order_options": {"steps": 8, "seed": 0}},
        {},
    ),
    "block diffusion (rows)": ("block_diffusion", {}, {}),
    "masked": ("masked", {}, {}),
    "next scale": ("next_scale", {}, {"rope": False}),
}
HEADER = (
    "order",
    "forwards",
    "parameters",
    "s a picture",
    "times as fast",
    "bits a token",
    "bits a picture",
    "concept %",
    "style %",
    "diversity",
)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The settings of a comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", required=True, help="folder with pictures and captions.jsonl")
    parser.add_argument("--tokenizer", required=True, help="tokenizer of all orders but next scale")
    parser.add_argument(
        "--scale-tokenizer", help="tokenizer of many scales; without it next scale is left out"
    )
    parser.add_argument("--judge", required=True)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="ORDER", help="some of: " + ", ".join(ORDERS)
    )
    parser.add_argument("--groups", nargs="*", default=[], help="only pictures of these groups")
    for name, value in (("steps", 2000), ("batch-size", 32), ("width", 128), ("depth", 6), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-k", type=int, default=256)
    for name, value in (("held-out", 512), ("prompts", 200), ("candidates", 100), ("diversity-prompts", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def config_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The training config of an order."""
    generator, model, flavour = ORDERS[name]
    folder = args.scale_tokenizer if generator == "next_scale" else args.tokenizer
    transformer = {
        "width": args.width,
        "depth": args.depth,
        "heads": args.heads,
        "rope_base": 100.0,
    } | flavour
    if transformer.get("taps") == "last two":
        transformer["taps"] = [args.depth - 1, args.depth]
    options = {"transformer": transformer, **model}
    if generator != "next_scale":
        options["tie_embeddings"] = True
        if levels := getattr(getattr(open_tokenizer(folder), "quantizer", None), "levels", None):
            options["code_levels"] = [int(level) for level in levels]
    steps = args.steps
    return {
        "output": str(folder_of(name, args) / "run"),
        "tokenizer": folder,
        "data": {"root": args.data, "groups": args.groups or None},
        "generator": generator,
        "model": options,
        "text": {"max_length": 8, "min_count": 2},
        "augment": {"flip": 0.5, "shift": 0.04, "scale": 0.06},
        "views": 2,
        "code_cache": str(args.output / "codes"),
        "sampling": {
            "guidance_scale": args.guidance,
            "temperature": args.temperature,
            "top_k": args.top_k,
        },
        "loop": {
            "steps": steps,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "warmup": min(150, steps // 10),
            "schedule": "wsd",
            "cooldown": 0.4,
            "ema": 0.998 if steps >= 1000 else 0.9,
            "seed": args.seed,
            "sample_every": steps,
            "checkpoint_every": max(1, min(250, steps // 2)),
        },
    }


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the figures of an order are kept."""
    return args.output / name.replace(" ", "-").replace("(", "").replace(")", "")


def once(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures in a file, worked out and written first if it does not exist."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(plain(work()), indent=1))
        print(path, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains an order, or goes on where it stopped."""
    values = config_of(name, args)
    path = folder_of(name, args) / "config.yaml"
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))
    started = any((Path(values["output"]) / "checkpoints").glob("step-*"))
    train_generator(path, resume="latest" if started else None)
    return {"samples": args.steps * args.batch_size}


@torch.no_grad()
def likelihood(pipe: Any, pictures: EvaluationSet) -> dict[str, Any]:
    """Bits of held-out pictures given their captions, and what a picture costs."""
    model, total, count = pipe.generator, 0.0, 0
    predicted = model.plan.predicted
    for start in range(0, len(pictures), 32):
        part = pictures.select(range(start, min(start + 32, len(pictures))))
        codes = pipe.tokenizer.encode(part.pixels)
        logits = model.logits(codes, pipe.text_tokenizer([caption.text for caption in part.captions]))
        losses = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")[:, predicted]
        total, count = total + float(losses.double().sum()), count + losses.numel()
    bits = total / count / math.log(2)
    return {
        "bits_per_token": bits,
        "bits_per_picture": bits * int(predicted.sum()),
        "tokens": int(predicted.sum()),
        "forwards": len(model.plan.feeds),
        "parameters": sum(value.numel() for value in model.parameters()),
    }


def measure(name: str, args: argparse.Namespace, pictures: EvaluationSet, judge: Judge) -> dict[str, Any]:
    """All figures of a trained order but its speed."""
    folder = folder_of(name, args)
    pipe = TextToImagePipeline.from_pretrained(folder / "run" / "model")
    pipe.set_progress_bar_config(disable=True)
    generate, groups = pipeline_caller(pipe), args.groups or None
    held_out = pictures.split("val").groups(groups).sample(args.held_out, args.seed)
    options: dict[str, Any] = {"groups": groups, "seed": args.seed}
    return {
        "likelihood": once(folder / "likelihood.json", lambda: likelihood(pipe, held_out)),
        "following": once(
            folder / "following.json",
            lambda: follow_prompts(
                generate, judge, pictures, limit=args.prompts, candidates=args.candidates, **options
            ).as_dict(),
        ),
        "diversity": once(
            folder / "diversity.json",
            lambda: measure_diversity(
                generate, judge, pictures, prompts=args.diversity_prompts, **options
            ).as_dict(),
        ),
    }


def speed(name: str, first: str, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a picture at batch 1, in turns with the first order."""
    pipes = [
        TextToImagePipeline.from_pretrained(folder_of(key, args) / "run" / "model") for key in (name, first)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    ours, other = (lambda pipe=pipe: pipe(prompt, seed=0) for pipe in pipes)
    return compare_speed(ours, other, rounds=args.rounds, names=(name, first)).as_dict()


def percent(share: float | None) -> str:
    """A share in percent; a dash where nothing could be marked."""
    return "-" if share is None else f"{100 * share:.1f}"


def row(name: str, figures: dict[str, Any]) -> tuple[object, ...]:
    """One row of the table."""
    bits, marks = figures["likelihood"], figures["following"]["generated"]
    return (
        name,
        bits["forwards"],
        f"{bits['parameters'] / 1e6:.2f} M",
        f"{figures['speed']['ours']['seconds_per_image']:.3f}",
        f"{figures['speed']['ratio']['median']:.2f}",
        f"{bits['bits_per_token']:.3f}",
        f"{bits['bits_per_picture']:.1f}",
        percent(marks["concept"]),
        percent(marks["style"]),
        f"{figures['diversity']['features']:.3f}",
    )


def report(figures: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The table and what its columns mean."""
    ceiling = next(iter(figures.values()))["following"]["ceiling"]
    return (
        f"{markdown_table(HEADER, [row(name, values) for name, values in figures.items()])}\n"
        f"Width {args.width}, depth {args.depth}, {args.steps * args.batch_size} training samples each. Seconds: median at "
        f"batch 1, decoding to pixels included, in turns with the first order. Bits: held-out pictures given their captions, "
        "teacher-forced in the order itself; block diffusion counts one pass a block, where the positions of a block do not "
        "know each other. Concept and style: the judge's retrieval; "
        f"real pictures reach {percent(ceiling['concept'])} and {percent(ceiling['style'])}. Diversity: mean distance of "
        "pictures of one prompt in the judge's features.\n"
    )


def main(words: list[str] | None = None) -> None:
    """Trains and measures every order, then writes comparison.json and comparison.md."""
    args = arguments(words)
    for name in args.only:
        if name not in ORDERS:
            raise TokenloomError(
                f"There is no order {name!r} in this comparison; there are {', '.join(ORDERS)}."
            )
    names = [name for name in args.only or ORDERS if args.scale_tokenizer or name != "next scale"]
    settings = {key: str(value) for key, value in vars(args).items() if key != "only"}
    if once(args.output / "settings.json", lambda: settings) != settings:
        raise TokenloomError(f"{args.output} holds a comparison with other settings; give another folder.")
    for name in names:
        once(folder_of(name, args) / "training.json", lambda name=name: train(name, args))
    pictures, judge = EvaluationSet.load(args.data), Judge.load(args.judge)
    figures = {name: measure(name, args, pictures, judge) for name in names}
    prompt = pictures.split("train").groups(args.groups or None).captions[0].text
    for name in names:
        path = folder_of(name, args) / f"speed-{folder_of(names[0], args).name}.json"
        figures[name]["speed"] = once(path, lambda name=name: speed(name, names[0], prompt, args))
    write_atomically(args.output / "comparison.json", json.dumps(plain(figures), indent=1))
    write_atomically(args.output / "comparison.md", report(figures, args))
    print(report(figures, args))


if __name__ == "__main__":
    main()
