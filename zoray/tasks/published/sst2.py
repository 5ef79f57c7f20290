"""SST-2 (Socher et al., 2013; GLUE), as MeZO uses it (Malladi et al., 2023).

Train and dev are disjoint samples of the Hub's train split; test is the Hub's validation split, because the labels of
the Hub's test split are hidden. With `test` below 872 it is a seeded sample of that split. Sentences that come twice in
train are used once; test stays as on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoray.records import Example, Splits
from zoray.tasks.base import check_template, check_words, distinct, fill, seeded_split
from zoray.tasks.published.hub import MOST, HubTask, texts

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class SST2(HubTask):
    """Is a sentence negative (0) or positive (1)? `words` are the label words of the two."""

    columns: ClassVar[tuple[str, ...]] = ("sentence", "label")
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")

    test: int | None = 872
    path: str = "stanfordnlp/sst2"
    template: str = "{text} It was"
    words: tuple[str, ...] = (" terrible", " great")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)
        object.__setattr__(self, "words", check_words(self.words, 2))

    def load(self) -> Splits:
        """Read, check and split the sentences: all of them, since journals name examples of this very split."""
        data = self.splits()
        pool = distinct(self._examples(data["train"], "train"))
        held_out = self._examples(data["validation"], "validation")
        train = max(1, min(MOST, len(pool) - self.dev)) if self.train is None else self.train
        test = min(MOST, len(held_out)) if self.test is None else self.test
        dev, rest = seeded_split(pool, (self.dev, train), self.seed, self.source("train"))
        (final,) = seeded_split(held_out, (test,), self.seed, self.source("validation, our test split"))
        return Splits(rest, dev, final)

    def example(self, row: Mapping[str, Any]) -> Example:
        """`{text} It was`, and a label word."""
        (sentence,), label = texts(row, "sentence"), self.label(row)
        prompt, calibration = fill(self.template, sentence.strip()), fill(self.template, "").strip(" ")
        return Example(prompt, self.words, label, calibration=calibration)

    def _examples(self, rows: Dataset, split: str) -> list[Example]:
        pairs = zip(rows["sentence"], rows["label"], strict=True)
        return [self.made({"sentence": text, "label": label}, split, i) for i, (text, label) in enumerate(pairs)]
