"""What may be asked of a server, and what it is refused with; how files and tasks become something to learn from."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from zoray.records import ConfigError
from zoray.run.config import group_options
from zoray.scoring.objectives import AnswerNLL, ChoiceNLL, Preference
from zoray.serving import commands
from zoray.serving.learning.experiments import file_of, lessons, objective_of, task_names
from zoray.serving.learning.job_requests import NewJob, Use, plainly
from zoray.tasks.published.movie_reviews import MovieReviews

ID = "file-" + "0" * 24


def nowhere(number):
    raise AssertionError(f"nobody asks for {number}")


def refusal(**request):
    with pytest.raises(ValidationError) as error:
        NewJob(**request)
    first = error.value.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


@pytest.mark.parametrize(
    ("request_", "source"),
    [
        ({"training_file": ID}, ID),
        ({"task": "movie_reviews"}, "task:movie_reviews"),
        ({"training_file": "task:movie_reviews"}, "task:movie_reviews"),  # for clients that insist on a file
        ({"training_file": ID, "suffix": "mail", "seed": 3, "hyperparameters": {"steps": 5}}, ID),
        ({"training_file": ID, "use": {"template": "{text} This is", "words": {"0": " bad", "1": " good"}}}, ID),
    ],
    ids=str,
)
def test_a_job_learns_from_a_file_or_a_task(request_, source):
    job = NewJob(**request_)
    assert job.source == source
    assert NewJob(**job.model_dump(exclude_none=True)) == job  # as it is stored


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({}, ": expected training_file or task; got neither"),
        ({"training_file": ID, "task": "sst2"}, ": expected training_file or task; got both"),
        ({"training_file": "task:sst2", "task": "rte"}, ": expected one task; got training_file and task"),
        ({"training_file": "a" * 65}, "training_file: String should have at most 64 characters"),
        ({"training_file": ID, "path": "/etc/passwd"}, "path: Extra inputs are not permitted"),
        ({"training_file": ID, "use": {"path": "/etc/passwd"}}, "use.path: Extra inputs are not permitted"),
        ({"training_file": ID, "use": {"_target_": "os.system"}}, "use._target_: Extra inputs are not permitted"),
        ({"training_file": ID, "use": {"metric": "f1"}}, "use.metric: Extra inputs are not permitted"),
        ({"training_file": ID, "use": {"kind": "prompt"}}, "use.kind: Input should be 'choice', 'completion', 'chat'"),
        ({"task": "sst2", "use": {"dev": 0}}, "use.dev: Input should be greater than or equal to 1"),
        ({"task": "sst2", "use": {"train": 1.5}}, "use.train: Input should be a valid integer"),
        ({"task": {"_target_": "os.system"}}, "task: Input should be a valid string"),
        ({"training_file": ID, "hyperparameters": {"learning_rate": "nan"}}, "hyperparameters.learning_rate: "),
        ({"training_file": ID, "seed": -1}, "seed: Input should be greater than or equal to 0"),
    ],
    ids=str,
)
def test_what_a_job_may_not_say_is_refused(request_, says):
    assert refusal(**request_).startswith(says)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("steps=3", 3),
        ("seed=7", 7),
        ("test=0", 0),
        ("learning_rate=1e-3", 1e-3),
        ("beta=1", 1.0),
        ("chat=true", True),
        ("space=false", False),
        ("turns=last", "last"),
        ("ignore=[name, id]", ["name", "id"]),
        ('words={no: " bad", 1: " good"}', {"no": " bad", "1": " good"}),
        ("template={text}\\n", "{text}\n"),
        ("name=7", "7"),
    ],
)
def test_the_command_line_reads_a_setting_as_what_the_request_has_it(text, value):
    key = text.partition("=")[0]
    found = commands._settings([text], [key])[key]
    assert found == value and type(found) is type(value)


def test_tasks_are_those_that_need_nothing_of_the_users():
    others = {"file", "mixture", "countdown", "structured", "questions"}  # a path, parts, or a reward
    assert set(task_names()) == set(group_options("task")) - others


def test_a_task_is_the_packages_own_with_other_sizes():
    job = NewJob(task="movie_reviews", use={"train": 64, "dev": 16, "test": 8})
    task, objective = lessons(job, nowhere)
    assert task == MovieReviews(train=64, dev=16, test=8) and objective == ChoiceNLL()
    stored = job.model_dump(exclude_none=True)
    assert stored["use"] == {"chat": False, "train": 64, "dev": 16, "test": 8}
    assert lessons(NewJob(**stored), nowhere) == (task, objective)
    assert lessons(NewJob(task="sst2"), nowhere)[0].path == "stanfordnlp/sst2"
    assert lessons(NewJob(task="drop"), nowhere)[1] == AnswerNLL()


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"task": "movie_review"}, "got 'movie_review'. Did you mean movie_reviews?"),
        ({"task": "file"}, "expected task to be one of boolq, cb, copa, drop, gsm8k, movie_reviews, "),
        ({"task": "countdown"}, "got 'countdown'"),
        ({"task": "../model/hf"}, "got '../model/hf'"),
        ({"training_file": "task:/etc/passwd"}, "got '/etc/passwd'"),
        ({"training_file": "task:"}, "got ''"),
        ({"task": "sst2", "use": {"template": "{text} is"}}, "to have train, dev, test only; got template"),
        ({"task": "sst2", "use": {"text_column": "a", "dev": 5}}, "to have train, dev, test only; got text_column"),
    ],
    ids=str,
)
def test_what_a_task_is_not_is_said(request_, says):
    with pytest.raises(ConfigError) as error:
        lessons(NewJob(**request_), nowhere)
    assert says in str(error.value)


ROWS = {
    "choice": ({"text": "a", "label": "x"}, {"text": "b", "label": "y"}),
    "completion": ({"prompt": "a", "completion": " b"},),
    "chat": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},),
    "preference": ({"prompt": "a", "chosen": " b", "rejected": " c"},),
}


def written(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_the_columns_say_which_likelihood_is_learnt(kind, tmp_path):
    path = written(tmp_path, ROWS[kind])
    suited = {"choice": ChoiceNLL, "preference": Preference}.get(kind, AnswerNLL)
    assert type(objective_of(file_of(Use(), path))) is suited
    task, objective = lessons(NewJob(training_file=ID, use={"train": 3}), lambda number: path)
    assert task.path == str(path) and task.train == 3 and type(objective) is suited


def test_prompts_alone_are_nothing_to_learn_from(tmp_path):
    path = written(tmp_path, [{"prompt": "a"}])
    with pytest.raises(ConfigError, match="got prompts only"):
        objective_of(file_of(Use(), path))


def test_a_text_is_to_be_gone_on_with(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of\nabout six words." for i in range(12)))
    task, objective = lessons(NewJob(training_file=ID), lambda number: path)
    assert task.kind_found == "completion" and objective == AnswerNLL()
    assert {file.name for file in tmp_path.iterdir()} == {"data.txt"}


def test_messages_have_no_paths_of_the_server_and_name_settings_as_requests_do(tmp_path):
    folder = tmp_path / "files" / ID
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError) as error:
        objective_of(file_of(Use(), written(folder, [{"body": "a", "label": "x"}])))
    said = plainly(str(error.value))
    assert said.startswith("the file")
    assert str(tmp_path) in str(error.value) and str(tmp_path) not in said
    assert "text_column=body" in said and "task." not in said
