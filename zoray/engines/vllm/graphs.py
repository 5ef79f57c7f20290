"""vLLM's own CUDA graphs for packed forwards: token counts rounded up to sizes that were captured at start.

vLLM compiles a model piece by piece between its attention layers and captures each piece once for every size
(cudagraph_mode PIECEWISE); replayed, a layer costs the host two launches instead of some twenty. A graph reads its
inputs where they were when it was captured, so tokens, positions and cache slots are written into the runner's buffers.
Padding comes after the last token: it has no adapter, cache slot or sequence, and its results are never read. Without
graphs (on a CPU, with engine.eager=true, for more tokens than the largest size) nothing is padded.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALLEST, PER_OCTAVE = 64, 8  # sizes of graphs: at most an eighth is padding, a sixteenth on average


def sizes(most: int) -> list[int]:
    """Token counts to capture, ascending, up to and including `most`."""
    found, size = [], SMALLEST
    while size < most:
        found += [size + step * size // PER_OCTAVE for step in range(PER_OCTAVE)]
        size *= 2
    return [*(size for size in found if size < most), most]


def compilation(max_tokens: int) -> dict[str, Any]:
    """vLLM's compilation_config for graphs, captured with adapters only; tokens without a slot use the same graphs."""
    return {
        "cudagraph_mode": "PIECEWISE",
        "cudagraph_capture_sizes": sizes(max_tokens),
        "cudagraph_specialize_lora": False,
    }


class Graphs:
    """The captured size for a forward, and the buffers for its inputs."""

    def __init__(self, runner: Any, slots: int) -> None:
        self.runner, self.slots = runner, slots
        self.plain = not hasattr(runner, "cudagraph_dispatcher")  # no graphs and no compiled code

    def choose(self, tokens: int) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """(mode, descriptor) for a forward of this many tokens; the descriptor's num_tokens includes padding."""
        if self.plain:
            return CUDAGraphMode.NONE, BatchDescriptor(tokens)
        return self.runner.cudagraph_dispatcher.dispatch(
            tokens, has_lora=self.slots > 0, num_active_loras=self.slots, invalid_modes={CUDAGraphMode.FULL}
        )

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Within it, forwards use neither graphs nor compiled code, which call no Python."""
        plain, self.plain = self.plain, True
        try:
            yield
        finally:
            self.plain = plain

    def inputs(self, tokens: np.ndarray, positions: np.ndarray, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions (T,) in the runner's buffers, with zeros up to `padded`."""
        ids = self.runner.input_ids.gpu
        return _fill(ids, tokens, padded, 0), _fill(self.runner.positions, positions, padded, 0)

    def slot_mapping(self, group: int, slots: np.ndarray, padded: int) -> torch.Tensor:
        """Cache slots (T,) of a KV-cache group in the runner's buffer; -1, meaning no write, up to `padded`."""
        return _fill(self.runner.input_batch.block_table[group].slot_mapping.gpu, slots, padded, -1)


def _fill(buffer: torch.Tensor, values: np.ndarray, padded: int, rest: int) -> torch.Tensor:
    buffer[: len(values)].copy_(torch.from_numpy(values), non_blocking=True)
    if padded > len(values):
        buffer[len(values) : padded].fill_(rest)
    return buffer[:padded]
