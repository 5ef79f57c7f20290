"""Examples -> losses and feedback: the same however they are cut into forward passes, and what moves the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chatty import ANSWERS, CHATS, CHOICES, PAIRS, PROMPTS, Given, chat_llama
from guided import guided, moved

import zoray.scoring.guidance
from zoray.engines.hf import Hf
from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators.feedback import Feedback
from zoray.methods.optimizers import Sgd
from zoray.methods.spaces import Lora
from zoray.methods.spaces.signs import packed
from zoray.models.folder import Model
from zoray.records import Example, Probe, Sampling, TokenSequence
from zoray.records.tiles import Grid
from zoray.scoring.guidance import SKIPPED
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Metric, Preference, Reward
from zoray.scoring.replica import Replica
from zoray.scoring.workload import load_workload
from zoray.tasks.mixture import Mixture, Part

CENTRE = Probe(2, 0, 0.0)
LONG = tuple(
    Example(f"the film number {i} is", (" great", " dull and lifeless", " a wonderful thing")[: 2 + i % 2], i % 2)
    for i in range(8)
)
ALSO = tuple(Example(e.prompt, (*e.options, " far too long"), e.label, also=(len(e.options),)) for e in LONG)
CALIBRATED = tuple(Example(e.prompt, e.options, e.label, calibration="It is") for e in LONG)
METHODS = {
    "choice": (CHOICES, ChoiceNLL()),
    "choice of several tokens": (LONG, ChoiceNLL()),
    "calibrated": (CALIBRATED, ChoiceNLL(calibration="sfc")),
    "answer": (ANSWERS, AnswerNLL()),
    "chat": (CHATS, AnswerNLL()),
    "preference": (PAIRS, Preference(beta=0.5)),
    "accuracy": (ALSO, Metric("accuracy")),
    "f1": (CHOICES, Metric("f1")),
}
REWARDING = '''
import hashlib

def reward(prompt, completion, example, how="hash"):
    """A number that depends on the text alone, or the same for all, or none for some."""
    number = int(hashlib.sha256((prompt + completion).encode()).hexdigest(), 16) % 1000
    if how == "fails" and number < 300:
        raise ValueError("no")
    return 0.5 if how == "equal" else number / 1000
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A function: the objective that the file above is, with arguments."""
    path = tmp_path_factory.mktemp("rewards") / "rewarding.py"
    path.write_text(REWARDING)

    def made(temperature: float = 1.0, **arguments: Any) -> Reward:
        return Reward(f"{path}:reward", arguments, temperature=temperature, max_tokens=5, workers=1, max_failed=1.0)

    return made


def replica_of(folder: Any, examples: Any, objective: Any, **settings: Any) -> Replica:
    task = examples if isinstance(examples, Mixture) else Given(examples, None, Sampling(max_tokens=5))
    return moved(Replica(guided(folder, task, objective, folder, **settings).spec))


def added(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], within: float = 1e-4) -> bool:
    assert list(found) == list(expected)
    return all(np.abs(found[n] - e).max() <= within * np.abs(e).max() for n, e in expected.items())


@pytest.fixture(scope="module", params=METHODS)
def method(request, folder) -> Replica:
    return replica_of(folder, *METHODS[request.param])


LIMITS = {"tokens": (40, 1 << 40, 1), "rows": (1 << 40, 6, 1), "one": (1, 1, 1), "blocks": (64, 1 << 40, 32)}


@pytest.mark.parametrize("limits", LIMITS)
def test_feedback_is_the_sum_over_examples_however_they_are_cut(method, limits, monkeypatch):
    chosen, engine, passes = np.array([5, 0, 3, 3, 6]), method.engine, list[Any]()
    outcomes, whole, weight = method.guidance(CENTRE, chosen)
    alone = [method.guidance(CENTRE, chosen[i : i + 1]) for i in range(len(chosen))]
    assert near(whole, added([feedback for _, feedback, _ in alone]))
    assert outcomes.losses == pytest.approx([float(one.losses[0]) for one, _, _ in alone], abs=1e-5)
    assert outcomes.scores.tolist() == [float(one.scores[0]) for one, _, _ in alone] or np.isnan(outcomes.scores).all()
    assert outcomes.tokens == sum(one.tokens for one, _, _ in alone)
    assert weight == pytest.approx(np.sqrt(np.mean([own**2 for _, _, own in alone])), rel=1e-4) and 0 < weight <= 1

    feedback = engine.feedback
    monkeypatch.setattr(engine, "at_once", lambda: LIMITS[limits])
    monkeypatch.setattr(engine, "feedback", lambda plan, gradient: passes.append(plan) or feedback(plan, gradient))
    again, cut, same = method.guidance(CENTRE, chosen)
    assert near(cut, whole) and again.tokens == outcomes.tokens and same == pytest.approx(weight, rel=1e-4)
    assert again.losses == pytest.approx(outcomes.losses, abs=1e-5) and len(passes) >= 2
    most_tokens, most_rows, block = LIMITS[limits]
    for plan in passes:  # also of an example that does not fit with all its sequences: only one of these may not
        lengths, asked = plan.table.lengths[plan.chosen], plan.table.n_targets[plan.chosen]
        fits = (-(-lengths // block) * block).sum() <= most_tokens and asked.sum() <= most_rows
        assert fits or len(plan.chosen) == 1


@pytest.mark.parametrize("objective", ["choice of several tokens", "preference"])
def test_an_example_of_more_tokens_than_a_forward_pass_has_feedback_from_vllm(objective, folder):
    examples, loss = METHODS[objective]
    text = "one of the best movies of the year. I liked the music. " * 3
    long = tuple(Example(f"{text} {e.prompt}", e.options, e.label) for e in examples)
    vllm = Vllm(slots=1, max_tokens=96, kv_cache_gib=0.25, feedback=True)
    assert 48 < len(load_workload(guided(folder, Given(long), loss, folder).spec).encoded["train"][0][0].tokens) < 96
    found, expected = (
        moved(Replica(replace(guided(folder, Given(long), loss, folder).spec, engine=engine, model=model)))
        for model, engine in ((Model(str(folder), dtype="float32"), vllm), (Model(str(folder)), Hf()))
    )
    ours, theirs = (replica.guidance(CENTRE, np.array([1, 2])) for replica in (found, expected))
    assert near(ours[1], theirs[1], 1e-2) and ours[0].losses == pytest.approx(theirs[0].losses, abs=1e-4)


def test_losses_are_those_that_scoring_gives(method):
    chosen = np.array([1, 4, 2])
    outcomes, _, _ = method.guidance(CENTRE, chosen)
    scored = method.scorer.outcomes("train", (CENTRE,), np.zeros(3, np.int64), chosen)
    assert outcomes.losses == pytest.approx(scored.losses, abs=1e-5)
    assert outcomes.scores == pytest.approx(scored.scores, nan_ok=True)


def nudged(replica: Replica, change: dict[str, np.ndarray], size: float) -> None:
    """Move the state's tensors behind everybody's back."""
    state: Any = replica.engine.state  # type: ignore[attr-defined]
    for name, values in change.items():
        state.layout.view(state.flat, name).add_(torch.from_numpy(values) * size)


def test_in_the_last_block_feedback_is_the_slope_of_the_losses(method):
    """Of what `scorer.outcomes` says, in any direction; of a metric that of its expected value."""
    chosen = np.arange(6)
    _, feedback, _ = method.guidance(CENTRE, chosen)
    last = list(method.engine.state.matrices)[-1]  # type: ignore[attr-defined]
    objective = method.scorer.parts[0].objective

    def total() -> float:
        sums, _ = method.scorer._sums(
            "train", None, (CENTRE,), np.zeros(6, np.int64), chosen, method.scorer.parts[0].objective.reference
        )
        if objective.smooth:
            return float(objective.reduce(sums).losses.sum())
        chances, first = objective._chances(sums), sums.first  # type: ignore[attr-defined]
        return float(len(chosen) - np.add.reduceat(np.where(sums.right, chances, 0.0), first).sum())

    for part in ("lora_A", "lora_B"):
        own = feedback[f"{last}.{part}"]
        change = {f"{last}.{part}": (own / np.linalg.norm(own)).astype(np.float32)}
        ends = []
        for size in (0.01, -0.02, 0.01):  # forth, back, home
            nudged(method, change, size)
            ends.append(total())
        assert (ends[0] - ends[1]) / 0.02 == pytest.approx(np.linalg.norm(own), rel=0.02)


def test_a_mixture_is_its_parts_together(folder, reward):
    parts = {
        "films": Part(Given(CHOICES), 2.0, ChoiceNLL()),
        "answers": Part(Given(ANSWERS, None), 1.0, AnswerNLL()),
        "pairs": Part(Given(PAIRS), 1.0, Preference()),
        "rewards": Part(Given(PROMPTS, "reward", Sampling(5)), 1.0, reward()),
    }
    mixture = replica_of(folder, Mixture(parts), ChoiceNLL(), estimator=Feedback(lens=0))
    chosen = np.array([26, 17, 3, 8, 0, 19, 25, 12])  # of each two, mixed up
    outcomes, whole, weight = mixture.guidance(CENTRE, chosen)
    found = []
    for number, part in enumerate(parts.values()):
        own = chosen // 8 == number
        result, feedback, _ = mixture.guidance(CENTRE, chosen[own])
        assert outcomes.losses[own] == pytest.approx(result.losses, abs=1e-6) and result.losses.std() > 0
        if number < 3:  # as a run of that part alone has it; what is sampled depends on an example's number
            alone = replica_of(folder, part.task.examples, part.objective, estimator=Feedback(lens=0))
            expected = alone.guidance(CENTRE, chosen[own] % 8)
            assert near(feedback, expected[1]) and result.losses == pytest.approx(expected[0].losses, abs=1e-5)
        found.append(feedback)
    assert near(whole, added(found)) and 0.5 < weight <= 1 and outcomes.written == 8


def test_a_preference_takes_the_bare_model_as_it_is(folder):
    """Before the first step both are the same, so that each pair is at log 2 and in doubt by a half."""
    replica = Replica(guided(folder, Given(PAIRS), Preference(beta=0.5), folder).spec)
    fresh, _, weight = replica.guidance(Probe(0, 0, 0.0), np.arange(4))
    assert fresh.losses == pytest.approx(np.full(4, np.log(2)), abs=1e-5) and weight == pytest.approx(0.5, abs=1e-4)
    later, feedback, _ = moved(replica).guidance(CENTRE, np.arange(4))
    assert np.abs(later.losses - np.log(2)).min() > 1e-3 and any(part.any() for part in feedback.values())
    assert later.tokens == 2 * sum(len(s.tokens) for i in range(4) for s in replica.workload.encoded["train"][i])


def test_of_f1_each_example_gives_its_option_and_the_feedback_of_accuracy(folder):
    f1, accuracy = (replica_of(folder, CHOICES, Metric(name)) for name in ("f1", "accuracy"))
    outcomes, feedback, _ = f1.guidance(CENTRE, np.arange(8))
    others, expected, _ = accuracy.guidance(CENTRE, np.arange(8))
    assert near(feedback, expected, 1e-6) and set(outcomes.losses) <= {0.0, 1.0}
    labels = np.array([e.label for e in CHOICES])
    assert (outcomes.losses == labels).tolist() == (others.losses == 0).tolist()
    grid = Grid.of(f1.spec, 2, pooled=True)
    scores, _ = f1.evaluate((), grid.tiles, per_example=True)
    assert scores.losses.shape == (4,) and set(scores.losses) <= {0.0, 1.0} and scores.feedback is not None


# rewards


def written(replica: Replica) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of the last call."""
    return replica.scorer.writer(replica.scorer.parts[0].objective).tokens


def surprise(replica: Replica, prompt: list[int], tokens: list[int]) -> float:
    """-log p of a completion at the state as it is."""
    whole, rows = np.array([*prompt, *tokens], np.int32), np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    one = TokenSequence(whole[:-1], rows.astype(np.int32), whole[rows + 1], np.zeros(len(rows), np.int32), 1)
    probe = Probe(replica.engine.step(), 0, 0.0)
    return -float(replica.engine.score([(probe, one)])[0][0])  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_completions_of_a_prompt_differ_and_their_rewards_are_reported(folder, reward, temperature):
    """Also where the objective itself takes the likeliest tokens; equal steps draw equal ones, others do not."""
    replica = replica_of(folder, PROMPTS, reward(temperature), estimator=Feedback(lens=0, samples=6))
    outcomes, _, weight = replica.guidance(CENTRE, np.array([2, 2, 7]))
    texts = [tuple(tokens) for _, tokens in written(replica)]
    assert len(texts) == 18 == outcomes.written and len(set(texts[:6])) > 3 and texts[:6] == texts[6:12]
    assert outcomes.losses.shape == (3,) and outcomes.losses[0] == outcomes.losses[1] != outcomes.losses[2]
    assert np.array_equal(outcomes.losses, -outcomes.scores) and weight == 1.0 and outcomes.failed == 0
    replica.guidance(CENTRE, np.array([2, 2, 7]))
    assert texts == [tuple(tokens) for _, tokens in written(replica)]
    replica.guidance(CENTRE._replace(step=3), np.array([2, 2, 7]))
    assert texts != [tuple(tokens) for _, tokens in written(replica)]


def test_a_completion_of_a_reward_above_its_prompts_mean_gets_likelier(folder, reward):
    """By one step as the driver makes it, of one prompt at a time; and others of that prompt less likely."""
    better = 0
    for number in range(6):
        replica = replica_of(folder, PROMPTS[number : number + 1], reward(), batch=1, estimator=Feedback(samples=2))
        scores, _ = replica.evaluate((), Grid.of(replica.spec, 2).tiles)
        assert scores.feedback is not None
        pair, objective = written(replica), replica.scorer.parts[0].objective
        texts = replica.scorer.writer(objective).texts
        if texts[0] == texts[1]:
            continue
        before = [surprise(replica, *one) for one in pair]
        gains = (1.0,) * len(replica.engine.state.matrices)  # type: ignore[attr-defined]
        _, commit = Sgd(lr=1e-3, schedule="constant").update((), 2, 3, (), gains, packed(scores.feedback, 2))
        replica.apply([commit])
        after = [surprise(replica, *one) for one in pair]
        better += 1
        values = worths(replica, PROMPTS[number], texts)
        sign = 1 if values[0] > values[1] else -1
        assert sign * ((after[0] - before[0]) - (after[1] - before[1])) < 0
    assert better >= 3


def worths(replica: Replica, example: Example, texts: list[str]) -> list[float]:
    """What the function above says of completions."""
    found: dict[str, Any] = {}
    exec(REWARDING, found)
    encoder: Any = replica.scorer.workload.encoder
    return [found["reward"](encoder.text(example.prompt), text, {}) for text in texts]


def test_equal_rewards_say_nothing(folder, reward):
    replica = replica_of(folder, PROMPTS, reward(how="equal"))
    outcomes, feedback, _ = replica.guidance(CENTRE, np.arange(4))
    assert outcomes.losses.tolist() == [-0.5] * 4 and not any(part.any() for part in feedback.values())
    scores, _ = replica.evaluate((), Grid.of(replica.spec, 2).tiles)
    assert scores.feedback is not None and not scores.feedback.any()


def test_rewards_that_fail_are_counted(folder, reward):
    replica = replica_of(folder, PROMPTS, reward(how="fails"))
    scores, _ = replica.evaluate((), Grid.of(replica.spec, 2).tiles)
    assert scores.written == 16 and 0 < scores.failed < 16 and "ValueError: no" in scores.failure


def test_the_policy_gradient_is_of_rewards_less_the_mean_of_the_others(folder, reward, monkeypatch):
    """Ahmadian et al.: sum over samples of -(r_i - mean of the others) * d log p_i."""
    replica = replica_of(folder, PROMPTS, reward(), estimator=Feedback(lens=0, samples=3))
    engine, given = replica.engine, []
    feedback = engine.feedback
    monkeypatch.setattr(
        engine,
        "feedback",
        lambda plan, gradient: given.append((plan, gradient(np.zeros(9)))) or feedback(plan, gradient),
    )
    replica.guidance(CENTRE, np.array([1]))
    ((plan, slopes),) = given
    r = np.array(worths(replica, PROMPTS[1], replica.scorer.writer(replica.scorer.parts[0].objective).texts))
    expected = [-(r[i] - (r.sum() - r[i]) / 2) for i in range(3)]
    assert slopes == pytest.approx(expected) and len(plan.chosen) == 3
    for (own, tokens), number in zip(written(replica), plan.chosen.tolist(), strict=True):
        one = plan.table[number]
        assert [*one.tokens.tolist(), one.targets[-1]] == [*own, *tokens] and one.targets.tolist() == tokens


@pytest.mark.parametrize("empty", ["all", "some"])
def test_completions_without_a_token_have_no_feedback(folder, reward, empty, monkeypatch):
    replica = replica_of(folder, PROMPTS, reward())
    engine = replica.engine
    generate = engine.generate

    def writes(*arguments: Any) -> Any:
        return ((at, [] if empty == "all" or at % 2 else tokens) for at, tokens in generate(*arguments))

    monkeypatch.setattr(engine, "generate", writes)
    outcomes, feedback, _ = replica.guidance(CENTRE, np.arange(3))
    assert outcomes.written == 12 and np.isfinite(outcomes.losses).all()
    assert any(part.any() for part in feedback.values()) == (empty == "some")


# maps


def test_maps_are_fitted_to_the_first_training_examples_without_their_beginning(folder, monkeypatch):
    replica = replica_of(folder, CHOICES, ChoiceNLL())
    found: list[Any] = []
    monkeypatch.setattr(replica.engine, "fit_lens", lambda table, rank: found.append((table, rank)))
    replica.guidance.fit_lens(5)
    ((table, rank),) = found
    sequences = [sequence for some in replica.workload.encoded["train"] for sequence in some]
    assert rank == 5 and len(table) == len(sequences)
    for k, sequence in enumerate(sequences):
        assert table[k].tokens.tolist() == sequence.tokens.tolist()
        assert table[k].rows.tolist() == list(range(SKIPPED, len(sequence.tokens)))
    monkeypatch.setattr(zoray.scoring.guidance, "LENS_ROWS", 20)
    replica.guidance.fit_lens(5)
    assert (
        20
        <= sum(len(found[1][0][k].rows) for k in range(len(found[1][0])))
        < 20 + max(len(s.tokens) for s in sequences)
    )


def test_examples_too_short_for_maps_have_none(folder):
    short = tuple(Example(" great", (" great", " terrible"), i % 2) for i in range(4))
    with_maps, without = (
        replica_of(folder, short, ChoiceNLL(), estimator=Feedback(lens=lens)).guidance(CENTRE, np.arange(4))
        for lens in (8, 0)
    )
    assert near(with_maps[1], without[1], 1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_have_feedback_as_well(folder, dtype):
    e = guided(folder, Given(CHOICES), ChoiceNLL(), folder)
    usual = moved(Replica(e.spec)).guidance(CENTRE, np.arange(4))
    other = moved(Replica(replace(e.spec, model=replace(e.spec.model, dtype=dtype)))).guidance(CENTRE, np.arange(4))
    for name, values in usual[1].items():
        assert other[1][name].dtype == np.float32
        cosine = (values * other[1][name]).sum() / np.linalg.norm(values) / np.linalg.norm(other[1][name])
        assert cosine > (0.9 if dtype == "bfloat16" else 0.999), name


def test_with_b_alone_only_b_has_feedback(folder):
    replica = replica_of(folder, CHOICES, ChoiceNLL(), space=Lora(rank=2, targets="residual"))
    _, feedback, _ = replica.guidance(CENTRE, np.arange(4))
    assert feedback and all(name.endswith("lora_B") for name in feedback)
    both = replica_of(folder, CHOICES, ChoiceNLL())
    assert set(both.guidance(CENTRE, np.arange(4))[1]) > set(feedback)
