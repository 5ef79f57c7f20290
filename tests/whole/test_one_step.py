"""examples/one_step.py: it is short, and what it prints is what transformers, its journal and a replay say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tiny import tiny_llama

from zoray.records.tiles import mean
from zoray.run import journal
from zoray.tasks.file.task import File

if TYPE_CHECKING:
    from zoray.records import Splits

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_step.py"
NUMBER = r"([-+]?\d+\.\d+)"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=200)


def loss_by_transformers(folder: Path, splits: Splits) -> float:
    """The mean over mails of the cross-entropy over the label words' mean log-probabilities, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses = []
    for example in splits.train:
        means = []
        for option in example.options:
            prompt, whole = (tokenizer(str(text)).input_ids for text in (example.prompt, f"{example.prompt}{option}"))
            assert whole[: len(prompt)] == prompt
            with torch.inference_mode():
                logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            means.append(torch.stack([logps[i - 1, whole[i]] for i in range(len(prompt), len(whole))]).mean())
        losses.append(-torch.stack(means).log_softmax(0)[example.label].item())
    return mean(losses)


def test_it_is_one_screen_or_two():
    source = EXAMPLE.read_text("utf-8")
    assert len(source.splitlines()) <= 100
    assert "import ray" not in source and "vllm" not in re.findall(r"^(?:from|import) (\S+)", source, re.M)
    assert [verb for verb in re.findall(r"^        # (\w+): ", source, re.M)] == ["ask", "evaluate", "tell", "commit"]


def test_what_it_prints_is_right(tmp_path):
    model, path = tiny_llama(tmp_path / "model"), tmp_path / "journal.jsonl"
    done = run(f"model={model}", "steps=3", f"journal={path}")
    assert done.returncode == 0, done.stderr
    contents, text = journal.read(path), done.stdout

    before = float(re.search(f"loss of 4 mails before: {NUMBER}", text)[1])
    splits = File(str(EXAMPLE.with_name("mail.csv")), template="{text} This is", train=4, dev=1, test=0).load()
    assert before == pytest.approx(loss_by_transformers(model, splits), abs=2e-4)

    steps = re.findall(rf"step (\d): loss {NUMBER} at \+eps, {NUMBER} at -eps; slope {NUMBER}; moved by {NUMBER}", text)
    assert [int(number) for number, *_ in steps] == [0, 1, 2] and len(contents.steps) == 3
    for (_, plus, minus, slope, moved), noted in zip(steps, contents.steps, strict=True):
        assert noted.losses == pytest.approx((float(plus), float(minus)), abs=1e-6) and noted.losses[0] > 0
        assert float(slope) == pytest.approx((noted.losses[0] - noted.losses[1]) / 0.02, abs=1e-4)
        assert noted.commit.coefficients == pytest.approx((float(moved),), abs=1e-6)
        assert float(moved) == pytest.approx(-0.01 * float(slope), abs=2e-6)

    after, moved = float(re.search(f"mails after: {NUMBER}", text)[1]), contents.steps[-1].digest
    state, replayed = re.findall(r"digest of .*: +([0-9a-f]{16})", text)
    assert state == replayed == journal.replay(contents).digest() and state not in (moved, contents.steps[0].digest)
    assert after != before
    assert f"journal: {path.stat().st_size:,} bytes, {path}" in text


def test_a_misspelt_argument_is_named():
    done = run("modell=x")
    assert done.returncode == 1 and done.stderr.startswith("expected model=..., steps=..., journal=...; got modell=x")
