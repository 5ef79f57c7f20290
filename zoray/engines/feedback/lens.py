"""Linear maps from the residual stream at a layer to its end, fitted to the base model's own streams.

For each matrix that writes to the stream: h_end ~ h (I + U V) + c, where h is the stream right after it and h_end that
before the final norm, by ridge regression over the tokens of a few training examples (the translators of the tuned
lens, Belrose et al., arXiv 2303.08112, fitted in closed form). For normally distributed h this is the mean Jacobian of
everything in between (Stein's lemma), so its transpose carries the gradient from the end down to the layer: no backward
pass, one small product a matrix. Shapes: n rows, H hidden, q rank of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zoray.engines.feedback.residual import SKIPPED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RIDGE = 1e-2  # of the mean variance of a stream's elements
SUMS_BYTES = 1 << 28  # of products summed at a time


class Map(NamedTuple):
    """I + U V."""

    u: torch.Tensor  # (H, q) float32
    v: torch.Tensor  # (q, H)

    def back(self, gradient: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient (n, H) at the map's input, from the gradient at its output.

        `positions` (n,) of the rows in their sequences: at the first few, whose streams are unlike all others and are
        left out of the fit, the gradient stays unchanged.
        """
        mapped = torch.addmm(gradient, gradient @ self.v.t(), self.u.t())
        return mapped if positions is None else torch.where(positions[:, None] < SKIPPED, gradient, mapped)


@dataclass
class Products:
    """Sums over rows of what a regression needs, for one stream."""

    count: int = 0
    x: Any = 0.0  # (H,)
    y: Any = 0.0  # (H,) of what the stream gains up to its end
    xx: Any = 0.0  # (H, H)
    xy: Any = 0.0  # (H, H)

    def add(self, x: torch.Tensor, end: torch.Tensor) -> None:
        """Add rows of the stream (n, H) and of its end (n, H)."""
        gain = end - x
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + gain.sum(0)
        self.xx, self.xy = self.xx + x.t() @ x, self.xy + x.t() @ gain

    def fit(self, rank: int) -> Map:
        """The regression's best map of this rank; needs at least one row."""
        n = self.count
        mean_x, mean_y = self.x / n, self.y / n
        cov = self.xx / n - torch.outer(mean_x, mean_x)
        cross = self.xy / n - torch.outer(mean_x, mean_y)
        cov.diagonal().add_(RIDGE * cov.diagonal().mean().clamp(min=1e-12))
        whole = torch.linalg.solve(cov, cross)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        return Map((u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous())


def at_once(hidden: int) -> int:
    """The number of streams to fit at a time: their products take most of a fit's memory."""
    return max(1, SUMS_BYTES // (3 * 4 * hidden * hidden))


class Streams:
    """Hooks that record the stream right after each of some matrices, and at its end, at some rows of a forward pass.

    Args:
        model: from transformers or vLLM.
        readers: matrix -> the norm that reads the stream right after it.
        end: the final norm.
    """

    def __init__(self, model: Any, readers: Mapping[str, str], end: str) -> None:
        self.rows: torch.Tensor | None = None
        self.found: dict[str, torch.Tensor] = {}
        names = {*readers.values(), end}
        self._hooks = [model.get_submodule(name).register_forward_pre_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Any:
        def keep(_: Any, inputs: tuple[Any, ...]) -> None:
            if self.rows is not None:  # hidden states, and with vLLM the residual still to be added to them
                parts = [part.flatten(0, -2)[self.rows].float() for part in inputs[:2] if part is not None]
                self.found[name] = parts[0] + parts[1] if len(parts) > 1 else parts[0]

        return keep

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def fit(
    readers: Mapping[str, str], end: str, passes: Sequence[Any], run: Any, model: Any, hidden: int, rank: int
) -> dict[str, Map]:
    """The map of every matrix in `readers`; no maps if all texts are too short to give rows.

    Args:
        readers: matrix -> the norm that reads the stream right after it.
        end: the final norm.
        passes: forward passes, for `run`.
        run: runs one pass with a `Streams`, whose rows it sets.
        model: the model with these streams.
        hidden: H.
        rank: of the maps.
    """
    maps: dict[str, Map] = {}
    inner = [name for name, reader in readers.items() if reader != end]
    step = at_once(hidden)
    for first in range(0, len(inner), step):
        some = {name: readers[name] for name in inner[first : first + step]}
        streams, products = Streams(model, some, end), {name: Products() for name in some}
        try:
            for one in passes:
                run(one, streams)
                for name, reader in some.items():
                    products[name].add(streams.found[reader], streams.found[end])
                streams.found.clear()
        finally:
            streams.close()
        maps |= {name: product.fit(rank) for name, product in products.items() if product.count}
    return maps
