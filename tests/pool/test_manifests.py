"""What is shipped for Ray's cluster launcher and for KubeRay, against their own schemas; unknown fields are errors."""

from __future__ import annotations

import copy
import json
import lzma
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from zoray.records import ConfigError

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "cluster" / "ray").glob("*.yaml"))
JOB, SERVICE = (ROOT / "cluster" / "kuberay" / f"{name}.yaml" for name in ("rayjob", "rayservice"))
OBJECT = {"kind", "apiVersion", "metadata"}  # of every object; its schema leaves metadata open
PINNED = re.search(r"^ray==(.*)$", (ROOT / "requirements" / "cuda.lock").read_text(), re.M)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema: fields that a server would drop are errors here."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        found["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    return found


def check(document: dict[str, Any]) -> None:
    """Raise unless KubeRay's custom resource definition of the document's kind takes it as it is."""
    packed = (ROOT / "tests" / "data" / "kuberay-1.7.0.json.xz").read_bytes()
    schema = strict(json.loads(lzma.decompress(packed))[document["kind"]])
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(schema).validate(document)


def group(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


@pytest.mark.parametrize("path", [JOB, SERVICE], ids=lambda path: path.stem)
def test_kuberays_schema_takes_the_manifest(path):
    resource = documents(path)[0]
    check(resource)
    cluster = group(resource)
    assert PINNED and cluster["rayVersion"] == PINNED[1]
    assert cluster["authOptions"] == {"mode": "token"}
    for workers in cluster["workerGroupSpecs"]:
        assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("spec.backofLimit", 3, "'backofLimit' was unexpected"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.imagePolicy", "x", "'imagePolicy' was unexpec"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "'tokens' is not one of"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "4", "'4' is not of type 'integer'"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.headGroupSpec.template", None, "None is not of type 'object'"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(where, value, says):
    resource = copy.deepcopy(documents(JOB)[0])
    *path, last = where.split(".")
    node: Any = resource
    for key in path:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError, match=re.escape(says)):
        check(resource)


@pytest.mark.parametrize("path", [JOB, SERVICE], ids=lambda path: path.stem)
def test_every_volume_of_the_manifest_is_there(path):
    first, *others = documents(path)
    names = {(other["kind"], other["metadata"]["name"]) for other in others}
    cluster = group(first)
    for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = part["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names


def test_the_jobs_commands_are_settings_that_launch_takes(tmp_path):
    """Of a new run; and of a resumed one, whose folder is the one that a new run makes."""
    from zoray.launch import _may_resume_with
    from zoray.run.config import build_experiment, compose

    resource, settings, _ = documents(JOB)
    script = settings["data"]["tune.sh"]
    assert resource["spec"]["entrypoint"] == "bash /etc/zoray/tune.sh"
    cluster = " ".join(re.findall(r'^cluster="(?:\$cluster )?(.*)"$', script, re.M))
    run = re.search(r"^run=(.*)$", script, re.M)
    commands = re.findall(r"exec python -m zoray.launch (.*?)(?<!\\)\n", script, re.S)
    assert run and len(commands) == 2
    resumed, new = (
        shlex.split(text.replace("\\\n", " ").replace("$cluster", cluster).replace("$run", run[1])) for text in commands
    )
    assert all(_may_resume_with(argument) for argument in resumed) and f"run.resume={run[1]}" in resumed
    experiment = build_experiment(compose("config", new))
    assert str(experiment.run.path) == run[1]
    workers = group(resource)["workerGroupSpecs"][0]
    assert experiment.cluster.replicas <= workers["maxReplicas"]
    cores = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert experiment.cluster.cpus_per_replica <= int(cores)


def serve_config() -> Any:
    """What Serve makes of the service's application; a field that it does not know is an error here."""
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(documents(SERVICE)[0]["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(given)
    (application,) = given["applications"]
    assert given.keys() <= ServeDeploySchema.model_fields.keys()
    assert application.keys() <= type(config.applications[0]).model_fields.keys()
    return config


def test_the_services_application_has_settings_that_zoray_serve_takes(monkeypatch):
    from zoray.serving import settings
    from zoray.serving.deployments import application as app

    (application,) = serve_config().applications
    assert application.import_path == "zoray.serving:build"
    built: list[settings.Settings] = []
    monkeypatch.setattr(app, "application", built.append)
    monkeypatch.setenv(settings.KEY, "k" * 16)
    app.build(application.args)
    (found,) = built
    assert found.key == "k" * 16 and found.host == "0.0.0.0" and found.name != "model"
    monkeypatch.delenv(settings.KEY)
    with pytest.raises(ConfigError, match="expected an API key in the environment variable ZORAY_API_KEY"):
        found.key  # noqa: B018
    (workers,) = group(documents(SERVICE)[0])["workerGroupSpecs"]
    assert workers["minReplicas"] == found.replicas
    (container,) = workers["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == found.gpus == found.engine.tensor_parallel


def test_all_pods_of_the_service_have_its_folder_and_its_key():
    resource, claim = documents(SERVICE)
    folder = serve_config().applications[0].args["serve.folder"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = group(resource)
    for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "serving")
        assert Path(folder).parent == Path(mount["mountPath"]) and pod["securityContext"]["fsGroup"] == 1000
        (key,) = (one["valueFrom"] for one in container["env"] if one["name"] == "ZORAY_API_KEY")
        assert key == {"secretKeyRef": {"name": "zoray-key", "key": "key"}}
    assert "kubectl create secret generic zoray-key --from-literal=key=" in (SERVICE.parent / "README.md").read_text()
    assert resource["spec"]["upgradeStrategy"]["type"] == "None"  # two clusters would write one folder


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_rays_launcher_takes_the_cluster_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(path)[0]
    prepared = prepare_config(config)  # as `ray up` does
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert sum(kind.get("max_workers", 0) for kind in types.values()) >= 2
    for command in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        assert "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config | {"idle_timeout": 3}))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_what_the_cluster_file_copies_is_all_that_an_installation_needs(path, tmp_path):
    for remote, local in documents(path)[0]["file_mounts"].items():
        if not local.startswith("~"):
            assert remote == f"~/zoray/{local}" and (ROOT / local).exists()
            (tmp_path / local).symlink_to(ROOT / local)
    for name in ("Makefile", "scripts/setup.sh", "requirements/cuda.lock", "conf/config.yaml"):
        assert (tmp_path / name).is_file()
    build = [sys.executable, "-m", "hatchling", "metadata", "version"]  # as pip asks; it reads README and LICENSE
    assert subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
