"""A real server among strangers: what its OpenAPI allows, odd requests, broken connections, data that are deleted."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import schemathesis
from gatewayed import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from odd import Odd, ask
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import labelled

from zoray.models.folder import cache_dir

REQUESTS = int(os.environ.get("ZORAY_FUZZ_REQUESTS", "1000"))
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def left(server):
    """The server, of which only what was there before is left afterwards."""
    assert server.ask("tiny")  # its engine may be starting yet
    kinds = {"files": "/v1/files", "jobs": "/v1/fine_tuning/jobs", "talks": "/v1/conversations"}

    def names(kind):
        return {one["id"] for one in server.http.get(kinds[kind]).json()["data"]}

    before, versions = {kind: names(kind) for kind in kinds}, server.http.get("/v1/versions").json()
    yield server
    server.http.post(f"/v1/versions/{versions['live'] or 'tiny'}/promote")
    for name in names("jobs") - before["jobs"]:
        server.http.post(f"/v1/fine_tuning/jobs/{name}/cancel")
    for kind in ("files", "jobs", "talks"):
        while new := names(kind) - before[kind]:  # a list shows only so many
            for name in new:
                assert server.http.delete(f"{kinds[kind]}/{name}").status_code == 200
    for version in server.http.get("/v1/versions").json()["data"]:
        if version["id"] not in {known["id"] for known in versions["data"]}:
            assert server.http.delete(f"/v1/versions/{version['id']}").status_code == 200
    server.http.put("/v1/learning", json={"on": True})


@pytest.fixture(scope="module")
def described(left):
    """What the server says that it can be asked; all but what would take other tests' data or the live version."""
    schema = schemathesis.openapi.from_url(f"{left.url}/openapi.json")
    schema = schema.exclude(method="DELETE", path="/v1/data").exclude(method="PUT", path="/v1/learning")
    return schema.exclude(path="/v1/versions/{version}/promote")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_as_the_openapi_says(left, described, mode):
    statuses, number = Counter(), left.upload("described.csv", labelled(40))
    known = {"number": number, "training_file": number, "model": "tiny", "name": f"described-{mode.name.lower()}"}
    body = {"training_file": number, "suffix": known["name"], "hyperparameters": {"steps": 1}}
    left.http.post("/v1/fine_tuning/jobs", json=body).raise_for_status()

    def check(case):
        if case.path.endswith("completions") and isinstance(case.body, dict):
            case.body["max_tokens"] = 4  # the tests are not to wait for long answers
        if mode is GenerationMode.POSITIVE and case.method != "DELETE":  # of what there is
            case.path_parameters |= {name: known[name] for name in case.path_parameters if name in known}
            if isinstance(case.body, dict):
                case.body |= {name: known[name] for name in ("model", "training_file") if name in case.body}
                if "training_file" in case.body:
                    case.body["hyperparameters"] = {"steps": 1}
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    bounds = settings(
        max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    for result in described.get_all_operations():
        operation = result.ok()
        with suppress(Unsatisfiable):  # nothing of it can be wrong
            bounds(given(operation.as_strategy(generation_mode=mode))(check))()
    print(dict(statuses))
    assert sum(statuses.values()) > 50 and statuses[400 if mode is GenerationMode.NEGATIVE else 200] > 20


def test_odd_requests_do_no_harm(left):
    places = (left.folder.parent, Path.cwd())
    before, said = [set(os.listdir(place)) for place in places], left.ask("tiny", tokens=16)

    async def main():
        async with httpx.AsyncClient(base_url=left.url, timeout=120) as http:
            return await ask(http, Odd(0), REQUESTS, parallel=4)

    begin = time.monotonic()
    statuses = asyncio.run(main())
    print(f"{REQUESTS} requests in {time.monotonic() - begin:.0f} s: {dict(sorted(statuses.items()))}")
    assert statuses[200] > REQUESTS / 5 and statuses[400] > REQUESTS / 10  # neither all wrong nor all right
    assert [set(os.listdir(place)) for place in places] == before
    assert left.ask("tiny", tokens=16) == said
    left.http.put("/v1/learning", json={"on": True}).raise_for_status()
    number = left.upload("after.csv", labelled(60))
    body = {"training_file": number, "suffix": f"after-{time.time_ns()}", "hyperparameters": {"steps": 1}}
    job = left.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    left.wait(lambda: left.job(job)["status"] == "succeeded", 120)  # and so have all before it ended
    going = {one["id"]: one["status"] for one in left.http.get("/v1/fine_tuning/jobs?limit=100").json()["data"]}
    assert all(status in (*ENDED, "paused") for status in going.values()), going


def sent(server, *pieces, pause=0.0):
    """The answer to raw bytes, sent in pieces; nothing where the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            return connection.recv(1 << 16)
        except (ConnectionError, TimeoutError):
            return b""


HEAD = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\ntext,label\n'


@pytest.mark.parametrize(
    "pieces",
    [
        (HEAD + b"Content-Length: 10\r\n\r\n" + PART,),  # less than there is
        (HEAD + b"Content-Length: -1\r\n\r\n" + PART,),
        (HEAD + b"Content-Length: 10\r\nContent-Length: 500\r\n\r\n" + PART,),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/files HTTP/1.1\r\n\r\n",),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + PART,),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + PART,),
        (HEAD + b"Content-Length: 999999999999\r\n\r\n" + PART,),
        (HEAD + b"Content-Length: 0\r\n\r\n",),
        (b"POST /v1/files HTTP/1.1\r\n\r\n",),  # no host
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",),
        (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1/health?\r\n\r\n",),
        (b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",),
        (b"GET /../../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",),
        (b"GET /v1/files/..%2f..%2flive.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",),
        (b"GET /v1/models?\xff\xfe HTTP/1.1\r\nHost: 127.0.0.2.evil\r\n\r\n",),
        (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",),
        (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 20_000 + b"Origin: http://evil\r\n\r\n",),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",),  # TLS
        (b"\0" * 1000,),
    ],
)
def test_broken_requests_are_refused_or_hung_up_on(server, pieces):
    found = sent(server, *pieces)
    assert not found or 400 <= int(found[9:12]) < 500, found[:500]
    assert b"root:" not in found and b'"version"' not in found
    assert server.http.get("/health").status_code == 200


def test_what_is_broken_off_leaves_nothing_and_others_are_answered_meanwhile(server):
    files = server.http.get("/v1/files").json()["data"]
    lying = HEAD + b"Content-Length: 100000\r\n\r\n" + PART  # and no more
    slow = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    slow += b"Content-Length: 99\r\n"
    waiting = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(60)]
    for number, connection in enumerate(waiting):
        connection.sendall((lying, slow + b"\r\n{", slow)[number % 3])
    begin = time.monotonic()
    assert server.ask("tiny", tokens=2) and server.http.get("/v1/files").json()["data"] == files
    assert time.monotonic() - begin < 20
    for connection in waiting:
        connection.close()
    assert server.ask("tiny", tokens=2) and server.http.get("/v1/files").json()["data"] == files


def test_an_upload_without_end_is_refused(server):
    size = 0

    def endless():
        nonlocal size
        yield PART
        for _ in range(200):
            size += 1 << 20
            yield b"x" * (1 << 20)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with suppress(httpx.TransportError):  # hung up on while it was still sending
        assert error_of(server.http.post("/v1/files", content=endless(), headers=headers))["code"] == 413
    assert size > 50 << 20 and server.http.get("/health").status_code == 200


def test_clients_that_hang_up_in_a_stream_hold_nothing(server):
    body = {"messages": [{"role": "user", "content": "It was"}], "max_tokens": 200, "n": 8, "stream": True}

    def hang_up():
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")

    begin = time.monotonic()
    server.http.post("/v1/chat/completions", json={**body, "stream": False}).raise_for_status()
    whole = time.monotonic() - begin  # of one that is not hung up on
    threads = [threading.Thread(target=hang_up) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(1)
    begin = time.monotonic()
    assert server.ask("tiny", tokens=2)
    assert time.monotonic() - begin < 2 + whole


def test_nothing_but_its_own_port_listens_and_that_only_here(server):
    listening = {}
    for process in server.processes(""):
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(connection.laddr.ip)
                here = getattr(address, "ipv4_mapped", None) or address
                listening[connection.laddr.port] = (str(here), here.is_loopback)
    assert listening[server.port] == ("127.0.0.1", True) and len(listening) > 5
    assert all(is_here for _, is_here in listening.values()), listening


def holding(mark: bytes, places, since: float = 0.0):
    """Files that hold something, among those that were written since."""
    found = []
    for path in (path for place in map(Path, places) for path in (place, *place.rglob("*"))):
        try:
            fresh = path.is_file() and path.stat().st_mtime >= since and path.stat().st_size < 200 << 20
            if fresh and (mark in path.read_bytes() or mark in str(path).encode()):
                found.append(path)
        except OSError:  # gone, or somebody else's
            continue
    return found


def test_deleted_data_are_nowhere(server):
    began, mark = time.time(), f"mark{os.urandom(6).hex()}"
    head = f"{mark}text,{mark}label\n"
    rows = [f"a {mark} story {i},{(f'{mark}good', f'{mark}bad')[i % 2]}\n" for i in range(60)]
    number = server.upload(f"{mark}.csv", (head + "".join(rows)).encode())
    use = {"text_column": f"{mark}text", "label_column": f"{mark}label", "template": f"{mark} {{{mark}text}} It was"}
    text = "\n\n".join(f"{i} {mark} words of a story that is long enough to be learnt from" for i in range(40))
    note = server.upload("note.txt", text.encode())
    large = server.upload(
        "large.csv", (head + "".join(f"a {mark} {i},{mark}a{i % 2}\n" for i in range(420_000))).encode()
    )
    for file, how in ((number, use), (note, {}), (large, {k: v for k, v in use.items() if k != "template"})):
        assert mark in server.http.post(f"/v1/files/{file}/preview", json=how).raise_for_status().text
    wrong = server.http.post(f"/v1/files/{number}/preview", json={**use, "words": {"a": " b", "c": " d"}})
    assert wrong.status_code == 400 and mark in wrong.text
    messages = [{"role": "user", "content": f"{mark}?"}, {"role": "assistant", "content": f"{mark}!"}]
    server.http.post("/v1/conversations", json={"messages": messages, "up": True}).raise_for_status()
    server.ask("tiny", mark)
    name = f"forget-{time.time_ns()}"  # of the server's log, which says which job ran
    body = {"training_file": number, "suffix": name, "use": use, "hyperparameters": {"steps": 10}}
    server.http.post("/v1/fine_tuning/jobs", json=body).raise_for_status()
    server.wait(lambda: server.job(name)["status"] == "succeeded", 120)
    versions = [version["id"] for version in server.http.get("/v1/versions").json()["data"]]
    assert any(version.startswith(name) for version in versions)
    server.ask(f"{name}@10", mark)
    private = server.folder.stat().st_mode & 0o777
    assert private == 0o700 and holding(mark.encode(), [server.folder])

    assert server.http.delete("/v1/data").json() == {"deleted": True}

    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/conversations", "/v1/versions"):
        found = server.http.get(path).json()
        assert found["data"] == [] and not found.get("history"), path
    assert server.http.post("/v1/completions", json={"prompt": "a", "model": f"{name}@10"}).status_code == 404
    (raylet,) = server.processes("raylet/raylet")
    session = re.search(r"(/[^\s=]*/session_[0-9_-]+)", " ".join(raylet.cmdline()))
    assert session is not None
    fresh = [path for path in Path(tempfile.gettempdir()).iterdir() if path.lstat().st_mtime >= began]
    places = [server.folder.parent, cache_dir(), session[1], *fresh]
    assert (Path(session[1]) / "logs").is_dir() and holding(b"zoray", [Path(session[1]) / "logs"])  # it finds things
    assert holding(mark.encode(), places, began) == []
    assert server.ask("tiny")
