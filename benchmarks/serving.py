"""What does tuning cost those who chat, and what does sharing an engine cost tuning?

    python -m benchmarks.serving [rounds=5] [seconds=20] [clients=2] [pause=0] [tokens=32] [steps=15] [serve.*=...]

A real server, asked over HTTP. `chat`: so many clients stream greedy answers, one request after the other, each `pause`
seconds (exponentially distributed) after its last; every round has a stretch with tuning on and one with it off, in an
order drawn anew. Ratios of throughput are medians of paired ratios; of p99, those of all requests of one kind together,
since one stretch has too few. `tuning_on` is the share of the idle speed that tuning keeps meanwhile.
`idle`: the same job by `launch`'s own loop and by the server without traffic, in turns of `steps` steps.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.server import running
from benchmarks.timing import ratio, spread

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULTS = {
    "rounds": "5",
    "seconds": "20",
    "clients": "2",
    "pause": "0",
    "tokens": "32",
    "steps": "15",
    "parts": "chat,idle",
}
DATA = Path(__file__).parents[1] / "examples" / "mail.csv"
TEMPLATE = "{subject}: {text} This is"
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short note to a colleague who is ill.",
    "Explain in two sentences why the sky is blue.",
    "Give me three ideas for a rainy Sunday with children.",
    "Which of these is heavier, a litre of water or a litre of oil, and why?",
)
FOREVER = 1_000_000  # steps of a job that is to last as long as the benchmark


@dataclass
class Chat:
    """What the clients of a stretch have seen."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to first tokens
    gaps: list[float] = field(default_factory=list)  # seconds between tokens


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    given = [argument.partition("=") for argument in arguments]
    options = {**DEFAULTS, **{key: value for key, _, value in given if key in DEFAULTS}}
    settings = [f"{key}={value}" for key, _, value in given if key not in DEFAULTS]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, settings, Path(folder))))


def measure(options: dict[str, str], settings: list[str], folder: Path) -> dict[str, Any]:
    """Chat with and without tuning, and tuning with and without a server."""
    own = [f"serve.folder={folder / 'store'}", "serve.requests_per_minute=null", "serve.eval_every=1000000", *settings]
    result: dict[str, Any] = {"benchmark": "serving", **options}
    with running(own) as url, httpx.Client(base_url=url, timeout=120) as http:
        job = Job(http)
        if "idle" in options["parts"]:
            result["idle"] = idle(job, options, settings, folder)
        if "chat" in options["parts"]:
            result["chat"] = chat(job, url, options)
        job.turn(False)
    return result


class Job:
    """An endless tuning job of the server."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.model = self._get("/v1/models")["data"][0]["id"]
        with DATA.open("rb") as file:
            uploaded = http.post("/v1/files", files={"file": (DATA.name, file)}).raise_for_status().json()
        body = {"training_file": uploaded["id"], "suffix": "bench", "use": {"template": TEMPLATE}}
        self.turn(False)
        http.post("/v1/fine_tuning/jobs", json={**body, "hyperparameters": {"steps": FOREVER}}).raise_for_status()

    def _get(self, path: str) -> Any:
        return self.http.get(path).raise_for_status().json()

    def turn(self, on: bool) -> None:
        """Let it go on, or stop it after the step at hand."""
        self.http.put("/v1/learning", json={"on": on}).raise_for_status()
        while not on and self._get("/v1/fine_tuning/jobs?limit=1")["data"][:1] and self._status() == "running":
            time.sleep(0.05)

    def _status(self) -> str:
        return self._get("/v1/fine_tuning/jobs/bench")["status"]

    def step(self) -> int:
        """The last step that it has taken."""
        return self._get("/v1/fine_tuning/jobs/bench")["step"]

    def steps(self, count: int) -> list[float]:
        """Seconds of so many steps, the first two after it has been turned on left out."""
        began = self.step()
        self.turn(True)
        while self.step() < began + count + 2:
            time.sleep(0.5)
        self.turn(False)
        found = [row for row in self._get(f"/v1/fine_tuning/jobs/bench/metrics?after={began}")["steps"]]
        return [row["seconds"] for row in found[2:]]


def chat(job: Job, url: str, options: dict[str, str]) -> dict[str, Any]:
    """Stretches with tuning on and off."""
    order, found = random.Random(0), {True: [], False: []}  # type: ignore[var-annotated]
    seconds, made = float(options["seconds"]), []
    talk(url, job.model, 3.0, options, 0)  # not counted
    for number in range(int(options["rounds"])):
        for on in order.sample((True, False), 2):
            if on:
                before = job.step()
                job.turn(True)
                while job.step() < before + 2:  # it is at work
                    time.sleep(0.2)
            talk(url, job.model, 3.0, options, 0)  # not counted: who comes first waits for a slice of an idle engine
            before = job.step()
            found[on].append(talk(url, job.model, seconds, options, number))
            if on:
                made.append(job.step() - before)
                job.turn(False)
    rate = {on: [one.tokens / one.seconds for one in found[on]] for on in found}
    result: dict[str, Any] = {
        "tokens_per_second_on": spread(rate[True]),
        "tokens_per_second_off": spread(rate[False]),
        "throughput": ratio(rate[True], rate[False]),
        "requests": sum(len(one.first) for on in found for one in found[on]),
        "steps_per_second": sum(made) / (seconds * len(made)),
    }
    for what in ("first", "gaps"):
        both = {on: [value for one in found[on] for value in getattr(one, what)] for on in found}
        for share in (50, 99):
            high = {on: statistics.quantiles(both[on], n=100, method="inclusive")[share - 1] for on in both}
            result[f"{what}_p{share}_ms"] = {"on": 1000 * high[True], "off": 1000 * high[False]}
            result[f"{what}_p{share}"] = high[True] / high[False]
    return result


def talk(url: str, model: str, seconds: float, options: dict[str, str], seed: int) -> Chat:
    """Let all clients chat for so long."""
    found, lock, ends = Chat(), threading.Lock(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=_client, args=(url, model, ends, options, 1000 * seed + i, found, lock))
        for i in range(int(options["clients"]))
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.monotonic() - began
    return found


def _client(url: str, model: str, ends: float, options: dict[str, str], seed: int, found: Chat, lock: Any) -> None:
    draw, pause = random.Random(seed), float(options["pause"])
    with httpx.Client(base_url=url, timeout=120) as http:
        while time.monotonic() < ends:
            if pause:
                time.sleep(draw.expovariate(1 / pause))
            messages = [{"role": "user", "content": f"{draw.choice(QUESTIONS)} ({draw.randrange(10**6)})"}]
            body = {"model": model, "messages": messages, "max_tokens": int(options["tokens"]), "temperature": 0}
            times = [time.monotonic()]
            with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                        times.append(time.monotonic())
            if len(times) > 1:
                with lock:
                    found.tokens += len(times) - 1
                    found.first.append(times[1] - times[0])
                    found.gaps += [b - a for a, b in pairwise(times[1:])]


def idle(job: Job, options: dict[str, str], settings: list[str], folder: Path) -> dict[str, Any]:
    """The job's steps in the server, and the same in launch's own loop, in turns."""
    count, launched = int(options["steps"]), Launched(settings, folder)
    served, alone = [], []
    for number in range(int(options["rounds"]) + 1):
        pair = [statistics.median(job.steps(count)), statistics.median(launched.steps(count))]
        if number:
            served.append(pair[0])
            alone.append(pair[1])
    launched.end()
    return {
        "seconds_per_step_served": spread(served),
        "seconds_per_step_launch": spread(alone),
        "speed": ratio(alone, served),
    }


class Launched:
    """The same job as a run of its own, in turns: `tune` asks after each step whether to stop, and waits there."""

    def __init__(self, settings: list[str], folder: Path) -> None:
        from zoray.run.config import build_experiment, compose
        from zoray.run.driver import tune
        from zoray.scoring.workload import load_workload

        plain = [s for s in settings if not s.startswith("serve.")]
        c = compose("serve", plain)
        task = [f"task.path={DATA}", f"task.template='{TEMPLATE}'"]
        run = [f"run.folder={folder}", "run.name=alone", f"run.steps={FOREVER}", f"run.batch={c.serve.batch}"]
        quiet = ["run.eval_every=0", "run.test=false", "logging.progress=false", "cluster.dashboard=false"]
        shared = [f"engine.max_tokens={c.engine.max_tokens}", f"engine.kv_cache_gib={c.engine.kv_cache_gib}"]
        e = build_experiment(
            compose("config", ["task=file", "objective=choice_nll", "space=lora", *shared, *plain, *task, *run, *quiet])
        )
        self._turn, self._left, self._seconds, self._over = threading.Condition(), 0, [], False  # type: ignore[var-annotated]
        self._last, self._there = 0.0, False
        (folder / "alone").mkdir()
        self._thread = threading.Thread(
            target=lambda: tune(e, load_workload(e.spec), {}, stopping=self._step), daemon=True
        )
        self._thread.start()
        self._wait(lambda: self._there)

    def _wait(self, true: Callable[[], bool]) -> None:
        with self._turn:
            while not true():
                self._turn.wait(1.0)
                if not self._thread.is_alive():
                    raise RuntimeError("the run beside the server has ended")

    def _step(self) -> bool:
        with self._turn:
            now, self._there = time.monotonic(), True
            if self._last:
                self._seconds.append(now - self._last)
            self._left -= 1
            self._turn.notify_all()
            while self._left < 0 and not self._over:
                self._turn.wait()
                now = time.monotonic()
            self._last = now
            return self._over

    def steps(self, count: int) -> list[float]:
        """Seconds of so many steps, the first two of a turn left out."""
        with self._turn:
            self._seconds.clear()
            self._left = count + 2
            self._turn.notify_all()
        self._wait(lambda: self._left < 0)
        return self._seconds[2:]

    def end(self) -> None:
        """Stop it."""
        with self._turn:
            self._over = True
            self._turn.notify_all()
        self._thread.join(60)


if __name__ == "__main__":
    main(sys.argv[1:])
