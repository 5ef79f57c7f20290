"""How near is residual feedback to the true gradient, matrix by matrix? Against autograd through the whole model.

    python -m benchmarks.cosines                                     SmolLM2-135M, movie reviews
    python -m benchmarks.cosines what=choice,text file=lines.txt     next-token loss on a file's lines as well
    python -m benchmarks.cosines model=gemma3-270m batches=1
    python -m benchmarks.cosines model=hf model.path=FOLDER task=sst2

The adapters have rank 8 on all matrices that write to the stream, and a state in which B is not zero: one step of
random signs. Of each batch, the cosine of the feedback of B with its gradient: with the stream as it is (`identity`),
and with maps of some ranks, fitted to the base model as a run does (guidance.py); the mean over the batches. The
examples are of dev, to which no map is fitted. `share` is a layer's share of the squared gradient. `upper half` and
`all` are of these matrices' gradients as one vector; `descent by signs` is how far a step along the signs of the
feedback goes down, beside one along the signs of the gradient. Other keys than those of DEFAULTS are settings of conf/.
`out` keeps one JSON file for each model and task, and the picture has all that are there.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.baselines import lines_of, order_of
from benchmarks.options import parse
from zoray.engines.feedback.lens import Map
from zoray.methods.spaces.base import layer_number
from zoray.models.folder import linear_matrices, load_tokenizer, max_length
from zoray.models.tokens import Encoder
from zoray.records import Commit, ConfigError, Example, Probe, Splits
from zoray.records.paths import user_path
from zoray.run.config import build_experiment, compose, guarded
from zoray.run.reports.plots import DEV, DPI, GRID, INK, TRAIN
from zoray.scoring.guidance import Gradient, Guidance
from zoray.scoring.objectives import AnswerNLL
from zoray.scoring.scorer import Scorer
from zoray.scoring.workload import Workload, load_workload
from zoray.tasks.batches import labels_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    Record = dict[str, Any]
    Gradients = dict[str, np.ndarray]  # of B, by matrix

DEFAULTS = {"what": "choice", "file": "", "ranks": "16,64,full", "batch": "16", "batches": "4", "gain": "0.01"}
DEFAULTS |= {"out": "runs/cosines", "picture": "", "seed": "0"}
TASKS = {"choice": "options of a task", "text": "next tokens of a text"}
HELD_OUT = 300  # lines of a file that no map is fitted to
ADAPTERS = ("engine=hf", "space.rank=8", "space.alpha=16", "space.targets=residual", "space.train=AB")
SHOWN = "64"  # the maps of the picture, where there are such


def main(arguments: list[str]) -> None:
    """Measure what is asked for, print the tables, draw the picture, then print one JSON object."""
    own = [argument for argument in arguments if argument.partition("=")[0] in DEFAULTS]
    options, where = parse(own, DEFAULTS), [argument for argument in arguments if argument not in own]
    out = user_path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for task in options["what"].split(","):
        results.append(measure(options, task, where))
        partial = out / f"{results[-1]['model']}-{task}.partial"
        partial.write_text(json.dumps(results[-1]) + "\n", encoding="utf-8")
        os.replace(partial, partial.with_suffix(".json"))
        print(f"{results[-1]['model']}, {task}\n\n{table(results[-1])}\n", flush=True)
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    draw(sorted(kept, key=lambda one: one["model"], reverse=True), user_path(options["picture"] or out / "cosines.png"))
    print(json.dumps({"benchmark": "cosines", **options, "results": results}))


def measure(options: dict[str, str], task: str, where: Sequence[str] = ()) -> Record:
    """The cosines of a model on one kind of task. `where`: settings of conf/."""
    if task not in TASKS:
        raise ConfigError(f"expected what of {', '.join(TASKS)}; got {task!r}")
    e, workload = experiment(options, task, where)
    engine = e.engine.start(workload.folder, e.spec.model.dtype, workload.matrices, e.space, e.run.seed)
    engine.model.requires_grad_(False)
    rng = np.random.default_rng(int(options["seed"]))
    signs = np.packbits(rng.integers(0, 2, engine.state.numel).astype(np.uint8)).tobytes()
    gains = (float(np.float32(options["gain"])),) * len(engine.state.matrices)
    engine.apply([Commit(0, (), gains=gains, signs=signs)])
    maps = fitted(Guidance(Scorer(e.spec, workload, engine), engine, 2), engine, options["ranks"].split(","))

    order = order_of(int(options["seed"]), labels_of(workload.splits.dev), int(options["batch"]))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    squares: dict[str, float] = defaultdict(float)
    for number in range(int(options["batches"])):
        estimates, truth = of_batch(e, workload, engine, maps, order.step(number))
        for name, true in truth.items():
            squares[name] += float(np.square(true, dtype=np.float64).sum())
        for setting, estimate in estimates.items():
            for name, matrices in groups(truth).items():
                guess, true = joined(estimate, matrices), joined(truth, matrices)
                found[name][setting].append(cosine(guess, true))
                if len(matrices) > 1:
                    found[f"{name}, descent by signs"][setting].append(descent(guess, true))
    total = sum(squares.values())
    rows = []
    for name, by_setting in found.items():
        share = squares[name] / total if name in squares else None
        means = {setting: float(np.mean(values)) for setting, values in by_setting.items()}
        rows.append({"matrix": name, "layer": layer_number(name), "share": share, **means})
    settings, examples = list(maps), int(options["batch"]) * int(options["batches"])
    common = {"model": name_of(where), "task": task, "examples": examples, "batches": int(options["batches"])}
    return {"benchmark": "cosines", **common, "settings": settings, "rows": rows}


def experiment(options: dict[str, str], task: str, where: Sequence[str]) -> tuple[Any, Workload]:
    """The experiment, and its workload: a task's, or lines whose every token but the first is asked for."""
    own = [*ADAPTERS, f"run.seed={options['seed']}", *(["objective=answer_nll"] if task == "text" else [])]
    e = build_experiment(compose("config", [*own, *where]))
    if task == "choice":
        return e, load_workload(e.spec)
    if not user_path(options["file"]).is_file():
        raise ConfigError(f"what=text needs a text file; got file={options['file']!r}. Set file=PATH")
    folder = e.model.resolve()
    encoder = Encoder(load_tokenizer(folder), max_length(folder), cut=True)
    held, train = lines_of(user_path(options["file"]), encoder, False, HELD_OUT)
    encoded = {
        name: tuple((encoder.sequence(tokens, range(1, len(tokens))),) for tokens in lines)
        for name, lines in (("train", train), ("dev", held), ("test", ()))
    }
    splits = Splits(*(tuple(Example("", answers=("",)) for _ in encoded[name]) for name in ("train", "dev")))
    return e, Workload(folder, linear_matrices(folder, e.space.targets), splits, encoded)


def fitted(guidance: Guidance, engine: Any, ranks: Sequence[str]) -> dict[str, dict[str, Map]]:
    """The maps of each setting; fitted once, of full rank, since the best one of a rank is its first columns."""
    settings: dict[str, dict[str, Map]] = {"identity": {}}
    if ranks != [""]:
        guidance.fit_lens(1 << 30)
        whole = engine._maps
        for rank in ranks:
            q = None if rank == "full" else int(rank)
            settings[rank] = {name: Map(one.u[:, :q], one.v[:q]) for name, one in whole.items()}
    return settings


def of_batch(
    e: Any, workload: Workload, engine: Any, maps: dict[str, dict[str, Map]], examples: np.ndarray
) -> tuple[dict[str, Gradients], Gradients]:
    """(feedback of B by setting, its true gradient) of the sum of the losses of some examples of dev."""
    objective = workload.parts[0].objective if workload.parts else AnswerNLL()
    encoded, chosen = Scorer(e.spec, workload, engine).table("dev").take(np.asarray(examples))
    centre = Probe(engine.step(), 0, 0.0)
    plan = encoded.plan((centre,), np.zeros(len(chosen), np.int64), chosen)
    gradient = Gradient(objective, encoded.sums(np.zeros(0), chosen), 0)
    estimates, values = {}, np.zeros(0)
    for setting, own in maps.items():
        engine._maps = own
        values, feedback = engine.feedback(plan, gradient)
        estimates[setting] = of_b(feedback)
    return estimates, true_gradients(engine, plan, centre, gradient(values))


def true_gradients(engine: Any, plan: Any, centre: Probe, slopes: np.ndarray) -> Gradients:
    """d sum_o slopes[o] * sum_o / dB by autograd through the whole model, a sequence at a time."""
    factors = {name: (a.clone(), b.clone().requires_grad_()) for name, a, b in engine.state.factors(centre)}
    total = {name: torch.zeros_like(b) for name, (_, b) in factors.items()}
    engine._active = factors
    for i, number in enumerate(plan.chosen.tolist()):
        one, own = plan.table[number], slopes[plan.first_output[i] : plan.first_output[i + 1]]
        logps = engine.model(input_ids=torch.from_numpy(one.tokens)[None]).logits[0].log_softmax(-1)
        picked = logps[torch.from_numpy(one.rows), torch.from_numpy(one.targets)]
        loss = (picked * torch.from_numpy(own[one.outputs]).to(picked)).sum()
        parts = torch.autograd.grad(loss, [b for _, b in factors.values()])
        for name, part in zip(factors, parts, strict=True):
            total[name] += part
    engine._active = {}
    return {name: values.numpy() for name, values in total.items()}


def of_b(feedback: dict[str, np.ndarray]) -> Gradients:
    """Those of B, by their matrix."""
    return {name.removesuffix(".lora_B"): values for name, values in feedback.items() if name.endswith(".lora_B")}


def groups(names: Gradients) -> dict[str, list[str]]:
    """Each matrix by itself, those of the upper half of the layers, and all."""
    last = 1 + max(layer_number(name) or 0 for name in names)
    upper = [name for name in names if (layer_number(name) or 0) >= last // 2]
    return {**{name: [name] for name in names}, "upper half": upper, "all": list(names)}


def joined(gradients: Gradients, names: Sequence[str]) -> np.ndarray:
    """Some of them as one vector."""
    return np.concatenate([gradients[name].ravel() for name in names]).astype(np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them is zero."""
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else 0.0


def descent(a: np.ndarray, b: np.ndarray) -> float:
    """How far a step along the signs of a goes down, to first order, beside one along the signs of the gradient b."""
    whole = float(np.abs(b).sum())
    return float(np.sign(a) @ b) / whole if whole > 0 else 0.0


def name_of(where: Sequence[str]) -> str:
    """A short name of the model that some settings choose."""
    given = dict(setting.partition("=")[::2] for setting in where)
    return Path(given["model.path"]).name if "model.path" in given else given.get("model", "smollm2-135m")


def leaf(row: Record) -> str:
    """The last part of a matrix's name."""
    return row["matrix"].rpartition(".")[2]


def table(result: Record) -> str:
    """Markdown: a row for each layer, each setting's cosines of its matrices; then of several layers together."""
    of_matrix = [row for row in result["rows"] if row["layer"] is not None]
    leaves, settings = list(dict.fromkeys(map(leaf, of_matrix))), result["settings"]
    names = [name if name == "identity" else f"maps, {name}" for name in settings]
    lines = [f"| layer | share | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    for layer in sorted({row["layer"] for row in of_matrix}):
        own = {leaf(row): row for row in of_matrix if row["layer"] == layer}
        cells = [" / ".join(f"{own[part][name]:.2f}" for part in leaves if part in own) for name in settings]
        lines.append(f"| {layer} | {sum(row['share'] for row in own.values()):.3f} | {' | '.join(cells)} |")
    for row in result["rows"]:
        if row["layer"] is None:
            lines.append(f"| {row['matrix']} | | {' | '.join(f'{row[name]:.2f}' for name in settings)} |")
    return "\n".join([f"{' / '.join(leaves)}\n", *lines])


def draw(results: Sequence[Record], path: Path) -> None:
    """A panel for each model and task: cosines by layer, faint for the identity, strong for the maps."""
    from matplotlib.figure import Figure

    columns = 2 if len(results) > 1 else 1
    lines = -(-len(results) // columns)
    height, left = 0.9 + 2.7 * lines, 0.16 / columns  # inches; of the width
    figure = Figure(figsize=(4.6 * columns, height), dpi=DPI, facecolor="white")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    figure.subplots_adjust(left, 0.5 / height, 0.98, 1 - 0.75 / height, hspace=0.42, wspace=0.08)
    title = "How near residual feedback is to the true gradient of B"
    figure.text(left, 1 - 0.25 / height, title, fontsize=12, fontweight="bold", color=INK, va="center")
    for axes, result in zip(panels, results, strict=False):
        _panel(axes, result)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("cosine with the gradient", color=INK, fontsize=9)
    panels[0].legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _panel(axes: Any, result: Record) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in result["rows"] if row["layer"] is not None]
    strong = SHOWN if SHOWN in result["settings"] else result["settings"][-1]
    for part, color in zip(dict.fromkeys(map(leaf, rows)), (TRAIN, DEV), strict=False):
        own = [row for row in rows if leaf(row) == part]
        x, bare, mapped = ([row[key] for row in own] for key in ("layer", "identity", strong))
        axes.plot(x, bare, color=color, alpha=0.4, linewidth=1.2, label=f"{part}, identity")
        if strong != "identity":
            axes.plot(x, mapped, color=color, linewidth=2.0, label=f"{part}, maps of rank {strong}")
    axes.set_title(f"{result['model']}, {TASKS[result['task']]}", fontsize=10, color=INK, loc="left")
    axes.set_ylim(min(-0.06, *(row[key] - 0.03 for row in rows for key in ("identity", strong))), 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer", color=INK, fontsize=9)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
