"""The server's HTTP side behind nginx with TLS, by the example of docs/serving.md; without engines."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from gatewayed import KEY, FakeGateway, error_of, rows, settings_of

from zoray.serving.http.routes import build_app

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
NAME = "llm.example.org"
EXAMPLE = re.search(
    r"```nginx\n(.*?)```", Path(__file__, "../../../docs/serving.md").resolve().read_text("utf-8"), re.S
)
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


class Slow(FakeGateway):
    """A stream's second event comes when the test says so."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go_on = threading.Event()

    async def answer(self, kind, body, version):
        if body.get("stream"):
            yield 200, True, b"data: {}\n\n"
            await asyncio.to_thread(self.go_on.wait, 20)
            yield 200, True, b"data: [DONE]\n\n"
        else:
            yield 200, False, b'{"object": "chat.completion", "choices": []}'


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def reachable(port):
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of the example's name: its file, and its key's."""
    folder = tmp_path_factory.mktemp("tls")
    crt, key = folder / "crt", folder / "key"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
    made += ["-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key), "-out", str(crt)]
    subprocess.run(made, check=True, capture_output=True)
    return crt, key


def started(tmp_path, chat_model, certificate, change=lambda text: text, names=None):
    """The server and nginx in front of it; a client of nginx by its public name, and the gateway."""
    behind, front = free_ports(2)
    names = (f"{NAME}:{front}",) if names is None else names
    gateway = Slow(settings_of(chat_model, tmp_path / "store", names=names, max_upload_mb=50.0), KEY)
    server = uvicorn.Server(uvicorn.Config(build_app(gateway), port=behind, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    text = change(EXAMPLE[1])
    here = {
        "listen 443": f"listen 127.0.0.1:{front}",
        "127.0.0.1:8000": f"127.0.0.1:{behind}",
        "/etc/ssl/llm.example.org.crt": str(certificate[0]),
        "/etc/ssl/llm.example.org.key": str(certificate[1]),
    }
    for old, new in here.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\n"
    (tmp_path / "conf").write_text(f"daemon off;\n{main}http {{\naccess_log off;\n{temporary}{text}}}\n")
    nginx = subprocess.Popen([NGINX, "-c", str(tmp_path / "conf"), "-e", str(tmp_path / "error.log")])
    reachable(behind), reachable(front)
    context = ssl.create_default_context(cafile=str(certificate[0]))

    def stop():
        gateway.go_on.set()
        nginx.terminate(), nginx.wait(10)
        server.should_exit = True
        thread.join(10)

    class ByName(httpx.HTTPTransport):  # as if the name were in DNS
        def handle_request(self, request):
            request.extensions["sni_hostname"] = NAME
            request.url = request.url.copy_with(host="127.0.0.1")
            return super().handle_request(request)

    url = f"https://{NAME}:{front}"
    http = httpx.Client(
        base_url=url, transport=ByName(verify=context), headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    )
    return http, url, gateway, stop


def without_host(text):
    lines = [line for line in text.splitlines(True) if "proxy_set_header Host" not in line]
    assert len(lines) == len(text.splitlines()) - 1
    return "".join(lines)


@pytest.fixture(params=["with Host", "without Host", "with $host"])
def proxied(request, tmp_path, chat_model, certificate):
    change = {"with Host": str, "without Host": without_host, "with $host": lambda text: text.replace("$http_", "$")}
    http, url, gateway, stop = started(tmp_path, chat_model, certificate, change[request.param])
    yield http, url, gateway
    stop()


def test_the_page_loads_and_posts_and_sdks_are_answered(proxied):
    http, url, _ = proxied
    page = {"Sec-Fetch-Site": "same-origin", "Origin": url}
    assert "<html" in http.get("/").text and http.head("/health").status_code == 200
    posted = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}, headers=page)
    assert posted.status_code == 200, posted.text
    uploaded = http.post("/v1/files", files={"file": ("a.csv", rows())}, headers=page)
    assert uploaded.status_code == 200, uploaded.text
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, http_client=http, max_retries=0)
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.chat.completions.create(model="live", messages=[{"role": "user", "content": "a"}]).choices == []
    for origin in ("https://evil.example", f"https://{NAME}:1", "null"):
        assert error_of(http.get("/v1/files", headers={"Origin": origin}))["code"] == 403


def test_streams_and_large_uploads_pass(proxied):
    http, _, gateway = proxied
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines) == "data: {}"  # while the second event has not been sent
        gateway.go_on.set()
        assert "data: [DONE]" in list(lines)
    line = b"x" * 999 + b"\n"
    assert http.post("/v1/files", files={"file": ("a.txt", line * 45_000)}).json()["bytes"] == 45_000_000
    refused = http.post("/v1/files", files={"file": ("a.txt", line * 52_435)})  # a little more than 50 MiB
    assert refused.status_code == 413 and "expected a file of at most" in error_of(refused)["message"]


def test_without_its_name_the_server_says_what_to_set(tmp_path, chat_model, certificate):
    for folder, change, header in (("a", str, "Host"), ("b", without_host, "Origin")):
        (tmp_path / folder).mkdir()
        http, url, _, stop = started(tmp_path / folder, chat_model, certificate, change, names=())
        try:
            said = error_of(http.get("/v1/files", headers={"Origin": url}))["message"]
        finally:
            stop()
        assert said.startswith(f"expected {header} to be") and f'serve.names=["{NAME}' in said, said
