"""Which emoji become cut-outs of the referring set, under which names and in which categories; names of colours.

Knows the sub-groups of emojibase-data and what was checked by hand. Knows nothing of pictures' files, scenes or phrases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tokenloom.data.splits import concept_id

STYLES = ("3d", "detailed")  # Fluent 3d and Noto: shaded drawings, the nearest to photographs

_CATEGORIES = {
    "animal": ("animal-",),
    "plant": ("plant-",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "food": ("food-prepared", "food-asian", "food-sweet"),
    "drink": ("drink",),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "building": ("place-building", "place-religious"),
    "tool": ("tool",),
    "instrument": ("musical-instrument",),
}
_NAMEABLE = (
    *(prefix for prefixes in _CATEGORIES.values() for prefix in prefixes),
    "dishware",
    "sport",
    "game",
    "event",
    "clothing",
    "music",
    "computer",
    "light-video",
    "book-paper",
    "mail",
    "writing",
    "office",
    "lock",
    "science",
    "medical",
    "household",
    "place-other",
    "place-geographic",
)
_UNCATEGORISED = frozenset(  # in a sub-group, but not what its category says
    "paw prints/pig nose/feather/wing/spiral shell/coral/spider web/microbe/empty nest/nest with eggs/rosette/mushroom/"
    "dragon/dragon face/phoenix/unicorn/fallen leaf/maple leaf/salt/butter/ice/pouring liquid/honey pot/cooking/"
    "pot of food/bowl with spoon/baby bottle/station/bus stop/motorway/railway track/oil drum/fuel pump/wheel/"
    "police car light/horizontal traffic light/vertical traffic light/stop sign/construction/roller skate/skateboard/"
    "anchor/ring buoy/parachute/seat/satellite/building construction/brick/rock/wood/wedding/Statue of Liberty/kaaba/"
    "dagger/crossed swords/bomb/boomerang/bow and arrow/shield/link/broken chain/chains/hook/magnet/balance scale/"
    "white cane/gear/nut and bolt/toolbox/teddy bear/carousel horse/nesting dolls/Christmas tree/tanabata tree/"
    "jack-o-lantern/pine decoration/carp streamer/flower playing cards/fishing pole".split("/")
)
_LEFT_OUT = frozenset(  # whole scenes, squares without an outline, and signs
    "national park/foggy/night with stars/cityscape/sunrise over mountains/sunrise/cityscape at dusk/sunset/"
    "bridge at night/hot springs/level slider/musical note/musical notes/musical score/sparkles/fireworks/"
    "moon viewing ceremony/spade suit/heart suit/diamond suit/club suit/landslide/beach with umbrella/desert/"
    "desert island/construction/motorway/elevator/flag in hole".split("/")
)
OTHER = "object"
"""The category of things that are certainly in none of the others; no phrase names it."""
SILENT = (OTHER, "building")
"""Categories that no phrase names: many photographs show buildings."""
LIVING = ("animal", "plant")
"""Categories that unknown photographs may show."""
BROADER = {"food": ("fruit", "vegetable"), "plant": ("fruit", "vegetable"), "drink": ("food",)}
"""Categories that a phrase with the key may also be understood to mean."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "gray", "black")
_HUES = ((12, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (258, "blue"), (292, "purple"))
_DOMINANT = 0.5  # share of the pixels that makes a thing "the green ..."


def cut_out_name(label: str) -> str:
    """The name of an emoji as people say it: lower case, without " face" behind animals and such."""
    name = re.sub(r"[^\w' -]", "", label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()).replace(
        "-", " "
    )
    return " ".join(name.removesuffix(" face").split())


def nameable(
    emoji: Sequence[Mapping[str, Any]], subgroups: Mapping[str, str]
) -> dict[str, tuple[str, str | None]]:
    """Code point key -> (name, category or `None` where that is open) of the emoji that can be cut out and named.

    Args:
        emoji: en/data.json of emojibase-data.
        subgroups: "subgroups" of its meta/groups.json: number -> "animal-mammal".
    """
    found = {}
    for entry in emoji:
        subgroup = subgroups.get(str(entry.get("subgroup")), "")
        label = entry["label"]
        if not subgroup.startswith(_NAMEABLE) or label in _LEFT_OUT:
            continue
        kinds = [name for name, prefixes in _CATEGORIES.items() if subgroup.startswith(prefixes)]
        category = None if label in _UNCATEGORISED else [*kinds, OTHER][0]
        found[concept_id(entry["hexcode"])] = (cut_out_name(label), category)
    return found


def colour_of(picture: Image.Image) -> str | None:
    """The colour word of an RGBA picture, or `None` if no colour has half of the opaque pixels."""
    small = picture.resize((32, 32), Image.Resampling.BOX)
    hsv = np.asarray(small.convert("RGB").convert("HSV"), dtype=np.float32).reshape(-1, 3)
    solid = np.asarray(small.getchannel("A")).reshape(-1) > 200
    if not solid.any():
        return None
    hue, saturation, value = hsv[solid, 0] * 360 / 255, hsv[solid, 1] / 255, hsv[solid, 2] / 255
    names = np.full(len(hue), "pink", dtype="<U8")
    for limit, name in reversed(_HUES):
        names[hue < limit] = name
    names[hue >= 345] = "red"
    names[(names == "red") & (saturation < 0.55) & (value > 0.75)] = "pink"
    names[np.isin(names, ("red", "orange")) & (value < 0.6)] = "brown"
    grey = saturation < 0.16
    names[grey & (value >= 0.85)] = "white"
    names[grey & (value < 0.85)] = "gray"
    names[value < 0.2] = "black"
    words, counts = np.unique(names, return_counts=True)
    best = int(counts.argmax())
    return str(words[best]) if counts[best] >= _DOMINANT * len(names) else None
