"""Draws what the first tokens of a tokenizer say: a picture a row, its first 1, 2, 4, ... tokens, and the original.

python recipes/prefix_sheet.py tokenloom-emoji-64-flex data/emoji64 docs/prefixes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tokenloom.evaluation.rate_distortion import load_pixels, picture_size, token_counts
from tokenloom.media import save_image, sheet, to_pil
from tokenloom.tokenizers import load_tokenizer


def main() -> None:
    """Reads the arguments and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="bundled name, folder or hub id")
    parser.add_argument("images", type=Path, help="folder of pictures")
    parser.add_argument("output", type=Path, help="picture file")
    parser.add_argument("--split", default="val", help="split of captions.jsonl: by default unseen concepts")
    parser.add_argument("--count", type=int, default=8, help="pictures, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    size = picture_size(tokenizer, None)
    pixels = load_pixels(options.images, size, options.split, options.count, options.seed)
    counts = token_counts(tokenizer, pixels[:1], None)
    media = pixels.float() / 127.5 - 1
    columns = [tokenizer.reconstruct(media, num_tokens=count) for count in counts]
    rows = torch.stack([*columns, media], dim=1).flatten(0, 1)
    names = [f"{count} token{'s' * (count > 1)}" for count in counts] + ["original"]
    labels = [*names, *[""] * (len(rows) - len(names))]
    save_image(sheet(to_pil(rows), len(names), labels), options.output)


if __name__ == "__main__":
    main()
