"""Shared fixtures: tiny models on disk, a labelled file, and one Ray for all tests that need it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Replicas have as many threads as there are cores, and so have those of tests beside: who waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from served import Served

from tiny import tiny_llama, tiny_opt, tiny_qwen2

pytest_plugins = ["browsing"]
ASKING = ("serving", "tuning_cli", "serving_page", "serving_forms", "serving_fuzz")  # files that share one server
FIRST = (
    *(
        "slurm",
        "launch",
        "chaos",
        "serving_crash",
        *ASKING,
        "serving_replicas",
        "pool",
        "feedback_pool",
        "crash",
        "ray",
        "gpu_report",
        "ports",
        "damage",
    ),
    "tensor_parallel",
)

SERVERS: list[Served] = []  # that run


def scope(path: str) -> str:
    """What a worker gets as a whole: a file, or all files that share the server."""
    return "asking" if Path(path).stem.removeprefix("test_") in ASKING else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As --dist loadfile has it, by `scope`."""
    from xdist.scheduler import LoadFileScheduling

    class ByScope(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(super()._split_scope(nodeid))

    return ByScope(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes come first, so that two workers end at about the same time."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")  # before -m is looked at
    place = {f"test_{name}": k for k, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models, by architecture."""
    root = tmp_path_factory.mktemp("models")
    return {"llama": tiny_llama(root / "llama"), "opt": tiny_opt(root / "opt"), "qwen2": tiny_qwen2(root / "qwen2")}


@pytest.fixture(scope="session")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 short texts of two kinds, as JSONL with columns text and label."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    words = {0: ["a dull and lifeless story", "far too long", "I did not like the plot"], 1: ["one of the best movies"]}
    words[1] += ["a wonderful thing to see", "I liked the music"]
    rows = [{"text": f"{words[i % 2][i % 3]} number {i}", "label": i % 2} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """One real server on a tiny chat model, shared: tests name their jobs apart, and leave it as they found it."""
    from chatty import chat_llama
    from served import Served

    root = tmp_path_factory.mktemp("served")
    served = Served(chat_llama(root / "model"), root / "store").start()
    SERVERS.append(served)
    yield served
    if served in SERVERS:
        assert served.stop() == 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The server ends after the last file that asks it: it has an engine that looks for work."""
    if SERVERS and (nextitem is None or scope(nextitem.path.name) != scope(item.path.name)):
        assert SERVERS.pop().stop() == 0


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a chat template."""
    from chatty import chat_llama

    return chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def gateway(chat_model: Path, tmp_path: Path):
    """The HTTP side of a server without engines, with a real tuner: see gatewayed.py."""
    from gatewayed import FakeGateway, settings_of

    return FakeGateway(settings_of(chat_model, tmp_path / "store"))


@pytest.fixture
def client(gateway):
    """Requests to it."""
    from gatewayed import Client

    return Client(gateway)


@pytest.fixture(scope="session")
def local_ray():
    """One Ray of two cores, shared; pools join it and leave it running."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
