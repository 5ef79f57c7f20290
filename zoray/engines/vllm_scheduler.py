"""vLLM's scheduler with some of the KV cache put aside: room of zoray's own, where it scores between steps of requests.

`scheduler_cls` is vLLM's own place for this. Steps are not scheduled ahead of the device (no async scheduling): what is
scored between two of them uses the runner's buffers. A core whose server was killed ends as well.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from zoray.engines.slots import BLOCKS


class SharingScheduler(Scheduler):
    """Requests get no block of the first `zoray_blocks`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        threading.Thread(target=_end_with, args=(os.getppid(),), name="zoray-parent", daemon=True).start()
        own: int = dict(self.vllm_config.additional_config)[BLOCKS]  # type: ignore[call-overload]
        pool = self.kv_cache_manager.block_pool
        if own >= pool.get_num_free_blocks():
            raise ValueError(
                f"expected a KV cache of more than {own} blocks, which scoring takes; got "
                f"{pool.get_num_free_blocks()}. Raise engine.kv_cache_gib, or lower engine.max_tokens"
            )
        taken = [block.block_id for block in pool.get_new_blocks(own)]
        if taken != list(range(1, own + 1)):
            raise RuntimeError(f"this vLLM hands out KV blocks in another order: {taken[:5]}...")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
