"""Loading and saving shared by all pipelines: bundled names, the weight record, versions, atomic folders.

Knows diffusers' pipeline folders. Knows nothing of prompts, media or what the components compute.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from tokenloom import __version__, models
from tokenloom.errors import TokenloomError
from tokenloom.precision import pays_in_bf16

if TYPE_CHECKING:
    from typing_extensions import Self


logger = logging.getLogger(__name__)


def register_library() -> None:
    """Tells diffusers that it may save and load components of tokenloom.

    diffusers keeps a table of libraries and, for each, the base classes whose instances it can save and load. With an
    entry for tokenloom, `model_index.json` names a component as ["tokenloom", "ImageVQTokenizer"], which is resolved as
    an attribute of the top-level package and stays valid when a class moves to another module.
    """
    methods = ["save_pretrained", "from_pretrained"]
    classes = {"ModelMixin": methods, "WordTokenizer": methods}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault("tokenloom", classes)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(classes)


class Pipeline(DiffusionPipeline):
    """Base of tokenloom's pipelines: a `DiffusionPipeline` whose names resolve offline first.

    Attributes:
        card: The weight record (`card.json`): training data, licence, measured figures. Empty for a new pipeline.
    """

    def __init__(self) -> None:
        super().__init__()
        register_library()
        self.card: dict[str, Any] = {}

    def awake(self, component: Any) -> Any:
        """The component, on the device where it shall run.

        The hooks of `enable_model_cpu_offload` move a component when its `forward` is called; ours are called by other
        names (`generate`, `encode`, `decode`), so that a call has to wake them.
        """
        hook = getattr(component, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(component)
        return component

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Offloads whole components, as `enable_model_cpu_offload`.

        Layer by layer, every weight would have to be moved again at every step of a generation.
        """
        logger.warning("Components are offloaded as a whole: a generation needs all layers at every step.")
        self.enable_model_cpu_offload(gpu_id=gpu_id, device=device)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] = models.DEFAULT_MODEL, **kwargs: Any
    ) -> Self:
        """Loads a bundled model, a folder, or a model of the Hugging Face hub, in this order.

        Args:
            pretrained_model_name_or_path: Bundled name, folder, or "owner/model".
            **kwargs: `dtype` (or `torch_dtype`) of the weights, a torch dtype or "auto", the default; `revision` and
                `cache_dir` for the hub; everything else as in `DiffusionPipeline.from_pretrained`, for instance a component by its name.

        Returns:
            The pipeline. By "auto" weights are float32; but a generator of 25 million weights or more, which reads them from
            memory at every step, is bfloat16 where the processor computes that (`tokenloom.precision`). One that was given
            by the caller stays as it is.

        Raises:
            TokenloomError: Unknown name, damaged file, or a model of a newer version.

        Example:
            >>> pipe = TextToImagePipeline.from_pretrained("tokenloom-emoji-64")  # doctest: +SKIP
        """
        folder = models.resolve(
            pretrained_model_name_or_path,
            revision=kwargs.pop("revision", None),
            cache_dir=kwargs.pop("cache_dir", None),
        )
        if not models.is_pipeline(folder):
            kind = models.read_config(folder).get("_class_name")
            raise TokenloomError(
                f"Expected a pipeline of a tokenizer and a generator, but {os.fspath(pretrained_model_name_or_path)!r} is one "
                f"component, of class {kind}. A tokenizer is opened with tokenloom.tokenizers.load_tokenizer, or by "
                "`tokenloom reconstruct --tokenizer`."
            )
        names = [
            name for name in ("dtype", "torch_dtype") if name in kwargs
        ]  # the first is unknown to old diffusers
        dtypes = [dtype for dtype in map(kwargs.pop, names) if dtype is not None and dtype != "auto"]
        if any(not isinstance(dtype, torch.dtype) for dtype in dtypes):
            raise TokenloomError(
                f'Expected dtype to be a torch dtype such as torch.bfloat16, or "auto", got {dtypes[0]!r}.'
            )
        register_library()
        try:
            pipe = super().from_pretrained(str(folder), **kwargs)
        except OSError as error:  # diffusers' word for a file that is not there
            raise TokenloomError(
                f"The model folder {str(folder)!r} is not whole ({' '.join(str(error).split())}). Copy or download it again."
            ) from error
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module) and (
                dtypes or (name == "generator" and name not in kwargs and pays_in_bf16(module))
            ):
                wanted = dtypes[0] if dtypes else torch.bfloat16
                nn.Module.to(module, wanted)  # ModelMixin.to warns of an empty list of float32 modules
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipe.card = models.read_card(folder)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves all components, `model_index.json` and `card.json`; an old model is replaced only once all is written.

        Args:
            save_directory: Folder, made if missing.
            *args: As in `DiffusionPipeline.save_pretrained`.
            **kwargs: As in `DiffusionPipeline.save_pretrained`.

        Raises:
            TokenloomError: The folder cannot be written.
        """
        target = Path(save_directory).expanduser().absolute()
        kwargs.setdefault("repo_id", target.name)
        scratch: Path | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            super().save_pretrained(str(scratch), *args, **kwargs)
            _stamp(scratch)
            if self.card:
                models.write_card(scratch, self.card)
            scratch.chmod(0o755)
            _move_into(scratch, target)
        except OSError as error:
            raise TokenloomError(
                f"The model cannot be saved in {target}: {error.strerror or error}. Choose a folder that can be written."
            ) from error
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)


def _stamp(folder: Path) -> None:
    """Writes this version into every configuration, and takes out where the weights were once loaded from."""
    for path in [folder / models.INDEX_FILE, *sorted(folder.glob("*/config.json"))]:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        config[models.VERSION_KEY] = __version__
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into(source: Path, target: Path) -> None:
    """Moves the entries of one folder into another on the same disk; the index last, as it marks a whole model."""
    if not target.exists():
        source.replace(target)
        return
    entries = sorted(source.iterdir(), key=lambda entry: entry.name == models.INDEX_FILE)
    for entry in entries:
        old = target / entry.name
        if old.is_dir():
            retired = source / f"{entry.name}.old"
            old.replace(retired)
        entry.replace(old)
