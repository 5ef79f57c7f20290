"""vLLM's scheduler with scoring in it, without a model: who is in a step, and with how many tokens."""

import pytest
import torch

from zoray.engines.shared.step_budget import FEWEST
from zoray.engines.slots import BLOCKS, SCORING, SLOWDOWN

OWN = 4  # KV blocks that slices have


@pytest.fixture
def make(tiny_models, monkeypatch):
    """Schedulers of so many KV blocks and requests at a time."""
    from vllm import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from zoray.engines.shared import scheduler as vllm_scheduler
    from zoray.engines.vllm.engine import in_this_process

    in_this_process()
    monkeypatch.setattr(vllm_scheduler, "_end_with", lambda parent: None)

    def scheduler(blocks=200, at_once=8, slowdown=1.5):
        settings = EngineArgs(
            model=str(tiny_models["llama"]),
            max_model_len=256,
            max_num_batched_tokens=128,
            max_num_seqs=at_once,
            block_size=16,
            scheduling_policy="priority",
            async_scheduling=False,
            enable_prefix_caching=False,
            additional_config={BLOCKS: OWN, SLOWDOWN: slowdown},
        ).create_engine_config()
        group = KVCacheGroupSpec(
            ["layer"], FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32)
        )
        cache = KVCacheConfig(blocks, [], [group])
        settings.cache_config.num_gpu_blocks = blocks
        return vllm_scheduler.SharingScheduler(
            settings, cache, StructuredOutputManager(settings), block_size=16, log_stats=False
        )

    return scheduler


def add(scheduler, name, tokens, most=200):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    scores = name.startswith(SCORING)
    parameters = SamplingParams(max_tokens=1 if scores else most, ignore_eos=True)
    salt = {"cache_salt": name}
    scheduler.add_request(Request(name, list(range(1, tokens + 1)), parameters, None, priority=int(scores), **salt))


def step(scheduler, seconds=None):
    """One step of an engine whose every token is 7; {request: its tokens in the step}."""
    from vllm.v1.outputs import ModelRunnerOutput

    planned = scheduler.schedule()
    counts = dict(planned.num_scheduled_tokens)
    ends = {
        name: [7] if scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens else []
        for name in counts
    }
    if seconds is not None:
        scheduler._began -= seconds
    answered = ModelRunnerOutput(
        req_ids=list(counts),
        req_id_to_index={name: k for k, name in enumerate(counts)},
        sampled_token_ids=list(ends.values()),
    )
    scheduler.update_from_output(planned, answered)
    return counts


def chatting(make):
    """A scheduler that knows how long a step of its one request takes."""
    scheduler = make()
    add(scheduler, "chat-0", 10, most=500)
    for _ in range(40):
        step(scheduler, seconds=0.1)
    return scheduler


def scored(counts):
    return sum(count for name, count in counts.items() if name.startswith(SCORING))


def test_scoring_alone_goes_on_in_short_steps(make):
    scheduler = make()
    for k in range(4):
        add(scheduler, f"{SCORING}{k}", 40)
    seen = [scored(step(scheduler)) for _ in range(3)]
    assert seen == [64, 64, 32] and not scheduler.has_unfinished_requests()


def test_a_step_of_requests_takes_along_what_the_budget_allows_and_each_request_gets_its_token(make):
    scheduler = make()
    for k in range(3):
        add(scheduler, f"chat-{k}", 10)
    assert step(scheduler) == {f"chat-{k}": 10 for k in range(3)}
    for k in range(4):
        add(scheduler, f"{SCORING}{k}", 100)
    steps = []
    while scored_left := [name for name in scheduler.requests if name.startswith(SCORING)]:
        allowed = scheduler._budget.tokens()
        counts = step(scheduler, seconds=0.1 + 0.0005 * allowed)
        assert [counts[f"chat-{k}"] for k in range(3)] == [1, 1, 1]
        assert scored(counts) <= allowed
        steps.append(scored(counts))
        assert len(steps) < 190, f"{scored_left} are left"
    assert sum(steps) == 400 and 0 < sum(map(bool, steps)) < len(steps)


def test_where_a_prompt_is_read_nothing_is_taken_along(make):
    scheduler = chatting(make)
    add(scheduler, f"{SCORING}0", 200)
    while not scored(step(scheduler, seconds=0.1)):
        pass
    add(scheduler, "chat-1", 250)  # more than one step can read beside another request
    scheduler._budget._credit.left = 10.0
    with_prompt = [step(scheduler, seconds=0.1) for _ in range(2)]
    assert sum(counts["chat-1"] for counts in with_prompt) >= 250 and not any(map(scored, with_prompt))
    assert any(scored(step(scheduler, seconds=0.1)) for _ in range(60))


def test_right_after_a_request_has_ended_nothing_is_taken_along_unless_tuning_starves(make):
    scheduler = chatting(make)
    add(scheduler, f"{SCORING}0", 250)
    budget = scheduler._budget

    def end_one(name, credit):
        add(scheduler, name, 10, most=3)
        while name in scheduler.requests:
            budget._credit.left = -1.0  # nothing is taken along meanwhile
            step(scheduler, seconds=0.1)
        budget._credit.left, budget._since_long = credit, 10**6
        return [bool(scored(step(scheduler, seconds=0.1))) for _ in range(3)]

    assert end_one("chat-1", 0.19) == [False, False, True]
    assert end_one("chat-2", 0.2)[0] is True


def test_max_slowdown_1_holds_scoring_back_until_requests_have_gone(make):
    scheduler = make(slowdown=1.0)
    add(scheduler, "chat-0", 10, most=100)
    step(scheduler)
    add(scheduler, f"{SCORING}0", 20)
    counts = [step(scheduler, seconds=0.1) for _ in range(100)]
    assert all(counts[k] == {"chat-0": 1} for k in range(99))
    assert counts[99] == {f"{SCORING}0": FEWEST}  # it is not known what they cost, and the next request may come


def test_a_request_that_finds_no_blocks_gets_those_of_scoring(make):
    """With all but a few KV blocks in the hands of sequences that are half run."""
    scheduler = make(blocks=1 + OWN + 16)
    add(scheduler, f"{SCORING}0", 200)
    assert step(scheduler) == {f"{SCORING}0": 64}
    assert step(scheduler) == {f"{SCORING}0": 64}
    add(scheduler, "chat-0", 250, most=3)
    seen = [step(scheduler) for _ in range(6)]
    assert any("chat-0" in counts for counts in seen)
    while scheduler.has_unfinished_requests():
        step(scheduler)


def test_places_are_for_requests_first(make):
    scheduler = make(at_once=2)
    for k in range(2):
        add(scheduler, f"{SCORING}{k}", 200)
    step(scheduler)
    for k in range(3):
        add(scheduler, f"chat-{k}", 10, most=5)
    seen = [step(scheduler, seconds=0.1) for _ in range(30)]
    assert all(len(counts) <= 2 for counts in seen)
    assert {"chat-0", "chat-1", "chat-2"} <= {name for counts in seen for name in counts}
    while scheduler.has_unfinished_requests():
        step(scheduler)


def test_who_goes_leaves_nothing_behind(make):
    from vllm.v1.request import RequestStatus

    scheduler = make()
    add(scheduler, "chat-0", 10)
    add(scheduler, f"{SCORING}0", 200)
    add(scheduler, f"{SCORING}1", 20)
    for _ in range(30):
        step(scheduler, seconds=0.1)
    scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)
    assert not scheduler.has_unfinished_requests() and not scheduler.running and not scheduler.waiting
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 200 - 1 - OWN
