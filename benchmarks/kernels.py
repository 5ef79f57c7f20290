"""What do the parts of a step cost, each alone? Adapters by dense products and by vLLM's kernels, slots, LM head.

    python -m benchmarks.kernels [model=opt-1.3b] [device=cpu] [dtype=auto] [tokens=850] [rows=32] [slots=2]

Microseconds of a whole step: of one layer of the shape, times the layers. `adapters` is what zoray uses (on CUDA dense
products, on a CPU products for each run of tokens), `adapters by vLLM` the wheel's own, `base` the products that they
go with. `slots` makes the directions of two probes and writes them; `apply` is a step's commit; `head` the LM head for
as many rows as a step asks for, with their log-probabilities.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.device import seconds_of
from benchmarks.options import parse
from benchmarks.shapes import config_of, make_model
from benchmarks.workload import experiment
from zoray.engines.packing import slots_of_tokens
from zoray.engines.slots import Site, Slots
from zoray.engines.vllm.engine import slot_rank
from zoray.records import Commit, Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULTS = {"model": "opt-1.3b", "device": "cpu", "dtype": "auto", "tokens": "850", "rows": "32", "slots": "2"}
DEFAULTS |= {"space": "lora", "batch": "16", "pairs": "1"}


def main(arguments: list[str]) -> None:
    """Time the parts and print one JSON object."""
    options = parse(arguments, DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


@torch.inference_mode()
def measure(options: dict[str, str], folder: Path) -> dict[str, Any]:
    """Microseconds of each part of a step, and a row for each product of a layer."""
    device, config = options["device"], config_of(options["model"])
    auto = "float32" if device == "cpu" else config["torch_dtype"]
    dtype = getattr(torch, auto if options["dtype"] == "auto" else options["dtype"])
    make_model(options["model"], folder / options["model"])
    e, workload = experiment({**options, "dtype": "auto"}, folder)
    rank, slots, tokens = slot_rank(e.space.rank), int(options["slots"]), int(options["tokens"])
    rows = []
    for name, (into, outs) in products(config).items():
        layer = Layer(into, outs, rank, slots, tokens, device, dtype)
        rows.append({"product": name, "in": into, "out": sum(outs)} | layer.times(e.space.rank))
    layers = config["num_hidden_layers"]
    result: dict[str, Any] = {"benchmark": "kernels", **options, "dtype": str(dtype).removeprefix("torch.")}
    for key in ("base", "adapters", "adapters by vLLM"):
        result[f"{key} us"] = layers * sum(row[f"{key} us"] for row in rows)
    result |= state_times(e.space, workload.matrices, slots, rank, device, dtype)
    head = torch.randn(config["vocab_size"], config["hidden_size"], device=device).to(dtype)
    hidden = torch.randn(int(options["rows"]), config["hidden_size"], device=device).to(dtype)
    result["head us"] = 1e6 * seconds_of(lambda: torch.log_softmax((hidden @ head.t()).float(), dim=-1), device)
    return {**result, "rows": rows}


def products(config: Mapping[str, Any]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The products of a decoder layer as vLLM fuses them: (in, the outs of its matrices)."""
    hidden = config["hidden_size"]
    if "ffn_dim" in config:
        inner = config["ffn_dim"]
        up, heads, kv = (inner,), hidden, hidden
    else:
        inner, size = config["intermediate_size"], config["head_dim"]
        up, heads, kv = (inner, inner), size * config["num_attention_heads"], size * config["num_key_value_heads"]
    return {"qkv": (hidden, (heads, kv, kv)), "o": (heads, (hidden,)), "up": (hidden, up), "down": (inner, (hidden,))}


class Layer:
    """A linear layer with slots, its tokens shared out evenly among them."""

    def __init__(
        self, into: int, outs: tuple[int, ...], rank: int, slots: int, tokens: int, device: str, dtype: torch.dtype
    ) -> None:
        random = {"device": device, "dtype": torch.float32}
        self.outs, self.device, self.slots, self.dtype = outs, device, slots, dtype
        self.x = torch.randn(tokens, into, **random).to(dtype)
        self.weight = (torch.randn(sum(outs), into, **random) * into**-0.5).to(dtype)
        self.y = torch.zeros(tokens, sum(outs), device=device, dtype=dtype)
        self.module: Any = SimpleNamespace(
            lora_a_stacked=tuple(torch.randn(slots, 1, rank, into, **random).to(dtype) for _ in outs),
            lora_b_stacked=tuple(torch.zeros(slots, 1, out, rank, device=device, dtype=dtype) for out in outs),
        )
        edges = np.linspace(0, tokens, slots + 1).astype(int).tolist()
        self.segments = tuple((slot, edges[slot], edges[slot + 1]) for slot in range(slots))

    def times(self, rank: int) -> dict[str, float]:
        """Microseconds of the base product, of zoray's adapters and of vLLM's."""
        named = {
            "base": lambda: torch.nn.functional.linear(self.x, self.weight),
            "adapters by vLLM": self.adding(self.vllm()),  # before zoray's own, which lay the tensors out anew
            "adapters": self.adding(self.dense() if self.device == "cuda" else self.by_runs(rank)),
        }
        return {f"{name} us": 1e6 * seconds_of(function, self.device) for name, function in named.items()}

    def adding(self, adapters: Any) -> Callable[[], None]:
        """A function that adds what adapters make of the slots as they are laid out now."""
        stacked = self.module.lora_a_stacked, self.module.lora_b_stacked
        return lambda: adapters.add_lora_linear(self.y, self.x, *stacked, 1.0, self.outs)

    def dense(self) -> Any:
        """The dense products of CUDA; they need no card."""
        from zoray.engines.layers.lora_cuda import DenseLayer, Mask
        from zoray.engines.layers.vllm_layers import join_a, join_b

        mask = Mask(len(self.x), self.slots, self.dtype, torch.device(self.device))
        mask.set(slots_of_tokens(self.segments, len(self.x)))
        return DenseLayer(mask.values, join_a(self.module), join_b(self.module))

    def by_runs(self, rank: int) -> Any:
        """The products of the CPU path."""
        from zoray.engines.layers import lora_cpu as cpu_lora

        wrapper = cpu_lora.SegmentedLora(len(self.x), 256, torch.device("cpu"))
        cpu_lora.join([self.module])
        wrapper.used_rank, wrapper.embeds, wrapper.one_a = rank, False, False
        wrapper.map_tokens(self.segments, 0)
        return wrapper

    def vllm(self) -> Any:
        """The wheel's own wrapper, which is told the slot of each token as zoray tells it."""
        of_token = slots_of_tokens(self.segments, len(self.x))
        if self.device == "cuda":
            from vllm.config.lora import LoRAConfig

            from zoray.engines.layers.lora_cuda import CudaLora

            rank = self.module.lora_b_stacked[0].shape[3]
            config = LoRAConfig(max_lora_rank=rank, max_loras=self.slots, lora_dtype=self.dtype)
            wrapper = CudaLora(len(self.x), 256, torch.device("cuda"), lora_config=config)
            wrapper.map_linear(of_token)
            return wrapper
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        plain = PunicaWrapperCPU(len(self.x), len(self.x), torch.device("cpu"))
        mapping = LoRAMapping(tuple((of_token + 1).tolist()), tuple(range(1, self.slots + 1)), is_prefill=True)
        plain.update_metadata(mapping, list(range(1, self.slots + 1)), self.slots + 1, 100)
        return plain


def state_times(space: Any, matrices: Any, slots: int, rank: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds of the directions with the slots that they go into, and of a step's commit."""
    chosen = space.select(matrices)
    sites = {
        name: Site(
            torch.zeros(slots, 1, rank, into, device=device, dtype=dtype),
            torch.zeros(slots, 1, out, rank, device=device, dtype=dtype),
            range(out),
            range(into),
        )
        for name, (out, into) in chosen.items()
    }
    weights = None
    if space.folds:
        weights = {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in chosen.items()}
    state, contents = space.open(matrices, 0, torch.device(device), weights), Slots(space, sites)
    step = iter(range(1 << 30))
    probes = [Probe(0, 0, 1e-3 if slot % 2 else -1e-3) for slot in range(slots)]
    found = {"slots us": 1e6 * seconds_of(lambda: contents.write(state, probes), device)}

    def apply() -> None:
        state.apply(Commit(next(step), (1e-6,)))
        state.moving()  # until then a commit may wait

    found["apply us"] = 1e6 * seconds_of(apply, device)
    return {"drawn a probe": space.drawn(matrices), **found}


if __name__ == "__main__":
    main(sys.argv[1:])
