"""What to score, and how it becomes a scalar: example -> token sequences -> log-probabilities -> (loss, correct).

An objective never calls the model. It encodes an example once, and later reduces the sums of log-probabilities that an
engine returns for its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.records import ConfigError, Example, TokenSequence

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ChoiceNLL:
    """Cross-entropy over an example's options, as MeZO trains classification (arXiv 2305.17333, appendix E).

    logit(option) = mean log-probability of the option's tokens after the prompt
    loss = -log softmax(logits)[label];  correct = argmax(logits) == label

    Options of one token all come from one pass over the prompt; others are a sequence each.

    Args:
        single_token: refuse options that are longer than one token, instead of scoring each in a sequence of its own.
    """

    single_token: bool = False

    def encode(self, example: Example, tokenizer: Any) -> tuple[TokenSequence, ...]:
        """The sequences to score for an example: one for single-token options, else one per option.

        Raises:
            ConfigError: an option adds no token, or more than one where `single_token` asks for one.
        """
        prompt = tokenizer(example.prompt)["input_ids"]
        full = [tokenizer(example.prompt + option)["input_ids"] for option in example.options]
        # A tokenizer may merge across the border (or end a text with a special token): keep what all have in common.
        shared = min(_common_prefix(prompt, tokens) for tokens in full)
        for option, tokens in zip(example.options, full, strict=True):
            if len(tokens) == shared:
                raise ConfigError(f"option {option!r} adds no token to the prompt {example.prompt[-40:]!r}")
            if self.single_token and len(tokens) != shared + 1:
                raise ConfigError(
                    f"expected label words of one token (objective.single_token); got {option!r}, which is "
                    f"{len(tokens) - shared} tokens: {tokenizer.convert_ids_to_tokens(tokens[shared:])}. Choose "
                    "another word in task.words, or set objective.single_token=false"
                )
        if shared == 0:
            raise ConfigError(f"expected a prompt of at least one token; got {example.prompt!r}")
        if all(len(tokens) == shared + 1 for tokens in full):
            n = len(full)
            rows = np.full(n, shared - 1, np.int32)
            targets = np.array([tokens[shared] for tokens in full], np.int32)
            return (
                TokenSequence(np.array(full[0][:shared], np.int32), rows, targets, np.arange(n, dtype=np.int32), n),
            )
        return tuple(
            TokenSequence(
                tokens=np.array(tokens[:-1], np.int32),  # the last token is only a target
                rows=np.arange(shared - 1, len(tokens) - 1, dtype=np.int32),
                targets=np.array(tokens[shared:], np.int32),
                outputs=np.zeros(len(tokens) - shared, np.int32),
                n_outputs=1,
            )
            for tokens in full
        )

    def reduce(
        self, sums: np.ndarray, counts: np.ndarray, options: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Summed log-probabilities of E examples with O options in all -> losses (E,) and correct (E,), float64.

        Args:
            sums: (O,), of each option, example after example.
            counts: (O,), how many tokens each sum is over.
            options: (E,), how many options each example has.
            labels: (E,), which of them is right.
        """
        logits, first = sums / counts, np.cumsum(options) - options
        top = np.maximum.reduceat(logits, first)
        of_example = np.repeat(top, options)
        losses = top + np.log(np.add.reduceat(np.exp(logits - of_example), first)) - logits[first + labels]
        position = np.where(logits == of_example, np.arange(len(logits)), len(logits))
        return losses, (np.minimum.reduceat(position, first) == first + labels).astype(np.float64)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
