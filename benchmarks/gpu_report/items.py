"""Everything the report measures, by name; what comes first is what nine minutes buy."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import device, feedback_step, kernels, memory, noise
from benchmarks.gpu_report import speed
from benchmarks.gpu_report.checks import Place, all_checks
from benchmarks.shapes import config_of

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ("correctness", "signal", "speed", "kernels", "memory")
TOGETHER = ("correctness", "signal")  # parts in which no time is measured that matters
TINY = ("engine.slots=2", "engine.kv_cache_gib=0.25", "engine.max_tokens=1024")


def all_items(place: Place) -> dict[str, Callable[[], dict[str, Any]]]:
    """What can be measured in a place: "part:name" to a function that measures it."""
    items = {f"correctness:{name}": check for name, check in all_checks(place).items()}
    where = settings(place)
    items["speed:device"] = partial(device.rates, place.device, place.tiny)
    timed = {
        f"speed:{case.name}": partial(speed.measure, case, place.device, place.folder, where) for case in cases(place)
    }
    for name in list(timed)[:2]:
        items[name] = timed.pop(name)
    return items | feedback(place) | signals(place) | parts(place) | timed


def cases(place: Place) -> list[speed.Case]:
    """What is timed against the bare forward and the training loop."""
    if place.tiny:
        small: dict[str, Any] = {"batches": (2, 4), "rounds": 2}
        return [speed.Case("opt-tiny", **small), speed.Case("opt-tiny", pairs=4, space="lozo", loops=(), **small)]
    models = ("opt-1.3b", "opt-13b", "opt-2.7b", "opt-6.7b", "llama-3-8b", "qwen3-4b")
    one = [speed.Case(model) for model in models]
    four = [speed.Case(model, pairs=4, loops=()) for model in models]
    return [*one, *four, speed.Case("opt-13b", space="lozo"), speed.Case("opt-1.3b", space="lozo")]


def feedback(place: Place) -> dict[str, Callable[[], dict[str, Any]]]:
    """Steps of residual feedback against the bare forward of the same tokens."""
    items: dict[str, Callable[[], dict[str, Any]]] = {}
    for model in ("opt-tiny",) if place.tiny else ("opt-1.3b", "llama-3-8b"):
        dtype = "float32" if place.device == "cpu" else config_of(model)["torch_dtype"]
        options = {**feedback_step.DEFAULTS, "model": model, "dtype": dtype, "device": place.device, "memory": "false"}
        options |= {"rounds": "2", "batch": "4"} if place.tiny else {}
        items[f"speed:{model}-feedback"] = partial(told, feedback_step.measure, options, place.folder, settings(place))
    return items


def signals(place: Place) -> dict[str, Callable[[], dict[str, Any]]]:
    """Noise against signal, in every dtype; and with batch-invariant kernels where the wheel has them."""
    where = settings(place)
    items: dict[str, Callable[[], dict[str, Any]]] = {}
    for model in place.models[-1:] if place.tiny else place.models:
        for dtype in place.dtypes[-1:] if place.tiny else place.dtypes:
            options = {**noise.DEFAULTS, "model": model, "dtype": dtype}
            options |= {"probes": "2", "batch": "4"} if place.tiny else {}
            items[f"signal:{model}-{dtype}"] = partial(told, noise.measure, options, place.folder, where)
            if place.device == "cuda" and dtype != "float32" and has_invariant():
                invariant = {**options, "invariant": "1"}
                items[f"signal:{model}-{dtype}-invariant"] = partial(
                    told, noise.measure, invariant, place.folder, where
                )
    return items


def parts(place: Place) -> dict[str, Callable[[], dict[str, Any]]]:
    """Kernels one by one, and memory."""
    models = ("opt-tiny",) if place.tiny else ("opt-1.3b", "opt-13b", "llama-3-8b")
    items: dict[str, Callable[[], dict[str, Any]]] = {}
    for model in models:
        for slots in (2, 8):
            options = {**kernels.DEFAULTS, "model": model, "device": place.device, "slots": str(slots)}
            options |= {"tokens": "64", "rows": "8"} if place.tiny else {}
            items[f"kernels:{model}-{slots}-slots"] = partial(told, kernels.measure, options, place.folder)
    options = {**memory.DEFAULTS, "model": models[0]}
    options |= {"apart": "0", "batch": "2"} if place.tiny else {}
    items[f"memory:{models[0]}"] = partial(told, memory.measure, options, settings(place))
    return items


def settings(place: Place) -> tuple[str, ...]:
    """Of the experiments in a place, beside their own."""
    return TINY if place.tiny else ()


def told(measure: Callable[..., dict[str, Any]], options: dict[str, str], *more: Any) -> dict[str, Any]:
    """A measurement without what its name says already."""
    found = measure(options, *more)
    return {key: value for key, value in found.items() if key not in options and key != "benchmark"}


def has_invariant() -> bool:
    """Whether this wheel of vLLM has batch-invariant kernels."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import envs

    return "VLLM_BATCH_INVARIANT" in envs.environment_variables
