"""One vLLM engine that answers requests and tunes: vLLM's AsyncLLM, whose core is a separate process.

Requests go to `client`, as in vLLM's own server. Tuning uses `SharedEngine`, an engine like any other. While requests
are under way, their steps score its sequences too (vllm/piggyback.py), as many tokens at a time as the budget allows;
else sequences are scored in slices, as long as the throttle allows. The first adapter slots hold probes, the others
hold versions that answer requests. Both kinds act in the same forward, and slices use reserved KV blocks
(scheduler.py), so that no request is touched.
"""

from __future__ import annotations

import asyncio
import pickle
import time
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.engines.packing import Plan, SequenceTable, by_slots
from zoray.engines.shared.throttle import Closed
from zoray.engines.slots import BLOCKS, PROBES, SCORING, SLOWDOWN
from zoray.engines.vllm.engine import VllmEngine, check_lora_support, in_this_process
from zoray.records import ConfigError, Probe, TokenSequence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from zoray.engines.shared.throttle import Throttle
    from zoray.engines.vllm.engine import Vllm
    from zoray.methods.spaces.base import Space
    from zoray.records import Sampling

LEAST_TOKENS = 64  # of a slice; a single sequence may be longer
BLOCK = 32  # tokens of a KV block
TUNING = "tune-"  # prefix of the names of tuning's requests, also of SCORING
JOINED_TOKENS = 256  # handed to the steps of requests at a time; a single sequence may be longer


def start_client(
    config: Vllm,
    folder: Path | str,
    name: str,
    dtype: str,
    matrices: Mapping[str, Any],
    space: Space,
    versions: int,
    max_slowdown: float,
) -> Any:
    """vLLM's AsyncLLM for requests and tuning. `versions`: number of slots beside those of probes.

    Raises:
        ConfigError: the space folds into the base weights, which other requests need unchanged; or vLLM refuses.
    """
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if space.folds:
        raise ConfigError(
            "expected space=lora for a served model: requests to other versions need the base weights unchanged"
        )
    config.check(space)
    in_this_process()
    check_lora_support(folder)
    own = -(-config.max_tokens // BLOCK) * 2  # each sequence ends in its own block
    arguments = config.llm_arguments(folder, dtype) | {
        "served_model_name": name,
        "skip_tokenizer_init": False,
        "block_size": BLOCK,
        "enable_prefix_caching": True,  # for a chat's earlier turns; a block belongs to one version
        "scheduler_cls": "zoray.engines.shared.scheduler.SharingScheduler",
        "async_scheduling": False,
        "enable_log_requests": False,
        "scheduling_policy": "priority",  # tuning's own requests wait behind all others
    }
    lora = config.lora_arguments(matrices, space)
    lora["max_loras"] = config.resident + versions
    lora["additional_config"] |= {BLOCKS: own, PROBES: config.resident, SLOWDOWN: max_slowdown}
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, **lora))
    except ValueError as error:
        raise ConfigError(f"vLLM does not load {folder} with these settings: {error}") from error


class Link:
    """Calls the core's worker from a thread, through the client's loop; stands in for vllm.LLM."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self.loop = client, loop

    def collective_rpc(self, method: str, args: tuple = ()) -> list[Any]:
        """The result of each rank's worker."""
        message = pickle.dumps((method, args), pickle.HIGHEST_PROTOCOL)
        call = self.client.collective_rpc("zoray_call", args=(message,))
        found = []
        for answer in asyncio.run_coroutine_threadsafe(call, self.loop).result():
            error, result = pickle.loads(answer)
            if error is not None:
                raise error if isinstance(error, ConfigError) else RuntimeError(f"in the engine's core: {error}")
            found.append(result)
        return found


class SharedEngine(VllmEngine):
    """Engine protocol (base.py) on a client that also answers requests. Never call it on the client's loop."""

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        config: Vllm,
        space: Space,
        matrices: Mapping[str, tuple[int, int]],
        seed: int,
        folder: Path | str,
        throttle: Throttle,
    ) -> None:
        self._link = Link(client, loop)
        super().__init__(self._link, space, matrices, seed, folder)
        self.probe_slots, self.throttle, self._forward_tokens = config.resident, throttle, config.max_tokens
        self._call("zoray_register")
        self._joins: bool = self._call("zoray_join")
        self._keeps, self._fitted = self._joins and self._call("zoray_keeps"), False

    def warm(self) -> None:
        """Run once everything that is slow the first time, and learn the cost of slices, before requests come."""
        tokens = np.arange(1, LEAST_TOKENS + 1, dtype=np.int64)
        one = TokenSequence(tokens, np.arange(len(tokens) - 1), tokens[1:], np.zeros(len(tokens) - 1, np.int64), 1)
        for count in (self.probe_slots, 1, 2, 3):
            self.score_plan(Plan.of([(Probe(0, k % self.probe_slots, 0.0), one) for k in range(count)]))
            if count == self.probe_slots:
                self.throttle.forget()

    def put(self, slot: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write an adapter, as given by `adapter()`, to a version's slot. No request may be using the slot."""
        self._call("zoray_put", slot, dict(arrays))

    def score_plan(self, plan: Plan) -> np.ndarray:
        """See Engine.score_plan. In slices; blocks while requests have the engine."""

        def part(probes: tuple[Probe, ...], members: np.ndarray, slot_of: np.ndarray) -> np.ndarray:
            self._write(probes)
            return self.score_slots(plan.table, plan.chosen[members], slot_of)

        return plan.gather(self.probe_slots, part)

    def score_slots(
        self,
        table: SequenceTable,
        chosen: np.ndarray,
        slots: np.ndarray,
        stopping: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Sums of log-probabilities of chosen sequences (n,) of a table, each under the adapter in its slot (n,).

        Scores in the steps of requests if there are any, else in slices between them.

        Raises:
            Closed: `stopping` became true between two slices.
        """
        order = np.argsort(slots, kind="stable")
        first = np.concatenate([[0], np.cumsum(table.n_outputs[chosen])]).astype(np.int64)
        sums = np.zeros(first[-1])
        ends = np.cumsum(table.lengths[chosen[order]])
        begin = 0
        while begin < len(order):
            if stopping():
                raise Closed
            done = ends[begin - 1] if begin else 0
            least = min(LEAST_TOKENS, float(ends[-1] - done))
            tokens = self.throttle.wait("tokens", least, self._forward_tokens, self._joins)
            stop = max(begin + 1, int(np.searchsorted(ends, done + (tokens or JOINED_TOKENS), side="right")))
            some = order[begin:stop]
            piece = SequenceTable.of([table[int(i)] for i in chosen[some]])
            if tokens:
                began = time.monotonic()
                found = self._call("zoray_score_slots", piece, slots[some])
                self.throttle.took("tokens", float(ends[stop - 1] - done), time.monotonic() - began)
            else:
                found = self._join(piece, slots[some].tolist())
            at = 0
            for i in some.tolist():
                count = first[i + 1] - first[i]
                sums[first[i] : first[i + 1]] = found[at : at + count]
                at += count
            begin = stop
        return sums

    def feedback(
        self, plan: Plan, gradient: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See Engine.feedback. As a slice if one of this size may run now, else in the steps of requests."""
        tokens = float(plan.table.lengths[plan.chosen].sum())
        self._write(plan.probes)
        if not self._keeps or self.throttle.free("feedback", tokens):
            self.throttle.wait("feedback", tokens, tokens)
            began = time.monotonic()
            found = self._call("zoray_feedback", plan, gradient)
            self.throttle.took("feedback", tokens, time.monotonic() - began)
            return found
        table = SequenceTable.of([plan.table[int(i)] for i in plan.chosen])
        names = self._run(table, plan.probe_of.tolist(), True)
        values, found = self._call("zoray_take_feedback", names, gradient)
        return _whole(values), found

    def at_once(self) -> tuple[int, int, int]:
        """Few at a time while requests may come, see Engine.at_once."""
        tokens, rows, block = super().at_once()
        return (tokens if self.throttle.idle else min(tokens, JOINED_TOKENS)), rows, block

    def fit_lens(self, table: SequenceTable, rank: int) -> None:
        """Fit the maps, which takes seconds, if no request is expected; else keep the earlier maps."""
        if self.throttle.idle or not self._fitted:
            super().fit_lens(table, rank)
            self._fitted = True

    def _join(self, table: SequenceTable, slots: Sequence[int]) -> np.ndarray:
        """Like score_slots for a whole table, each sequence a request behind all others (vllm/piggyback.py)."""
        return _whole(self._call("zoray_take", self._run(table, slots)))

    def _run(self, table: SequenceTable, slots: Sequence[int], feedback: bool = False) -> list[str]:
        """Run all sequences of a table in the steps of requests, each under its slot; returns their requests' names."""
        from vllm import SamplingParams

        names = [f"{SCORING}{uuid.uuid4().hex}" for _ in slots]
        last = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)  # vLLM must generate at least one
        self._call("zoray_expect", names, table, slots, feedback)
        try:
            self._together([(table[k].tokens.tolist(), slots[k], last, names[k]) for k in range(len(names))])
        except BaseException:
            self._call("zoray_take", names)
            raise
        return names

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        probes: tuple[Probe, ...],
        probe_of: np.ndarray,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: frozenset[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Completions in the same continuous batch as requests, some at a time, see base.py."""
        for some, members, slot_of in by_slots(probes, probe_of, self.probe_slots):
            self._write(some)
            numbers = members.tolist()
            asked, own = [prompts[i] for i in numbers], [seeds[i] for i in numbers]
            for number, tokens in self.generate_slots(asked, slot_of, sampling, own, stops):
                yield numbers[number], tokens

    def generate_slots(
        self,
        prompts: Sequence[Sequence[int]],
        slot_of: np.ndarray,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: frozenset[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Completions of prompts (n,), each under the adapter in its slot (n,), -1 for the bare model."""
        begin = 0
        while begin < len(prompts):
            count = max(1, int(self.throttle.wait("completions", 1, len(prompts))))
            numbers = range(begin, min(begin + count, len(prompts)))
            began = time.monotonic()
            found = self._together(
                [(prompts[i], int(slot_of[i]), _parameters(sampling, seeds[i], stops), _name()) for i in numbers]
            )
            self.throttle.took("completions", len(numbers), time.monotonic() - began)
            yield from zip(numbers, found, strict=True)
            begin += count

    def _together(self, asked: Sequence[tuple[Sequence[int], int, Any, str]]) -> list[list[int]]:
        """vLLM's completions of prompts, each prompt (tokens, slot or -1, SamplingParams, its request's name)."""

        async def one(tokens: Sequence[int], slot: int, parameters: Any, name: str) -> list[int]:
            # A slot's adapter changes, and vLLM finds cached prefixes by the adapter's name and by the salt.
            adapter = slot_request(name, slot) if slot >= 0 else None
            prompt = {"prompt_token_ids": list(tokens), "cache_salt": name}
            async for answer in self._link.client.generate(prompt, parameters, name, lora_request=adapter, priority=1):
                if answer.finished:
                    return list(answer.outputs[0].token_ids)
            raise RuntimeError("vLLM has ended a request of tuning without a last token")

        async def every() -> list[list[int]]:
            return await asyncio.gather(*(one(*each) for each in asked))

        return asyncio.run_coroutine_threadsafe(every(), self._link.loop).result()

    def _write(self, probes: tuple[Probe, ...]) -> None:
        begin = 0
        while begin < len(probes):
            count = max(1, int(self.throttle.wait("slots", 1, len(probes))))
            some = probes[begin : begin + count]
            self.throttle.took("slots", len(some), self._call("zoray_write_some", some, begin))
            begin += count


def slot_request(name: str, slot: int) -> Any:
    """A LoRARequest that makes vLLM use the adapter in a slot. vLLM finds cached prefixes by its name."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, slot + 1, "/none")


def report(client: Any, throttle: Throttle) -> None:
    """Make a client's requests report to a throttle: their begin, their tokens, and their end."""
    generate = client.generate

    async def watched(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        request = options.get("request_id") or arguments[2]
        if str(request).startswith(TUNING):
            async for answer in generate(*arguments, **options):
                yield answer
            return
        throttle.began()
        last, seen = time.monotonic(), 0
        try:
            async for answer in generate(*arguments, **options):
                now, tokens = time.monotonic(), sum(len(output.token_ids) for output in answer.outputs)
                for which in range(min(tokens, 64)):  # one, or all if only the final output is requested
                    note = throttle.first_token if not seen and which == 0 else throttle.token
                    note((now - last) / tokens)
                last, seen = now, seen + tokens
                yield answer
        finally:
            throttle.ended()

    client.generate = watched


def _whole(sums: np.ndarray) -> np.ndarray:
    """Sums of sequences that ran as requests; RuntimeError unless all of them finished."""
    if not np.isfinite(sums).all():
        raise RuntimeError("vLLM has ended a scored sequence before its end")
    return sums


def _name() -> str:
    return f"{TUNING}{uuid.uuid4().hex}"


def _parameters(sampling: Sampling, seed: int, stops: frozenset[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed if sampling.temperature else None,
        stop_token_ids=sorted(stops),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
