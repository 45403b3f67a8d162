"""Annotation files in the formats of COCO and RefCOCO: good records, and bad ones that are named and passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenloom.data.annotations import read_coco, segmentation_mask
from tokenloom.data.referring import Example
from tokenloom.errors import TokenloomError

SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # corners of 4 x 4 pixels
RLE = {"size": [8, 10], "counts": [8, 2, 70]}


def write(folder: Path, annotations: list[dict[str, Any]], references: list[Any]) -> tuple[Path, Path]:
    Image.new("RGB", (10, 8), "white").save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "lost.png"}],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "refs.json").write_text(json.dumps(references))
    return folder / "instances.json", folder / "refs.json"


def annotation(key: int, segmentation: Any, image: int = 1) -> dict[str, Any]:
    return {"id": key, "image_id": image, "category_id": 7, "segmentation": segmentation}


def test_references(tmp_path: Path) -> None:
    instances, references = write(
        tmp_path,
        [annotation(1, [SQUARE]), annotation(2, RLE)],
        [
            {
                "ref_id": 5,
                "ann_id": 1,
                "sentences": [{"sent": "the dog"}, {"raw": "left dog"}],
                "split": "val",
            },
            {"ref_id": 6, "ann_ids": [1, 2], "image_id": 1, "sentences": ["both"], "split": "val"},
            {"ref_id": 7, "ann_ids": [-1], "image_id": 1, "sentences": ["the cat"], "split": "val"},
            {"ref_id": 8, "ann_id": 1, "sentences": ["not asked for"], "split": "train"},
        ],
    )
    (example,) = read_coco(instances, tmp_path, references, split="val")
    assert isinstance(example, Example)
    assert [phrase.text for phrase in example.phrases] == ["the dog", "left dog", "both", "the cat"]
    assert [int(mask.sum()) for mask in example.masks] == [16, 16, 18, 0]
    assert example.phrases[3].kind == "absent"


def test_categories_without_references(tmp_path: Path) -> None:
    instances, _ = write(tmp_path, [annotation(1, [SQUARE]), annotation(2, RLE)], [])
    (example,) = read_coco(instances, tmp_path)
    assert isinstance(example, Example)
    assert [phrase.text for phrase in example.phrases] == ["all dog"]
    assert int(example.masks[0].sum()) == 18


def test_bad_records_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    instances, references = write(
        tmp_path,
        [
            annotation(1, [SQUARE]),
            annotation(2, {"size": [8, 10], "counts": [8, 2]}),
            annotation(3, [SQUARE], image=2),
            {"id": 4},
        ],
        [
            {"ref_id": 1, "ann_id": 1, "sentences": ["good"]},
            {"ref_id": 2, "ann_id": 2, "sentences": ["cut off"]},
            {"ref_id": 3, "ann_id": 3, "sentences": ["no picture"]},
            {"ref_id": 4, "ann_id": 99, "sentences": ["no annotation"]},
            {"ref_id": 5, "ann_id": 1, "sentences": [""]},
        ],
    )
    found = list(read_coco(instances, tmp_path, references))
    errors = [str(one) for one in found if isinstance(one, TokenloomError)]
    examples = [one for one in found if isinstance(one, Example)]
    assert [phrase.text for one in examples for phrase in one.phrases] == ["good"]
    expected = (
        r"annotations[3]: without image_id, segmentation",
        "reference 4: there is no annotation 99",
        "reference 5: a sentence is empty",
        "reference 2, annotation 2, image 1: The counts add up to 10",
        "image 2: ",
    )
    assert len(errors) == len(expected)
    for error, start in zip(errors, expected, strict=True):
        assert error.startswith(start)


@pytest.mark.parametrize(
    "bad", [[], [[1, 2, 3]], [[1, 2, 3, 4, 5, "x"]], None, {"size": [4, 4], "counts": [16]}]
)
def test_malformed_masks(bad: Any) -> None:
    with pytest.raises(TokenloomError):
        segmentation_mask(bad, (8, 10))


def test_polygons_cover_whole_pixels() -> None:
    mask = segmentation_mask([SQUARE], (8, 10))
    wanted = np.zeros((8, 10), bool)
    wanted[1:5, 2:6] = True
    assert np.array_equal(mask, wanted)


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(TokenloomError, match="holds no images and annotations"):
        read_coco(tmp_path / "x.json", tmp_path)
    with pytest.raises(TokenloomError, match="Cannot read"):
        read_coco(tmp_path / "y.json", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"id": [1], "image_id": 1, "segmentation": []}]}, "an id must be"),
        ({"categories": None}, "categories: expected a list"),
        ({"categories": [{"id": [7], "name": "dog"}]}, "expected an id and a name"),
        ({"annotations": [annotation(2, {"size": [10**9, 10**9], "counts": [10**18]})]}, "but the picture"),
    ],
)
def test_records_of_another_shape_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    instances, _ = write(tmp_path, [annotation(1, [SQUARE])], [])
    instances.write_text(json.dumps({**json.loads(instances.read_text()), **changes}))
    found = [one for one in read_coco(instances, tmp_path) if isinstance(one, TokenloomError)]
    assert found and message in str(found[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_id": [1]}, "image_id must be"), ({"ann_id": [[1]]}, "no annotation")],
)
def test_references_of_another_shape_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    reference = {"ref_id": 4, "ann_id": 1, "image_id": 1, "sentences": ["the dog"]}
    instances, references = write(tmp_path, [annotation(1, [SQUARE])], [reference, {**reference, **change}])
    good, bad = sorted(
        read_coco(instances, tmp_path, references), key=lambda one: isinstance(one, TokenloomError)
    )
    assert isinstance(good, Example) and message in str(bad)
