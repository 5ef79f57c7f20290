"""vLLM's scheduler, with room for zoray between the steps of requests and in them.

Between two steps zoray scores in KV blocks that are reserved here. In a step it scores as requests whose names begin
with `SCORING`; a step takes as many of their tokens as its budget allows: none while a request waits for its first
token, so that prompts are read as fast as without tuning; and none right after a request has ended, since programs then
ask the next question, which would have to wait for the step. `scheduler_cls` is vLLM's own setting for this. Steps are
not scheduled ahead of the device (no async scheduling): scoring between two steps uses the runner's buffers. If the
server is killed, the core ends as well.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from zoray.engines.shared.step_budget import MOST_ALONE, StepBudget
from zoray.engines.slots import BLOCKS, SCORING, SLOWDOWN

QUIET = 2  # steps after a request has ended


class SharingScheduler(Scheduler):
    """Requests get none of the first `zoray_blocks` blocks; scoring gets the tokens that requests leave in a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        threading.Thread(target=_end_with, args=(os.getppid(),), name="zoray-parent", daemon=True).start()
        settings: dict[str, Any] = dict(self.vllm_config.additional_config)  # type: ignore[arg-type]
        self._budget = StepBudget(settings[SLOWDOWN], self.max_num_scheduled_tokens)
        self._decoding, self._stuck, self._began = False, False, 0.0
        self._asking: set[str] = set()  # requests, as of the last step
        self._quiet = 0  # steps to come that take no scoring along
        own: int = settings[BLOCKS]
        pool = self.kv_cache_manager.block_pool
        if own >= pool.get_num_free_blocks():
            raise ValueError(
                f"expected a KV cache of more than {own} blocks, which scoring takes; got "
                f"{pool.get_num_free_blocks()}. Raise engine.kv_cache_gib, or lower engine.max_tokens"
            )
        taken = [block.block_id for block in pool.get_new_blocks(own)]
        if taken != list(range(1, own + 1)):
            raise RuntimeError(f"this vLLM hands out KV blocks in another order: {taken[:5]}...")

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Like vLLM's, with scoring behind all requests, as far as the step has tokens for it."""
        self._began = time.monotonic()
        queued = [r for r in self.waiting if _scores(r.request_id)] if any(map(_scores, self.requests)) else []
        scoring = [r for r in self.running if _scores(r.request_id)]
        others = [r for r in self.running if not _scores(r.request_id)]
        waits = len(self.waiting) > len(queued)
        asking = {name for name in self.requests if not _scores(name)}
        self._quiet, self._asking = QUIET if self._asking - asking else max(0, self._quiet - 1), asking
        self._decoding = bool(others) and not waits and all(_left(r) == 1 for r in others)
        if not scoring and not queued:
            self._stuck = False
            return super().schedule(*args, **kwargs)
        tokens = self._tokens(others, waits)
        room = self.max_num_running_reqs - len(others) if tokens else 0
        self.running = others + scoring[:room]
        if held := queued if self._stuck or not tokens else []:
            self.waiting.remove_requests(held)
        whole = self.max_num_scheduled_tokens
        if tokens:
            self.max_num_scheduled_tokens = min(whole, len(others) + tokens)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = whole
            self.running += scoring[room:]
            self._stuck = bool(scoring) and any(not _scores(r.request_id) for r in self.waiting)
            for request in held:
                self.waiting.add_request(request)

    def _tokens(self, others: list[Any], waits: bool) -> int:
        """Tokens of scoring in the next step."""
        if self._stuck:  # a request waits for blocks or a place that scoring holds: let scoring finish
            return MOST_ALONE
        if not others:
            return 0 if waits else self._budget.alone()
        quiet = self._quiet and not self._budget.starved  # among many requests, one ends all the time
        return self._budget.tokens() if self._decoding and not quiet else 0

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Like vLLM's; also notes the step's duration."""
        found = super().update_from_output(scheduler_output, *args, **kwargs)
        if self._decoding:
            counts = scheduler_output.num_scheduled_tokens.items()
            scored = sum(count for name, count in counts if _scores(name))
            self._budget.took(scored, time.monotonic() - self._began)
        return found


def _scores(name: str) -> bool:
    return name.startswith(SCORING)


def _left(request: Any) -> int:
    """Tokens of a request without KV yet: 1 if it is only generating."""
    return request.num_tokens_with_spec - request.num_computed_tokens


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
