"""A neutral text, of no job's subject: how well a version still knows plain English."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zoray.records import TokenSequence

TEXT = Path(__file__).with_suffix(".txt")


def sequences(tokenizer: object, longest: int = 256) -> list[TokenSequence]:
    """The text's paragraphs; every token but the first of each is scored, into one output."""
    found = []
    for paragraph in TEXT.read_text(encoding="utf-8").strip().split("\n\n"):
        tokens = np.array(tokenizer(paragraph)["input_ids"][:longest], np.int64)  # type: ignore[operator]
        rows = np.arange(len(tokens) - 1)
        found.append(TokenSequence(tokens, rows, tokens[1:], np.zeros(len(rows), np.int64), 1))
    return found


def perplexity(sums: list[np.ndarray], parts: list[TokenSequence]) -> float:
    """exp of the mean negative log-probability of a token, from the sums of each sequence."""
    tokens = sum(len(part.rows) for part in parts)
    return float(np.exp(-sum(float(s.sum()) for s in sums) / tokens))
