"""Fine-tuning jobs as clients of OpenAI's API ask for them, to a server's HTTP side without engines."""

from __future__ import annotations

import json

import pytest
from gatewayed import error_of, rows

from zoray.serving.learning.experiments import experiment_of
from zoray.serving.learning.job_requests import NewJob


def job(client, **fields):
    return client.post("/v1/fine_tuning/jobs", json={"training_file": client.upload(rows()).json()["id"], **fields})


def stored_experiment(gateway):
    """What the job `mail` will run."""
    store = gateway.inner.store
    stored = json.loads((store.folder / "jobs" / "mail" / "request.json").read_text())
    return experiment_of(gateway.settings, store, "mail", NewJob.stored(stored))


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, {"n_epochs": 12, "steps": 60, "batch_size": 16, "learning_rate": 0.1, "learning_rate_multiplier": 1}),
        ({"hyperparameters": {"n_epochs": 3}}, {"n_epochs": 3, "steps": 15, "batch_size": 16}),
        ({"hyperparameters": {"n_epochs": 2, "batch_size": 4}}, {"n_epochs": 2, "steps": 40, "batch_size": 4}),
        ({"hyperparameters": {"steps": 3}}, {"n_epochs": 0.6, "steps": 3}),
        (
            {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}},
            {"n_epochs": 12, "steps": 60, "batch_size": 16, "learning_rate_multiplier": 1},
        ),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0.5}},
            {"learning_rate": 0.05, "learning_rate_multiplier": 0.5},
        ),
        ({"hyperparameters": {"learning_rate": 0.3}}, {"learning_rate": 0.3, "learning_rate_multiplier": 3}),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}}},
            {"n_epochs": 1, "steps": 10, "batch_size": 8},
        ),
    ],
)
def test_hyperparameters_of_openais_are_taken_and_shown_as_they_are(client, gateway, fields, numbers):
    """Of 100 rows 80 are learnt from."""
    made = job(client, suffix="mail", **fields)
    assert made.status_code == 200, made.text
    found = client.get("/v1/fine_tuning/jobs/mail").json()
    assert found == made.json() and found["hyperparameters"].items() >= numbers.items()
    assert found["method"] == {"type": "supervised", "supervised": {"hyperparameters": found["hyperparameters"]}}
    experiment = stored_experiment(gateway)
    assert (experiment.run.steps, experiment.run.batch) == (found["steps"], found["hyperparameters"]["batch_size"])
    assert experiment.optimizer.lr == pytest.approx(found["hyperparameters"]["learning_rate"])


def test_a_jobs_other_fields_of_openais_are_kept_and_shown(client):
    found = job(client, suffix="mail", seed=7, metadata={"team": "b"}, integrations=[]).json()
    assert (found["seed"], found["metadata"], found["integrations"]) == (7, {"team": "b"}, [])
    other = job(
        client, metadata=None, method=None, hyperparameters=None, validation_file=None, integrations=None
    ).json()
    assert other["seed"] == 0 and other["metadata"] is None and other["validation_file"] is None


PAIRS = b'{"prompt": "q%d", "chosen": "yes", "rejected": "no"}\n'


def test_a_job_of_preferences_is_called_dpo(client):
    number = client.upload(b"".join(PAIRS % i for i in range(40)), "pairs.jsonl").json()["id"]
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
    found = job(client, training_file=number, method=dpo).json()
    assert found["method"]["type"] == "dpo" and found["hyperparameters"]["beta"] == 0.3 and found["steps"] == 2
    assert job(client, training_file=number).json()["method"]["dpo"]["hyperparameters"]["beta"] == 0.1
    error = error_of(job(client, training_file=number, method={"type": "supervised"}))
    assert "expected method dpo, since the rows have preferences; got supervised" in error["message"]


def test_a_validation_file_is_what_is_held_out(client, gateway):
    held_out = client.upload(
        b"text,label\n" + b"".join(b"other %d,%s\n" % (i, (b"good", b"bad")[i % 2]) for i in range(30))
    )
    number = held_out.json()["id"]
    found = job(client, suffix="mail", validation_file=number).json()
    assert found["validation_file"] == number and found["hyperparameters"]["n_epochs"] == round(60 * 16 / 90, 2)
    splits = stored_experiment(gateway).task.load()
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [90, 30, 10]
    assert all("other" in example.prompt for example in splits.dev)
    assert not any("other" in example.prompt for example in (*splits.train, *splits.test))
    assert client.delete(f"/v1/files/{number}").status_code == 200
    assert client.get("/v1/fine_tuning/jobs/mail").json()["status"] == "cancelled"
    assert error_of(job(client, validation_file=number))["code"] == 404
    rows = b"text,label\n" + b"".join(b"text %d,%s\n" % (i, (b"good", b"bad")[i % 2]) for i in range(30))
    one, same = (client.upload(rows).json()["id"] for _ in range(2))
    error = error_of(job(client, training_file=one, validation_file=same))
    assert error["code"] == 400 and "all of its rows are held out as well" in error["message"]
    assert job(client, validation_file=client.upload(b"prompt,completion\na,b\n" * 9).json()["id"]).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method.type", "objective=reward"),
        (
            {"method": {"type": "supervised", "dpo": {}}},
            "method",
            "expected supervised beside type supervised; got dpo",
        ),
        ({"method": {"type": "dpo"}}, None, "expected method supervised, since the rows have no preferences; got dpo"),
        ({"hyperparameters": {"beta": 0.1}}, None, "expected beta with preferences only"),
        ({"hyperparameters": {"n_epochs": 3, "steps": 5}}, "hyperparameters", "expected steps or n_epochs; got both"),
        ({"hyperparameters": {"learning_rate": 1, "learning_rate_multiplier": 2}}, "hyperparameters", "got both"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than or equal to 1; got 0"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "valid integer"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e5}}, None, "expected a learning rate below 100; got 10000"),
        (
            {
                "hyperparameters": {"n_epochs": 2},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            },
            None,
            "expected n_epochs once; got it in hyperparameters and in method.supervised",
        ),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
            "integrations",
            "this server sends numbers nowhere",
        ),
        ({"metadata": {"a": 5}}, "metadata.a", "valid string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "expected at most 16 of them; got"),
        ({"validation_file": "file-" + "0" * 24}, None, "there is no file"),
        (
            {"training_file": "task:movie_reviews", "validation_file": "file-" + "0" * 24},
            None,
            "held-out rows of its own",
        ),
    ],
)
def test_what_means_nothing_here_is_refused_with_what_to_say_instead(client, fields, param, said):
    error = error_of(job(client, **fields))
    assert error["code"] in (400, 404) and error["param"] == param and said in error["message"], error
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []
