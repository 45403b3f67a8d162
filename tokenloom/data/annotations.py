"""Annotation files in the formats of COCO and RefCOCO: pictures, phrases, masks.

Reads a COCO "instances" JSON (polygons, run lengths, boxes), and with it a list of references in the manner of RefCOCO:
a JSON list of {"ann_id" or "ann_ids", "image_id", "sentences": [...], "split"}, in which sentences are texts or objects with
"sent" or "raw". Without references each category of a picture gives the phrase "all <category>". Knows files; knows nothing
of tokenizers' networks or models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenloom.data.referring import Example
from tokenloom.data.referring_phrases import Phrase
from tokenloom.errors import TokenloomError
from tokenloom.media import open_image

_FILE_HINT = "Expected a COCO file: an object with the lists images, annotations and categories."


def read_coco(
    instances: str | os.PathLike[str],
    pictures: str | os.PathLike[str],
    references: str | os.PathLike[str] | None = None,
    split: str | None = None,
) -> Iterator[Example | TokenloomError]:
    """Pictures with phrases and masks, one after the other; for a bad record the error that names it, then the next.

    Args:
        instances: The COCO JSON file.
        pictures: Folder that "file_name" is relative to.
        references: JSON list of references; `None` makes phrases of the categories.
        split: Only references of this "split".

    Yields:
        An `Example` a picture with phrases (kind "reference" or "all"), or a `TokenloomError` that names a record: a
        picture that is missing, a malformed mask, a reference to nothing. The other records of a picture still count.

    Raises:
        TokenloomError: At once, if a file cannot be read or is of another format.
    """
    content = _load(instances)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise TokenloomError(f"{str(instances)!r} holds no images and annotations. {_FILE_HINT}")
    listed = None
    if references is not None:
        listed = _load(references)
        if not isinstance(listed, list):
            raise TokenloomError(f"{str(references)!r} must hold a list of references.")
    return _examples(content, Path(pictures), listed, split)


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenloomError(f"Cannot read {str(path)!r} ({error.strerror}).") from None
    except ValueError as error:
        raise TokenloomError(f"{str(path)!r} is not JSON in UTF-8 ({error}). {_FILE_HINT}") from None


def _examples(
    content: dict[str, Any], folder: Path, references: list[Any] | None, split: str | None
) -> Iterator[Example | TokenloomError]:
    images, annotations, errors = _index(content)
    yield from errors
    wanted: dict[Any, list[tuple[str, str, str, tuple[Any, ...]]]] = {}  # image -> (record, text, kind, ids)
    if references is None:
        titles, errors = _titles(content.get("categories"))
        yield from errors
        groups: dict[tuple[Any, Any], list[Any]] = {}
        for key, one in annotations.items():
            category = one.get("category_id")
            groups.setdefault((one["image_id"], category if _is_id(category) else repr(category)), []).append(
                key
            )
        for (image, category), ids in groups.items():
            record = f"category {category!r} of image {image!r}"
            if category not in titles:
                yield TokenloomError(f"{record}: there is no such category.")
                continue
            wanted.setdefault(image, []).append((record, f"all {titles[category]}", "all", tuple(ids)))
    else:
        for number, reference in enumerate(references):
            try:
                image, found = _reference(number, reference, annotations, split)
            except TokenloomError as error:
                yield error
                continue
            if found:
                wanted.setdefault(image, []).extend(found)
    for image, phrases in wanted.items():
        if image not in images:
            yield TokenloomError(f"{phrases[0][0]}: there is no image {image!r} in the list of images.")
            continue
        yield from _example(images[image], phrases, annotations, folder)


def _index(content: dict[str, Any]) -> tuple[dict[Any, Any], dict[Any, Any], list[TokenloomError]]:
    """Images and annotations by id, and an error for each record without what is needed."""
    errors = []
    found: list[dict[Any, Any]] = []
    for key, needed in (("images", ("id", "file_name")), ("annotations", ("id", "image_id", "segmentation"))):
        records = {}
        for number, record in enumerate(content[key]):
            missing = [name for name in needed if not isinstance(record, dict) or name not in record]
            if missing:
                errors.append(TokenloomError(f"{key}[{number}]: without {', '.join(missing)}."))
            elif not all(_is_id(record[name]) for name in needed if name.endswith("id")):
                errors.append(TokenloomError(f"{key}[{number}]: an id must be a number or a text."))
            else:
                records[record["id"]] = record
        found.append(records)
    return found[0], found[1], errors


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _titles(categories: Any) -> tuple[dict[Any, str], list[TokenloomError]]:
    """Names of the categories by id, and an error for each that has none."""
    if not isinstance(categories, list):
        return {}, [TokenloomError("categories: expected a list of {id, name}, from which phrases are made.")]
    good = [
        isinstance(one, dict) and _is_id(one.get("id")) and isinstance(one.get("name"), str)
        for one in categories
    ]
    errors = [
        TokenloomError(f"categories[{number}]: expected an id and a name, got {categories[number]!r:.60}.")
        for number, right in enumerate(good)
        if not right
    ]
    return {one["id"]: one["name"] for one, right in zip(categories, good, strict=True) if right}, errors


def _reference(
    number: int, reference: Any, annotations: Mapping[Any, Any], split: str | None
) -> tuple[Any, list[tuple[str, str, str, tuple[Any, ...]]]]:
    if not isinstance(reference, dict):
        raise TokenloomError(f"references[{number}]: expected an object, got {reference!r:.60}.")
    record = f"reference {reference.get('ref_id', number)!r}"
    if split is not None and reference.get("split") != split:
        return None, []
    ids = reference.get("ann_ids", [reference["ann_id"]] if "ann_id" in reference else None)
    ids = [] if ids in ([-1], [None]) else ids  # a phrase that means nothing, as gRefCOCO writes it
    sentences = reference.get("sentences")
    if not isinstance(ids, list) or not isinstance(sentences, list) or not sentences:
        raise TokenloomError(f"{record}: expected ann_id or ann_ids, and a list of sentences.")
    for one in ids:
        if not _is_id(one) or one not in annotations:
            raise TokenloomError(f"{record}: there is no annotation {one!r}.")
    image = reference.get("image_id", annotations[ids[0]]["image_id"] if ids else None)
    if not _is_id(image):
        raise TokenloomError(f"{record}: image_id must be a number or a text, got {image!r:.60}.")
    if any(annotations[one]["image_id"] != image for one in ids):
        raise TokenloomError(f"{record}: its annotations belong to another image than {image!r}.")
    phrases = []
    for sentence in sentences:
        text = sentence.get("sent", sentence.get("raw")) if isinstance(sentence, dict) else sentence
        if not isinstance(text, str) or not text.strip():
            raise TokenloomError(f"{record}: a sentence is empty or not a text: {sentence!r:.60}.")
        phrases.append((record, text, "reference" if ids else "absent", tuple(ids)))
    return image, phrases


def _example(
    image: Mapping[str, Any],
    phrases: list[tuple[str, str, str, tuple[Any, ...]]],
    annotations: Mapping[Any, Any],
    folder: Path,
) -> Iterator[Example | TokenloomError]:
    place = f"image {image['id']!r}"
    try:
        picture = open_image(folder / str(image["file_name"]))
    except TokenloomError as error:
        yield TokenloomError(f"{place}: {error}")
        return
    size = (picture.height, picture.width)
    kept, masks = [], []
    for record, text, kind, ids in phrases:
        mask = np.zeros(size, dtype=bool)
        try:
            for one in ids:
                mask |= segmentation_mask(annotations[one]["segmentation"], size)
        except TokenloomError as error:
            yield TokenloomError(f"{record}, annotation {one!r}, {place}: {error}")
            continue
        kept.append(Phrase(text, kind, ids))
        masks.append(mask)
    if kept:
        name = str(image["file_name"])
        yield Example(name, picture, tuple(kept), np.stack(masks), "file")


def segmentation_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Bool (H, W) of a "segmentation" of COCO: a list of polygons, or run lengths, compressed or not.

    Raises:
        TokenloomError: For anything else, and for masks of another size than the picture's.
    """
    if isinstance(segmentation, Mapping):
        from tokenloom.tokenizers.mask_formats import rle_to_mask

        given = segmentation.get("size")
        if isinstance(given, list) and given != list(size):  # before it is unpacked: it may claim any size
            raise TokenloomError(
                f"the mask is {given!r:.60}, but the picture is {list(size)} (height, width)."
            )
        return rle_to_mask(segmentation).numpy()
    if not isinstance(segmentation, list) or not segmentation:
        raise TokenloomError(
            f"a segmentation is a list of polygons or run lengths, got {segmentation!r:.60}."
        )
    mask = np.zeros(size, dtype=bool)
    for polygon in segmentation:
        flat = polygon if isinstance(polygon, list) else []
        numbers = all(isinstance(value, (int, float)) and np.isfinite(value) for value in flat)
        if len(flat) < 6 or len(flat) % 2 or not numbers:
            raise TokenloomError(
                f"a polygon is a list of at least three points x, y, x, y, ..., got {polygon!r:.60}."
            )
        mask |= fill_polygon(np.array(flat, dtype=float).reshape(-1, 2), size)
    return mask


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bool (H, W) of the pixels whose centres, at half numbers, lie inside a polygon (n, 2) of x and y (even-odd rule)."""
    mask = np.zeros(size, dtype=bool)
    after = np.roll(points, -1, axis=0)
    (x0, y0), (x1, y1) = points.T, after.T
    centres = np.arange(size[1]) + 0.5
    for row in range(max(0, int(y0.min())), min(size[0], int(np.ceil(y0.max())))):
        y = row + 0.5
        crossed = (y0 <= y) != (y1 <= y)
        share = (y - y0[crossed]) / (y1[crossed] - y0[crossed])
        ends = np.sort(x0[crossed] + share * (x1[crossed] - x0[crossed]))
        mask[row] = np.searchsorted(ends, centres, side="right") % 2 == 1
    return mask
