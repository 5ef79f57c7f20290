"""Scoring through vLLM's own request path: a request per sequence, through scheduler, sampler and output processing.

It checks the packed path, and is not the default, because every sequence costs host work. Completions are written here
too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zoray.engines.packing import Plan
    from zoray.records import Sampling, TokenSequence


def score_slots(llm: Any, plan: Plan, members: np.ndarray, slots: np.ndarray, adapters: Sequence[Any]) -> np.ndarray:
    """Sums of log-probabilities of the outputs of `members` (k,) of a plan, each under the adapter of its slot (k,).

    Options of one token are one request that asks for their log-probabilities; other outputs are a request each, the
    whole text, whose prompt log-probabilities are summed over the answer.

    Args:
        llm: vllm.LLM.
        adapters: a LoRARequest for each slot.
    """
    prompts, parameters, loras, reads = [], [], [], []
    first = 0
    for member, slot in zip(members.tolist(), slots.tolist(), strict=True):
        sequence = plan.table[int(plan.chosen[member])]
        for prompt, parameter, read in _requests(sequence):
            prompts.append({"prompt_token_ids": prompt})
            parameters.append(parameter)
            loras.append(adapters[slot] if slot >= 0 else None)
            reads.append([(first + output, position, token) for output, position, token in read])
        first += sequence.n_outputs
    sums = np.zeros(first)
    answers = llm.generate(prompts, parameters, lora_request=loras, use_tqdm=False)
    for answer, read in zip(answers, reads, strict=True):
        for output, position, token in read:
            found = answer.outputs[0].logprobs[0] if position is None else answer.prompt_logprobs[position]
            sums[output] += found[token].logprob
    return sums


def write(
    llm: Any, prompts: Sequence[tuple[Sequence[int], int, Any]], sampling: Sampling, stops: frozenset[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index, tokens) for completions of (tokens, seed, LoRARequest or None), as they finish.

    All requests are queued together, so that vLLM's scheduler batches long and short ones continuously.
    """
    from vllm import SamplingParams

    engine, waiting = llm.llm_engine, set()
    for number, (tokens, seed, adapter) in enumerate(prompts):
        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed if sampling.temperature else None,
            stop_token_ids=sorted(stops),
            detokenize=False,
        )
        prompt = {"prompt_token_ids": list(tokens)}
        engine.add_request(name := f"zoray-{number}", prompt, parameters, lora_request=adapter)
        waiting.add(name)
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    waiting.discard(output.request_id)
                    yield int(output.request_id.rpartition("-")[2]), list(output.outputs[0].token_ids)
    finally:
        if waiting:  # the caller has stopped, or a step has failed
            engine.abort_request(sorted(waiting))


def _requests(sequence: TokenSequence) -> list[tuple[list[int], Any, list[tuple[int, int | None, int]]]]:
    """(prompt, sampling parameters, [(output, position or None for the sampled one, token)]) for a sequence."""
    from vllm import SamplingParams

    tokens, last = sequence.tokens.tolist(), len(sequence.tokens) - 1
    common = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    if (sequence.rows == last).all() and "logprob_token_ids" in SamplingParams.__struct_fields__:
        asked = sequence.targets.tolist()
        read: list[tuple[int, int | None, int]]
        read = [(int(output), None, token) for output, token in zip(sequence.outputs, asked, strict=True)]
        ids = sorted(set(asked))
        return [(tokens, SamplingParams(**common, logprobs=len(ids), logprob_token_ids=ids), read)]
    requests = []
    for output in range(sequence.n_outputs):
        own = sequence.outputs == output
        rows, targets = sequence.rows[own].tolist(), sequence.targets[own].tolist()
        text = [*tokens[: rows[-1] + 1], targets[-1]] if rows else []
        if [text[row + 1] for row in rows] != targets:
            raise ConfigError("engine.scoring=request can't score targets that are not the text's own continuation")
        read = [(output, row + 1, target) for row, target in zip(rows, targets, strict=True)]
        requests.append((text, SamplingParams(**common, prompt_logprobs=0), read))
    return requests
