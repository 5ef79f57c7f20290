"""Scoring in the steps of requests: numbers as of a packed forward, behind all requests, within the budget."""

import asyncio
import threading
import time
import uuid
from contextlib import contextmanager
from itertools import pairwise
from statistics import median

import numpy as np
import pytest

from zoray.engines.packing import Plan, SequenceTable
from zoray.engines.shared.cost import RARE, SHARE
from zoray.engines.shared.step_budget import FEWEST, MOST_ALONE, USUAL_OF, StepBudget
from zoray.methods.spaces.base import Space
from zoray.records import Commit, Probe, TokenSequence


def budget(slowdown=1.5, most=512, step=0.1):
    found = StepBudget(slowdown, most)
    for _ in range(USUAL_OF):
        found.took(0, step)
    return found


def run(found, steps, step=0.1, fixed=0.01, each=0.001):
    """Steps in which tuning is taken along as the budget has it; (tokens, seconds added) of each."""
    seen = []
    for _ in range(steps):
        tokens = found.tokens()
        added = fixed + each * tokens if tokens else 0.0
        found.took(tokens, step + added)
        seen.append((tokens, added))
    return seen


def test_nothing_is_taken_along_before_a_usual_step_is_known():
    found = StepBudget(1.5, 512)
    for _ in range(USUAL_OF - 1):
        assert found.tokens() == 0
        found.took(0, 0.1)
    found.took(0, 0.1)
    assert found.tokens() == FEWEST


def test_tuning_adds_no_more_than_its_share_of_a_step_and_of_the_time():
    seen = run(budget(), 2000)
    share = sum(added for _, added in seen) / (2000 * 0.1)
    assert 0.7 * SHARE < share <= SHARE + 0.01
    long = [k for k, (_, added) in enumerate(seen) if added > 0.5 * 0.1 + 1e-6]
    assert 11 <= len(long) <= 14 and all(b - a >= RARE for a, b in pairwise(long))
    assert max(added for _, added in seen) <= 0.1 + 1e-6
    usual = [tokens for k, (tokens, _) in enumerate(seen) if tokens and k not in long]
    assert max(usual) == pytest.approx(40, abs=1) and len(usual) > 100


def test_where_tokens_cost_nothing_a_step_takes_all_there_is_room_for_but_no_leap_into_the_unknown():
    tokens = [size for size, _ in run(budget(), 200, fixed=0.0, each=0.0) if size]
    assert tokens[0] == FEWEST and tokens[1] == 4 * FEWEST and max(tokens) == 512
    assert all(b <= 4 * max(tokens[:k]) for k, b in enumerate(tokens[1:], 1))


def test_steps_that_are_slow_by_themselves_leave_more_room():
    """What is promised is of the slow ones: requests have them anyway."""
    found = StepBudget(1.5, 512)
    for k in range(64):
        found.took(0, 0.1 if k % 8 else 0.2)
    assert max(added for _, added in run(found, 150)) == pytest.approx(1.5 * 0.2 - 0.1, rel=0.2)


def test_where_even_the_fewest_take_too_long_they_are_in_few_steps():
    seen = run(budget(), 10 * RARE, fixed=0.2)
    many = [k for k, (tokens, _) in enumerate(seen) if tokens]
    assert {seen[k][0] for k in many} == {FEWEST} and 8 <= len(many) <= 12
    assert all(b - a >= RARE for a, b in pairwise(many))


def test_a_step_without_requests_is_short_as_well():
    """The next request may come while it runs."""
    assert StepBudget(1.5, 512).alone() == MOST_ALONE  # nobody has been there yet
    found = budget()
    assert found.alone() == FEWEST
    run(found, 300)  # 0.01 s and 0.001 s a token
    assert found.alone() == pytest.approx((0.5 * 0.1 - 0.01) / 0.001, abs=1)
    slow = budget()
    run(slow, 300, each=0.02)
    assert slow.alone() == FEWEST
    free = budget()
    run(free, 300, fixed=0.0, each=0.0)
    assert free.alone() == MOST_ALONE


def test_no_slowdown_is_no_tuning_beside_requests():
    assert all(tokens == 0 for tokens, _ in run(budget(slowdown=1.0), 3 * RARE))


def test_one_slow_step_changes_little():
    found = budget()
    run(found, 200)
    found.took(40, 5.0)
    for _ in range(RARE - 1):  # it has spent credit for a while
        found.took(0, 0.1)
    assert found.tokens() == pytest.approx(40, abs=3)


@pytest.fixture(scope="module")
def shared(chat_model):
    """An engine that answers requests and tunes, and the loop it runs on."""
    from zoray.engines.shared.engine import SharedEngine, report, start_client
    from zoray.engines.shared.throttle import Throttle
    from zoray.engines.vllm.engine import Vllm
    from zoray.methods.spaces import Lora
    from zoray.models.folder import linear_matrices

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    config = Vllm(slots=2, max_tokens=256, kv_cache_gib=0.05)
    space: Space = Lora(rank=2, alpha=4.0, targets="residual", train="AB")  # type: ignore[assignment]
    matrices, throttle = linear_matrices(chat_model), Throttle(1e6)

    async def start():
        return start_client(config, chat_model, "tiny", "float32", matrices, space, 1, 1e6)

    client = asyncio.run_coroutine_threadsafe(start(), loop).result(120)
    engine = SharedEngine(client, loop, config, space, matrices, 0, chat_model, throttle)
    report(client, throttle)
    yield engine
    client.shutdown()
    loop.call_soon_threadsafe(loop.stop)


def sequences(count=12):
    """Texts of 5 to 90 tokens; some ask for several tokens of one row."""
    draw = np.random.default_rng(3)
    found = []
    for k in range(count):
        tokens = draw.integers(3, 90, 5 + 7 * k)
        asked = np.sort(draw.choice(len(tokens), 4, replace=False))
        rows = np.repeat(asked, 1 + k % 2)
        outputs = np.arange(len(rows)) % 3
        found.append(TokenSequence(tokens, rows, draw.integers(3, 90, len(rows)), outputs, 3))
    return found


async def write(engine, text, tokens):
    """What a request gets."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0.0)
    client, name = engine._link.client, f"chat-{uuid.uuid4().hex}"
    async for answer in client.generate({"prompt_token_ids": text}, parameters, name):
        if answer.finished:
            return list(answer.outputs[0].token_ids)
    raise AssertionError("no last token")


def once(engine, text, tokens):
    return asyncio.run_coroutine_threadsafe(write(engine, text, tokens), engine._link.loop).result(60)


@contextmanager
def company(engine, text):
    """At each moment a request under way that is past its prompt; a list of what they get."""
    answers, stop = [], threading.Event()

    async def one(tokens):
        while not stop.is_set():
            answers.append(await write(engine, text, tokens))

    async def two():
        await asyncio.gather(one(40), one(60))  # when the first one ends, the other one goes on

    running = asyncio.run_coroutine_threadsafe(two(), engine._link.loop)
    try:
        deadline = time.monotonic() + 60
        while not answers and time.monotonic() < deadline:
            time.sleep(0.01)
        yield answers
    finally:
        stop.set()
        running.result(60)


def test_scores_are_those_of_a_packed_forward_whoever_is_in_the_batch(shared):
    table = SequenceTable.of(sequences())
    slots = np.arange(len(table)) % 3 - 1  # the bare model, and two probes
    shared._write((Probe(0, 0, 0.5), Probe(0, 1, -0.5)))
    alone = shared._call("zoray_score_slots", table, slots)
    assert len(set(np.round(alone, 6))) == len(alone)
    np.testing.assert_allclose(shared._join(table, slots.tolist()), alone, rtol=0, atol=2e-5)
    text = list(range(10, 20))
    quiet = once(shared, text, 60)
    with company(shared, text) as answers:  # in their steps
        found = shared._join(SequenceTable.of([table[0], table[1]]), slots[:2].tolist())
    np.testing.assert_allclose(found, alone[:6], rtol=0, atol=2e-5)
    assert len(answers) > 2 and all(answer == quiet[: len(answer)] for answer in answers)
    answer = asyncio.run_coroutine_threadsafe(write(shared, text, 60), shared._link.loop)
    found = shared._join(table, slots.tolist())  # begins in its steps, goes on behind its end
    np.testing.assert_allclose(found, alone, rtol=0, atol=2e-5)
    assert answer.result(60) == quiet


def test_while_a_request_is_under_way_its_steps_take_the_work_along(shared, monkeypatch):
    """Not slices, which are forbidden here."""
    table, slots = SequenceTable.of(sequences()), np.zeros(12, np.int64)
    alone = shared._call("zoray_score_slots", table, slots)
    monkeypatch.setattr(shared.throttle, "took", lambda *given: pytest.fail(f"a slice: {given}"))
    with company(shared, list(range(30, 40))) as answers:
        found = shared.score_slots(table, np.arange(12)[:2], slots[:2])
    np.testing.assert_allclose(found, alone[:6], rtol=0, atol=2e-5)
    assert len({tuple(answer[:40]) for answer in answers}) == 1


def slopes(values):
    """At module level: it travels to the engine's core."""
    return np.sin(1.0 + np.arange(len(values)))


def test_feedback_in_the_steps_of_requests_is_that_of_a_packed_forward(shared, monkeypatch):
    numbers = shared._call("zoray_adapter")
    count = sum(array.size for array in numbers.values())
    bits = np.random.default_rng(0).integers(0, 2, count).astype(np.uint8)
    signs, gains = np.packbits(bits).tobytes(), (0.5,) * (len(numbers) // 2)
    shared.apply([Commit(0, (), gains=gains, signs=signs)])  # B is not zero any more
    one, probe = sequences(6), Probe(1, 0, 0.0)
    plan = Plan.of([(None, one[2]), *((probe, each) for each in one)])
    sums, alone = shared._call("zoray_feedback", plan, slopes)
    assert all(np.abs(array).max() > 0 for array in alone.values())
    shared.warm()  # what it costs to write slots is known
    took = shared.throttle.took

    def only_slots(kind, *rest):
        assert kind == "slots", f"a slice: {kind}"
        took(kind, *rest)

    monkeypatch.setattr(shared.throttle, "took", only_slots)
    with company(shared, list(range(30, 40))) as answers:
        values, found = shared.feedback(plan, slopes)
    assert len(answers) > 2 and shared.at_once()[0] <= 256
    np.testing.assert_allclose(values, sums, rtol=0, atol=2e-5)
    for name, array in alone.items():
        assert np.abs(found[name] - array).max() < 1e-4 * np.abs(array).max(), name
    shared.reset()


def test_the_time_until_a_step_of_requests_ends_is_no_cost_of_a_slot(shared, monkeypatch):
    """Else slots, whose writing takes a millisecond, are held back for half a minute while people chat."""
    call, noted = shared._call, []

    def behind_a_step(*given):
        time.sleep(0.3)
        return call(*given)

    monkeypatch.setattr(shared, "_call", behind_a_step)
    monkeypatch.setattr(shared.throttle, "took", lambda *given: noted.append(given))
    shared._write((Probe(0, 0, 0.5),))
    ((kind, size, seconds),) = noted
    assert (kind, size) == ("slots", 1) and 0 < seconds < 0.2


def test_a_request_that_ends_too_early_is_an_error_and_nothing_is_left(shared):
    table = SequenceTable.of(sequences(2))
    with pytest.raises(Exception, match=r"length|longer|maximum"):
        shared._join(SequenceTable.of([_long()]), [0])
    assert np.isfinite(shared._join(table, [0, 1])).all()


def _long():
    tokens = np.full(2000, 5)
    return TokenSequence(tokens, np.array([0]), np.array([5]), np.array([0]), 1)


def test_the_usual_step_is_a_median():
    found = budget()
    for seconds in (5.0, 0.09, 0.11):
        found.took(0, seconds)
    assert median(found._plain) == pytest.approx(0.1)
