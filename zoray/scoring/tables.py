"""Examples as tables of token sequences, so that a step's host work is a few array operations.

A split that is tokenised at start is one table; in one that is tokenised as it goes, each step's examples are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoray.engines.packing import Plan, SequenceTable, ranges, starts_of
from zoray.scoring.objectives.base import Sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoray.records import Example, Probe, TokenSequence

    Sequences = Sequence[TokenSequence]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The sequences of E examples as one table, and which sequences and outputs belong to each example."""

    table: SequenceTable
    n_sequences: np.ndarray  # (E,)
    first_sequence: np.ndarray  # (E + 1,)
    n_outputs: np.ndarray  # (E,)
    first_output: np.ndarray  # (E + 1,)
    counts: np.ndarray  # (outputs,) tokens that each sums over
    labels: np.ndarray  # (E,)
    right: np.ndarray  # (outputs,) bool: whether the option is right
    tokens: np.ndarray  # (E,) in its sequences; an engine may compute a common beginning once

    @classmethod
    def of(cls, sequences: Sequence[Sequences], examples: Sequence[Example]) -> Encoded:
        """From the sequences of each example."""
        table = SequenceTable.of([sequence for some in sequences for sequence in some])
        n_sequences = np.array([len(some) for some in sequences], np.int64)
        first_sequence, of_sequence = starts_of(n_sequences), starts_of(table.n_outputs)
        first_output = of_sequence[first_sequence]
        summed = table.outputs + np.repeat(of_sequence[:-1], table.n_targets)
        right = np.zeros(int(of_sequence[-1]), bool)
        for example, first, outputs in zip(examples, first_output, np.diff(first_output), strict=False):
            if outputs:
                right[[first + label for label in (example.label, *example.also) if label < outputs]] = True
        return cls(
            table,
            n_sequences,
            first_sequence,
            np.diff(first_output),
            first_output,
            np.bincount(summed, minlength=int(of_sequence[-1])),
            np.array([example.label for example in examples], np.int64),
            right,
            np.diff(table.first_token[first_sequence]),
        )

    def plan(self, probes: tuple[Probe, ...], probe_of: np.ndarray, examples: np.ndarray) -> Plan:
        """All sequences of `examples` (n,), each under its probe (n,), -1 for the bare model."""
        sequences = self.n_sequences[examples]
        chosen = ranges(self.first_sequence[examples], sequences)
        return Plan(self.table, probes, np.repeat(probe_of, sequences), chosen)

    def spread(self, values: np.ndarray, examples: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Outputs of `examples` (k,), end to end, repeated for each of `places` (n,) among them."""
        outputs = self.n_outputs[examples]
        return values[ranges(starts_of(outputs)[places], outputs[places])]

    def sums(self, values: np.ndarray, examples: np.ndarray, reference: np.ndarray | None = None) -> Sums:
        """The engine's answer to such a plan, as an objective takes it."""
        outputs = self.n_outputs[examples]
        at = ranges(self.first_output[examples], outputs)
        return Sums(values, self.counts[at], outputs, self.labels[examples], self.right[at], reference)


class EncodedSplit:
    """A split's examples, encoded.

    Args:
        examples: of the split, in order.
        sequences: of each.
    """

    def __init__(self, examples: Sequence[Example], sequences: Sequence[Sequences]) -> None:
        self._examples, self._sequences = examples, sequences
        self._whole = Encoded.of(sequences, examples) if isinstance(sequences, tuple) else None

    def take(self, examples: np.ndarray) -> tuple[Encoded, np.ndarray]:
        """A table that has `examples` (n,), and their numbers in it (n,)."""
        if self._whole is not None:
            return self._whole, examples
        numbers, places = np.unique(examples, return_inverse=True)
        sequences = [self._sequences[int(i)] for i in numbers]
        return Encoded.of(sequences, [self._examples[int(i)] for i in numbers]), places
