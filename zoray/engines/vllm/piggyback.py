"""Scoring inside the steps of requests: a scored sequence is a request, and its rows are read at the end of a step.

vLLM's own prompt log-probabilities compute every row over the whole vocabulary, and only give the prompt's tokens.
Here, as in packed scoring, only scored rows reach the LM head, and any token may be a target. The model runner hands
the hidden states of each step to `_get_prompt_logprobs_dict`, on every rank; there they are read.
All code that reaches into vLLM's internals is in engines/vllm/, engines/layers/ and engines/shared/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoray.engines.feedback.kept import Kept, joined
from zoray.engines.packing import Pack
from zoray.engines.slots import SCORING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.engines.packing import SequenceTable
    from zoray.engines.vllm.forward import Forward

HOOK = "_get_prompt_logprobs_dict"
NAME = len(SCORING) + 32  # characters of a name, to which vLLM appends more


@dataclass(eq=False)
class Scored:
    """One sequence under way."""

    slot: int
    rows: np.ndarray  # (M,) int64, ascending positions
    targets: np.ndarray  # (M,) int64
    outputs: np.ndarray  # (M,) int64
    found: np.ndarray  # (M,) float64 log-probabilities; nan until the row has run
    n_outputs: int
    kept: list[tuple[slice, Kept]] | None = None  # for feedback: slices of its rows and their kept tensors


class Piggyback:
    """The sequences that one worker scores as requests."""

    def __init__(self, forward: Forward) -> None:
        self._forward: Any = forward
        self._scored: dict[str, Scored] = {}

    def attach(self) -> bool:
        """Read every step from now on; False if this vLLM's model runner has no hook for it."""
        runner = self._forward.runner
        given = getattr(runner, HOOK, None)
        if given is None:
            return False

        def read_along(hidden: torch.Tensor, counts: dict[str, int]) -> Any:
            if self._scored:
                self._read(hidden, counts)
            return given(hidden, counts)

        setattr(runner, HOOK, read_along)
        return True

    def expect(self, names: Sequence[str], table: SequenceTable, slots: Sequence[int], feedback: bool = False) -> None:
        """Expect all sequences of a table as requests of these names, each under its slot.

        With `feedback`, keep the tensors of their rows until they are taken.
        """
        if feedback:
            self._forward.feedback.rows.whole = True
        for number, (name, slot) in enumerate(zip(names, slots, strict=True)):
            one = table[number]
            rows, targets, outputs = (np.asarray(part, np.int64) for part in (one.rows, one.targets, one.outputs))
            kept: list[tuple[slice, Kept]] | None = [] if feedback else None
            self._scored[name] = Scored(slot, rows, targets, outputs, np.full(len(rows), np.nan), one.n_outputs, kept)

    def take(self, names: Sequence[str]) -> np.ndarray:
        """Sums of log-probabilities of all outputs of these sequences, in their order, float64; forgets the sequences.

        nan if a sequence has not run to its end.
        """
        sums, some = [], [self._scored.pop(name) for name in names]
        if any(one.kept is not None for one in some):
            rows = self._forward.feedback.rows
            rows.whole = any(one.kept is not None for one in self._scored.values())
        for one in some:
            sums.append(np.zeros(one.n_outputs))
            np.add.at(sums[-1], one.outputs, one.found)
        return np.concatenate([np.zeros(0), *sums])

    @torch.inference_mode()
    def take_feedback(self, names: Sequence[str], gradient: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Like Engine.feedback, for these sequences in their order; forgets the sequences."""
        feedback = self._forward.feedback
        some = [self._scored[name] for name in names]
        values = self.take(names)
        slopes, first = gradient(values), np.cumsum([0, *(one.n_outputs for one in some)])
        parts: list[Kept] = []
        row_of, targets, weights, positions, begin = [], [], [], [], 0
        for k, one in enumerate(some):
            if one.slot < 0:  # the bare model has no adapter to train
                continue
            for which, kept in one.kept or []:
                rows = one.rows[which]
                row_of.append(begin + np.cumsum(np.diff(rows, prepend=rows[:1]) > 0))
                targets.append(one.targets[which])
                positions.append(np.unique(rows))
                weights.append(slopes[first[k] + one.outputs[which]])
                parts.append(kept)
                begin += len(kept.hidden)
        rows_of, ids, places = (
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *part])) for part in (row_of, targets, positions)
        )
        slopes = torch.from_numpy(np.concatenate([np.zeros(0), *weights]).astype(np.float32))
        return values, feedback.of_rows(joined(parts), rows_of, ids, slopes, places)

    @torch.inference_mode()
    def _read(self, hidden: torch.Tensor, counts: dict[str, int]) -> None:
        """Read the scored rows of a step, given its number of tokens of each request."""
        runner, parts = self._forward.runner, []
        for number, count in counts.items():
            one = self._scored.get(number[:NAME])
            if one is None:
                continue
            begin = runner.requests[number].num_computed_tokens  # before this step
            first, end = np.searchsorted(one.rows, (begin, begin + count))
            if end > first:
                start = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[number]])
                parts.append((start - begin, one, slice(int(first), int(end))))
        if not parts:
            return
        for shift, one, which in parts:
            if one.kept is not None:
                places = np.unique(one.rows[which]) + shift
                one.kept.append((which, self._forward.feedback.rows.of(torch.from_numpy(places), hidden)))
        parts.sort(key=lambda part: part[0] + int(part[1].rows[part[2].start]))  # rows ascend
        found = self._forward.log_probabilities(hidden, _asked(parts, len(hidden))).double().cpu().numpy()
        at = 0
        for _, one, which in parts:
            count = which.stop - which.start
            one.found[which] = found[at : at + count]
            at += count


def _asked(parts: Sequence[tuple[int, Scored, slice]], tokens: int) -> Pack:
    """The rows of one step as a pack, whose segments end at scored rows."""
    places = np.concatenate([one.rows[which] + shift for shift, one, which in parts])
    new = np.diff(places, prepend=-1) > 0
    rows, none = places[new], np.zeros(0, np.int64)
    segments, begin = [], 0
    for shift, one, which in parts:
        end = int(one.rows[which.stop - 1]) + shift + 1
        segments.append((one.slot, begin, end))
        begin = end
    return Pack(
        tokens=np.zeros(tokens, np.int64),
        positions=none,
        lengths=none.astype(np.int32),
        context=none.astype(np.int32),
        blocks=none.astype(np.int32),
        segments=tuple(segments),
        rows=rows,
        target_rows=np.cumsum(new) - 1,
        targets=np.concatenate([one.targets[which] for _, one, which in parts]),
        outputs=np.concatenate([one.outputs[which] for _, one, which in parts]),
    )
