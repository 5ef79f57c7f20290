"""Checks on the loaded model, before the first step, what zoray relies on in a vLLM build.

Guarantees: a slot whose B is zero changes no bit of any LoRA layer's output; every layer computes W x + s B A x with
the adapter of each token's slot; and, for a folding space, a layer uses base weights that are written in place. With
feedback: a forward keeps its layers' real inputs, and the last matrix's feedback is the gradient of the scores.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import numpy as np
import torch

from zoray.engines.feedback.kept import taken
from zoray.engines.layers.vllm_layers import gives_logits, names_in, slots_of, takes_tokens
from zoray.engines.packing import Plan, SequenceTable
from zoray.records import ConfigError, Probe, TokenSequence

TOKENS = 3  # of each slot
LOUD = 16.0  # scale of the test's probes in 16 bits, large compared with the rounding of bare outputs
LEAST_RISE = 200  # times the rounding of scores, for their slope to mean anything
GRAPH_TOKENS = 37  # of each of two sequences, so that no graph has their size
log = logging.getLogger(__name__)
Scorer = Any  # the PackedScorer of worker.py, which imports this file


@torch.inference_mode()
def prove_live(scorer: Scorer) -> dict[str, float]:
    """Check every LoRA layer against plain matrix products, with another known adapter in every slot.

    Returns:
        The largest relative error of an adapter and, if the space folds, of a fold.

    Raises:
        ConfigError: a check fails in this vLLM.
    """
    modules, slots = scorer.manager.modules, scorer.slots
    dtype = scorer.vllm_config.model_config.dtype
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    segments = tuple((slot, TOKENS * slot, TOKENS * (slot + 1)) for slot in range(slots))
    _map(scorer, ((-1, 0, TOKENS * slots),))
    inputs = {name: _input(scorer, module) for name, module in modules.items()}
    bare = {name: _output(scorer, name, inputs[name]) for name in modules}

    scorer.write_all([Probe(0, slot, 0.0) for slot in range(slots)])  # B is zero at journal index 0
    _map(scorer, segments)
    zero = {name: _output(scorer, name, inputs[name]) for name in modules}
    changed = [name for name in modules if not torch.equal(zero[name], bare[name])]
    if changed:
        raise ConfigError(f"adapter self-test failed: a zero adapter changes the output of {changed[0]}")

    probes = [Probe(0, slot, 1.0 if dtype == torch.float32 else LOUD) for slot in range(slots)]
    scorer.write_all(probes)
    adapters = [{name: (a, b) for name, a, b in scorer.state.factors(probe)} for probe in probes]
    errors = {}
    for name, module in modules.items():
        found = _output(scorer, name, inputs[name]).float() - bare[name].float()
        x = _as_rows(inputs[name], module)
        for slot, start, stop in segments:
            expected = _expected(scorer, name, adapters[slot], x[start:stop])
            errors[name, slot] = _relative_error(found[start:stop], expected, bare[name][start:stop])
    where = max(errors, key=errors.__getitem__)
    if errors[where] > tolerance:
        raise ConfigError(
            f"adapter self-test failed: the output of {where[0]} differs from W x + s B A x by {errors[where]:.2e} "
            f"relative, at most {tolerance:g} expected; this vLLM build does not apply adapters as zoray writes them"
        )
    return {"adapter_error": errors[where], **(_prove_foldable(scorer, bare, tolerance) if scorer.weights else {})}


@torch.inference_mode()
def prove_compiled(scorer: Scorer) -> dict[str, float]:
    """Compare a padded forward through compiled code and a CUDA graph with one through neither.

    Empty if there is neither. If they differ, the engine goes on without them, with a warning, and slower.
    """
    config, graphs = scorer.vllm_config.model_config, scorer.graphs
    length = min(GRAPH_TOKENS, config.max_model_len - 1, scorer.max_tokens // 2 - 1)  # no graph has twice this size
    if config.enforce_eager and graphs.choose(2 * length)[1].num_tokens == 2 * length:
        return {}
    rows, one = np.array([length // 2, length - 1], np.int32), np.ones(2, np.int32)
    sequences = [TokenSequence(np.arange(k, k + length, dtype=np.int32), rows, one, one * 0, 1) for k in range(2)]
    work = (SequenceTable.of(sequences), np.arange(2), np.array([0, scorer.slots - 1]))  # prove_live left adapters
    found, graphs.plain = scorer.score_slots(*work), True
    expected, graphs.plain = scorer.score_slots(*work), False
    error = float(np.abs(found / expected - 1).max())
    if not error <= (1e-3 if config.dtype == torch.float32 else 0.05):
        log.warning("the compiled model and CUDA graphs stay unused: scores differ by %.2e relative without", error)
        graphs.plain = True
        return {}
    return {"compiled_error": error}


@torch.inference_mode()
def prove_feedback(scorer: Scorer) -> dict[str, float]:
    """Check residual feedback at journal index 0, through compiled code and a CUDA graph if there are any.

    First, kept tensors are compared with those that hooks see in a forward through neither. Then, if a matrix is the
    last to write to the stream, so that its feedback is exact, with a central difference of the scores along it.

    Returns:
        The largest relative error of kept tensors, and the error of the slope along the feedback.

    Raises:
        ConfigError: one of them is too large.
    """
    config, feedback = scorer.vllm_config.model_config, scorer.feedback
    exact = config.dtype == torch.float32
    plan = _plan_of_some(scorer)
    slopes, kept = np.sin(1.0 + np.arange(int(plan.first_output[-1]))), dict[str, torch.Tensor]()

    def gradient(_: np.ndarray) -> np.ndarray:  # called when the rows are there
        rows = feedback.rows
        kept.update({f"the input of {name}": rows.inputs[name].clone() for name in scorer.matrices})
        kept.update({f"the output of {name}": rows.outputs[name].clone() for name in feedback.behind})
        kept["the stream"] = rows.stream.clone()
        return slopes

    scores, found = feedback(plan, gradient)
    expected = _seen_by_hooks(scorer, plan)
    errors = {what: _distance(kept[what], seen) for what, seen in expected.items()}
    where = max(errors, key=errors.__getitem__)
    tolerance = 1e-3 if exact else 0.1
    advice = "this vLLM build does not let zoray keep what feedback needs. Take engine.eager=true, or estimator=rloo"
    if not errors[where] <= tolerance:
        raise ConfigError(
            f"feedback self-test failed: what is kept of {where} differs from a forward without compiled code and "
            f"graphs by {errors[where]:.2e} relative, at most {tolerance:g} expected; {advice}"
        )
    last = next((name for name, reader in feedback.readers.items() if reader == feedback.family.norm), None)
    if last is None:
        return {"kept_error": errors[where]}
    along = torch.from_numpy(found[f"{last}.lora_B"]).to(scorer.device)
    base = expected[f"the output of {last}" if last in feedback.behind else "the stream"]
    rounding = torch.finfo(torch.float32).eps * float(np.abs(slopes) @ np.abs(scores))
    slope = _slope(scorer, plan, slopes, last, along, expected[f"the input of {last}"], base, exact, rounding)
    if slope is None:
        return {"kept_error": errors[where]}
    error = abs(slope / float(along.square().sum()) - 1)
    tolerance = 0.05 if exact else 0.3
    if not error <= tolerance:
        raise ConfigError(
            f"feedback self-test failed: along the feedback of {last} the scores do not rise as predicted "
            f"({error:.2e} relative, at most {tolerance:g}); {advice}"
        )
    return {"kept_error": errors[where], "feedback_error": error}


def _plan_of_some(scorer: Scorer) -> Plan:
    """Two sequences under the state's centre, with four targets each and a length that no graph has."""
    config = scorer.vllm_config.model_config
    length = min(GRAPH_TOKENS, config.max_model_len - 1, scorer.max_tokens // 2 - 1)
    rows, vocabulary = np.linspace(length // 4, length - 1, 4).astype(np.int32), config.get_vocab_size()
    return Plan.of(
        [
            (
                Probe(scorer.state.step, 0, 0.0),
                TokenSequence(
                    np.arange(k, k + length, dtype=np.int32) % vocabulary,
                    rows,
                    ((4 * k + np.arange(4)) * 7919 % vocabulary).astype(np.int32),
                    np.arange(4, dtype=np.int32),
                    4,
                ),
            )
            for k in range(2)
        ]
    )


def _seen_by_hooks(scorer: Scorer, plan: Plan) -> dict[str, torch.Tensor]:
    """Inputs of matrices and the final norm in a plain forward, at a plan's rows, and outputs of some matrices."""
    feedback, found, hooks = scorer.feedback, dict[str, torch.Tensor](), []
    packed = feedback.packed(plan)
    at = torch.from_numpy(packed.rows).to(scorer.device)

    def keep(_: Any, inputs: Any, output: Any, name: str) -> None:
        found[f"the input of {name}"] = inputs[0].index_select(0, at)
        if name in feedback.behind:
            found[f"the output of {name}"] = (output[0] if isinstance(output, tuple) else output).index_select(0, at)

    for module_name, module in scorer.manager.modules.items():
        for name in scorer.matrices.keys() & set(names_in(scorer.manager, module_name)):
            hooks.append(module.register_forward_hook(partial(keep, name=name)))
    norm = scorer.runner.model.get_submodule(feedback.family.norm)

    def keep_stream(_: Any, inputs: Any) -> None:
        found["the stream"] = taken(at, inputs[0], inputs[1] if len(inputs) > 1 else None)

    hooks.append(norm.register_forward_pre_hook(keep_stream))
    try:
        with scorer.graphs.plainly():
            scorer._forward(packed)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _slope(
    scorer: Scorer,
    plan: Plan,
    slopes: np.ndarray,
    name: str,
    along: torch.Tensor,
    x: torch.Tensor,
    base: torch.Tensor,
    exact: bool,
    rounding: float,
) -> float | None:
    """d sum(slopes * scores) / d t for B + t * along of a matrix, as a central difference.

    None if the rise is lost in rounding: scores hardly depend on random weights (load_format=dummy).

    Args:
        scorer: gives the scores.
        plan: of one probe.
        slopes: of the scores.
        name: of the matrix.
        along: (out, rank).
        x: (R, in), inputs of the matrix at the plan's rows.
        base: (R, out), the sum that its outputs are added to.
        exact: whether numbers have 32 bits; with 16 the step is larger, so that rounding is relatively small.
        rounding: of the sum of scores in float32.
    """
    state = scorer.state.arrays()
    a, b = (torch.from_numpy(state[f"{name}.lora_{part}"]).to(scorer.device) for part in "AB")
    moved = scorer.space.scaling * (x.float() @ a.t()) @ along.t()
    reach = float((moved.norm(dim=1) / base.float().norm(dim=1).clamp(min=1e-12)).max())
    most, far = (0.05, 0.01) if exact else (3.0, 0.1)  # limits of the scores' rise, and of the change of the base
    size = min(most / max(float(along.square().sum()), 1e-30), far / max(reach, 1e-30))
    if size * float(along.square().sum()) < LEAST_RISE * rounding:
        return None
    sums = []
    for t in (size, -size):
        scorer.contents.put(0, {**state, f"{name}.lora_B": (b + t * along).cpu().numpy()})
        scores = scorer.score_slots(plan.table, plan.chosen, np.zeros(len(plan.chosen), np.int64))
        sums.append(float(slopes @ scores))
    return (sums[0] - sums[1]) / (2 * size)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative distance of two tensors; infinite if an element is not a number."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))
    return math.inf if math.isnan(error) else error


def _prove_foldable(scorer: Scorer, bare: dict[str, torch.Tensor], tolerance: float) -> dict[str, float]:
    """Check that writing a base weight changes what its layer computes, by x dW^T, and put the weight back.

    A backend that packs weights at load time keeps a copy that such a write would miss.
    """
    errors = {}
    _map(scorer, ((-1, 0, TOKENS * scorer.slots),))
    for module_name, module in scorer.manager.modules.items():
        names = names_in(scorer.manager, module_name)
        kept = {name: scorer.weights[name].clone() for name in names if name in scorer.weights}
        if not kept:
            continue
        given, expected = _input(scorer, module), []
        x = _as_rows(given, module)
        for name, (_, b_slots) in zip(names, slots_of(module), strict=True):
            if name in kept:
                weight = scorer.weights[name]
                ramp = torch.cos(torch.arange(weight.numel(), device=scorer.device)).view(weight.shape)
                weight.add_((ramp * kept[name].float().abs().mean()).to(weight.dtype))
                expected.append(x @ (weight.float() - kept[name].float()).t())
            else:
                expected.append(torch.zeros(len(x), b_slots.shape[2], device=scorer.device))
        found = _output(scorer, module_name, given).float() - bare[module_name].float()
        for name, weight in kept.items():
            scorer.weights[name].copy_(weight)
        errors[module_name] = _relative_error(found, torch.cat(expected, dim=1), bare[module_name])
    where = max(errors, key=errors.__getitem__)
    if errors[where] > tolerance:
        raise ConfigError(
            f"folding self-test failed: writing the base weight of {where} does not change its output as "
            f"expected ({errors[where]:.2e} relative, at most {tolerance:g}); take space=lora on this backend"
        )
    return {"fold_error": errors[where]}


def _relative_error(found: torch.Tensor, expected: torch.Tensor, bare: torch.Tensor) -> float:
    """The largest difference over the largest expected value; infinite if an element is not a number.

    `found` is the difference of two outputs in the model's dtype, so a rounding unit of the bare output on either side
    does not count: some layers have outputs hundreds of times as large as an adapter's.
    """
    grain = 2 * torch.finfo(bare.dtype).eps * bare.float().abs()
    error = float(((found - expected).abs() - grain).clamp(min=0).max() / expected.abs().max().clamp(min=1e-6))
    return math.inf if math.isnan(error) else error


def _map(scorer: Scorer, segments: tuple[tuple[int, int, int], ...]) -> None:
    """Map tokens to slots; if the head has an adapter, every token of the test is also one of its rows."""
    rows = [slot for slot, start, stop in segments for _ in range(start, stop)] if scorer.head_moves else ()
    scorer.map_slots(segments, rows)


def _input(scorer: Scorer, module: Any) -> torch.Tensor:
    """Three rows for each slot: token ids for an embedding, else (3 * slots, in) numbers without a pattern."""
    width, rows = slots_of(module)[0][0].shape[3], TOKENS * scorer.slots
    if takes_tokens(module):
        return torch.arange(rows, device=scorer.device) * 7919 % width
    ramp = torch.arange(rows * width, device=scorer.device, dtype=torch.float32)
    return torch.sin(ramp).view(rows, width).to(scorer.vllm_config.model_config.dtype)


def _as_rows(x: torch.Tensor, module: Any) -> torch.Tensor:
    """(rows, in) float32; token ids as one-hot rows."""
    if takes_tokens(module):
        return torch.nn.functional.one_hot(x, slots_of(module)[0][0].shape[3]).float()
    return x.float()


def _output(scorer: Scorer, module_name: str, x: torch.Tensor) -> torch.Tensor:
    module = scorer.manager.modules[module_name]
    if gives_logits(module):  # the head's own weight stays in the model, under the name of its adapter
        return module._get_logits(x, scorer.runner.model.get_submodule(module_name))
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def _expected(scorer: Scorer, module_name: str, adapter: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """(alpha / rank) x A^T B^T of a fused module's matrices side by side; zero for untrained matrices."""
    module, parts = scorer.manager.modules[module_name], []
    for child, (_, b_slots) in zip(names_in(scorer.manager, module_name), slots_of(module), strict=True):
        if child in adapter:
            (a, b), rows = adapter[child], scorer.contents.sites[child].rows
            whole = x.repeat(1, a.shape[1] // x.shape[1])  # every rank has the same inputs; their outputs add up
            parts.append(scorer.space.scaling * (whole @ a.t()) @ b[rows.start : rows.stop].t())
        else:
            parts.append(torch.zeros(len(x), b_slots.shape[2], device=scorer.device))
    return torch.cat(parts, dim=1)
