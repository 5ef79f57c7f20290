"""Local copies of Hub data sets for tests: tiny Parquet files with the Hub's folders, columns and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Sequence, Value

TEXT, INT = Value("string"), Value("int32")
FALSE_TRUE = ClassLabel(names=["False", "True"])
ENTAILMENT = ClassLabel(names=["entailment", "not_entailment"])

# task -> folder of its files, its columns as the data set's card gives them, and the split that is our test
SCHEMAS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sst2": (
        "data",
        {"idx": INT, "sentence": TEXT, "label": ClassLabel(names=["negative", "positive"])},
        "validation",
    ),
    "rte": ("rte", {"premise": TEXT, "hypothesis": TEXT, "idx": INT, "label": ENTAILMENT}, "validation"),
    "cb": (
        "cb",
        {
            "premise": TEXT,
            "hypothesis": TEXT,
            "idx": INT,
            "label": ClassLabel(names=["entailment", "contradiction", "neutral"]),
        },
        "validation",
    ),
    "boolq": ("data", {"question": TEXT, "answer": Value("bool"), "passage": TEXT}, "validation"),
    "wsc": (
        "wsc.fixed",
        {
            "text": TEXT,
            "span1_index": INT,
            "span2_index": INT,
            "span1_text": TEXT,
            "span2_text": TEXT,
            "idx": INT,
            "label": FALSE_TRUE,
        },
        "validation",
    ),
    "wic": (
        "wic",
        {
            "word": TEXT,
            "sentence1": TEXT,
            "sentence2": TEXT,
            "start1": INT,
            "start2": INT,
            "end1": INT,
            "end2": INT,
            "idx": INT,
            "label": FALSE_TRUE,
        },
        "validation",
    ),
    "multirc": (
        "multirc",
        {
            "paragraph": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "idx": {"paragraph": INT, "question": INT, "answer": INT},
            "label": FALSE_TRUE,
        },
        "validation",
    ),
    "copa": (
        "copa",
        {
            "premise": TEXT,
            "choice1": TEXT,
            "choice2": TEXT,
            "question": TEXT,
            "idx": INT,
            "label": ClassLabel(names=["choice1", "choice2"]),
        },
        "validation",
    ),
    "record": (
        "record",
        {
            "passage": TEXT,
            "query": TEXT,
            "entities": Sequence(TEXT),
            "entity_spans": Sequence({"text": TEXT, "start": INT, "end": INT}),
            "answers": Sequence(TEXT),
            "idx": {"passage": INT, "query": INT},
        },
        "validation",
    ),
    "squad": (
        "plain_text",
        {
            "id": TEXT,
            "title": TEXT,
            "context": TEXT,
            "question": TEXT,
            "answers": Sequence({"text": TEXT, "answer_start": INT}),
        },
        "validation",
    ),
    "drop": (
        "data",
        {
            "section_id": TEXT,
            "query_id": TEXT,
            "passage": TEXT,
            "question": TEXT,
            "answers_spans": Sequence({"spans": TEXT, "types": TEXT}),
        },
        "validation",
    ),
    "gsm8k": ("main", {"question": TEXT, "answer": TEXT}, "test"),
}


def plain(name: str, number: int) -> dict[str, Any]:
    """A row that no other number has; all columns, labels in turn."""
    texts = {key: f"{key} {number}" for key, kind in SCHEMAS[name][1].items() if kind is TEXT}
    numbers = {key: number for key, kind in SCHEMAS[name][1].items() if kind is INT}
    special: dict[str, Any] = {
        "boolq": {"answer": number % 2 == 0},
        "multirc": {"idx": {"paragraph": number, "question": 0, "answer": 0}},
        "copa": {"question": ["cause", "effect"][number % 2]},
        "record": {
            "query": f"Query {number}: who is @placeholder?",
            "entities": [f"A{number}", f"B{number}", "C"],
            "entity_spans": {"text": [f"A{number}"], "start": [0], "end": [2]},
            "answers": [f"B{number}"],
            "idx": {"passage": number, "query": number},
        },
        "squad": {"answers": {"text": [f"answer {number}"], "answer_start": [0]}},
        "drop": {"answers_spans": {"spans": [str(number)], "types": ["number"]}},
        "gsm8k": {"answer": f"It is 1+{number} = <<1+{number}={1 + number}>>{1 + number}.\n#### {1 + number}"},
    }
    label = SCHEMAS[name][1].get("label")
    labelled = {} if label is None else {"label": number % getattr(label, "num_classes", 2)}
    return texts | numbers | labelled | special.get(name, {})


def write(root: Path, name: str, **splits: list[dict[str, Any]]) -> str:
    """A copy of a data set's folder with some splits (`held_out` is the one that is our test); what task.path takes."""
    folder, columns, held_out = SCHEMAS[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        data = Dataset.from_list(rows, features=Features(columns))
        file = f"{held_out if split == 'held_out' else split}-00000-of-00001.parquet"
        data.to_parquet(str(root / folder / file))
    return str(root)


def copy(root: Path, name: str, train: int, held_out: int) -> str:
    """A copy with so many plain rows; those of the held-out split go on counting where train ends."""
    numbers = range(train + held_out)
    rows = [plain(name, number) for number in numbers]
    return write(root, name, train=rows[:train], held_out=rows[train:])
