"""`python -m zoray.tuning VERB`: tuning jobs and versions of a running server (zoray.serve), from the command line.

upload FILE                             upload a file, for several jobs
preview FILE_ID|task:NAME [key=value]   show how it would be used
create file=PATH|training_file=ID|task=NAME [name=...] [steps= n_epochs= batch_size= ...] [template= ...]
list, files, status NAME, metrics NAME, events NAME [follow]
pause, resume, stop NAME                stop is for good
delete NAME                             a job that has ended, an upload (file-...) or a version (job@step)
versions, promote VERSION, rollback [VERSION|base]
learning [on|off]                       whether jobs run at all
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import TYPE_CHECKING, Any, get_args, get_origin

from zoray.records import ConfigError
from zoray.records.overrides import mapping_of, setting, unescaped
from zoray.records.paths import user_path
from zoray.records.signatures import unknown_key
from zoray.run.config import guarded
from zoray.serving.client import DEFAULT, URL, Client
from zoray.serving.learning.job_requests import Hyperparameters, NewJob, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

USE, HYPER = tuple(Use.model_fields), tuple(Hyperparameters.model_fields)
SOURCES = ("file", "training_file", "task")
KINDS: dict[str, Any] = {  # the type of each setting of a job: int, float, bool, str, list, dict
    name: get_origin(kind) or kind
    for model in (NewJob, Hyperparameters, Use)
    for name, field in model.model_fields.items()
    for kind in (*get_args(field.annotation), field.annotation)[:1]  # without None
}
FILE_ID = re.compile(r"file-[0-9a-f]{24}")
ENDED = ("succeeded", "failed", "cancelled")
FOLLOW_SECONDS = 1.0  # between looks at a job's events
Found = tuple[Any, str]  # JSON for machines, text for people


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    asked = _parser().parse_args(argv)

    def run() -> int:
        client = Client(asked.url)
        if asked.verb == "events" and asked.follow:
            return _follow(client, asked)
        found, text = VERBS[asked.verb](client, asked)
        print(json.dumps(found) if asked.json else text)
        return 0

    return guarded(run)


def _upload(client: Client, asked: Any) -> Found:
    found = client.upload(user_path(asked.file))
    return found, f"{found['id']}  {found['filename']}, {found['bytes']:,} bytes"


def _files(client: Client, asked: Any) -> Found:
    found = client.get("files")
    rows = [(one["id"], one["filename"], f"{one['bytes']:,}", _when(one["created_at"])) for one in found["data"]]
    return found, _table(("file", "name", "bytes", "uploaded"), rows)


def _preview(client: Client, asked: Any) -> Found:
    found = client.post("files", asked.file, "preview", json=_settings(asked.settings, USE))
    return found, "\n".join(found["lines"])


def _create(client: Client, asked: Any) -> Found:
    given = _settings(asked.settings, (*SOURCES, "validation_file", "name", "seed", *HYPER, *USE))
    if len(sources := [key for key in SOURCES if key in given]) != 1:
        got = " and ".join(sources) or "none of them"
        raise ConfigError(f"expected one of file=PATH, training_file=ID and task=NAME; got {got}")
    uploaded = client.upload(user_path(given.pop("file")))["id"] if "file" in given else None
    request = {key: given[key] for key in ("task", "training_file", "validation_file", "seed") if key in given}
    request |= {"training_file": uploaded} if uploaded else {}
    request |= {"suffix": given["name"]} if "name" in given else {}
    for part, keys in (("hyperparameters", HYPER), ("use", USE)):
        if own := {key: given[key] for key in keys if key in given}:
            request[part] = own
    try:
        job = client.post("fine_tuning", "jobs", json=request)
    except ConfigError:
        if uploaded:  # else each new try would leave another copy
            client.delete("files", uploaded)
        raise
    name = job["id"]
    return job, f"{_line(job)}\nwatch it: python -m zoray.tuning events {name} follow"


def _list(client: Client, asked: Any) -> Found:
    found = client.get("fine_tuning", "jobs")
    rows = []
    for job in found["data"]:
        step = f"{job['step']}/{job['steps']}"
        worth = f"{_worth(job['first'])} -> {_worth(job['last'])}" if job["first"] else ""
        rows.append((job["id"], job["status"], step, job["filename"], worth, job["fine_tuned_model"] or ""))
    return found, _table(("job", "status", "step", "learns from", "held-out rows", "version"), rows)


def _status(client: Client, asked: Any) -> Found:
    job = client.get("fine_tuning", "jobs", asked.name)
    lines = [_line(job), f"tokens: {job['trained_tokens']:,}"]
    if job["first"]:
        lines.append(f"held-out rows: {_worth(job['first'])} -> {_worth(job['last'])} ({job['last']['count']} rows)")
    if job["fine_tuned_model"]:
        lines.append(f"last version that passed the gate: {job['fine_tuned_model']}")
    return job, "\n".join(lines)


def _events(client: Client, asked: Any) -> Found:
    found = client.get("fine_tuning", "jobs", asked.name, "events")
    return found, "\n".join(map(_event, reversed(found["data"])))


def _follow(client: Client, asked: Any) -> int:
    """Print events as they come, until the job has ended."""
    known: set[str] = set()
    while True:
        status = client.get("fine_tuning", "jobs", asked.name)["status"]  # before its events: the last is not missed
        events = client.get("fine_tuning", "jobs", asked.name, "events")["data"]
        for event in reversed(events):
            if event["id"] not in known:
                print(json.dumps(event) if asked.json else _event(event), flush=True)
        known |= {event["id"] for event in events}
        if status in ENDED:
            return 0
        time.sleep(FOLLOW_SECONDS)


def _metrics(client: Client, asked: Any) -> Found:
    found = client.get("fine_tuning", "jobs", asked.name, "metrics")
    rows = [(f"{e['step']}", e["split"], f"{e['loss']:.4f}", _score(e)) for e in found["evaluations"]]
    text = _table(("step", "rows", "loss", "metric"), rows)
    if found["steps"]:
        last = found["steps"][-1]
        text += f"\nlast step {last['step']}: loss {last['loss']:.4f}, {last['seconds']:.2f} s, {last['tokens']} tokens"
    return found, text


def _turn(client: Client, asked: Any) -> Found:
    job = client.post("fine_tuning", "jobs", asked.name, "cancel" if asked.verb == "stop" else str(asked.verb))
    return job, _line(job)


def _delete(client: Client, asked: Any) -> Found:
    name = asked.name
    where = ("versions",) if "@" in name else ("files",) if FILE_ID.fullmatch(name) else ("fine_tuning", "jobs")
    return client.delete(*where, name), f"{name} is deleted"


def _versions(client: Client, asked: Any) -> Found:
    found = client.get("versions")
    rows = []
    for one in found["data"]:
        live = "live" if one["id"] == found["live"] else ""
        measured = one["measured"]
        rows.append((one["id"], live, "passed" if one["passed"] else "did not pass", _score(measured), one["reason"]))
    table = _table(("version", "", "gate", "held-out rows", "why"), rows)
    return found, table if found["live"] else f"{table}\nlive: the base model"


def _promote(client: Client, asked: Any) -> Found:
    found = client.post("versions", asked.name, "promote")
    return found, f"{found['live'] or 'the base model'} is live"


def _rollback(client: Client, asked: Any) -> Found:
    target = asked.name or _before(client.get("versions")) or "base"
    if target == "base":
        target = client.get("models")["data"][0]["id"]  # the base model is the first
    return _promote(client, argparse.Namespace(name=target))


def _before(versions: Mapping[str, Any]) -> str | None:
    """The last version that was live before this one and still exists; None is the base model."""
    live, kept = versions["live"], {one["id"] for one in versions["data"]}
    if live is None:
        raise ConfigError("expected a version to be live; it is the base model. Name one: rollback VERSION")
    for entry in reversed(versions["history"]):
        if entry["version"] != live and (entry["version"] is None or entry["version"] in kept):
            return entry["version"]
    return None


def _learning(client: Client, asked: Any) -> Found:
    found = client.get("learning") if asked.wish is None else client.put("learning", json={"on": asked.wish == "on"})
    return found, f"active learning is {'on' if found['on'] else 'off'}"


VERBS: dict[str, Callable[[Client, Any], Found]] = {
    "upload": _upload, "files": _files, "preview": _preview, "create": _create, "list": _list, "status": _status,
    "events": _events, "metrics": _metrics, "pause": _turn, "resume": _turn, "stop": _turn, "cancel": _turn,
    "delete": _delete, "versions": _versions, "promote": _promote, "rollback": _rollback, "learning": _learning,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoray.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_everywhere()],
    )
    parser.set_defaults(url=None, json=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        one = verbs.add_parser(verb, parents=[_everywhere()])
        if verb in ("upload", "preview"):
            one.add_argument("file", help="a file of rows" if verb == "upload" else "an upload's id, or task:NAME")
        if verb in ("preview", "create"):
            one.add_argument("settings", nargs="*", metavar="key=value", help=f"of use: {', '.join(USE)}")
        if verb in ("status", "events", "metrics", "pause", "resume", "stop", "cancel", "delete", "promote"):
            one.add_argument("name")
        if verb == "events":
            one.add_argument("follow", nargs="?", choices=["follow"], help="keep printing until the job has ended")
        if verb == "rollback":
            one.add_argument("name", nargs="?", metavar="VERSION|base", help="default: the one that was live before")
        if verb == "learning":
            one.add_argument("wish", nargs="?", choices=["on", "off"])
    return parser


def _everywhere() -> argparse.ArgumentParser:
    """Options allowed before a verb and after it; a new parser for each, since a parser stores its defaults."""
    found = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    found.add_argument("--url", help=f"the server's address; else that of {URL}, else {DEFAULT}")
    found.add_argument("--json", action="store_true", help="print the server's answer as JSON")
    return found


def _settings(arguments: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """key=value arguments, each value of its key's type."""
    found = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"expected arguments of the form key=value; got {argument!r}")
        if key not in known:
            raise unknown_key(key, key, "", list(known))
        found[key] = _value(key, text)
    return found


def _value(key: str, text: str) -> Any:
    kind = KINDS.get(key, str)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            said = "a whole number" if kind is int else "a number"
            raise ConfigError(f"expected {key} to be {said}; got {text!r}") from None
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"expected {key} to be true or false; got {text!r}")
        return text == "true"
    if kind is list:
        return [name.strip() for name in text.strip("[]").split(",") if name.strip()]
    if kind is dict:
        if (words := mapping_of(_unquoted(text))) is None:
            raise ConfigError(f"expected {key} as {setting(key, {'no': ' bad', 'yes': ' good'})}; got {text!r}")
        return {label: unescaped(word) for label, word in words.items()}
    return unescaped(_unquoted(text))


def _unquoted(text: str) -> str:
    """A text without the quotes that a run's command line needs and messages print."""
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return re.sub(r'\\(["\\])', r"\1", text[1:-1]) if quoted else text


def _line(job: Mapping[str, Any]) -> str:
    why = f": {job['error']['message']}" if job["error"] else ""
    return f"{job['id']}, from {job['filename']}: {job['status']}, step {job['step']} of {job['steps']}{why}"


def _worth(evaluation: Mapping[str, Any]) -> str:
    return _score(evaluation) or f"loss {evaluation['loss']:.4f}"


def _score(measured: Mapping[str, Any]) -> str:
    score = measured["score"]
    return f"{measured['metric']} {score:.3f}" if measured["metric"] and score is not None else ""


def _event(event: Mapping[str, Any]) -> str:
    return f"{_when(event['created_at'])}  {event['data']['kind']}: {event['message']}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "there are none"
    lines = [head, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
