"""Imports: lazy, quick, and possible with the core dependencies alone."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tokenloom

HEAVY = (
    "torch",
    "torchvision",
    "torchaudio",
    "diffusers",
    "timm",
    "accelerate",
    "transformers",
    "numpy",
    "PIL",
)
EXTRAS = (
    "transformers",
    "resvg_py",
    "pytest",
    "hypothesis",
    "scipy",
    "pandas",
    "matplotlib",
    "skimage",
    "cv2",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["tokenloom", "tokenloom.cli", "tokenloom.models", "tokenloom.pipelines"])
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_import_is_quick() -> None:
    start = time.perf_counter()
    assert run_python("import tokenloom").returncode == 0
    assert time.perf_counter() - start < 1.5


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    names = [module.name for module in pkgutil.walk_packages(tokenloom.__path__, "tokenloom.")]
    assert "tokenloom.pipelines.text_to_image" in names
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))"
    done = run_python(f"{block}\nimport importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in tokenloom.__all__:
        assert getattr(tokenloom, name) is not None
        assert name in dir(tokenloom)


def test_model_mixin_is_the_one_of_diffusers() -> None:
    import diffusers

    assert tokenloom.ModelMixin is diffusers.ModelMixin


def test_unknown_attributes_are_attribute_errors() -> None:
    assert not hasattr(tokenloom, "PreTrainedTokenizer")
    with pytest.raises(AttributeError, match="has no attribute 'Layuot'"):
        tokenloom.Layuot  # noqa: B018


def test_version_agrees_with_the_installed_package() -> None:
    parts = tokenloom.__version__.split(".")
    assert len(parts) == 3
    assert all(part.isdigit() for part in parts)


def test_every_folder_of_modules_is_a_package() -> None:
    root = Path(tokenloom.__file__).parent
    folders = {path.parent for path in root.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
