"""Phrases about a scene that are true by construction, each with the objects it means.

Ambiguous phrases are never made: a name is unique only if no other object's name contains its words, places and sizes need
a clear margin, and nothing is asked for that the background shows. Knows scenes; knows nothing of pictures or files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenloom.data.referring_names import BROADER, COLOURS, OTHER, SILENT
from tokenloom.data.referring_pool import Pool
from tokenloom.data.referring_scenes import Scene, Thing

KINDS = ("name", "colour", "position", "size", "relation", "category", "all", "absent")
ABSENT_SHARE = 0.12
_UNCOUNTED = (
    "food",
    "fruit",
    "fish",
    "popcorn",
    "rice",
    "bread",
    "bacon",
    "garlic",
    "ice",
    "deer",
    "shrimp",
    "squid",
)
_MARGIN = 0.12  # between centres, as a share of the scene's side
_LARGER = 1.6  # ratio of areas
_EDGES = (
    ("leftmost", "left", "x", 1),
    ("rightmost", "right", "x", -1),
    ("uppermost", "upper", "y", 1),
    ("lowest", "lower", "y", -1),
)


@dataclass(frozen=True)
class Phrase:
    """A phrase.

    Attributes:
        text: The words.
        kind: One of `KINDS`.
        targets: Indices of the objects it means; empty for absent ones.
    """

    text: str
    kind: str
    targets: tuple[int, ...]


def plural(name: str) -> str:
    """The plural of a name, by rule; a few words stay as they are."""
    if name.endswith(_UNCOUNTED):
        return name
    if name.endswith(("s", "x", "ch", "sh")):
        return name if name.endswith("s") and not name.endswith("ss") else f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def _means(name: str, other: str) -> bool:
    """Whether an object called `other` could be meant by `name`: all words of one are words of the other."""
    words, more = set(name.split()), set(other.split())
    return words <= more or more <= words


def _of_name(things: Sequence[Thing], name: str) -> list[int]:
    return [index for index, thing in enumerate(things) if _means(name, thing.name)]


def _of_category(things: Sequence[Thing], category: str) -> list[int] | None:
    """The objects of a category, or `None` where others could be meant as well."""
    near = {
        category,
        *BROADER.get(category, ()),
        *(key for key, value in BROADER.items() if category in value),
    }
    if any(thing.category is None or (thing.category in near - {category}) for thing in things):
        return None
    return [index for index, thing in enumerate(things) if thing.category == category]


def true_phrases(scene: Scene) -> list[Phrase]:
    """Every phrase but the absent ones, each text once, in a fixed order."""
    things = scene.things
    groups: dict[str, list[int]] = {}  # a noun -> the objects that it can mean
    for thing in things:
        same = _of_name(things, thing.name)
        clear = not set(thing.name.split()) & set(scene.shows)
        if clear and all(things[index].name == thing.name for index in same):
            groups[thing.name] = same
    found = _names_and_colours(things, groups)
    if scene.quiet:
        for category in dict.fromkeys(thing.category for thing in things if thing.category):
            if category in SILENT or category in scene.shows:
                continue
            members = _of_category(things, category)
            if members is not None:
                groups.setdefault(category, members)
                if len(members) == 1:
                    found.append(Phrase(f"the {category}", "category", (members[0],)))
    for noun, members in groups.items():
        if len(members) > 1:
            found.append(Phrase(f"all {plural(noun)}", "all", tuple(members)))
            found += _places(things, noun, members)
    found += _sizes(things, groups, OTHER not in scene.shows)
    found += _relations(things, groups)
    return list({phrase.text: phrase for phrase in found}.values())


def _names_and_colours(things: Sequence[Thing], groups: dict[str, list[int]]) -> list[Phrase]:
    found = []
    for noun, members in groups.items():
        if len(members) == 1:
            found.append(Phrase(f"the {noun}", "name", (members[0],)))
        if set(noun.split()) & set(COLOURS):
            continue
        for index in members:
            colour = things[index].colour
            rivals = [other for other in members if other != index]
            if colour and all(things[other].colour not in (None, colour) for other in rivals):
                found.append(Phrase(f"the {colour} {noun}", "colour", (index,)))
    return found


def _places(things: Sequence[Thing], noun: str, members: list[int]) -> list[Phrase]:
    found = []
    for most, more, axis, sign in _EDGES:
        ranked = sorted(members, key=lambda index: sign * getattr(things[index], axis))
        gap = abs(getattr(things[ranked[1]], axis) - getattr(things[ranked[0]], axis))
        if gap >= _MARGIN:
            word = more if len(members) == 2 else most
            found.append(Phrase(f"the {word} {noun}", "position", (ranked[0],)))
    return found


def _sizes(things: Sequence[Thing], groups: dict[str, list[int]], alone: bool) -> list[Phrase]:
    """Phrases of size; of all objects only where they are alone."""
    found = []
    for noun, members in [*groups.items(), *([("object", list(range(len(things))))] if alone else [])]:
        if len(members) < 2:
            continue
        ranked = sorted(members, key=lambda index: things[index].area)
        two = len(members) == 2
        if things[ranked[-1]].area >= _LARGER * things[ranked[-2]].area:
            found.append(Phrase(f"the {'larger' if two else 'largest'} {noun}", "size", (ranked[-1],)))
        if things[ranked[1]].area >= _LARGER * things[ranked[0]].area:
            found.append(Phrase(f"the {'smaller' if two else 'smallest'} {noun}", "size", (ranked[0],)))
    return found


def _relations(things: Sequence[Thing], groups: dict[str, list[int]]) -> list[Phrase]:
    """Relations to an object of a unique name; among several of one name only if one alone stands so."""
    found = []
    for anchor, places in groups.items():
        if len(places) != 1:
            continue
        base = things[places[0]]
        for noun, members in groups.items():
            if noun == anchor or places[0] in members:
                continue
            sides = [_side(things[index], base) for index in members]
            for words in dict.fromkeys(side for side in sides if side):
                if sides.count(words) == 1 and all(sides):
                    target = members[sides.index(words)]
                    found.append(Phrase(f"the {noun} {words} the {anchor}", "relation", (target,)))
    return found


def _side(thing: Thing, base: Thing) -> str | None:
    """Where a thing stands beside another, if it is clear."""
    dx, dy = thing.x - base.x, thing.y - base.y
    if max(abs(dx), abs(dy)) < _MARGIN or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def absent_phrase(scene: Scene, names: Sequence[str], rng: random.Random) -> Phrase | None:
    """A phrase about nothing in the scene: a name that shares no word with any, or a colour that none of a name has.

    `names` must hold none that the background may show (`SceneMaker.absent_names`).
    """
    things = scene.things
    taken = {*COLOURS, *scene.shows}
    coloured = [thing for thing in things if thing.colour and not set(thing.name.split()) & taken]
    if coloured and rng.random() < 0.3:
        noun = rng.choice(coloured).name
        same = _of_name(things, noun)
        seen = {things[index].colour for index in same}
        if None not in seen and all(things[index].name == noun for index in same):
            near = seen | {other for one in seen for other in _NEAR.get(str(one), ())}
            if free := [colour for colour in COLOURS if colour not in near]:
                return Phrase(f"the {rng.choice(free)} {noun}", "absent", ())
    present = {word for thing in things for word in thing.name.split()}
    present |= {thing.category for thing in things if thing.category}
    for _ in range(20):
        name = rng.choice(names) if names else ""
        if name and not present & set(name.split()):
            colour = (
                f"{rng.choice(COLOURS)} "
                if rng.random() < 0.15 and not set(name.split()) & set(COLOURS)
                else ""
            )
            return Phrase(f"the {colour}{name}", "absent", ())
    return None


_NEAR = {
    "red": ("orange", "pink", "brown", "purple"),
    "orange": ("red", "yellow", "brown"),
    "yellow": ("orange", "green", "brown"),
    "green": ("yellow", "blue"),
    "blue": ("purple", "green", "gray"),
    "purple": ("blue", "pink", "red"),
    "pink": ("red", "purple", "white"),
    "brown": ("orange", "red", "yellow", "black", "gray"),
    "white": ("gray", "pink"),
    "gray": ("white", "black", "blue", "brown"),
    "black": ("gray", "brown", "blue"),
}


def phrases_of(scene: Scene, names: Sequence[str], rng: random.Random) -> list[Phrase]:
    """All true phrases of a scene and, one at a time, absent ones until they are about 12 % of all."""
    found = true_phrases(scene)
    wanted = len(found) * ABSENT_SHARE / (1 - ABSENT_SHARE)
    count = int(wanted) + (rng.random() < wanted - int(wanted))
    absent = [absent_phrase(scene, names, rng) for _ in range(count)]
    texts = {phrase.text for phrase in found}
    return found + [phrase for phrase in absent if phrase is not None and phrase.text not in texts]


def draw_phrases(scene: Scene, names: Sequence[str], count: int, rng: random.Random) -> list[Phrase]:
    """`count` phrases, for training: each absent with a chance of 12 %, else of a kind drawn first, so that kinds balance.

    Phrases repeat where a scene has fewer.
    """
    true = true_phrases(scene)
    kinds: dict[str, list[Phrase]] = {}
    for phrase in true:
        kinds.setdefault(phrase.kind, []).append(phrase)
    drawn = []
    for _ in range(count):
        absent = absent_phrase(scene, names, rng) if not true or rng.random() < ABSENT_SHARE else None
        if absent is not None:
            drawn.append(absent)
        elif true:
            drawn.append(rng.choice(kinds[rng.choice(sorted(kinds))]))
        else:
            drawn.append(Phrase(f"all {plural('object')}", "all", tuple(range(len(scene.things)))))
    return drawn


def vocabulary_texts(pool: Pool) -> list[str]:
    """Texts that hold every word of phrases about a pool, for a vocabulary; names that are held out are among them."""
    words = " ".join((*COLOURS, *(word for edge in _EDGES for word in edge[:2])))
    nouns = sorted(
        {item.name for item in pool.cut_outs} | {item.category or "object" for item in pool.cut_outs}
    )
    fixed = "all object objects larger largest smaller smallest left of right of above below"
    return [words, fixed, *nouns, *(plural(noun) for noun in nouns)]
