"""Keeps tensors of a forward pass for residual feedback, at the requested rows only.

`KeptRows` is for layers that Python calls: they hand over their tensors, and it takes the requested rows. `StaticRows`
is for a model that torch compiles and a CUDA graph holds, in which no Python is called: every forward copies the rows
of a table into buffers, both allocated once, before the model is compiled. That is the only copy, and its size is
bounded (`most_rows`); every forward makes it, of row 0 if no rows are requested. Shapes: R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

ROW_BYTES = 1 << 26  # at least, for the kept rows of a forward
WHOLE_TOKENS = 1024  # in a step that is kept as a whole: steps with scored tokens are small
ROW_SHARE = 0.04  # of the bytes of the model's weights


class Kept(NamedTuple):
    """The tensors that feedback needs at some rows; the keys of matrices are chosen by their layers."""

    inputs: Mapping[Hashable, torch.Tensor]  # (R, in)
    outputs: Mapping[Hashable, torch.Tensor]  # (R, out) of matrices with a norm behind them
    stream: torch.Tensor  # (R, hidden) before the final norm, float32
    hidden: torch.Tensor  # (R, hidden) after the final norm


def joined(parts: Sequence[Kept]) -> Kept:
    """The rows of all parts."""
    inputs, outputs = (
        {layer: torch.cat([getattr(part, field)[layer] for part in parts]) for layer in getattr(parts[0], field)}
        for field in ("inputs", "outputs")
    )
    return Kept(
        inputs, outputs, *(torch.cat([getattr(part, field) for part in parts]) for field in ("stream", "hidden"))
    )


class KeptRows:
    """Each matrix's input, some matrices' output, and the stream before the final norm, at the requested rows.

    Args:
        layers: key of a matrix's layer -> whether to keep its output as well.
    """

    def __init__(self, layers: Mapping[Hashable, bool]) -> None:
        self.layers = dict(layers)
        self.at: torch.Tensor | None = None  # (R,) tokens of the forward; None keeps nothing
        self.whole = False  # or keep all tokens, if the rows are not known before; `of` selects them afterwards
        self.inputs: dict[Hashable, torch.Tensor] = {}  # (R, in)
        self.outputs: dict[Hashable, torch.Tensor] = {}  # (R, out)
        self.stream: torch.Tensor | None = None  # (R, hidden) float32

    def ask(self, at: torch.Tensor) -> None:
        """Request these tokens (R,) of the next forward."""
        self.at = at

    def fits(self, rows: int) -> bool:
        """Whether a compiled or captured forward can keep this many rows."""
        return True

    def keep(self, layer: Hashable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Called by every LoRA layer with its input and its final output."""
        if layer not in self.layers or not self._takes(x):
            return
        self.inputs[layer] = x.clone() if self.at is None else x.index_select(0, self.at)
        if self.layers[layer]:
            self.outputs[layer] = y.clone() if self.at is None else y.index_select(0, self.at)

    def keep_stream(self, x: torch.Tensor, rest: torch.Tensor | None = None) -> None:
        """Called before the final norm, with hidden states and the residual still to be added to them."""
        if self._takes(x):
            self.stream = taken(self.at, x, rest)

    def _takes(self, x: torch.Tensor) -> bool:
        return self.at is not None or (self.whole and len(x) <= WHOLE_TOKENS)

    def of(self, at: torch.Tensor, hidden: torch.Tensor) -> Kept:
        """These tokens (R,) of the last forward, which was kept as a `whole`; `hidden`: its hidden states."""
        assert self.stream is not None and len(self.stream) == len(hidden)
        inputs, outputs = (
            {layer: part.index_select(0, at) for layer, part in parts.items()} for parts in (self.inputs, self.outputs)
        )
        return Kept(inputs, outputs, self.stream.index_select(0, at), hidden.index_select(0, at))

    def clear(self) -> None:
        """Request nothing, and forget the kept rows."""
        self.at = self.stream = None
        self.inputs.clear()
        self.outputs.clear()


class StaticRows(KeptRows):
    """The same from buffers. If they are too small, Python takes the rows, from a forward that runs without graphs.

    Args:
        widths: name of a matrix -> (in, out), or (in, 0) if its output is not needed.
        hidden: H.
        most: rows in a buffer.
        dtype: the model's.
        device: the model's.
    """

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], hidden: int, most: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__({name: out > 0 for name, (_, out) in widths.items()})
        self.most = most
        self.table = torch.zeros(most, dtype=torch.long, device=device)
        options: Any = {"dtype": dtype, "device": device}
        self.input_buffers = {name: torch.zeros(most, into, **options) for name, (into, _) in widths.items()}
        self.output_buffers = {name: torch.zeros(most, out, **options) for name, (_, out) in widths.items() if out}
        self.stream_buffer = torch.zeros(most, hidden, dtype=torch.float32, device=device)

    def ask(self, at: torch.Tensor) -> None:
        """See KeptRows.ask. The next forward fills the buffers."""
        count = len(at)
        if not self.fits(count):
            super().ask(at)
            return
        self.table[:count].copy_(at)
        self.inputs = {name: buffer[:count] for name, buffer in self.input_buffers.items()}
        self.outputs = {name: buffer[:count] for name, buffer in self.output_buffers.items()}
        self.stream = self.stream_buffer[:count]

    def fits(self, rows: int) -> bool:
        """See KeptRows.fits."""
        return rows <= self.most

    def keep(self, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        """See KeptRows.keep; torch.compile sees only the copies."""
        if self.at is not None:
            super().keep(layer, x, y)
            return
        self.input_buffers[layer].copy_(x.index_select(0, self.table))
        if layer in self.output_buffers:
            self.output_buffers[layer].copy_(y.index_select(0, self.table))

    def keep_stream(self, x: torch.Tensor, rest: torch.Tensor | None = None) -> None:
        """See KeptRows.keep_stream; torch.compile sees only the copy."""
        if self.at is not None:
            super().keep_stream(x, rest)
            return
        self.stream_buffer.copy_(taken(self.table, x, rest))

    def clear(self) -> None:
        """Request row 0, which every forward has: later forwards may be too short for the rows requested before."""
        super().clear()
        self.table.zero_()


class Keeping:
    """Replaces a LoRA layer's wrapper: does the same, then keeps the rows."""

    def __init__(self, wrapper: Any, rows: KeptRows, name: str) -> None:
        self.wrapper, self.rows, self.name = wrapper, rows, name

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See DenseLayer and vLLM's wrappers."""
        result = self.wrapper.add_lora_linear(y, x, *args, **kwargs)
        self.rows.keep(self.name, x, y)
        return result


def keep_stream(norm: Any, rows: KeptRows) -> None:
    """Let a final norm hand over its input.

    Through its class, since compiled code does not call an instance's own `forward`, and finds a hook by a number that
    changes with the process. The residual is added before: vLLM's own kernel adds and normalises in place, and its
    passes over a compiled graph do not look for other readers of what it overwrites.
    """
    kind = type(norm)

    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        stream = x if residual is None else x + residual
        self.kept_rows.keep_stream(stream)
        normed = kind.forward(self, stream)
        return normed if residual is None else (normed, stream)

    norm.kept_rows = rows
    norm.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def taken(at: torch.Tensor | None, x: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
    """Rows (all for None) of hidden states plus the residual still to be added, as float32; never x itself."""
    some = x.to(torch.float32, copy=True) if at is None else x.index_select(0, at).float()
    if rest is None:
        return some
    return some + (rest if at is None else rest.index_select(0, at)).float()


def most_rows(model: Any, widths: Mapping[str, tuple[int, int]], hidden: int, dtype: torch.dtype) -> int:
    """The most rows to keep of a forward, from the bytes of a row, see StaticRows, and of the model's weights."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    row = sum(into + out for into, out in widths.values()) * dtype.itemsize + 4 * hidden
    return max(1, int(max(ROW_BYTES, ROW_SHARE * weights)) // row)
