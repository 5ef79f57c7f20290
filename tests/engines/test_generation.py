"""Completions: both engines write the same, each probe as if it were alone, and sampling draws common numbers."""

from __future__ import annotations

import numpy as np
import pytest
from chatty import PROMPTS, Given, chat_llama

from zoray.engines.hf import Hf
from zoray.engines.vllm.engine import Vllm
from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, LowRank
from zoray.models.folder import Model
from zoray.records import Commit, Example, Probe, Sampling
from zoray.scoring.objectives import Reward
from zoray.scoring.replica import Replica
from zoray.scoring.workload import ReplicaSpec

PROBES = tuple(Probe(1, k, scale) for k in range(3) for scale in (0.05, -0.05))
TEXTS = [
    "the film is",
    "It was",
    "a dull and lifeless story, and far too long",
    "I liked the music. I did",
    "one of the",
]
EXAMPLES = tuple(Example(text) for text in TEXTS)
GREEDY, WARM = Sampling(max_tokens=12), Sampling(max_tokens=12, temperature=1.0)
SPACES = {"lora": Lora(rank=2, alpha=4.0), "lora-AB": Lora(rank=3, alpha=6.0, train="AB"), "lowrank": LowRank(rank=1)}
COMMIT = Commit(0, (0.02, -0.01))


def made(folder, engine, space="lora", sampling=GREEDY, examples=EXAMPLES) -> Replica:
    task, estimator = Given(examples, "reward", sampling), TwoPoint(pairs=3, eps=0.05)
    objective = Reward("length", {"most": 60})
    replica = Replica(ReplicaSpec(Model(str(folder)), task, objective, SPACES[space], estimator, engine, 0, 0, 4))
    replica.apply([COMMIT])
    return replica


def written(replica: Replica, probes: tuple[Probe, ...], probe_of, examples, step: int = 1) -> list[str]:
    """The texts, in order."""
    replica.scorer.outcomes("train", probes, np.array(probe_of), np.array(examples), step)
    return replica.scorer.writer(replica.workload.parts[0].objective).texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.mark.parametrize(("space", "slots"), [("lora", 2), ("lora-AB", 6), ("lowrank", 6)])
def test_vllm_writes_what_transformers_does(folder, space, slots):
    """Under every probe, in one call or several, long prompts beside short ones: products by runs and by masks."""
    vllm = made(folder, Vllm(slots=slots, max_tokens=512, kv_cache_gib=0.02), space)
    reference = made(folder, Hf(), space)
    probe_of, examples = np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6)
    found, expected = (written(r, PROBES, probe_of, examples) for r in (vllm, reference))
    assert found == expected
    assert len({tuple(expected[k * 5 : k * 5 + 5]) for k in range(6)}) > 3, "probes that change nothing"
    assert written(vllm, PROBES[2:3], [0] * 5, range(5)) == expected[10:15]  # alone as beside others
    order = np.random.default_rng(0).permutation(30)  # neighbours in the batch are of other probes
    shuffled = written(vllm, PROBES, probe_of[order], examples[order])
    assert shuffled == [expected[i] for i in order]
    assert vllm.engine.digest() == reference.engine.digest()


def test_scores_are_the_same_after_completions_were_written(folder):
    """Both ways share the slots and the KV cache."""
    vllm = made(folder, Vllm(slots=4, max_tokens=512, kv_cache_gib=0.02))
    surprise = [vllm.scorer.surprise(PROBES[:2], np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))]
    written(vllm, PROBES, np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6))
    surprise.append(vllm.scorer.surprise(PROBES[:2], np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])))
    assert surprise[0].tolist() == surprise[1].tolist()


@pytest.mark.parametrize("engine", [Hf(), Vllm(slots=4, max_tokens=512, kv_cache_gib=0.02)], ids=["hf", "vllm"])
def test_sampling_draws_the_same_numbers_for_all_probes(folder, engine):
    """A probe of scale 0 is the centre: three of them write the same, at another step something else."""
    replica = made(folder, engine, sampling=WARM)
    centres = tuple(Probe(1, k, 0.0) for k in range(3))
    texts = written(replica, centres, np.repeat(np.arange(3), 5), np.tile(np.arange(5), 3))
    assert texts[:5] == texts[5:10] == texts[10:] and len(set(texts[:5])) > 3
    assert written(replica, centres[:1], [0] * 5, range(5)) == texts[:5]
    assert written(replica, centres[:1], [0] * 5, range(5), step=2) != texts[:5]
    greedy = made(folder, engine)
    assert written(greedy, centres[:1], [0] * 5, range(5)) != texts[:5]


def test_plus_and_minus_of_a_small_probe_stay_close(folder):
    """Common random numbers: with numbers of their own, two samples of the same model would have little in common."""
    replica = made(folder, Vllm(slots=4, max_tokens=512, kv_cache_gib=0.02), sampling=WARM)
    pair = (Probe(1, 0, 1e-4), Probe(1, 0, -1e-4))
    texts = written(replica, pair, np.repeat([0, 1], 5), np.tile(np.arange(5), 2))
    assert sum(a == b for a, b in zip(texts[:5], texts[5:], strict=True)) >= 4


def test_a_completion_ends_at_a_stop_or_at_its_length(folder):
    replica = made(folder, Hf())
    outcomes = replica.scorer.outcomes("train", PROBES, np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6), 1)
    texts = replica.scorer.writer(replica.workload.parts[0].objective).texts
    stopped = made(folder, Hf(), sampling=Sampling(12, stop=("e",)))
    short = stopped.scorer.outcomes("train", PROBES, np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6), 1)
    cut = stopped.scorer.writer(stopped.workload.parts[0].objective).texts
    assert cut == [text.split("e")[0] for text in texts] and any("e" in text for text in texts)
    lengths = outcomes.columns["tokens"].tolist()
    ends = ["e" in text or length < 12 for text, length in zip(texts, lengths, strict=True)]
    assert [bool(ended) for ended in short.columns["ended"]] == ends
    assert (short.columns["tokens"] <= outcomes.columns["tokens"]).all() and not outcomes.columns["failed"].any()
    assert outcomes.written == 30 and outcomes.tokens > 30 * 2
    lengths = [len(text.strip()) for text in texts]
    expected = [min(1.0, max(0.0, (60 - n) / 60)) if n else 0.0 for n in lengths]
    assert outcomes.scores.tolist() == pytest.approx(expected) and (outcomes.losses == -outcomes.scores).all()


def test_a_chat_is_written_to_its_end_of_turn(folder):
    replica = made(folder, Vllm(slots=2, max_tokens=512, kv_cache_gib=0.02), examples=PROMPTS)
    texts = written(replica, PROBES[:1], [0] * 8, range(8))
    assert len(texts) == 8 and not any("</s>" in text for text in texts)
    tokens = replica.workload.encoder.tokens(PROMPTS[0].prompt)
    model = made(folder, Hf(), examples=PROMPTS)
    assert written(model, PROBES[:1], [0] * 8, range(8)) == texts
    assert (
        tokens == model.workload.encoder.tokenizer("<s>user\nthe movies of the year 0</s>\n<s>assistant\n")["input_ids"]
    )
