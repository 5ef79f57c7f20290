"""What do plain methods reach on the same task? Thresholds, probes of hidden states, backpropagation; no vLLM.

    python -m benchmarks.baselines                                   all of them on movie_reviews, then the table
    python -m benchmarks.baselines what=backprop budget=1600 rules=adam lr=0.5,1,2 seeds=0
    python -m benchmarks.baselines what=text file=lines.txt out=text.json
    python -m benchmarks.baselines what=answers task=file task.path=mail.jsonl
    python -m benchmarks.baselines model=hf model.path=FOLDER task=sst2 bos=true

Any task will do whose examples all have the same options of one token each; other keys than those of DEFAULTS are
settings of conf/. All methods read the same prompts at the same position: the logits of the option words, or the hidden
states, of the last prompt token. A probe's layer and penalty are chosen on dev, so only test is free of the choice.

`backprop` trains both halves of adapters of rank 8 and alpha 16 with the cross-entropy over the option words, a run for
each budget of sequences, its learning rate falling linearly to 0. The last state counts; with `states=4` there is a row
more, of that which is best on dev of four, as zoray's own runs have it. `adam` and `meansign` have them on the layers
that write to the residual stream, from block `first` on (the upper half), `adamw-all` on all linear layers of all.
`text` is the next-token loss on 300 held-out lines of a file, under the same adapters and rules; `answers` that of the
answers of a task, on its own dev rows, as objective=answer_nll has it (the mean over a row's tokens, then over rows).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.bare_model import (
    READ,
    Reading,
    Split,
    adapted,
    answer_logits,
    answer_loss,
    blocks,
    descend,
    linear_layers,
    load,
    read,
    token_loss,
)
from benchmarks.options import parse
from zoray.models.folder import load_tokenizer, max_length
from zoray.models.tokens import Encoder
from zoray.records import ConfigError
from zoray.records.paths import user_path
from zoray.run.config import build, build_experiment, compose, guarded
from zoray.scoring.workload import load_workload
from zoray.tasks.batches import Order, labels_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Record = dict[str, Any]

DEFAULTS = {"what": "all", "seeds": "0,1,2", "budget": "", "rules": "adam,meansign,adamw-all", "lr": "1", "batch": "16"}
DEFAULTS |= {"first": "", "layers": "1", "penalties": "10,100,1000", "bos": "false", "file": "", "out": ""}
DEFAULTS |= {"states": "1"}
ALL = ("untuned", "margin", "probe", "backprop")
PARTS = (*ALL, "text", "answers")
BUDGETS, TEXT_BUDGETS = "320,1280,1600,6400", "0,160,320,640,1280,5120"
RULES: dict[str, tuple[str, float, bool]] = {  # optimizer, learning rate, whether on all linear layers
    "adam": ("Adam", 1e-3, False),
    "meansign": ("MeanSign", 2e-3, False),
    "adamw-all": ("AdamW", 5e-4, True),
}
HELD_OUT, LONGEST, SHORTEST = 300, 48, 31  # lines; tokens; characters


def main(arguments: list[str]) -> None:
    """Run what is asked for, print the table, then one JSON object; `out` is written anew after each result."""
    own = [argument for argument in arguments if argument.partition("=")[0] in DEFAULTS]
    options = parse(own, DEFAULTS)
    records = []
    for record in measure(options, [argument for argument in arguments if argument not in own]):
        records.append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
        if options["out"]:
            out = user_path(options["out"])
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_name(f"{out.name}.partial")
            partial.write_text(
                json.dumps({"benchmark": "baselines", **options, "results": records}) + "\n", encoding="utf-8"
            )
            os.replace(partial, out)
    print(table(records))
    print(json.dumps({"benchmark": "baselines", **options, "results": records}))


def measure(options: dict[str, str], where: Sequence[str] = ()) -> Iterator[Record]:
    """The results one by one. `where`: settings of conf/."""
    parts = ALL if options["what"] == "all" else tuple(options["what"].split(","))
    if wrong := (set(parts) - {*PARTS}) | (set(options["rules"].split(",")) - RULES.keys()):
        raise ConfigError(f"expected what of {', '.join(PARTS)}, rules of {', '.join(RULES)}; got {wrong}")
    if "text" in parts and not user_path(options["file"]).is_file():
        raise ConfigError(f"what=text needs a text file; got file={options['file']!r}. Set file=PATH")
    config = compose("config", where)
    source, task = build(config.model, "model"), build(config.task, "task")
    splits = task.load() if set(parts) & set(ALL) else None
    folder = source.resolve()
    encoder = Encoder(load_tokenizer(folder), max_length(folder), cut=True)
    bos, seeds = options["bos"] == "true", [int(seed) for seed in options["seeds"].split(",")]
    if splits is not None:
        found = {"train": splits.train, "dev": splits.dev, "test": splits.test}
        data, words = encode({name: examples for name, examples in found.items() if len(examples)}, encoder, bos)
        order = {seed: order_of(seed, labels_of(splits.train), int(options["batch"])) for seed in seeds}
        model = load(folder, source.dtype)
        if set(parts) & {"untuned", "margin", "probe"}:
            layers = range(0, blocks(model) + 1, int(options["layers"])) if "probe" in parts else ()
            readings = {name: read(model, split, words, layers) for name, split in data.items()}
            if "untuned" in parts:
                yield {"method": "untuned", "setting": "", "seed": seeds[0], **scores(readings)}
            if "margin" in parts:
                yield from margins(readings, seeds)
            if "probe" in parts:
                yield from probes(readings, layers, [float(l2) for l2 in options["penalties"].split(",")], seeds)
        if "backprop" in parts:

            def loss_of(seed: int, step: int) -> torch.Tensor:
                chosen = order[seed].step(step)
                logits = answer_logits(model, [data["train"].sequences[i] for i in chosen], words)[0]
                return cross_entropy(logits, data["train"].labels[chosen].to(logits.device))

            def reached() -> Record:
                return scores({name: read(model, data[name], words) for name in data if name != "train"})

            yield from backprop(model, options, (options["budget"] or BUDGETS).split(","), seeds, loss_of, reached)
    if "text" in parts:
        yield from text(load(folder, source.dtype), encoder, bos, options, seeds)
    if "answers" in parts:
        yield from answers(load(folder, source.dtype), options, seeds, where)


def encode(
    splits: dict[str, Sequence[Any]], encoder: Encoder, bos: bool = False
) -> tuple[dict[str, Split], torch.Tensor]:
    """Each split's prompts as tokens with labels, and the token of each option; `bos` puts the mark of a beginning."""
    words: list[int] = []
    encoded = {}
    for name, examples in splits.items():
        sequences = []
        for example in examples:
            if len(example.options) < 2:
                raise ConfigError("expected a task with options to choose from; this one has none. Take another task")
            shared, whole = encoder.continued(example.prompt, example.options)
            found = [tokens[shared] for tokens in whole]
            words = words or found
            if found != words or any(len(tokens) != shared + 1 for tokens in whole):
                raise ConfigError(
                    f"expected the same options of one token each in all examples; got {example.options!r}, tokens "
                    f"{[tokens[shared:] for tokens in whole]}. Take other words, task.words=..., or another task"
                )
            tokens = begun(whole[0], encoder, bos)
            sequences.append(encoder.sequence(tokens, [len(tokens) - 1]).tokens.tolist())
        encoded[name] = Split(sequences, torch.from_numpy(labels_of(examples)))
    return encoded, torch.tensor(words)


def begun(tokens: list[int], encoder: Encoder, bos: bool) -> list[int]:
    """The tokens, with the mark of a beginning in front if `bos` asks for it and it is not there."""
    mark = encoder.tokenizer.bos_token_id
    if bos and mark is None:
        raise ConfigError("bos=true needs a tokenizer that has a mark of a beginning; this one has none. Leave it out")
    return [mark, *tokens] if bos and tokens[:1] != [mark] else tokens


def order_of(seed: int, labels: np.ndarray, batch: int) -> Order:
    """Which rows each step sees, labels in turn: the order of zoray's own runs."""
    return Order(SimpleNamespace(data_seed=seed, batch=batch, stratify=True), labels)


def some(n: int, size: int, seed: int) -> torch.Tensor:
    """So many of n rows."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(n)[:size])


def scores(readings: dict[str, Reading], offsets: torch.Tensor | float = 0.0) -> Record:
    """Accuracy and loss on dev and test, with `offsets` added to the options' logits."""
    record: Record = {}
    for name, reading in readings.items():
        if name != "train":
            logits = reading.logits + offsets
            record[f"{name}_accuracy"] = (logits.argmax(1) == reading.labels).double().mean().item()
            record[f"{name}_loss"] = cross_entropy(logits, reading.labels).item()
    return record


def margins(readings: dict[str, Reading], seeds: Sequence[int]) -> Iterator[Record]:
    """Offsets from a few rows of train: without labels from 16 and from all, with labels from 16 and from 320."""
    train = readings["train"]
    n = len(train.labels)
    for fit, sizes in ((centred, {16, n}), (fitted, {16, 320})):
        for size in sorted({min(size, n) for size in sizes}):
            for seed in seeds if size < n else seeds[:1]:
                chosen = some(n, size, seed)
                offsets = fit(train.logits[chosen], train.labels[chosen])
                method = f"margin {'without' if fit is centred else 'with'} labels"
                yield {"method": method, "setting": f"{size} rows", "seed": seed, **scores(readings, offsets)}


def centred(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Offsets that take away the median margin of two options, or each option's mean logit of more; no labels."""
    del labels
    if logits.shape[1] > 2:
        return -logits.mean(0)
    return torch.stack([logits.new_zeros(()), (logits[:, 0] - logits[:, 1]).quantile(0.5)])


def fitted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Offsets of the best accuracy: for two options the threshold; for more, three rounds of one option at a time.

    Of all thresholds that are as good, the middle one.
    """
    offsets = logits.new_zeros(logits.shape[1])
    for option in [*range(1, len(offsets))] * (1 if len(offsets) == 2 else 3):
        moved = logits + offsets
        own = moved[:, option].clone()
        moved[:, option] = -torch.inf
        rival, other = moved.max(1)
        gaps = (rival - own).sort().values  # the option is chosen where more than this is added to it
        cuts = torch.cat([gaps[:1] - 1, (gaps[1:] + gaps[:-1]) / 2, gaps[-1:] + 1])
        wins = cuts[:, None] > rival - own
        right = torch.where(wins, labels == option, labels == other).sum(1)
        best = (right == right.max()).nonzero()[:, 0]
        offsets[option] += cuts[best[len(best) // 2]]
    return offsets


def probes(
    readings: dict[str, Reading], layers: Sequence[int], penalties: Sequence[float], seeds: Sequence[int]
) -> Iterator[Record]:
    """A linear probe of each layer, from 320 rows and from all; the penalty is chosen on dev, and so is the layer."""
    train = readings["train"]
    n = len(train.labels)
    for size in sorted({min(320, n), n}):
        for seed in seeds if size < n else seeds[:1]:
            best: list[Record] = []
            for k, layer in enumerate(layers):
                chosen, tried = some(n, size, seed), []
                for l2 in penalties:
                    probe = Probe(train.states[chosen, k], train.labels[chosen], train.logits.shape[1], l2)
                    said = {s: r._replace(logits=probe(r.states[:, k])) for s, r in readings.items()}
                    tried.append({"setting": f"{size} rows, layer {layer}", "seed": seed, "layer": layer, "l2": l2})
                    tried[-1] |= scores(said)
                best.append(_best(tried))
                yield {"method": "probe", **best[-1]}
            yield {"method": "probe, layer by dev", **_best(best), "setting": f"{size} rows"}


def _best(records: Sequence[Record]) -> Record:
    return max(records, key=lambda record: (record.get("dev_accuracy", 0), -record["dev_loss"]))


class Probe:
    """Multinomial logistic regression on standardised states: sum of cross-entropies + l2 / 2 |w|^2, by L-BFGS."""

    def __init__(self, states: torch.Tensor, labels: torch.Tensor, classes: int, l2: float) -> None:
        states = states.double()  # in float32 it would stop too early
        self.mean, self.std = states.mean(0), states.std(0).clamp(min=1e-6)
        x = (states - self.mean) / self.std
        self.weight = weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
        self.bias = bias = x.new_zeros(classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], 1, 500, None, 1e-7, 1e-12, line_search_fn="strong_wolfe")

        def objective() -> torch.Tensor:
            solver.zero_grad()
            loss = cross_entropy(x @ weight + bias, labels) + l2 / (2 * len(x)) * weight.square().sum()
            loss.backward()
            return loss

        solver.step(objective)

    @torch.no_grad()
    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(n, classes) logits."""
        return (states - self.mean) / self.std @ self.weight + self.bias


def backprop(
    model: Any,
    options: dict[str, str],
    budgets: Sequence[str],
    seeds: Sequence[int],
    loss_of: Callable[[int, int], torch.Tensor],
    reached: Callable[[], Record],
) -> Iterator[Record]:
    """A run for each budget, rule, learning rate and seed; `loss_of` is of (seed, step), `reached` what is measured."""
    first = int(options["first"] or blocks(model) // 2)
    for budget, rule, factor, seed in product(budgets, options["rules"].split(","), options["lr"].split(","), seeds):
        optimizer, lr, everywhere = RULES[rule]
        lr, steps = lr * float(factor), int(budget) // int(options["batch"])
        with adapted(linear_layers(model, everywhere, first), seed) as parameters:
            every = max(1, steps // int(options["states"]))
            began, measuring = time.monotonic(), 0.0
            found: list[Record] = [] if steps else [{"steps": 0, **reached()}]
            for step in descend(parameters, optimizer, lr, steps, lambda step, seed=seed: loss_of(seed, step)):
                if step % every == 0 or step == steps:
                    since = time.monotonic()
                    found.append({"steps": step, **reached()})
                    measuring += time.monotonic() - since
            seconds = round(time.monotonic() - began - measuring, 1)
            record = {"method": f"backprop {rule}", "setting": f"{budget} sequences, lr {lr:g}", "seed": seed}
            yield {**record, "seconds": seconds, **found[-1]}
            if len(found) > 1:
                record["setting"] += f", best of {len(found)} on dev"
                yield {**record, **_best(found)}


def text(
    model: Any, encoder: Encoder, bos: bool, options: dict[str, str], seeds: Sequence[int], held_out: int = HELD_OUT
) -> Iterator[Record]:
    """Backpropagation on the lines of a file; the loss a token on the lines held out. No line is in both."""
    held, train = lines_of(user_path(options["file"]), encoder, bos, held_out)
    order = {seed: order_of(seed, np.zeros(len(train), np.int64), int(options["batch"])) for seed in seeds}

    def loss_of(seed: int, step: int) -> torch.Tensor:
        total, count = token_loss(model, [train[i] for i in order[seed].step(step)])
        return total / count

    @torch.no_grad()
    def reached() -> Record:
        parts = [token_loss(model, held[first : first + READ]) for first in range(0, len(held), READ)]
        return {"dev_loss": sum(total.item() for total, _ in parts) / sum(count for _, count in parts)}

    yield from _of_text(model, options, seeds, loss_of, reached)


def answers(model: Any, options: dict[str, str], seeds: Sequence[int], where: Sequence[str]) -> Iterator[Record]:
    """The same on the answers of a task, as zoray encodes them; the loss a row on dev."""
    workload = load_workload(build_experiment(compose("config", ["objective=answer_nll", *where])).spec)
    train, held = ([sequence for (sequence,) in workload.encoded[split]] for split in ("train", "dev"))
    order = {seed: order_of(seed, labels_of(workload.splits.train), int(options["batch"])) for seed in seeds}

    def loss_of(seed: int, step: int) -> torch.Tensor:
        return answer_loss(model, [train[i] for i in order[seed].step(step)]).mean()

    @torch.no_grad()
    def reached() -> Record:
        losses = [answer_loss(model, held[first : first + READ]) for first in range(0, len(held), READ)]
        return {"dev_loss": torch.cat(losses).mean().item()}

    yield from _of_text(model, options, seeds, loss_of, reached)


def _of_text(model: Any, options: dict[str, str], seeds: Sequence[int], loss_of: Any, reached: Any) -> Iterator[Record]:
    budgets = (options["budget"] or TEXT_BUDGETS).split(",")
    if "0" in budgets:
        yield {"method": "untuned", "setting": "text", "seed": seeds[0], **reached()}
    yield from backprop(model, options, [b for b in budgets if b != "0"], seeds, loss_of, reached)


def lines_of(path: Path, encoder: Encoder, bos: bool, held_out: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the lines that are held out, and of the others; of lines that are the same there is one."""
    lines = [line for line in dict.fromkeys(path.read_text(encoding="utf-8").splitlines()) if len(line) >= SHORTEST]
    if len(lines) <= held_out:
        raise ConfigError(f"{path} must have more than {held_out} lines of {SHORTEST} characters; got {len(lines)}")
    tokens = [begun(encoder.tokens(lines[i]), encoder, bos)[:LONGEST] for i in some(len(lines), len(lines), 0)]
    return tokens[:held_out], tokens[held_out:]


COLUMNS = ("dev_accuracy", "test_accuracy", "dev_loss", "test_loss", "seconds")


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each method and setting, mean and standard deviation over the seeds."""
    names = [name.replace("_", " ") for name in COLUMNS]
    rows = [f"| method | setting | seeds | {' | '.join(names)} |", "|" + "---|" * (3 + len(names))]
    for method, setting in dict.fromkeys((record["method"], record["setting"]) for record in records):
        runs = [record for record in records if (record["method"], record["setting"]) == (method, setting)]
        cells = [_spread([run[name] for run in runs if name in run]) for name in COLUMNS]
        rows.append(f"| {method} | {setting} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
