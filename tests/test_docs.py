"""The documentation: its Python runs, its commands parse, its configurations load, its links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image

from tokenloom import cli
from tokenloom.data import Caption, write_captions
from tokenloom.demo import PHOTO
from tokenloom.generators import order as order_module
from tokenloom.tokenizers.registry import TOKENIZERS
from tokenloom.training.audio_config import CodecConfig, ContinuationConfig
from tokenloom.training.config import GeneratorConfig, TokenizerConfig, from_dict
from tokenloom.training.segmentation_config import MaskTokenizerConfig, SegmentationConfig
from tokenloom.training.video_config import VideoConfig, VideoTokenizerConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHELLS = ("sh", "bash", "console")
STYLES = ("flat", "simple")
GROUPS = ("animals & nature", "food & drink")


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The (line number, text) of every fenced block of these languages."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(2)) + 1, found.group(2))
        for found in FENCE.finditer(text)
        if found.group(1) in languages
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `tokenloom ...` line of the shell blocks."""
    found = []
    for _, text in blocks(page, *SHELLS):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["tokenloom"]:
                found.append(words[1:])
            elif "tokenloom.cli" in words:
                found.append(words[words.index("tokenloom.cli") + 1 :])
    return found


def parse(words: list[str]) -> None:
    """Parses a command line with the parser of the program, without running it; raises what the parser raises."""
    command: Any = typer.main.get_command(cli.app)
    words = list(words)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name!r}; there are {sorted(command.commands)}"
        command = command.commands[name]
    command.make_context(command.name, words)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, spelled as common renderers do."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def page_id(page: Path) -> str:
    return page.name


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages assume it: a photograph, and a (small) set at data/emoji64."""
    Image.open(PHOTO).save(tmp_path / "photo.jpg")
    root = tmp_path / "data" / "emoji64"
    captions = []
    for index in range(12):
        group, split = GROUPS[index % 2], ("train", "val", "val_style")[index // 4]
        for style in STYLES:
            file = f"{style}/{index}.png"
            (root / style).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (20 * index, 255 - 20 * index, 128)).save(root / file)
            label = f"thing {chr(ord('a') + index)}"
            caption = Caption(
                file=file,
                text=f"a {style} picture of {label}",
                label=label,
                style=style,
                group=group,
                concept=str(index),
                licence="CC0-1.0",
                split=split,
            )
            captions.append(caption)
    write_captions(root, captions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        order_module, "_REGISTRY", dict(order_module._REGISTRY)
    )  # a page may register an order
    return tmp_path


def write_named_configs(page: Path, folder: Path) -> None:
    """Writes the YAML blocks that begin with "# NAME.yaml" under that name."""
    for _, text in blocks(page, "yaml"):
        if found := re.match(r"# (\S+\.yaml)\n", text):
            (folder / found.group(1)).write_text(text, encoding="utf-8")


def test_there_is_something_to_check() -> None:
    assert len(PAGES) >= 8
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 20
    assert sum(len(commands(page)) for page in PAGES) >= 20


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_id)
def test_python_runs(page: Path, desk: Path) -> None:
    write_named_configs(page, desk)
    names: dict[str, Any] = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        code = "\n" * (line - 1) + text  # so that a traceback shows the line of the page
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=f"{page.name}: {shlex.join(words)}")
        for page in PAGES
        for words in commands(page)
    ],
)
def test_commands_parse(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(
    "words", [["generat", "x"], ["generate", "x", "--sead", "1"], ["generate"], ["train", "a.yaml", "--set"]]
)
def test_a_wrong_command_would_be_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|missing|requires an argument|no command"):
        parse(words)


CONFIGS = [(page, text) for page in PAGES for _, text in blocks(page, "yaml")]
RECIPES = [(path, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize(("page", "text"), CONFIGS + RECIPES, ids=lambda value: getattr(value, "name", ""))
def test_configurations_load(page: Path, text: str) -> None:
    values = yaml.safe_load(text)
    classes = (None, *TOKENIZERS)  # a generator's config names a folder instead
    kind: type = TokenizerConfig if values.get("tokenizer") in classes else GeneratorConfig
    if "scenes" in values:
        kind = SegmentationConfig if "tokenizer" in values or "unet" in values else MaskTokenizerConfig
    elif "video" in values["output"]:
        kind = VideoConfig if "tokenizer" in values else VideoTokenizerConfig
    elif "codec" in values or "crop_seconds" in values:
        kind = ContinuationConfig if "codec" in values else CodecConfig
    assert from_dict(kind, values).output == values["output"]


def test_caption_lines_are_caption_lines(tmp_path: Path) -> None:
    from tokenloom.data import read_captions

    lines = [text for page in PAGES for _, text in blocks(page, "json")]
    assert lines
    (tmp_path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    captions = read_captions(tmp_path, check_files=False)
    assert len(captions) == sum(len(text.splitlines()) for text in lines)
    assert json.loads(captions[-1].to_json())["split"] == "val"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_page = target.suffix == ".md" and target.is_file()
        if not target.exists() or (anchor and not (is_page and anchor in anchors(target))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page: Path) -> None:
    names = set(
        re.findall(
            r"\b((?:tokenloom|recipes|tests|docs)/[\w/.-]+\.(?:py|yaml|md))\b", page.read_text("utf-8")
        )
    )
    assert sorted(name for name in names if not (ROOT / name).is_file()) == []


def test_every_page_is_listed_in_the_readme() -> None:
    links = set(LINK.findall(prose(ROOT / "README.md")))
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in links] == []


def import_table() -> dict[str, set[str]]:
    """What the architecture page allows each part to import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Packages, and who may know whom")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", section, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}


def imported_parts(path: Path) -> set[str]:
    """The parts of tokenloom that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "tokenloom":
            names |= {f"tokenloom.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("tokenloom.")}


def test_imports_follow_the_table_of_the_architecture() -> None:
    used: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tokenloom").rglob("*.py")):
        part = path.relative_to(ROOT / "tokenloom").parts[0].removesuffix(".py")
        if part != "__init__":
            used[part] = used.get(part, set()) | (imported_parts(path) - {part})
    allowed = import_table()
    assert sorted(allowed) == sorted(used)
    forbidden = {part: sorted(names - allowed[part]) for part, names in used.items()}
    assert {part: names for part, names in forbidden.items() if names} == {}
