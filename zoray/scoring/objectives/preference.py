"""Which of two answers is preferred: direct preference optimisation, scored instead of differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoray.records import ConfigError, Example, TokenSequence, is_finite, require
from zoray.scoring.objectives.base import Objective, Outcomes, Sums

if TYPE_CHECKING:
    from zoray.models.tokens import Encoder


@dataclass(frozen=True)
class Preference(Objective):
    """The DPO loss of (chosen, rejected) answers (Rafailov et al., arXiv 2305.18290, eq. 7).

    margin = beta * [(log p(chosen) - log p(rejected)) - (log p_ref(chosen) - log p_ref(rejected))]
    loss = -log sigmoid(margin);  correct = margin > 0

    Log-probabilities are sums over an answer's tokens, its end included. The reference is the same model without its
    adapter, scored in the same pass; so the space may not fold into the weights.

    Args:
        beta: how strongly the model is held to the reference.
        eos: whether a plain answer ends in the model's end of text; null: unless the answer ends in a line break.
    """

    reference: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("margin",)

    beta: float = 0.1
    eos: bool | None = None

    def __post_init__(self) -> None:
        require(is_finite(self.beta) and self.beta > 0, "objective.beta to be a positive number", self.beta)
        require(self.eos in (True, False, None), "objective.eos to be true, false or null", self.eos)

    def bind(self, task: Any, example: Example) -> Objective:
        """Itself, for tasks of pairs."""
        if len(example.options) != 2:
            raise ConfigError(
                f"expected examples with a chosen and a rejected answer for objective=preference; got "
                f"{len(example.options)} options. Take task=file with columns prompt, chosen and rejected"
            )
        return self

    def encode(self, example: Example, encoder: Encoder) -> tuple[TokenSequence, ...]:
        """A sequence for each answer, the right one first."""
        chosen, rejected = example.options[example.label], example.options[1 - example.label]
        return tuple(encoder.answer(example.prompt, text, self.eos) for text in (chosen, rejected))

    def slopes(self, batch: Sums) -> np.ndarray:
        """-beta sigmoid(-margin) for the chosen answer, + for the rejected one (eq. 7's gradient, section 4)."""
        doubt = self.beta / (1.0 + np.exp(np.clip(self._margins(batch), -500, 500)))
        return np.stack([-doubt, doubt], axis=1).flatten()

    def doubts(self, batch: Sums, slopes: np.ndarray) -> np.ndarray:
        """sigmoid(-margin)."""
        return np.abs(slopes[::2]) / self.beta

    def _margins(self, batch: Sums) -> np.ndarray:
        assert batch.reference is not None
        gain = batch.sums - batch.reference
        return self.beta * (gain[::2] - gain[1::2])

    def reduce(self, batch: Sums) -> Outcomes:
        """Losses, and whether each margin is positive."""
        margins = self._margins(batch)
        losses = np.logaddexp(0.0, -margins)
        return Outcomes(losses, (margins > 0).astype(np.float64), {"margin": margins})
