"""A server's settings: conf/serve.yaml, checked."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoray.engines.vllm.engine import Vllm
from zoray.records import ConfigError, require
from zoray.records.paths import user_path
from zoray.records.signatures import check_signature
from zoray.run.config import build
from zoray.serving.gate import Gate

KEY = "ZORAY_API_KEY"  # the environment variable that holds the API key
PUBLIC = re.compile(r"(?!-)[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")  # a name of an address
PORTS = {"http": "80", "https": "443"}  # default ports, which addresses leave out
PARTS = ("model", "engine", "space", "estimator", "optimizer")


@dataclass(frozen=True)
class Settings:
    """A server.

    Args:
        model: the model to serve and tune.
        engine: vLLM, with slots for a step's probes, and a KV cache for requests and scoring.
        space: the adapters' space, lora.
        estimator: for tuning jobs, as in a run.
        optimizer: likewise; its `anchor` pulls towards the base model.
        gate: when a version becomes the live one.
        name: the base model's name in requests; null for its folder's name.
        folder: where uploads, jobs and versions are kept.
        host: address to listen on. Any but this machine's own needs a key in the environment variable ZORAY_API_KEY.
        port: port to listen on.
        names: this server's public names, behind a proxy: names of addresses, with the port if that is not 80 or 443.
            Needs a key.
        replicas: number of engines, which share requests and tuning.
        gpus: GPUs of each engine; null takes engine.tensor_parallel of them where there are any.
        slots: versions, besides the base model, that can answer at the same time.
        max_slowdown: maximum slowdown, from tuning, of the time to first token and between tokens, as a factor.
        steps: steps of a tuning job that names none.
        batch: examples per step, likewise.
        eval_every: steps between evaluations on held-out rows, each of which may promote a version.
        seed: of directions, of A and of the order of examples.
        max_upload_mb: largest size of a file.
        max_storage_mb: largest size of all uploads together.
        requests_per_minute: limit for one address; null for none.
        capture: keep conversations that people rate (thumbs up or down), to learn from.
        dashboard: Ray's dashboard on http://127.0.0.1:8265.
    """

    model: Any
    engine: Any
    space: Any
    estimator: Any
    optimizer: Any
    gate: Gate = field(default_factory=Gate)
    name: str | None = None
    folder: str = "serving"
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    replicas: int = 1
    gpus: int | None = None
    slots: int = 4
    max_slowdown: float = 1.5
    steps: int = 60
    batch: int = 16
    eval_every: int = 20
    seed: int = 0
    max_upload_mb: float = 50.0
    max_storage_mb: float = 2000.0
    requests_per_minute: int | None = 600
    capture: bool = True
    dashboard: bool = False

    def __post_init__(self) -> None:
        if self.name is None:
            stem = Path(self.model.path).stem.lower()
            object.__setattr__(self, "name", re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._") or "model")
        named = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][\w./-]*", self.name) is not None
        require(named and self.name != "live", "serve.name of letters, digits and . _ / -, and not `live`", self.name)
        for name in ("replicas", "slots", "steps", "batch", "eval_every"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, f"serve.{name} to be a whole number of at least 1", value)
        require(isinstance(self.port, int) and 0 < self.port < 65536, "serve.port in 1..65535", self.port)
        for name in self.names:
            ok = isinstance(name, str) and PUBLIC.fullmatch(name) is not None
            require(ok, "serve.names such as llm.example.org or llm.example.org:8443, without https:// and paths", name)
        object.__setattr__(self, "names", tuple(self.names))
        require(self.max_slowdown >= 1, "serve.max_slowdown of at least 1", self.max_slowdown)
        require(self.max_upload_mb > 0 and self.max_storage_mb > 0, "serve.max_upload_mb over 0", self.max_upload_mb)
        ok = self.requests_per_minute is None or self.requests_per_minute >= 1
        require(ok, "serve.requests_per_minute of at least 1, or null", self.requests_per_minute)
        require(isinstance(self.capture, bool), "serve.capture to be true or false", self.capture)
        ranks = self.engine.tensor_parallel if isinstance(self.engine, Vllm) else 0
        if not ranks:
            raise ConfigError(f"expected engine=vllm for a served model; got {type(self.engine).__name__}")
        ok = self.gpus is None or self.gpus == 0 or self.gpus >= ranks
        require(ok, f"serve.gpus to be null, 0, or a GPU for each of engine.tensor_parallel={ranks}", self.gpus)
        if self.space.folds:
            raise ConfigError(
                "expected space=lora for a served model: requests to other versions need the base weights as they are"
            )
        engine = self.engine.for_probes(len(self.estimator.ask(0)), self.estimator.guided)
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "folder", str(user_path(self.folder).absolute()))

    @property
    def key(self) -> str | None:
        """The key that requests must present, from the environment.

        Raises:
            ConfigError: other machines can reach this server and there is no key; or the key is too short.
        """
        key = os.environ.get(KEY) or None
        if key is not None and len(key) < 16:
            raise ConfigError(f"expected {KEY} to have at least 16 characters; it has {len(key)}")
        if key is None and (self.names or not is_own(self.host)):
            what, instead = ("host", "127.0.0.1") if not is_own(self.host) else ("names", "[]")
            given = self.host if what == "host" else f"[{','.join(self.names)}]"
            raise ConfigError(
                f"expected an API key in the environment variable {KEY}, since {what}={given} lets others reach this "
                f"server. Take {what}={instead}, or set one: export {KEY}=$(openssl rand -hex 24)"
            )
        return key


def settings_of(config: Any) -> Settings:
    """The settings of a composed conf/serve.yaml.

    Raises:
        ConfigError: a setting is invalid.
    """
    parts = {name: build(config[name], name) for name in PARTS}
    own = dict(config.serve)
    names = own["names"]
    own["names"] = [names] if isinstance(names, str) else list(names) if isinstance(names, Sequence) else names
    gate = dict(own["gate"]) if isinstance(own["gate"], Mapping) else own["gate"]
    typed = {**gate, "_target_": "zoray.serving.gate.Gate"} if isinstance(gate, dict) else gate
    check_signature({**own, "gate": typed, "_target_": "zoray.serving.settings.Settings"}, "serve")
    return Settings(**parts, **{**own, "gate": Gate(**gate)})


def is_own(host: str) -> bool:
    """Whether a host is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_public(address: str, names: Sequence[str], scheme: str = "") -> bool:
    """Whether an address is one of the server's public names; its port is compared if a `scheme` is given.

    Host headers come without a scheme: proxies forward them with or without a port, which does not change the name.
    """
    host, port = _parts(address)
    usual = PORTS.get(scheme, "")
    return any(host == name and (not scheme or (port or usual) == (own or usual)) for name, own in map(_parts, names))


def _parts(address: str) -> tuple[str, str]:
    """Name and port of an address, "" for none."""
    found = re.fullmatch(r"(.*?)(?::([0-9]+))?", address.lower())
    return (found[1], found[2] or "") if found else (address, "")
