"""Typed training configs read from YAML.

Every key is a field of a dataclass below; an unknown key is an error that names the closest match, and a value of the
wrong type says which type was expected. Knows nothing of models beyond passing their options through.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokenloom.errors import TokenloomError, unknown_name

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON and in version 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def check_range(where: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high or math.isinf(value):
        limit = f"between {low} and {high}" if math.isfinite(high) else f"a number of at least {low}"
        raise TokenloomError(f"{where} must be {limit}, got {value}.")


@dataclass(kw_only=True)
class DataConfig:
    """Which pictures are trained on.

    Attributes:
        root: Folder with pictures and a captions.jsonl.
        split: Value of "split" to keep; `None` keeps all.
        groups: Values of "group" to keep; `None` keeps all.
        styles: Values of "style" to keep; `None` keeps all.
        licences: Values of "licence" to keep; `None` keeps all.
    """

    root: str
    split: str | None = "train"
    groups: list[str] | None = None
    styles: list[str] | None = None
    licences: list[str] | None = None


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes to training pictures, all off at zero.

    Attributes:
        flip: Probability of a horizontal mirror.
        shift: Largest shift as a fraction of the side; the border is white.
        scale: Largest relative change of size.
        rotate: Largest rotation in degrees.
        colour: Largest relative change of brightness, contrast and channel gains.
        permute: Probability of a random permutation of the colour channels.
    """

    flip: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    colour: float = 0.0
    permute: float = 0.0


@dataclass(kw_only=True)
class LoopConfig:
    """Everything about optimisation that no model needs to know.

    Attributes:
        steps: Optimizer steps in all.
        batch_size: Samples a step and process (before accumulation).
        accumulate: Gradient accumulation steps.
        optimizer: "adamw", or "muon": timm's Muon for weights of linear and convolution layers, NAdamW for the rest. It
            learns more from a sample (docs/lab-notes.md) and takes about 0.2 s more a step for 3 million weights on a CPU
            core, nothing to speak of on a GPU.
        learning_rate: Peak learning rate.
        betas: Betas of (N)AdamW.
        weight_decay: Weight decay of tensors with two or more axes.
        warmup: Steps of linear warm-up.
        schedule: "cosine", "constant" or "wsd" (constant, then a linear cooldown to zero).
        cooldown: Fraction of the steps in the "wsd" cooldown.
        clip: Largest gradient norm.
        ema: Decay of the weight average; 0 turns it off.
        precision: "auto", "bf16", "fp16" or "no"; "auto" is bf16 where the processor computes it in hardware, else
            float32 (a CPU without AVX-512 BF16 or AMX is a hundred times slower in bf16).
        compile: Whether to compile the model with torch.compile.
        seed: Seed of initialisation, order and augmentation.
        log_every: Steps between log lines.
        sample_every: Steps between sample grids (the first is made at step 0).
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
    """

    steps: int = 10000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.05
    warmup: int = 200
    schedule: str = "cosine"
    cooldown: float = 0.2
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    log_every: int = 50
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for key in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "sample_every",
            "checkpoint_every",
            "keep",
        ):
            check_range(f"loop.{key}", getattr(self, key), 1)
        for key in ("learning_rate", "weight_decay", "warmup", "clip"):
            check_range(f"loop.{key}", getattr(self, key), 0)
        for key in ("cooldown", "ema"):
            check_range(f"loop.{key}", getattr(self, key), 0, 1)
        check_range("loop.seed", self.seed, 0, 2**32 - 1)
        if len(self.betas) != 2:
            raise TokenloomError(f"loop.betas must be two numbers, got {self.betas}.")
        for index, beta in enumerate(self.betas):
            if not 0 <= beta < 1:  # at 1 the moments never change, and their correction divides by 0
                raise TokenloomError(
                    f"loop.betas[{index}] must be at least 0 and less than 1, got {beta}; usual are 0.9 and 0.95."
                )
        for key, options in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "constant", "wsd")),
            ("precision", ("auto", "bf16", "fp16", "no")),
        ):
            if getattr(self, key) not in options:
                raise unknown_name(f"loop.{key}", getattr(self, key), options)


@dataclass(kw_only=True)
class TokenizerLossConfig:
    """Weights of the reconstruction losses; zero switches a loss off.

    Attributes:
        l1: Mean absolute error.
        l2: Mean squared error.
        structure: Multi-scale structural loss (1 - SSIM over three scales); needs no weights.
        perceptual: Feature distance through a timm backbone.
        perceptual_backbone: Name of the timm backbone.
        perceptual_pretrained: Whether timm loads its published weights (needs them cached or a network).
        adversarial: PatchGAN hinge loss with adaptive weight.
        adversarial_start: First step of the adversarial loss.
        lecam: LeCam regularisation of the discriminator, for small sets of pictures.
        entropy: Weight of the quantizer's entropy loss, in the place of its own `entropy_weight`; `None` leaves that.
    """

    l1: float = 0.1
    l2: float = 1.0
    structure: float = 0.0
    perceptual: float = 0.0
    perceptual_backbone: str = "vgg16"
    perceptual_pretrained: bool = True
    adversarial: float = 0.0
    adversarial_start: int = 5000
    lecam: float = 0.0
    entropy: float | None = None


@dataclass(kw_only=True)
class TokenizerConfig:
    """A tokenizer training run: `tokenloom train-tokenizer CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the model.
        data: Training pictures.
        tokenizer: Class of the tokenizer, a key of `tokenloom.tokenizers.registry.TOKENIZERS`: "image_vq", "image_cnn",
            "image_scale".
        model: Options of that class.
        loss: Loss weights.
        augment: Random changes to the pictures.
        loop: Optimisation.
        init_from: Folder of a tokenizer that training starts from; its own class and options count, not those above.
        freeze: Parts that stay as they are: "encoder", "quantizer", "decoder", or what names of parameters begin with. With
            [encoder, quantizer] the decoder alone is trained, and codes do not change.
    """

    output: str
    data: DataConfig
    tokenizer: str = "image_vq"
    model: dict[str, Any] = field(default_factory=dict)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class TextConfig:
    """How captions become words.

    Attributes:
        max_length: Words kept of a caption.
        min_count: Captions a word must appear in to enter the vocabulary.
        drop: Probability that a caption is dropped, which trains the unguided half.
        max_tags: Most tags added to a caption at random (needs "label" and "tags" in captions.jsonl).
    """

    max_length: int = 12
    min_count: int = 1
    drop: float = 0.1
    max_tags: int = 2

    def __post_init__(self) -> None:
        check_range("text.max_length", self.max_length, 1)
        check_range("text.drop", self.drop, 0, 1)


@dataclass(kw_only=True)
class GeneratorLossConfig:
    """Published details of training a generator, all off by default.

    Attributes:
        step_weights: Weight of the loss of each step of the order (a scale, a block, ...); empty for 1.
        progressive: Share of the training in which later steps join the loss one after the other (VAR's progressive
            scales); 0 for none.
        progressive_first: Steps in the loss at the start of it.
        growth: Block sizes of the order "blocks", each for an equal part of the share `growth_share`, the last one for the
            rest (NBDiff: 1, 2, 4, ...); empty for none.
        growth_share: Share of the training in which blocks grow.
    """

    step_weights: list[float] = field(default_factory=list)
    progressive: float = 0.0
    progressive_first: int = 1
    growth: list[Any] = field(default_factory=list)
    growth_share: float = 0.5

    def __post_init__(self) -> None:
        for index, weight in enumerate(self.step_weights):
            check_range(f"loss.step_weights[{index}]", weight, 0)
        check_range("loss.progressive", self.progressive, 0, 1)
        check_range("loss.progressive_first", self.progressive_first, 1)
        check_range("loss.growth_share", self.growth_share, 0, 1)


@dataclass(kw_only=True)
class GeneratorConfig:
    """A generator training run: `tokenloom train CONFIG`.

    Attributes:
        output: Folder for checkpoints, samples, the log and the pipeline.
        tokenizer: Folder of the image tokenizer (as `train-tokenizer` writes it).
        data: Training pictures.
        generator: Name of the generator, one of `tokenloom.training.families.FAMILIES`: "next_token", "next_neighbor",
            "next_block", "block_diffusion", "next_scale" or "masked".
        model: Options of the generator: "order", "order_options", "transformer", and its arguments.
        loss: Published details of training.
        text: Captions.
        augment: Random changes to the pictures; codes of `views` changed copies are computed once.
        views: Copies of each picture whose codes are cached; the first is the unchanged picture. 0 changes and encodes
            every picture anew each time: slower, but a long training does not learn two copies by heart.
        held_out: Split of the data whose loss is logged as "held_out" with every sample grid; `None` = none. If it rises
            while the training loss falls, the model learns pictures by heart.
        code_cache: Folder where these codes are kept, so that a resumed or a second run need not encode the pictures
            again; `None` keeps them in memory alone.
        sample_prompts: Prompts of the sample grid.
        sampling: Preset stored with the model, as `TextToImagePipeline` takes it: guidance_scale, temperature, top_k, ...
        loop: Optimisation.
        init_from: Folder of a generator whose weights training starts from.
    """

    output: str
    tokenizer: str
    data: DataConfig
    generator: str = "next_neighbor"
    model: dict[str, Any] = field(default_factory=dict)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    text: TextConfig = field(default_factory=TextConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    views: int = 1
    code_cache: str | None = None
    held_out: str | None = None
    sample_prompts: list[str] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    loop: LoopConfig = field(default_factory=LoopConfig)
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_range("views", self.views, 0)


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
        return _convert(value, kind, where)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast("type[Any]", kind), value, where)
    if kind is Any:
        return value
    plain = origin or kind
    if plain is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if not isinstance(value, plain) or (plain in (int, float) and isinstance(value, bool)):
        raise TokenloomError(
            f"{where} must be of type {plain.__name__}, got {value!r} ({type(value).__name__})."
        )
    if origin is list:
        (inner,) = typing.get_args(kind)
        return [_convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        inner = typing.get_args(kind)[1]
        return {key: _convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    return value


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Builds a config dataclass from plain values.

    Args:
        kind: The dataclass.
        values: A mapping with plain values, as YAML gives them.
        where: Path of the mapping inside the file, for messages.

    Raises:
        TokenloomError: For an unknown key, a missing key, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise TokenloomError(f"{where or 'The config'} must be a mapping of keys to values, got {values!r}.")
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            place = f"It was found at {where}.{key}." if where else ""
            raise unknown_name("configuration key", key, fields, place)
    missing = [
        name
        for name, item in fields.items()
        if name not in values
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise TokenloomError(f"{where or 'The config'} lacks the required keys: {', '.join(missing)}.")
    converted = {
        key: _convert(value, hints[key], f"{where}.{key}" if where else key) for key, value in values.items()
    }
    return kind(**converted)


def load_config(kind: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """Reads a YAML file into a config dataclass.

    Args:
        kind: The dataclass, for instance `TokenizerConfig`.
        path: The YAML file.
        overrides: Changes such as "loop.steps=200", parsed as YAML values.

    Raises:
        TokenloomError: If the file cannot be read, is not YAML, or does not fit the dataclass.
    """
    return from_dict(kind, read_values(path, overrides))


def read_values(path: str | Path | None, overrides: list[str] | None = None) -> Any:
    """Reads plain values from a YAML (or JSON) file, or from nothing, and changes them.

    Args:
        path: The file; `None` begins with no values.
        overrides: Changes such as "loop.steps=200", parsed as YAML values.

    Raises:
        TokenloomError: If the file cannot be read or is not YAML, or a change does not fit.
    """
    try:
        values = {} if path is None else _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenloomError(f"Cannot read the config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TokenloomError(f"{path} is not valid YAML: {error}") from None
    for override in overrides or []:
        _override(values, override)
    return values


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a safe loader: it builds plain values alone


def _override(values: Any, override: str) -> None:
    """Applies one "key.key=value" to nested mappings in place."""
    path, equals, text = override.partition("=")
    if not equals:
        raise TokenloomError(f"Override {override!r} must look like key.key=value.")
    *parents, last = path.split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise TokenloomError(f"Override {override!r} does not fit: what it changes is not a mapping of keys.")
    try:
        target[last] = _parse(text)
    except yaml.YAMLError:
        raise TokenloomError(f"Override {override!r} has a value that is not valid YAML.") from None
