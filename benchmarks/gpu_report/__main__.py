"""Does zoray do on this card what it does on a CPU, and how fast? One command, no network, no weights.

    python -m benchmarks.gpu_report out=DIR [--only PART] [--minutes 9]
    python -m benchmarks.gpu_report out=DIR --device cpu --tiny       the small form, which the tests run

Parts: correctness, signal, speed, kernels, memory; the most telling items come first. Every item runs in a process of
its own (all of the small form in one), those without timings several at a time, and leaves DIR/items/NAME.json; what is
there and holds is not run again, so a second call goes on where the first one stopped. After every item DIR gets
report.json and report.md, and plots in the end. The exit code is 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.checks import Place
from benchmarks.gpu_report.items import PARTS, TOGETHER, all_items
from benchmarks.gpu_report.plots import draw
from benchmarks.gpu_report.report import machine, write
from zoray.records.paths import user_path

AT_ONCE = 4  # items without timings on a card together: they are mostly waiting for models to load
LEAST_SECONDS = {"cpu": 5, "cuda": 25}  # an item is not begun with less time left
LEAST_FOR_SPEED = 100  # on a card: three copies of a model are loaded, two of them compiled


def main(arguments: list[str]) -> int:
    """Run what has not been run yet, while there is time; 0 if everything that has been run holds."""
    options = parse(arguments)
    items = options.out / "items"
    items.mkdir(parents=True, exist_ok=True)
    if options.item:
        measure(options, items, options.item)
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    names = names_of(options)
    chosen = [name for name in names if options.only in (None, name.partition(":")[0], name)]
    if not chosen:
        sys.exit(f"expected --only to be one of {', '.join(PARTS)}, or an item; got {options.only}")
    results = {name: found for name in names if (found := stored(items, name))}
    waiting = [name for name in chosen if not results.get(name, {"holds": False})["holds"]]

    where, lock = machine(options.device), threading.Lock()

    def one(name: str) -> None:
        left, least = deadline - time.monotonic(), LEAST_SECONDS[options.device]
        if options.device == "cuda" and name.startswith("speed:") and name != "speed:device":
            least = LEAST_FOR_SPEED
        if left < least:
            return
        found = measure(options, items, name) if options.tiny else in_process(arguments, items, name, left)
        if found is None:
            return
        with lock:
            results[name] = found
            print(f"{name}: {'holds' if found['holds'] else 'FAILS: ' + found['why']}", flush=True)
            write(options.out, where, names, results)

    for together, group in groupby(waiting, key=lambda name: name.partition(":")[0] in TOGETHER):
        with ThreadPoolExecutor(AT_ONCE if together and options.device == "cuda" and not options.tiny else 1) as pool:
            list(pool.map(one, group))
    write(options.out, where, names, results)
    draw(options.out, results)
    failed = [name for name, result in results.items() if not result["holds"]]
    missing = [name for name in names if name not in results]
    print(f"{len(results) - len(failed)} hold, {len(failed)} fail, {len(missing)} not run yet; {options.out}/report.md")
    return 1 if failed else 0


def parse(arguments: list[str]) -> Any:
    """The command line; exits with what is expected where it is something else."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", help="out=DIR: where the report goes")
    parser.add_argument("--only", metavar="PART", help=f"one of {', '.join(PARTS)}, or the name of an item")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.out.startswith("out=") or options.out == "out=":
        parser.error(f"expected out=DIR; got {options.out!r}")
    options.out = user_path(options.out.removeprefix("out=")).resolve()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("expected a CUDA device; there is none. The small form: --device cpu --tiny")
    return options


def names_of(options: Any) -> list[str]:
    """All items, in the order in which they matter."""
    return list(all_items(place_of(options)))


def place_of(options: Any) -> Place:
    """Where the items are measured."""
    models = options.out / "models"
    models.mkdir(parents=True, exist_ok=True)
    return Place(options.device, options.tiny, models)


def measure(options: Any, items: Path, name: str) -> dict[str, Any]:
    """The result of one item, in this process; it is stored as well."""
    began = time.monotonic()
    result: dict[str, Any] = {"name": name, "holds": True, "why": ""}
    try:
        result["measured"] = all_items(place_of(options))[name]()
    except Exception as error:
        result |= {"holds": False, "why": f"{type(error).__name__}: {error}".split("\n")[0]}
        result["traceback"] = traceback.format_exc()
    result["seconds"] = round(time.monotonic() - began, 1)
    (items / f"{name}.json").write_text(json.dumps(result, default=str) + "\n", encoding="utf-8")
    return result


def in_process(arguments: list[str], items: Path, name: str, seconds: float) -> dict[str, Any] | None:
    """An item in a process of its own, so that its memory is free afterwards, and a crash is its own.

    None where it is not done in time.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_report", *arguments, "--item", name]
    path = items / f"{name}.json"
    path.unlink(missing_ok=True)
    with (items / f"{name}.log").open("wb") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return None
    why = f"its process ended with code {code}, see {log.name}"
    return stored(items, name) or {"name": name, "holds": False, "why": why, "seconds": round(seconds, 1)}


def stored(items: Path, name: str) -> dict[str, Any] | None:
    """The result of an item that has been run."""
    path = items / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
