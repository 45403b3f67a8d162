"""Parallel decoding: several steps of an order guessed, checked in one forward, and kept while they are right.

`options` is what a user sets and reads, `stepper` the loop, `windows` the rows and the cache, `drafts` the guesses, `acceptance`
what counts. Knows generators that are what their row plan says.
"""

from __future__ import annotations

from tokenloom.generators.parallel.options import Parallel, ParallelStats
from tokenloom.generators.parallel.stepper import ParallelStepper

__all__ = ["Parallel", "ParallelStats", "ParallelStepper"]
