"""What each photograph of the pool shows, looked up by eye, so that no phrase means something in the background.

A phrase such as "the animal", "the hammer" or "the largest object" is only made where the photograph shows nothing of the kind, and nothing is called
absent that the photograph shows. Knows the photographs by name; knows nothing of their files, scenes or phrases.
"""

from __future__ import annotations

from tokenloom.data.referring_names import OTHER

_SCENERY = (  # words for what is seen; names of photographs of buildings, water, sky and stone
    ("", "solar4 umang_by_Abhishek_Mudgal windmill"),
    ("pyramid lamp", "leMusee"),
    ("flag", "zimniPalace"),
    ("sun", "sunset_by_Aitzol_Berasategi"),
    ("mountain grass", "picosdeeuropa_by_Aitzol_Berasategi"),
    ("tool shovel box bucket", "igloo"),
    ("plant tree", "aitzgorri_by_Aitzol_Berasategi china dam2 dam3 greatWall leaningTowerOfPisa"),
    ("plant tree", "life_by_Aitzol_Berasategi windmill12 windmill14 windmill7 solar7"),
    ("plant tree statue", "mountRushmore"),
)
_THINGS = (  # the same for photographs of one thing or a few
    ("animal plant fish coral", "fish1 fish14 fish15 fish2 fish23 fish24 fish25 fish26 fish27 fish28"),
    ("animal plant fish coral", "fish3 fish4 fish5 fish8"),
    ("animal cat", "chelsea"),
    ("animal dog", "friends_by_Aitzol_Berasategi"),
    ("animal plant crocodile lizard", "crocodile"),
    ("animal plant moose deer", "moose"),
    ("animal plant panda bear", "panda"),
    ("plant flower", "flower seeding_by_Clements_Engelhardt"),
    ("fruit food fig bowl", "Picture_0B_by_freespace"),
    ("tool brush paintbrush", "Picture_1A_by_freespace"),
    ("food drink wine bottle barrel chair table", "Wine_by_Jakkub_Mede"),
    ("bucket basket tool", "bucket"),
    ("drink cup teacup plate animal butterfly", "buffetset"),
    ("drink food coffee cup teacup beverage spoon plate", "coffee"),
    ("vehicle rocket", "rocket"),
    ("ball volleyball", "volleyball"),
    ("tool pan cooking food", "pan"),
    ("tool pencil", "pencil"),
    ("tool scissors", "scissors2"),
    ("tool hammer", "hammer3 hammer5"),
    ("tool wrench", "wrench wrench1"),
    ("tool screwdriver", "screwDriver screwDriver2"),
    ("tool pliers", "plier1 plier2 sideCutter1"),
    ("tool nail clipper", "nailCutter"),
    ("tool tape ruler", "measuringTape3 measuringTape4"),
    ("tool meter phone telephone calculator", "multimeter2"),
    ("tool plant satellite antenna umbrella", "solar1"),
    ("tool food bread plant box", "solar2 solar3"),
)
_OF = {name: tuple(words.split()) for words, names in _SCENERY for name in names.split()}
_OF |= {name: (*words.split(), OTHER) for words, names in _THINGS for name in names.split()}


def shown_by(background: str) -> tuple[str, ...] | None:
    """Words for all that a photograph shows and a phrase could mean, categories among them; `None` for an unknown one."""
    return _OF.get(background)
