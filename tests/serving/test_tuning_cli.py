"""`python -m zoray.tuning` against a real server, in the order of a user's story; and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from served import labelled

from zoray.serving import client
from zoray.serving import commands as tuning


@pytest.fixture
def ask(server, monkeypatch, capsys):
    """What a command prints; it has to succeed."""
    monkeypatch.setenv(client.URL, server.url)

    def run(*arguments):
        assert tuning.main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a command is refused with."""

    def run(*arguments, url=None):
        if url:
            monkeypatch.setenv(client.URL, url)
        assert tuning.main(arguments) == 2
        found = capsys.readouterr()
        assert found.out == "" and found.err.startswith("error: ") and found.err.count("\n") == 1
        return found.err

    return run


def test_a_file_is_uploaded_looked_at_learnt_from_and_rolled_back(ask, server, tmp_path):
    """All verbs, as a user meets them."""
    mail = tmp_path / "mail.csv"
    mail.write_bytes(labelled())
    number = ask("upload", str(mail)).split()[0]
    assert number.startswith("file-") and "mail.csv" in ask("files")
    seen = ask("preview", number, "template={text} It was", 'words={bad: " dull", good: " great"}')
    assert "200 rows, choice" in seen and "'bad' as ' dull' (100)" in seen and "It was» great«" in seen

    said = ask("create", f"training_file={number}", "name=cli-mail", "steps=20", "batch_size=2", "dev=20", "test=0")
    assert said.startswith("cli-mail, from mail.csv: ") and "events cli-mail follow" in said
    events = ask("events", "cli-mail", "follow").splitlines()  # until it has ended
    assert "created: learns from mail.csv" in events[0] and "succeeded: 20 steps" in events[-1]
    assert ask("events", "cli-mail").splitlines() == events
    assert "cli-mail, from mail.csv: succeeded, step 20 of 20" in ask("status", "cli-mail")
    assert "(20 rows)" in ask("status", "cli-mail")
    head, *rows = ask("list").splitlines()
    assert head.split()[:3] == ["job", "status", "step"] and any(row.startswith("cli-mail  succeeded") for row in rows)
    assert "last step 20: loss " in ask("metrics", "cli-mail")
    found = json.loads(ask("metrics", "cli-mail", "--json"))
    assert [e["step"] for e in found["evaluations"]] == [0, 10, 20] and len(found["steps"]) == 20

    versions = json.loads(ask("--json", "versions"))
    assert [v["id"] for v in versions["data"] if v["job"] == "cli-mail"] == ["cli-mail@10", "cli-mail@20"]
    assert ask("promote", "cli-mail@10") == "cli-mail@10 is live\n"
    assert ask("promote", "cli-mail@20") == "cli-mail@20 is live\n"
    assert ask("rollback") == "cli-mail@10 is live\n"
    row = next(line for line in ask("versions").splitlines() if line.startswith("cli-mail@10"))
    assert " live " in row
    assert ask("rollback", "base") == "the base model is live\n" and "live: the base model" in ask("versions")

    assert ask("delete", "cli-mail@20") == "cli-mail@20 is deleted\n"
    assert ask("delete", "cli-mail") == "cli-mail is deleted\n" and "cli-mail " not in ask("list")
    assert ask("delete", number) == f"{number} is deleted\n" and number not in ask("files")


def test_a_job_is_held_stopped_and_the_server_need_not_learn(ask, server, tmp_path):
    """From a file of answers, for which there is no metric but the loss."""
    answers = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"The film number {i} is", "completion": " a wonderful thing to see"} for i in range(60)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ask("learning", "off") == "active learning is off\n" == ask("learning")
    ask("create", f"file={answers}", "name=cli-answers", "steps=5000")
    assert json.loads(ask("status", "cli-answers", "--json"))["status"] == "queued"
    assert ask("learning", "on") == "active learning is on\n"
    server.wait(lambda: "loss " in ask("list"), 150)
    assert "cli-answers, from answers.jsonl: paused" in ask("pause", "cli-answers")
    assert ": queued" in ask("resume", "cli-answers")
    assert ": cancelled" in ask("stop", "cli-answers")
    assert "loss " in ask("status", "cli-answers")
    server.wait(lambda: tuning.main(["delete", "cli-answers"]) == 0, 150)  # its step has to end first


def test_a_job_learns_from_a_task_that_zoray_brings_along(ask, server):
    seen = ask("preview", "task:movie_reviews", "train=16", "dev=8", "test=0")
    assert "16 train, 8 dev, 0 test" in seen
    said = ask("create", "task=movie_reviews", "name=cli-task", "steps=2", "train=16", "dev=8", "test=0")
    assert said.startswith("cli-task, from movie_reviews: queued")
    server.wait(lambda: server.job("cli-task")["status"] == "succeeded", 150)
    job = server.openai.fine_tuning.jobs.create(
        model="tiny",
        training_file="task:movie_reviews",
        suffix="cli-task-2",
        extra_body={"use": {"train": 16, "dev": 8, "test": 0}, "hyperparameters": {"steps": 2}},
    )
    assert job.training_file == "task:movie_reviews"
    server.wait(lambda: server.job("cli-task-2")["status"] == "succeeded", 150)
    for name in ("cli-task", "cli-task-2"):
        ask("delete", name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "nobody"], "there is no job nobody"),
        (["promote", "nobody@3"], "there is no version"),
        (["delete", "file-" + "0" * 24], "there is no file file-0000"),
        (["upload", "nowhere.csv"], "can't read nowhere.csv: No such file or directory"),
        (["upload", sys.executable], "expected a file of .csv, .tsv, .jsonl, .txt; got python"),
        (["create", "task=movies"], "expected task to be one of boolq, "),
        (["create", "name=a"], "expected one of file=PATH, training_file=ID and task=NAME; got none of them"),
        (["create", "task=sst2", "file=a.csv"], "got file and task"),
        (["create", "task=sst2", "stpes=3"], "unknown config key 'stpes'"),
        (["create", "task=sst2", "steps=many"], "expected steps to be a whole number; got 'many'"),
        (["create", "task=sst2", "steps=0"], "hyperparameters.steps: Input should be greater than or equal to 1"),
        (["create", "task=sst2", "words=bad"], "expected words as 'words={no: "),
        (["create", "task=sst2", "chat=yes"], "expected chat to be true or false; got 'yes'"),
        (["create", "steps"], "expected arguments of the form key=value; got 'steps'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line(arguments, says, refused, server):
    assert says in refused(*arguments, url=server.url)


def test_a_refused_file_is_not_kept(refused, server, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("text,label\na,1\nb,2\n")
    before = server.http.get("/v1/files").json()
    said = refused("create", f"file={path}", url=server.url)
    assert "has the numbers 1, 2" in said and str(server.folder) not in said and "'words={" in said
    assert server.http.get("/v1/files").json() == before


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:9", "expected a server at http://127.0.0.1:9; it does not answer"),
        ("ftp://127.0.0.1", "expected a server's address such as http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "expected a server's address such as http://127.0.0.1:8000"),
    ],
)
def test_a_server_that_is_not_there_is_said(url, says, refused):
    assert says in refused("list", url=url)
    assert says in refused("list", "--url", url)


def test_it_is_a_command():
    done = subprocess.run([sys.executable, "-m", "zoray.tuning", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(verb in done.stdout for verb in tuning.VERBS if verb != "cancel")
    done = subprocess.run([sys.executable, "-m", "zoray.tuning", "tune"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "invalid choice: 'tune'" in done.stderr


@pytest.mark.parametrize(
    ("live", "history", "target"),
    [
        ("b@2", ["a@1", "b@2"], "a@1"),
        ("a@1", ["a@1", "b@2", "a@1"], "b@2"),
        ("b@2", ["a@1", "gone@1", "b@2"], "a@1"),
        ("a@1", ["a@1"], None),
        ("a@1", ["b@2", None, "a@1"], None),
    ],
)
def test_a_rollback_goes_to_the_version_before_that_is_still_there(live, history, target):
    known = [{"id": "a@1"}, {"id": "b@2"}]
    assert tuning._before({"live": live, "data": known, "history": [{"version": v} for v in history]}) == target
