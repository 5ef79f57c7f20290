"""Objectives of given text against plain transformers code: choice, answer and preference losses, and calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chatty import ANSWERS, CHATS, CHOICES, PAIRS, Given, chat_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoray.engines.hf import Hf
from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, LowRank
from zoray.models.folder import Model
from zoray.records import ConfigError, Example, Probe
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Metric, Preference, Reward
from zoray.scoring.objectives.choice import macro_f1
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec, load_workload

ENGINES = {"hf": Hf(), "vllm": Vllm(slots=4, max_tokens=1024, kv_cache_gib=0.02)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def plain(folder):
    """The same model and tokenizer in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), AutoTokenizer.from_pretrained(folder)


def replica(folder, examples, objective, engine="hf", space=None, **task) -> Replica:
    spec = ReplicaSpec(
        Model(str(folder)),
        Given(tuple(examples), **task),
        objective,
        space or Lora(),
        TwoPoint(),
        ENGINES[engine],
        0,
        0,
        4,
    )
    return Replica(spec)


def token_logps(plain, prompt: str, text: str, end: bool = False) -> torch.Tensor:
    """Log-probabilities of the tokens of a text after a prompt."""
    model, tokenizer = plain
    before, tokens = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, prompt + text))
    tokens = [*tokens, tokenizer.eos_token_id] if end else tokens
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return torch.stack([logps[i - 1, tokens[i]] for i in range(len(before), len(tokens))])


def losses(plain, examples, calibrated: bool = False) -> list[float]:
    found = []
    for e in examples:
        if calibrated:
            logits = [
                token_logps(plain, e.prompt, o).sum() - token_logps(plain, e.calibration, o).sum() for o in e.options
            ]
        else:
            logits = [token_logps(plain, e.prompt, o).mean() for o in e.options]
        found.append(float(torch.nn.functional.cross_entropy(torch.stack(logits)[None], torch.tensor([e.label]))))
    return found


MANY = tuple(
    Example(e.prompt, (" dull and lifeless", " a wonderful thing", " great"), 1, calibration="It was") for e in CHOICES
)


@pytest.mark.parametrize(
    ("engine", "calibration", "examples"),
    [
        *((engine, "none", CHOICES) for engine in ENGINES),
        *((engine, "sfc", MANY) for engine in ENGINES),
        ("hf", "none", MANY),
        ("hf", "sfc", CHOICES),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value[0].options)} options",
)
def test_choice_nll_is_the_cross_entropy_of_transformers(folder, plain, engine, calibration, examples):
    """Options of one token, and of several."""
    found = replica(folder, examples, ChoiceNLL(calibration=calibration), engine).outcomes("train", Probe(0, 0, 0.0))
    assert found.losses.tolist() == pytest.approx(losses(plain, examples, calibration == "sfc"), abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_answer_nll_is_the_mean_over_the_answers_tokens(folder, plain, engine):
    ended = replica(folder, ANSWERS, AnswerNLL(eos=True), engine, metric=None).outcomes("train", Probe(0, 0, 0.0))
    expected = [-float(token_logps(plain, e.prompt, e.answers[0], end=True).mean()) for e in ANSWERS]
    assert ended.losses.tolist() == pytest.approx(expected, abs=1e-4) and np.isnan(ended.scores).all()


def test_an_answers_end_and_a_right_option_as_an_answer(folder, plain):
    found = replica(folder, ANSWERS, AnswerNLL(), metric=None).outcomes("train", Probe(0, 0, 0.0))
    expected = [-float(token_logps(plain, e.prompt, e.answers[0]).mean()) for e in ANSWERS]
    assert found.losses.tolist() == pytest.approx(expected, abs=1e-4)  # they end in a line break
    right = replica(folder, CHOICES, AnswerNLL(eos=False)).outcomes("train", Probe(0, 0, 0.0))
    expected = [-float(token_logps(plain, e.prompt, e.options[e.label]).mean()) for e in CHOICES]
    assert right.losses.tolist() == pytest.approx(expected, abs=1e-4)
    likeliest = replica(folder, CHOICES, ChoiceNLL()).outcomes("train", Probe(0, 0, 0.0))
    assert right.scores.tolist() == likeliest.scores.tolist()  # judged by the options


def test_a_chats_loss_is_on_all_turns_of_the_assistants(folder, plain):
    found = replica(folder, CHATS, AnswerNLL(), metric=None).outcomes("train", Probe(0, 0, 0.0))
    for example, loss in zip(CHATS, found.losses, strict=True):
        first = "<s>user\nIt was</s>\n<s>assistant\n"
        second = f"{first}great</s>\n<s>user\nthe film?</s>\n<s>assistant\n"
        turns = [token_logps(plain, first, "great</s>"), token_logps(plain, second, f"{example.answers[0]}</s>")]
        assert loss == pytest.approx(-float(torch.cat(turns).mean()), abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_preference_is_dpo_against_the_bare_model(folder, plain, engine):
    """At the start all margins are 0; under a probe they are those of the definition."""
    objective = Preference(beta=0.3)
    made = replica(folder, PAIRS, objective, engine)
    start = made.outcomes("train", Probe(0, 0, 0.0))
    assert start.losses.tolist() == pytest.approx([math.log(2)] * 8, abs=1e-5) and not start.scores.any()
    probe = Probe(0, 0, 0.05)
    found = made.outcomes("train", probe)
    moved = replica(folder, PAIRS, AnswerNLL(), metric=None)
    sums = {}
    for k in (0, 1):
        one = tuple(Example(e.prompt, answers=(e.options[k],)) for e in PAIRS)
        made_of = replica(folder, one, AnswerNLL(), metric=None)
        counts = made_of.scorer.table("train", None).take(np.arange(8))[0].counts
        for name, at in (("moved", probe), ("bare", Probe(0, 0, 0.0))):
            sums[k, name] = -made_of.outcomes("train", at).losses * counts
    margins = 0.3 * (sums[0, "moved"] - sums[0, "bare"] - sums[1, "moved"] + sums[1, "bare"])
    assert np.abs(margins).max() > 1e-2, "a probe that changes nothing"
    assert found.columns["margin"].tolist() == pytest.approx(margins.tolist(), abs=1e-3)
    assert found.losses.tolist() == pytest.approx(np.log1p(np.exp(-margins)).tolist(), abs=1e-3)
    assert found.scores.tolist() == (margins > 0).astype(float).tolist()
    assert moved.info.digest == made.info.digest


def test_metrics_of_options_have_no_slope(folder):
    accuracy = replica(folder, CHOICES, Metric()).outcomes("train", Probe(0, 0, 0.0))
    assert set(accuracy.losses) <= {0.0, 1.0} and (accuracy.losses == 1 - accuracy.scores).all()
    f1 = replica(folder, CHOICES, Metric("f1"))
    found, objective = f1.outcomes("train", Probe(0, 0, 0.0)), f1.workload.parts[0].objective
    assert found.losses.tolist() == found.columns["predicted"].tolist() and f1.workload.pooled and f1.info.noise == 0
    labels = np.array([e.label for e in CHOICES])
    assert objective.pool(found.losses.tolist(), labels) == pytest.approx(1 - macro_f1(found.losses, labels))
    assert math.isnan(objective.pool([math.nan, 0.0], labels[:2]))


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([0, 1, 1, 0], [0, 1, 1, 0], 1.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], (0 + 2 * 2 / (4 + 2)) / 2),
        ([0, 0, 1, 2], [0, 1, 1, 2], (2 / 3 + 2 / 3 + 1) / 3),
    ],
)
def test_macro_f1(predicted, labels, expected):
    assert macro_f1(np.array(predicted), np.array(labels)) == pytest.approx(expected)


def test_objectives_refuse_tasks_that_they_make_no_sense_for(folder):
    model, cases = (
        Model(str(folder)),
        [
            (
                ANSWERS,
                ChoiceNLL(),
                Lora(),
                r"options to choose from for objective=choice_nll; .*=answer_nll, metric",
            ),
            (
                PAIRS[:1] * 8,
                ChoiceNLL(calibration="sfc"),
                Lora(),
                r"a calibration prompt .*sfc; task=given has none",
            ),
            ((Example("a"),) * 8, AnswerNLL(), Lora(), r"examples with an answer for objective=answer_nll"),
            (ANSWERS, Preference(), Lora(), r"a chosen and a rejected answer for objective=preference; got 0 options"),
            (PAIRS, Preference(), LowRank(), r"compares with the model as it was. Take space=lora"),
            (
                CHOICES,
                Metric("numeric"),
                Lora(),
                r"accuracy or f1 for a task of options; got 'numeric'",
            ),
            (ANSWERS, Metric("rouge"), Lora(), r"a metric among f1, exact_match, numeric, ...; got 'rouge'"),
            (ANSWERS, Reward("rouge"), Lora(), r"expected a built-in reward .*; got 'rouge'"),
        ],
    )
    for examples, objective, space, says in cases:
        spec = ReplicaSpec(model, Given(tuple(examples)), objective, space, TwoPoint(), Hf(), 0, 0, 4)
        with pytest.raises(ConfigError, match=says):
            load_workload(spec)
