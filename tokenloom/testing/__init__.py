"""Checks for parts that you write yourself: `check_tokenizer` holds a tokenizer against the contract.

Knows tokenizers and how they fail. Knows nothing of generators, pipelines or test frameworks.
"""

from __future__ import annotations

from tokenloom.testing.failures import TokenizerCheckError
from tokenloom.testing.suite import check_tokenizer

__all__ = ["TokenizerCheckError", "check_tokenizer"]
