"""For tests: tiny models whose tokenizer has a chat template, and experiments on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import tiny_llama

from zoray.engines.hf import Hf
from zoray.methods.estimators import TwoPoint
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces import Lora
from zoray.models.folder import Model
from zoray.pool.settings import Cluster
from zoray.records import Example, Message, Sampling, Splits
from zoray.run.experiment import Experiment, Run
from zoray.run.reports.monitor import Logging

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def chat_llama(folder: Path) -> Path:
    """A tiny Llama whose tokenizer writes chats as <s>role, the text, </s>."""
    from transformers import AutoTokenizer

    tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Given:
    """A task of given examples, the same on all splits."""

    examples: tuple[Example, ...]
    metric: str | None = "accuracy"
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=6))

    def load(self) -> Splits:
        return Splits(self.examples, self.examples[:4], self.examples[:2])


CHOICES = tuple(
    Example(f"{text} number {i}. It was", (" terrible", " great"), i % 2, calibration="It was")
    for i, text in enumerate(["the film", "a dull story", "the music", "the plot"] * 2)
)
ANSWERS = tuple(
    Example(f"the film number {i} is", answers=(f" {word}\n", " far too long\n"), data={"answer": word})
    for i, word in enumerate(["great", "a wonderful thing", "dull", "terrible"] * 2)
)
CHATS = tuple(
    Example((Message("user", "It was"), Message("assistant", "great"), Message("user", "the film?")), answers=(word,))
    for word in ["a wonderful thing to see", "dull", "far too long", "the best"] * 2
)
PAIRS = tuple(Example(f"the plot number {i} is", options=(" great", " dull and lifeless"), label=0) for i in range(8))
PROMPTS = tuple(Example((Message("user", f"the movies of the year {i}"),), data={"answer": "42"}) for i in range(8))


def experiment(folder: Path, task: Any, objective: Any, runs: Path, **settings: Any) -> Experiment:
    """A run of a few steps with the reference engine."""
    run = {"name": "r", "folder": str(runs), "steps": 3, "batch": 4, "eval_every": 0, "stratify": False}
    parts = {"space": Lora(rank=2, alpha=4.0), "estimator": TwoPoint(pairs=2, eps=0.02), "optimizer": Sgd(lr=1e-3)}
    parts |= {key: settings.pop(key) for key in list(settings) if key in parts}
    quiet = Logging(progress=False, curve=False)
    return Experiment(
        Model(str(folder)), task, objective, *parts.values(), Hf(), Cluster(), quiet, Run(**run | settings)
    )
