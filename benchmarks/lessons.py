"""How long does a served model take to learn a file, and what does it learn? A job from upload to verdict, over HTTP.

    python -m benchmarks.lessons what=style                 400 paragraphs of plain text: held-out perplexity
    python -m benchmarks.lessons what=reviews               2,000 labelled rows, 200 held out: accuracy
    python -m benchmarks.lessons what=reviews clients=2     the same while two clients chat without pause

A real server on a folder of its own, settings of conf/serve.yaml as further arguments. `style` is the published tweets
(of the archive that the movie reviews come from), each a paragraph of a .txt as an office might upload: the way its
people write. Prints one JSON object: seconds from the upload to the job's end, the job's curve, what the gate said.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.options import parse
from benchmarks.server import running
from benchmarks.serving import DEFAULTS as CHAT
from benchmarks.serving import talk
from benchmarks.workstation import TEMPLATE, reviews
from zoray.serving.client import Client
from zoray.tasks.published.movie_reviews import fetch

OPTIONS = {"what": "style", "clients": "0", "paragraphs": "400", "held_out": "80", "lr": "", "steps": ""}
TWEETS = "tweets_GroundTruth.txt"


def main(arguments: list[str]) -> None:
    """Measure and print one JSON object."""
    own = [argument for argument in arguments if argument.partition("=")[0] in OPTIONS]
    settings = [argument for argument in arguments if argument not in own]
    options = parse(own, OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, settings, Path(folder))))


def measure(options: dict[str, str], settings: list[str], folder: Path) -> dict[str, Any]:
    """One job."""
    data, use = lesson(options, folder)
    with running([f"serve.folder={folder / 'store'}", "serve.requests_per_minute=null", *settings]) as url:
        client, stop = Client(url), threading.Event()
        model = client.get("models")["data"][0]["id"]
        talking = threading.Thread(target=_talk, args=(url, model, int(options["clients"]), stop), daemon=True)
        talking.start()
        began = time.monotonic()
        body = {"training_file": client.upload(data)["id"], "suffix": "lesson", "use": use}
        numbers = {"learning_rate": float(options["lr"])} if options["lr"] else {}
        numbers |= {"steps": int(options["steps"])} if options["steps"] else {}
        client.post("fine_tuning", "jobs", json={**body, **({"hyperparameters": numbers} if numbers else {})})
        while client.get("fine_tuning", "jobs", "lesson")["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(1.0)
        seconds = time.monotonic() - began
        stop.set()
        talking.join()
        return {"benchmark": "lessons", **options, "seconds": round(seconds, 1), **_outcome(client)}


def lesson(options: dict[str, str], folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a job, and how it is to be used."""
    if options["what"] == "reviews":
        return reviews(folder), {"template": TEMPLATE, "dev": 200, "test": 200}
    lines = fetch(TWEETS).decode("utf-8").splitlines()
    texts = dict.fromkeys(line.split("\t")[2].strip() for line in lines if line.count("\t") >= 2)
    long = [text for text in texts if len(text.split()) >= 10][: int(options["paragraphs"])]
    path = folder / "style.txt"
    path.write_text("\n\n".join(long) + "\n", encoding="utf-8")
    return path, {"dev": int(options["held_out"]), "test": 0}


def _outcome(client: Client) -> dict[str, Any]:
    job = client.get("fine_tuning", "jobs", "lesson")
    dev = [e for e in client.get("fine_tuning", "jobs", "lesson", "metrics")["evaluations"] if e["split"] == "dev"]
    curve = [[e["step"], e["loss"], e["score"]] for e in dev]
    losses = [e["loss"] for e in dev]
    events = client.get("fine_tuning", "jobs", "lesson", "events")["data"]
    versions = [
        {key: version.get(key) for key in ("id", "passed", "promoted", "reason", "perplexity")}
        for version in client.get("versions")["data"]
    ]
    return {
        "status": job["status"],
        "curve": curve,
        "perplexity_falls_by": 1 - math.exp(losses[-1] - losses[0]) if losses else None,
        "versions": versions,
        "live": client.get("versions")["live"],
        "said": [event["message"] for event in events][-8:],
    }


def _talk(url: str, model: str, clients: int, stop: threading.Event) -> None:
    """Let clients chat without pause until the job has ended."""
    while clients and not stop.is_set():
        talk(url, model, 10.0, {**CHAT, "clients": str(clients)}, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
