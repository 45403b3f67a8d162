"""A tiny pool for tests: discs and squares of plain colours on grey photographs."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from tokenloom.data.referring_names import colour_of

THINGS = {
    "apple": ("fruit", "red", "train"),
    "frog": ("animal", "green", "train"),
    "whale": ("animal", "blue", "train"),
    "lemon": ("fruit", "yellow", "val_style"),
    "plum": ("fruit", "purple", "val"),
}


def write_pool(folder: Path) -> Path:
    """Writes the pool and returns its folder."""
    (folder / "cut").mkdir(parents=True)
    (folder / "bg").mkdir()
    cut_outs, backgrounds = [], []
    for name, (category, colour, split) in THINGS.items():
        for shape in ("disc", "square"):
            picture = Image.new("RGBA", (40, 30))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "disc" else draw.rectangle)((0, 0, 39, 29), fill=colour)
            file = f"cut/{name}-{shape}.png"
            picture.save(folder / file)
            record = {"file": file, "name": name, "category": category, "split": split}
            cut_outs.append({**record, "colour": colour_of(picture)})
    for split in ("train", "val"):
        file = f"bg/{split}.png"
        Image.new("RGB", (90, 60), "gray").save(folder / file)
        backgrounds.append({"file": file, "quiet": True, "split": split})
    (folder / "pool.json").write_text(json.dumps({"cut_outs": cut_outs, "backgrounds": backgrounds}))
    return folder
