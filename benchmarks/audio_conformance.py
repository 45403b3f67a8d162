"""Whether codes of audio codecs depend on batch, padding or pieces: a table of every codec that can be used.

    python benchmarks/audio_conformance.py

The codecs have the structure of the published ones, few channels and random weights: what is asked does not depend on
training. Needs transformers. A minute on one core.
"""

from __future__ import annotations

from tokenloom.evaluation.audio_conformance import conformance_table, measure_small_codecs


def main() -> None:
    """Prints the table, and why a codec is refused."""
    rows = dict(measure_small_codecs())
    print(conformance_table(rows))
    for name, row in rows.items():
        reason = row if isinstance(row, str) else row["reason"]
        if reason:
            print(f"* {name}: {reason}")


if __name__ == "__main__":
    main()
