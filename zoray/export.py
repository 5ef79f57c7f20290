"""`python -m zoray.export run=DIR [step=K|best] [format=peft|merged] out=DIR`: any step of a run, for other programs.

`peft` writes an adapter folder that peft and vLLM load; `merged` a Hugging Face checkpoint in safetensors. A run that
folds into its base weights has no small adapter of its own: its folds are stacked while their rank fits a LoRA slot,
else the change is cut to `rank` by SVD, and the error is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray import disk, journal
from zoray.adapters import Stack, relative_error, truncate, write_merged, write_peft
from zoray.cli import run_main
from zoray.history import resolve_step
from zoray.models import linear_matrices, load_matrices, pinned_folder, quantisation, tied
from zoray.paths import user_path
from zoray.records import ConfigError, require
from zoray.spaces import from_record
from zoray.spaces.base import MAX_RANK
from zoray.spaces.fold import product

if TYPE_CHECKING:
    import torch

FORMATS = ("peft", "merged")
RANK = 64  # of an adapter that a change of weights is cut to


def main(config: Any) -> None:
    """Rebuild the state and write it; print what was written and how exact it is."""
    if config.run is None or config.out is None:
        raise ConfigError(
            "expected python -m zoray.export run=runs/NAME out=DIR (and step=K or step=best, format=peft or "
            "format=merged)"
        )
    require(config.format in FORMATS, f"format to be one of {', '.join(FORMATS)}", config.format)
    ok = isinstance(config.rank, int) and 1 <= config.rank <= MAX_RANK
    require(ok, f"rank to be a whole number from 1 to {MAX_RANK}", config.rank)
    folder, out = user_path(config.run), user_path(config.out)
    if out.exists():
        raise ConfigError(f"expected {out} not to exist yet; it does. Choose another folder with out=DIR")
    disk.check_place(out, "out")
    print(write(folder, out, config.step, config.format, config.rank))


def write(folder: Path, out: Path, step: object, kind: str, rank: int = RANK) -> str:
    """Write a step of the run in a folder as `kind`, one of FORMATS; says what was written, and how exact it is."""
    contents = journal.read(folder / journal.FILE_NAME)
    last = resolve_step(step, folder, len(contents.steps))
    made = _folded if from_record(contents.header["space"]).folds else _lora
    return f"step {last} of {len(contents.steps)}, {made(contents, last, kind, rank, out)}: {out}"


def _lora(contents: journal.Contents, step: int, kind: str, rank: int, out: Path) -> str:
    header, space = contents.header, from_record(contents.header["space"])
    state = journal.replay(contents, step)
    arrays, digest = state.arrays(), state.digest()
    if kind == "peft":
        write_peft(out, arrays, space.rank, space.alpha, header["model"], space.targets)
        return f"digest {digest}, exact adapter of rank {space.rank}"
    source = pinned_folder(header)
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
    weights = load_matrices(source, header["matrices"], "auto")
    write_merged(out, source, {name: _merge(weights[name], arrays, name, space.scaling) for name in weights})
    return f"digest {digest}, merged, {next(iter(weights.values())).dtype}"


def _merge(weight: torch.Tensor, arrays: dict[str, Any], name: str, scaling: float) -> torch.Tensor:
    """W + scaling * B @ A in float32, rounded once to the dtype of W."""
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)
    b, a = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("lora_B", "lora_A"))
    return (weight.to(wide) + product(b, a) * scaling).to(weight.dtype)


def _folded(contents: journal.Contents, step: int, kind: str, rank: int, out: Path) -> str:
    import torch

    header, space = contents.header, from_record(contents.header["space"])
    source = pinned_folder(header)
    original = load_matrices(source, header["matrices"], header["dtype"])
    weights = {name: weight.clone() for name, weight in original.items()}
    stack = Stack()
    state: Any = journal.replay(contents, step, weights=weights, on_fold=stack)
    digest = state.digest()
    rest = state.pending()
    if any(b.any() for b, _ in rest.values()):  # what is not folded yet belongs to the model as well
        stack(rest)
    wide = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    final = {name: weights[name].to(wide) + (product(*rest[name]) if rest else 0) for name in weights}
    if kind == "merged":
        write_merged(out, source, {name: value.to(weights[name].dtype) for name, value in final.items()})
        return f"digest {digest}, merged, {header['dtype']}"
    change = {name: final[name] - original[name].to(wide) for name in final}
    decayed = any(noted.commit.decay != 1 or noted.commit.anchor != 1 for noted in contents.steps[:step])
    if stack.rank and stack.fits and not decayed:
        arrays, how = stack.arrays(), f"stack of all folds, rank {stack.rank}"
        width = stack.rank
    else:
        arrays, how, width = truncate(change, rank), f"SVD of the change to rank {rank}", rank
    write_peft(out, arrays, width, width, header["model"], space.targets)
    return f"digest {digest}, {how}, relative error {relative_error(arrays, change):.2e}"


if __name__ == "__main__":
    run_main("export", main)
