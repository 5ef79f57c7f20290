"""Answers to questions, compared as SQuAD does (Rajpurkar et al., 2016): exact match and the F1 of their words."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from zoray.scoring.rewards.base import LIMIT, answers_of

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
UNANSWERABLE = ("CANNOTANSWER", "no answer")


def exact_match(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1 if the completion is one of `answers`, but for case, punctuation, articles and spaces."""
    right = {normalise(answer) for answer in answers_of(example, "exact_match")}
    return float(normalise(completion[:LIMIT]) in right)


def f1(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """The best F1 of the completion's words with those of one of `answers`.

    As in MeZO (Malladi et al., 2023), a question that can't be answered, whose first answer is CANNOTANSWER or
    "no answer", scores 1 or 0.
    """
    answers, written = answers_of(example, "f1"), normalise(completion[:LIMIT])
    if answers[0] in UNANSWERABLE:
        return float(written == normalise(answers[0]))
    return max(_f1(written.split(), normalise(answer).split()) for answer in answers)


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def _f1(written: list[str], right: list[str]) -> float:
    """2 P R / (P + R) = 2 common / (written + right); 0 where nothing is common."""
    common = (Counter(written) & Counter(right)).total()
    return 2 * common / (len(written) + len(right)) if common else 0.0
