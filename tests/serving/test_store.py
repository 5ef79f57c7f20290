"""What a server keeps: whole or not at all, below one folder, and gone when it is deleted."""

import json
import threading

import pytest

from zoray.records import ConfigError
from zoray.serving.learning.conversations import Conversations
from zoray.serving.store import NotFound, Store, append_json, read_lines, write_json


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "server")


def version(store, name):
    folder = store.new_version(name)
    folder.mkdir()
    job, _, step = name.partition("@")
    write_json(folder / "meta.json", {"id": name, "job": job, "step": int(step), "created_at": int(step)})


def test_files_come_and_go(store):
    first = store.add_file("mail.csv", b"text,label\n")
    second = store.add_file("../../etc/Notes.TXT", b"abc")
    assert [file["filename"] for file in store.files()] == ["mail.csv", "Notes.TXT"]
    assert store.data_path(second["id"]).read_bytes() == b"abc" and store.data_path(second["id"]).name == "data.txt"
    assert store.file(first["id"])["bytes"] == 11
    store.delete_file(first["id"])
    assert [file["id"] for file in store.files()] == [second["id"]]
    assert not any(b"text,label" in path.read_bytes() for path in store.folder.rglob("*") if path.is_file())
    with pytest.raises(NotFound, match="there is no file"):
        store.file(first["id"])


@pytest.mark.parametrize("name", ["run.py", "a.csv.exe", "noend", "", ".csv/..", "a.parquet"])
def test_files_of_another_kind_are_refused(store, name):
    with pytest.raises(ConfigError, match=r"expected a file of \.csv"):
        store.add_file(name, b"x")


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "a/b", "/etc/passwd", "file-" + "0" * 23, "x\0y", "A", "a" * 41]
)
def test_no_name_leads_out_of_the_folder(store, name):
    for look in (store.file, store.data_path, store.delete_file, store.version_folder, store.job_folder):
        with pytest.raises(NotFound):
            look(name)
    if not name.startswith("file-"):  # which may be a job's name
        with pytest.raises(ConfigError, match="expected a name"):
            store.new_job(name, {}, {})
    with pytest.raises(ConfigError, match="expected a version's name"):
        store.new_version(name)


def test_live_is_a_version_that_there_is_and_has_a_history(store):
    assert store.live() is None and store.live_history() == []
    with pytest.raises(NotFound):
        store.set_live("mail@10", "why")
    version(store, "mail@10")
    version(store, "mail@20")
    store.set_live("mail@20", "passed")
    store.set_live("mail@10", "rolled back")
    assert store.live() == "mail@10" and [e["version"] for e in store.live_history()] == ["mail@20", "mail@10"]
    with pytest.raises(ConfigError, match="mail@10 is live"):
        store.delete_version("mail@10")
    store.delete_version("mail@20")
    assert [v["id"] for v in store.versions()] == ["mail@10"]
    store.set_live(None, "base")
    assert Store(store.folder).live() is None


def test_jobs_have_names_of_their_own(store):
    store.new_job("mail", {"created_at": 2}, {})
    store.new_job("other", {"created_at": 1}, {})
    assert store.jobs() == ["other", "mail"]
    with pytest.raises(ConfigError, match="there is a job mail already"):
        store.new_job("mail", {"created_at": 3}, {})
    version(store, "gone@5")
    with pytest.raises(ConfigError, match="take another name"):
        store.new_job("gone", {"created_at": 3}, {})  # its versions would be mixed up with those of an earlier job
    store.delete_job("mail")
    assert store.jobs() == ["other"]


def test_what_a_killed_server_left_half_done_is_cleared_away(store):
    (store.folder / "files" / ".partial-x").mkdir()
    (store.folder / "files" / ".partial-x" / "data.csv").write_text("secret")
    assert not (Store(store.folder).folder / "files" / ".partial-x").exists()


def test_json_files_are_replaced_as_a_whole_and_lines_survive_a_torn_end(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 0)

    def write(number):
        for _ in range(50):
            write_json(path, {"from": number, "data": [number] * 500})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = json.loads(path.read_text())
        assert found == 0 or found["data"] == [found["from"]] * 500
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    lines = tmp_path / "lines.jsonl"
    append_json(lines, {"a": 1})
    with lines.open("a") as file:
        file.write('{"a": 2')
    assert read_lines(lines) == [{"a": 1}] and read_lines(tmp_path / "none") == []


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_rated_conversations_become_examples_and_pairs_become_preferences(tmp_path):
    kept = Conversations(tmp_path)
    with pytest.raises(ConfigError, match="at least 3 conversations with thumbs up"):
        kept.rows()
    for i in range(4):
        kept.add(talk(f"q{i}", f"good {i}"), True, "base")
    rows = [json.loads(line) for line in kept.rows().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == [f"good {i}" for i in range(4)]
    for i in range(4):
        kept.add(talk(f"q{i}", f"bad {i}"), False, "base")
    rows = [json.loads(line) for line in kept.rows().splitlines()]
    assert rows[1] == {"prompt": talk("q1", "")[:1], "chosen": "good 1", "rejected": "bad 1"}
    changed = kept.all()[0]
    kept.add(changed["messages"], False, "base", changed["id"])  # a change of mind
    assert len(kept.all()) == 8 and len(kept.rows().splitlines()) == 3
    kept.delete(changed["id"])
    assert len(kept.all()) == 7 and not list(tmp_path.glob(f"*{changed['id']}*"))
    with pytest.raises(NotFound):
        kept.delete("../x")


@pytest.mark.parametrize("messages", [[], talk("q", " "), talk("q", "a")[:1], [*talk("q", "a"), *talk("q", "a")[:1]]])
def test_a_conversation_needs_an_answer(tmp_path, messages):
    with pytest.raises(ConfigError, match="expected messages that end with"):
        Conversations(tmp_path).add(messages, True, "base")


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_pairs_of_one_question_do_not_multiply_and_rows_are_bounded(tmp_path):
    kept = Conversations(tmp_path)
    for number in range(40):
        kept.add(talk("Hello", f"{'good' if number % 2 else 'bad'} {number}"), bool(number % 2), "tiny")
    pairs = [json.loads(line) for line in kept.rows().splitlines()]
    assert len(pairs) == 20 * 4 and {pair["rejected"] for pair in pairs} == {f"bad {n}" for n in (32, 34, 36, 38)}
    few = [json.loads(line) for line in kept.rows(most=500).splitlines()]
    assert few == pairs[-len(few) :] and 0 < len(few) < 10


def test_the_latest_conversations_are_told_apart_from_all(tmp_path):
    kept = Conversations(tmp_path)
    ids = [kept.add(talk(f"question {number}", "yes"), True, "tiny")["id"] for number in range(5)]
    assert sorted(kept.ids()) == sorted(ids)
    assert [one["id"] for one in kept.latest(2)] == ids[-2:]
    kept.add(talk("question 0", "yes"), False, "tiny", ids[0])  # rated anew
    assert [one["id"] for one in kept.latest(2)] == [ids[-1], ids[0]]
    (tmp_path / ".talk-x.json.123").write_text("half")
    kept.delete_everything()
    assert kept.ids() == [] and list(tmp_path.iterdir()) == []
