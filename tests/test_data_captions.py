"""captions.jsonl: what is read, what is refused, and how it is written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tokenloom.data import prompts
from tokenloom.data.captions import Caption, read_captions, write_captions
from tokenloom.errors import TokenloomError

GOOD = '{"file": "a.png", "text": "a red ball"}'


def write(folder: Path, *lines: str) -> Path:
    (folder / "a.png").write_bytes(b"x")
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_round_trip_keeps_every_key(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    captions = [
        Caption(file="a.png", text="café “ball”", label="ball", tags=("red", "round"), split="val"),
        Caption(file="a.png", text="", extra={"rating": 5}),
    ]
    path = write_captions(tmp_path, captions)
    assert read_captions(tmp_path) == captions
    assert read_captions(path) == captions
    assert "café" in path.read_text(encoding="utf-8")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.png", "captions.jsonl"]


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "captions.jsonl").write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n"
    )
    assert [caption.text for caption in read_captions(tmp_path)] == ["a red ball"] * 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file": "a.png", "text": }', r"line 3: not JSON \(Expecting value at column 27\)"),
        ('["a.png", "text"]', "line 3: expected a JSON object .* got list"),
        ('{"text": "x"}', 'line 3: the key "file" is missing'),
        ('{"file": "a.png"}', 'line 3: the key "text" is missing'),
        ('{"file": "a.png", "text": 7}', r'line 3: "text" must be a text, got 7 \(int\)'),
        ('{"file": "a.png", "text": null}', 'line 3: "text" must be a text'),
        ('{"file": "a.png", "text": "x", "style": ["flat"]}', 'line 3: "style" must be a text'),
        ('{"file": "a.png", "text": "x", "tags": "red"}', 'line 3: "tags" must be a list of texts'),
        ('{"file": "a.png", "text": "x", "tags": ["red", 1]}', 'line 3: "tags" must be a list of texts'),
        ('{"file": "b.png", "text": "x"}', "line 3: there is no picture 'b.png'"),
        ('{"file": "../a.png", "text": "x"}', "line 3: .* inside the folder"),
        ('{"file": "/etc/a.png", "text": "x"}', "line 3: .* inside the folder"),
        ('{"file": "C:\\\\a.png", "text": "x"}', "line 3: .* inside the folder"),
        ('{"file": "", "text": "x"}', "line 3: .* inside the folder"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(TokenloomError, match=expected):
        read_captions(write(tmp_path, GOOD, "", line, GOOD))


def test_text_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes(b'\n{"file": "a.png", "text": "caf\xe9"}\n')
    with pytest.raises(TokenloomError, match="line 2: not UTF-8"):
        read_captions(tmp_path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match=r"Expected a folder with a captions\.jsonl"):
        read_captions(tmp_path)
    with pytest.raises(TokenloomError, match="is empty"):
        read_captions(write(tmp_path, "", " "))


def test_file_check_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, '{"file": "later.png", "text": "x"}')
    assert read_captions(tmp_path, check_files=False)[0].file == "later.png"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(TypeError):
        write_captions(tmp_path, [Caption(file="a.png", text="new", extra={"bad": object()})])
    assert read_captions(tmp_path)[0].text == "a red ball"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(TokenloomError, match="Create the folder first"):
        write_captions(tmp_path / "missing", [])


def test_plain_caption_fits_its_article() -> None:
    assert prompts.plain_caption("onion", "flat") == "a flat picture of onion"
    assert prompts.plain_caption("onion", "outlined") == "an outlined picture of onion"
    assert prompts.plain_caption("onion") == "a picture of onion"


def test_captions_with_tags() -> None:
    made = [
        prompts.caption("onion", ("food", "onion", "root"), "flat", random.Random(seed)) for seed in range(60)
    ]
    again = [
        prompts.caption("onion", ("food", "onion", "root"), "flat", random.Random(seed)) for seed in range(60)
    ]
    start = "a flat picture of onion"
    assert made == again
    assert set(made) == {
        start,
        f"{start}, food",
        f"{start}, root",
        f"{start}, food, root",
        f"{start}, root, food",
    }
    assert prompts.caption("onion", (), "flat") == start
    assert prompts.caption("onion", ("food",), "flat", random.Random(0), max_tags=0) == start
