"""Exports a step of a run for other programs: a PEFT adapter folder, or a merged Hugging Face checkpoint.

`peft` writes an adapter folder that peft and vLLM load; `merged` a checkpoint in safetensors. A run that folds into its
base weights has no small adapter: its folds are stacked if their rank fits a LoRA slot, else the change is cut to
`rank` by SVD, and the error is printed. For a merged checkpoint the share of the change lost to rounding is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.methods.spaces import from_record
from zoray.methods.spaces.fold import product
from zoray.models.adapters import Stack, relative_error, truncate, write_merged, write_peft
from zoray.models.folder import linear_matrices, load_matrices, quantisation, tied
from zoray.records import ConfigError
from zoray.run import journal
from zoray.run.folder import base_of_run
from zoray.run.reports.history import resolve_step

if TYPE_CHECKING:
    import torch

FORMATS = ("peft", "merged")
RANK = 64  # of an adapter that a change of weights is cut to
SAID, WARNED = 1e-4, 0.05  # shares of a change lost to rounding from which it is printed, and warned about


def write(folder: Path, out: Path, step: object, kind: str, rank: int = RANK, dtype: str = "auto") -> str:
    """Write a step of the run in `folder` as `kind`, one of FORMATS; returns what was written and how exact it is.

    `dtype`: of a merged checkpoint; auto for the model's own.
    """
    contents = journal.read(folder / journal.FILE_NAME)
    last = resolve_step(step, folder, len(contents.steps))
    made = _folded if from_record(contents.header["space"]).folds else _lora
    how, rounding = made(folder, contents, last, kind, rank, dtype, out)
    return f"{rounding}step {last} of {len(contents.steps)}, {how}: {out}"


def _lora(
    folder: Path, contents: journal.Contents, step: int, kind: str, rank: int, dtype: str, out: Path
) -> tuple[str, str]:
    import torch

    header, space = contents.header, from_record(contents.header["space"])
    state = journal.replay(contents, step)
    arrays, digest = state.arrays(), state.digest()
    if kind == "peft":
        write_peft(out, arrays, space.rank, space.alpha, header["model"], space.targets)
        return f"digest {digest}, exact adapter of rank {space.rank}", ""
    source = base_of_run(folder, header)
    if quantisation(source):
        raise ConfigError(
            f"format=merged adds the adapter to the base weights, and those of {header['model']} are quantised; "
            "take format=peft"
        )
    inner = linear_matrices(source)
    vocabulary = [name for name in header["matrices"] if name not in inner]
    if vocabulary and tied(source):
        raise ConfigError(
            f"format=merged adds the adapter to the base weights, and {header['model']} has one weight for its "
            f"embedding and LM head: adapters on {', '.join(vocabulary)} can't be told apart in it. Take format=peft"
        )
    original, merged = load_matrices(source, header["matrices"], "auto"), Rounded(dtype)
    for name, weight in original.items():
        b, a = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("lora_B", "lora_A"))
        merged.add(name, weight, weight, product(b, a) * space.scaling)
    write_merged(out, source, merged.weights)
    return f"digest {digest}, merged, {merged.dtype}", merged.said()


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """A weight in the dtype used for additions: float32, or its own if that is wider."""
    import torch

    return weight.to(torch.promote_types(weight.dtype, torch.float32))


class Rounded:
    """Changed weights, each rounded once to a checkpoint's dtype, and the share of the change lost by rounding.

    Args:
        dtype: of the checkpoint; auto for the dtype of the original weights.
    """

    def __init__(self, dtype: str) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self._dtype, self._missed, self._total = dtype, 0.0, 0.0

    def add(self, name: str, before: torch.Tensor, now: torch.Tensor, more: torch.Tensor) -> None:
        """Add a weight (out, in): before the run, now, and what must still be added to it."""
        import torch

        after = now.double() + more.double()
        self.weights[name] = after.to(before.dtype if self._dtype == "auto" else getattr(torch, self._dtype))
        self._missed += float((self.weights[name].double() - after).square_().sum())
        self._total += float((after - before.double()).square_().sum())

    @property
    def lost(self) -> float:
        """||rounded - exact|| / ||exact - before|| over all matrices (Frobenius)."""
        return (self._missed / self._total) ** 0.5 if self._total else 0.0

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype."""
        return str(next(iter(self.weights.values())).dtype).removeprefix("torch.")

    def said(self) -> str:
        """A line to print if more is lost than in float32, with advice if it is much; else empty."""
        line = f"rounding to {self.dtype} lost {100 * self.lost:.2g} % of the change"
        if self.lost > WARNED:
            line = f"warning: {line}. dtype=float32 keeps it, and so does format=peft, an adapter for the base model"
        return f"{line}\n" if self.lost >= SAID else ""


def _folded(
    folder: Path, contents: journal.Contents, step: int, kind: str, rank: int, dtype: str, out: Path
) -> tuple[str, str]:
    import torch

    header, space = contents.header, from_record(contents.header["space"])
    source = base_of_run(folder, header)
    original = load_matrices(source, header["matrices"], header["dtype"])
    weights = {name: weight.clone() for name, weight in original.items()}
    stack = Stack()
    state: Any = journal.replay(contents, step, weights=weights, on_fold=stack)
    digest = state.digest()
    rest = state.pending()
    if any(b.any() for b, _ in rest.values()):  # updates not folded yet belong to the model as well
        stack(rest)
    pending = {name: product(*rest[name]) if rest else torch.zeros(()) for name in weights}
    if kind == "merged":
        merged = Rounded(dtype)
        for name, weight in weights.items():
            merged.add(name, original[name], weight, pending[name])
        write_merged(out, source, merged.weights)
        return f"digest {digest}, merged, {merged.dtype}", merged.said()
    change = {name: _wide(weights[name]) + pending[name] - _wide(original[name]) for name in weights}
    decayed = any(noted.commit.decay != 1 or noted.commit.anchor != 1 for noted in contents.steps[:step])
    if stack.rank and stack.fits and not decayed:
        arrays, how = stack.arrays(), f"stack of all folds, rank {stack.rank}"
        width = stack.rank
    else:
        arrays, how, width = truncate(change, rank), f"SVD of the change to rank {rank}", rank
    write_peft(out, arrays, width, width, header["model"], space.targets)
    return f"digest {digest}, {how}, relative error {relative_error(arrays, change):.2e}", ""
