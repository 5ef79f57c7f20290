"""What is in a request to a server's HTTP side, without engines: odd bodies, files, templates, names and queries."""

from __future__ import annotations

import json
import resource
import time
from itertools import product
from urllib.parse import unquote

import pytest
from gatewayed import JSON, JSON_TYPE, error_of, routes, rows

# What is in a body.

ODD_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"text"',
    "NaN": b"NaN",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "closed deep lists": b'{"messages":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "a huge number": b'{"seed": ' + b"9" * 10_000 + b"}",
    "a huge exponent": b'{"temperature": 1e999999}',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "a zero byte": b'{"model": "a\x00b"}',
    "half a character": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
    "half a name": b'{"\\ud800": 1, "training_file": "\\ud800", "on": "\\ud800"}',
    "many names": json.dumps({f"name{i}": i for i in range(20_000)}).encode(),
    "many numbers": b'{"prompt": [' + b"1," * 1_000_000 + b'"x"], "messages": [' + b"1," * 500_000 + b"1]}",
}
BODY_PATHS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/files/file-000000000000000000000000/preview"),
    ("POST", "/v1/conversations"),
    ("PUT", "/v1/learning"),
)


@pytest.mark.parametrize("kind", ODD_BODIES)
def test_odd_bodies_are_refused_as_wrong(client, gateway, kind):
    for method, path in BODY_PATHS:
        begin = time.monotonic()
        response = client.request(method, path, content=ODD_BODIES[kind], headers=JSON)
        known = (400, 404) if "preview" in path and kind == "many names" else (400,)
        assert response.status_code in known, (path, response.text[:300])
        assert error_of(response)["message"] and len(response.content) < 2000
        assert time.monotonic() - begin < 2
    assert gateway.asked == []


def test_bodies_that_are_not_called_json_are_refused(client):
    body = b'{"messages": [{"role": "user", "content": "a"}]}'
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        "x",
        "application/json2",
    ):
        response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
        assert "application/json" in error_of(response)["message"]
    assert client.post("/v1/chat/completions", content=body, headers=JSON).status_code == 200


def test_unknown_fields_of_jobs_and_uses_are_refused(client):
    number = client.upload(rows()).json()["id"]
    asked = {"training_file": number}
    for more in ({"_target_": "os.system"}, {"use": {"path": "/etc/passwd"}}, {"use": {"_target_": "x"}},
                 {"hyperparameters": {"epochs": 3}}, {"run": {"folder": "/tmp"}},
                 {"use": {"metric": "f1"}}):  # fmt: skip
        error = error_of(client.post("/v1/fine_tuning/jobs", json=asked | more))
        assert "this server knows no such field here" in error["message"]
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


@pytest.mark.parametrize(
    "change",
    [
        {"n": 10_000}, {"n": 0}, {"max_tokens": -1}, {"max_tokens": 10**30}, {"temperature": -1},
        {"temperature": 1e300},
        {"top_p": 0}, {"top_p": 2}, {"stop": ["x"] * 1000}, {"stop": ""}, {"stop": ["x" * 10_000]}, {"seed": -1},
        {"seed": 2**64}, {"logit_bias": {"x": 1}}, {"logit_bias": {str(i): 1 for i in range(5000)}},
        {"stream": "maybe"},
        {"logit_bias": {"1": 1e9}}, {"presence_penalty": 100}, {"frequency_penalty": -3}, {"user": "x" * 10_000},
        {"stream_options": {"include_usage": True}}, {"model": ["tiny"]}, {"model": "x" * 1000},
    ],
)  # fmt: skip
def test_fields_that_could_cost_without_bound_are_bounded(client, gateway, change):
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
                       ("/v1/completions", {"prompt": "a"})):  # fmt: skip
        assert client.post(path, json=body | change).status_code == 400
    assert gateway.asked == []


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []}, {"messages": [{"role": "user", "content": "a"}] * 1001}, {"messages": [{"role": "root"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
        {"messages": [{"role": "user", "content": None}]}, {"top_logprobs": 21, "logprobs": True}, {"top_logprobs": 3},
        {"response_format": {"type": "structural_tag"}}, {"response_format": {"type": "json_schema"}},
    ],
)  # fmt: skip
def test_chats_that_are_more_than_text_are_refused(client, gateway, change):
    body = {"messages": [{"role": "user", "content": "a"}], **change}
    assert client.post("/v1/chat/completions", json=body).status_code == 400 and gateway.asked == []


@pytest.mark.parametrize(
    "change",
    [{"prompt": ["a"] * 33}, {"prompt": ["a"] * 30, "n": 16}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]},
     {"prompt": [[1], ["a"]]}, {"best_of": 1000}, {"logprobs": 1, "echo": True, "stream": True}, {"logprobs": 21},
     {"logprobs": -1}, {"max_tokens": 0}],
)  # fmt: skip
def test_completions_are_bounded_in_number(client, gateway, change):
    assert client.post("/v1/completions", json={"prompt": "a"} | change).status_code == 400 and gateway.asked == []


def shaped(client, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
    return client.post("/v1/chat/completions", json=body).status_code


def test_schemas_whose_grammar_may_explode_are_refused(client, gateway):
    deep = {"type": "string"}
    for _ in range(12):
        deep = {"type": "object", "properties": {"a": deep}}
    for schema in ({"type": "string", "pattern": "(a|b)*a(a|b){30}"}, {"type": "string", "minLength": 10**9}, deep,
                   {"type": "array", "items": {}, "minItems": 10**9}, {"$ref": "http://evil.example"},
                   {"enum": ["x" * 100] * 200}, {"properties": []}, {"anyOf": {}}, {"items": 1}):  # fmt: skip
        assert shaped(client, schema) == 400, schema
    person = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    noted = {**person, "$defs": {"A": {"type": "integer", "title": "A"}}, "properties": {"age": {"$ref": "#/$defs/A"}}}
    assert shaped(client, person) == 200 and [
        body["response_format"]["json_schema"]["schema"] for _, body in gateway.asked
    ] == [person]
    assert shaped(client, noted) == 200 and gateway.asked[1] == gateway.asked[0]


def test_what_reaches_the_engine_is_what_openai_documents(client, gateway):
    more = {"chat_template": "{{ x }}", "prompt_embeds": "x", "vllm_xargs": {"a": 1}, "request_id": "1", "priority": -5,
            "truncate_prompt_tokens": 1, "structured_outputs": {"regex": "x"}, "cache_salt": "x",
            "tools": []}  # fmt: skip
    said = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "reasoning": "x"}
    message = {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}
    known = {"model": "tiny", "stop": ["."], "n": 2, "temperature": 0.5, "logit_bias": {"5": 1.0}, "stream": False}
    assert client.post("/v1/chat/completions", json={**more, **known, "messages": [message, said]}).status_code == 200
    clean = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
    assert gateway.asked == [("chat", {**known, "messages": clean})]
    more |= {"suffix": "", "add_special_tokens": False}
    assert client.post("/v1/completions", json={**more, **known, "prompt": "a", "echo": True}).status_code == 200
    assert gateway.asked[1:] == [("completions", {**known, "prompt": "a", "echo": True})]


# Uploads.


@pytest.mark.parametrize("name", ["a.py", "a.parquet", "a.csv.zip", "a.json", "a", "", ".csv.", "csv", "a.csv\0.exe"])
def test_files_of_other_types_are_refused(client, name):
    assert client.upload(b"text,label\n", name).status_code == 400
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("data", "what"),
    [(b"PK\x03\x04rest", "ZIP"), (b"\x1f\x8b\x08rest", "gzip"), (b"PAR1rest", "Parquet"), (b"text\0label", "binary"),
     (b"\x7fELF\x02\0\0", "binary"), (b"x" * 10_000_000, "lines of at most"), (b"a\n" + b"x" * 1_048_577, "lines of")],
)  # fmt: skip
def test_what_is_no_text_is_refused_whatever_it_is_called(client, data, what):
    for name in ("a.csv", "a.jsonl", "a.txt"):
        assert what in error_of(client.upload(data, name))["message"]
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd.csv", "..\\..\\boot.csv", "/root/.ssh/keys.csv", "C:\\Users\\me\\mail.csv",
             "a\r\nb.csv",
             "\u202egnp.csv", "😀.csv", "x" * 5000 + ".csv"],
)  # fmt: skip
def test_a_files_name_is_only_shown(client, gateway, name):
    found = client.upload(rows(), name)
    if found.status_code == 200:
        shown = found.json()["filename"]
        assert "/" not in shown and "\\" not in shown and shown.isprintable() and len(shown) <= 100
    folder = gateway.inner.store.folder
    inside = {path.name for path in folder.glob("files/*/*")}
    assert inside <= {"data.csv", "meta.json"} and [path.name for path in folder.parent.iterdir()] == ["store"]


def test_a_windows_path_is_not_shown(client):
    assert client.upload(rows(), "C:\\Users\\me\\mail.csv").json()["filename"] == "mail.csv"


BOUNDARY = b"--b\r\n"
FILE = b'Content-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
MALFORMED = {
    "nothing": b"",
    "no end": BOUNDARY + FILE + b"text,label\n",
    "no boundary": FILE + b"text,label\n",
    "only an end": b"--b--\r\n",
    "no name": BOUNDARY + b"Content-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
    "no disposition": BOUNDARY + b"\r\nx\r\n--b--\r\n",
    "no file name": BOUNDARY + b'Content-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
    "other field": BOUNDARY + b'Content-Disposition: form-data; name="x"; filename="a.csv"\r\n\r\nx\r\n--b--\r\n',
    "two files": (BOUNDARY + FILE + b"x\r\n") * 2 + b"--b--\r\n",
    "many fields": (BOUNDARY + b'Content-Disposition: form-data; name="f"\r\n\r\nx\r\n') * 1000 + b"--b--\r\n",
    "a large field": BOUNDARY + b'Content-Disposition: form-data; name="f"\r\n\r\n' + b"x" * 9999 + b"\r\n--b--\r\n",
    "many headers": BOUNDARY + b"X: y\r\n" * 10_000 + FILE + b"x\r\n--b--\r\n",
    "a long header": BOUNDARY + b"X: " + b"y" * 1_000_000 + b"\r\n" + FILE + b"x\r\n--b--\r\n",
    "zero bytes": BOUNDARY + b"\0\0\0: \0\r\n\r\n\0\r\n--b--\r\n",
    "random bytes": bytes(range(256)) * 100,
    "bare line ends": (BOUNDARY + FILE + b"x\r\n--b--\r\n").replace(b"\r\n", b"\n"),
    "another purpose": BOUNDARY
    + FILE
    + b'x\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nevil\r\n--b--\r\n',
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_forms_are_refused(client, kind):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert error_of(client.post("/v1/files", content=MALFORMED[kind], headers=headers))["code"] == 400
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    "kind", ["", "text/csv", "multipart/mixed; boundary=b", "multipart/form-data", "multipart/form-data; boundary=",
             "multipart/form-data; boundary=" + "b" * 10_000, "multipart/form-data; boundary=\xff", "application/json"],
)  # fmt: skip
def test_forms_of_odd_types_are_refused(client, kind):
    content = BOUNDARY + FILE + b"x\r\n--b--\r\n"
    response = client.post("/v1/files", content=content, headers={"Content-Type": kind.encode("latin-1")})
    assert error_of(response)["code"] == 400


def test_odd_but_right_forms_are_taken(client):
    content = BOUNDARY + FILE + rows() + b"\r\n--b--\r\n"
    for kind in ("Multipart/Form-Data; boundary=b", "multipart/form-data; charset=nonsense; boundary=b"):
        response = client.post("/v1/files", content=content, headers={"Content-Type": kind})
        assert response.status_code == 200 and response.json()["bytes"] == len(rows())


def test_large_uploads_lie_in_no_temporary_file(client, monkeypatch):
    import tempfile

    def refuse(*_, **__):
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "_TemporaryFileWrapper", refuse, raising=False)
    assert client.upload(rows(200_000)).status_code == 200


DANGEROUS = {
    "formulas.csv": b"text,label\n" + b"=cmd|' /C calc'!A0 %d,good\n@SUM(1+1)*cmd|' /C calc'!A0 %d,bad\n" * 1,
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
    "deep cell.csv": b'prompt,completion\n"' + b"[" * 100_000 + b'",x\n',
    "wide.jsonl": json.dumps({f"c{i}": i for i in range(50_000)}).encode() + b"\n",
    "nan.jsonl": b'{"text": NaN, "label": Infinity}\n' * 20,
    "numbers.jsonl": b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n",
    "quotes.csv": b'text,label\n"' + b"x,y\n" * 10_000,
    "surrogates.jsonl": b'{"text": "\\ud800 %d", "label": "\\udfff"}\n' * 20,
    "surrogate names.jsonl": b'{"\\ud800": "a", "label": "b"}\n' * 20,
    "utf16.csv": "text,label\na,b\n".encode("utf-16"),
    "latin.csv": b"text,label\nfilm\xe9,good\n",
    "bare.csv": b"text,label\r" * 10,
    "empty.csv": b"",
    "blank.txt": b"\n \n" * 100_000,
    "spaces.txt": b"\n" + b" " * 1_000_000 + b"x",
    "commas.csv": b"," * 100_000 + b"\n" + b"," * 100_000,
    "one row.csv": b"text,label\nx,y\n",
    "repeats.jsonl": b'{"prompt": "a", "completion": "b"}\n' * 1000,
    "answers first.jsonl": b'{"messages": [{"role": "assistant", "content": "a %d"}, {"role": "user", "content": "b"}, '
    b'{"role": "assistant", "content": "c"}]}\n' * 20,
    "roles.jsonl": b'{"messages": [{"role": "__class__", "content": {}}]}\n' * 20,
    "pickle.txt": b"cos\nsystem\n(S'touch /tmp/x'\ntR.",
}


@pytest.mark.parametrize("name", DANGEROUS)
def test_dangerous_files_are_data_or_mistakes_and_cost_little(client, name):
    found = client.upload(DANGEROUS[name], name)
    assert found.status_code == 200, found.text
    number, begin = found.json()["id"], time.monotonic()
    for path, body in ((f"/v1/files/{number}/preview", {}), ("/v1/fine_tuning/jobs", {"training_file": number})):
        response = client.post(path, json=body)
        assert response.status_code == 400, response.text
        assert str(client.app) not in response.text and "/files/" not in error_of(response)["message"]
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("column", ["__class__", "{text}", "%s", "a b", "лейбл", "0", "$ref", "../x", "'; DROP TABLE"])
def test_odd_names_of_columns_are_only_names(client, column):
    number = client.upload(rows(label=column)).json()["id"]
    use = {"label_column": column}
    lines = client.post(f"/v1/files/{number}/preview", json=use).json()["lines"]
    assert repr(column) in lines[1] and "» good«" in "".join(lines)


# Templates.


@pytest.mark.parametrize(
    "template",
    ["{0.__class__}", "{text.__class__}", "{text!r:>9999999999}", "{text:>9999999999}", "{text.__init__.__globals__}",
     "{text[0]}", "{}", "{0}", "{__import__}", "{text}{nothing}", "{{text}}{% for x in y %}", "{text!r}",
     "$" + "{text.x}"],
)  # fmt: skip
def test_a_template_is_text_with_columns_and_never_evaluated(client, template):
    number = client.upload(rows()).json()["id"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = client.post(f"/v1/files/{number}/preview", json={"template": template})
    said = response.text
    assert response.status_code in (200, 400)
    assert not any(text in said for text in ("<class", "built-in", "<module", "'film", "wrapper")), said
    if response.status_code == 200:
        kept = template.replace("{text}", "film 0")
        assert kept.partition("film 0")[2].strip()[:8] in said or kept.partition("film 0")[0].strip()[:8] in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_template_does_not_multiply_long_texts(client):
    number = client.upload(rows()).json()["id"]
    response = client.post(f"/v1/files/{number}/preview", json={"template": "{text}" * 600})
    assert "at most 10 columns" in error_of(response)["message"]
    response = client.post(f"/v1/files/{number}/preview", json={"template": "{" * 4000})
    assert response.status_code == 400


# Names in paths.

ESCAPES = (
    "..", "../x", "../secret.csv", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fetc/passwd", "%00", "a%00b",
    "%ff%fe", "..%5c..%5cx",
    "%2fetc%2fpasswd", "*", "file-*", "job@*", "~", "-", ".partial-x", "x" * 9000, "%0a", "mail%0a", "%F0%9F%98%80",
    "file-" + "0" * 24, "a@1", "//", "{0.__class__}",
)  # fmt: skip


def test_no_name_in_a_path_leads_anywhere(client, gateway):
    secret = gateway.inner.store.folder.parent / "secret.csv"
    secret.write_text("a secret")
    for method, _, pattern in routes(client):
        if "{" not in pattern:
            continue
        for escape in ESCAPES:
            path = pattern.split("{")[0] + unquote(escape) + pattern.rpartition("}")[2]
            scope = {"method": method, "path": path, "headers": [(b"host", b"localhost"), (b"content-type", JSON_TYPE)]}
            body = b"{}" if method == "POST" else b""
            status, _, said = client.raw(scope, {"type": "http.request", "body": body, "more_body": False})
            assert status in (404, 405, 400) or path.strip() == "/", (method, path, said)
            assert b"a secret" not in said and b"root:" not in said
    assert secret.read_text() == "a secret" and {p.name for p in secret.parent.iterdir()} == {"secret.csv", "store"}


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=0", "limit=" + "9" * 30, "limit=x", "limit=NaN", "after=../x", "after=%00",
              "limit=1&limit=2",
              "after=" + "x" * 5000, "%ff=%ff", "limit=", "after=\xff", "limit=" + "9" * 5000],
)  # fmt: skip
def test_odd_queries_are_answered_or_refused(client, query):
    for path in ("/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/x/events"):
        assert client.get(f"{path}?{query}").status_code in (200, 400, 404)
    status, _, _ = client.raw({"path": "/v1/fine_tuning/jobs", "query_string": b"after=\xff\xfe&limit=\x00"})
    assert status in (400, 404)


def test_methods_that_a_route_does_not_have_are_refused(client):
    have = {(method, path) for method, path, _ in routes(client)}
    paths = {path for _, path in have}
    for method, path in product(("HEAD", "OPTIONS", "PUT", "PATCH", "POST", "DELETE", "TRACE", "BREW"), paths):
        if (method, path) not in have:
            assert client.request(method, path).status_code in (404, 405), (method, path)


def test_a_slash_too_many_leads_nowhere(client):
    response = client.get("/v1/models/", headers={"Host": "127.0.0.1"})
    assert response.status_code == 404 and "location" not in response.headers


# Jobs.


def test_a_jobs_name_is_its_own(client):
    number = client.upload(rows()).json()["id"]
    asked = {"training_file": number, "suffix": "mail"}
    assert client.post("/v1/fine_tuning/jobs", json=asked).json()["status"] == "queued"
    assert "there is a job mail already" in error_of(client.post("/v1/fine_tuning/jobs", json=asked))["message"]
    unnamed = [client.post("/v1/fine_tuning/jobs", json={"training_file": number}).json()["id"] for _ in range(3)]
    assert len(set(unnamed)) == 3
    for name in ("../x", "A", "a/b", ".x", "", "x\n", "a" * 41, "x@5", "\u202e", "*"):
        response = client.post("/v1/fine_tuning/jobs", json={"training_file": number, "suffix": name})
        assert response.status_code == 400 or name == "", (name, response.text)
    for file in ("../../etc/passwd", "/etc/passwd", "file-x", "*", "\0"):
        assert client.post("/v1/fine_tuning/jobs", json={"training_file": file}).status_code == 404


NOT_FINITE = (
    '{"kind": "evaluation", "step": 0, "split": "dev", "loss": null, "score": null, "count": 20, "tokens": 8, '
    '"seconds": 0.1, "digest": "00", "metric": "accuracy", "others": {}}\n'
    '{"kind": "step", "step": 1, "loss": null, "score": null, "lr": 0.1, "tokens": 26, "seconds": 0.1}\n'
)


def test_a_job_whose_numbers_are_not_finite_is_shown(client, gateway):
    number = client.upload(rows()).json()["id"]
    client.post("/v1/fine_tuning/jobs", json={"training_file": number, "suffix": "mail"})
    run = gateway.inner.store.folder / "jobs" / "mail" / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(NOT_FINITE)
    for path in ("", "/mail", "/mail/metrics", "/mail/events"):
        response = client.get(f"/v1/fine_tuning/jobs{path}")
        assert response.status_code == 200 and "NaN" not in response.text, response.text


def test_a_preview_while_a_job_reads_leaves_a_text_alone(client, gateway):
    text = b"\n\n".join(b"story %d of many words and of a few more words" % i for i in range(30))
    number = client.upload(text, "notes.txt").json()["id"]
    response = client.post("/v1/fine_tuning/jobs", json={"training_file": number, "suffix": "mail"})
    assert response.status_code == 200, response.text
    path = gateway.inner.store.folder / "files" / number / "data.txt"
    before = path.stat()
    assert client.post(f"/v1/files/{number}/preview", json={}).status_code == 200
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert {one.name for one in path.parent.iterdir()} == {"data.txt", "meta.json"}
