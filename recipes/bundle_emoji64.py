"""Copies a trained pipeline into the package as the bundled model `tokenloom-emoji-64`, in bfloat16 with its card.

python recipes/bundle_emoji64.py runs/emoji64-generator/model --figures docs/figures/evaluation.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml

from tokenloom import TextToImagePipeline
from tokenloom.models import DEFAULT_MODEL

ASSETS = Path(__file__).resolve().parent.parent / "tokenloom" / "assets"
CARD = {
    "description": "64x64 pictures of things, animals, food and faces from words, in seven drawing styles.",
    "license": "Apache-2.0 (weights); see training_data for the pictures it was trained on",
    "training_data": [
        "Fluent Emoji, gradient and flat, (c) Microsoft, MIT: @iconify-json/fluent-emoji, fluent-emoji-flat",
        "Noto Emoji and Noto Emoji v1, (c) Google, Apache-2.0: @iconify-json/noto, noto-v1",
        "FxEmojis, (c) Mozilla, Apache-2.0: @iconify-json/fxemoji",
        "Twemoji, (c) Twitter and contributors, CC-BY-4.0: @iconify-json/twemoji",
        "EmojiOne 2, (c) EmojiOne, CC-BY-4.0: @iconify-json/emojione",
        "Labels and tags: emojibase-data, MIT, from Unicode CLDR",
    ],
    "styles": ["3d", "flat", "detailed", "blob", "muted", "simple", "glossy"],
    "pixel_range": [-1, 1],
    "recipes": ["recipes/emoji64-tokenizer.yaml", "recipes/emoji64-generator.yaml"],
    "limits": "Drawings on white only. Flags, symbols and people were left out of the generator's training.",
}


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder written by `tokenloom train`")
    parser.add_argument("--figures", type=Path, help="JSON with measured figures for the card")
    options = parser.parse_args()
    pipeline = TextToImagePipeline.from_pretrained(options.model, dtype=torch.bfloat16)
    recipe = yaml.safe_load((Path(__file__).parent / "emoji64-generator.yaml").read_text())
    pipeline.register_to_config(sampling=recipe["sampling"])  # the preset may be chosen after training
    figures = json.loads(options.figures.read_text()) if options.figures else {}
    pipeline.card = {**CARD, "figures": figures}
    pipeline.save_pretrained(ASSETS / DEFAULT_MODEL)
    size = sum(file.stat().st_size for file in (ASSETS / DEFAULT_MODEL).rglob("*.safetensors"))
    print(f"{ASSETS / DEFAULT_MODEL}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
