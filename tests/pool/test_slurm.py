"""SLURM: the command line made, what is refused, and the shipped script on a real SLURM of two nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray
from local_pool import launched
from slurm_nodes import NODES, SlurmCluster, missing, wait

from zoray.pool.slurm import Slurm, command, environment, script_path, seconds
from zoray.records import ConfigError
from zoray.run import journal
from zoray.run.config import build_experiment, compose
from zoray.run.folder import load_run_config

STEPS = 150  # a few seconds of steps, to kill and stop a driver in
LACKS = missing()
real = pytest.mark.skipif(bool(LACKS), reason=f"two nodes of SLURM: this machine {LACKS}")


def settings(folder: Path, model: Path, data: Path, name: str) -> list[str]:
    return [
        *(f"model.path={model}", "task=file", f"task.path={data}", "task.words=[' terrible',' great']"),
        *("task.dev=20", "task.test=20", "engine=hf", f"run.name={name}", f"run.folder={folder}"),
        *(f"run.steps={STEPS}", "run.batch=8", "run.stratify=false", "run.eval_every=50", "run.digest_every=5"),
        *("estimator=two_point", "optimizer.lr=0.01", "optimizer.schedule=constant"),
    ]


def launch_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    assert launched(monkeypatch, *arguments) == 0


OTHER_JOBS = {
    *("SLURM_MEM_PER_CPU", "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURMD_NODENAME", "SBATCH_MEM_PER_CPU"),
    *("SBATCH_ARRAY_INX", "SRUN_CPUS_PER_TASK", "PMI_RANK", "PMIX_RANK", "PMI2_FD", "OMPI_COMM_WORLD_RANK"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_AUTH_TOKEN", "RAY_TMPDIR"),
}
OUTSIDE = {
    "SLURM_CONF",
    "SLURM_JWT",
    "SBATCH_ACCOUNT",
    "SBATCH_PARTITION",
    "RAY_USAGE_STATS_ENABLED",
    "OMP_NUM_THREADS",
}


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """A function that puts an sbatch on PATH which notes its arguments and environment, and answers as told."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = tmp_path / "sbatch.json"

    def install(answer: str, code: int = 0):
        program = tmp_path / "bin" / "sbatch"
        program.parent.mkdir(exist_ok=True)
        note = f"json.dump([sys.argv[1:], dict(os.environ)], open({str(said)!r}, 'w'))"
        end = f"print({answer!r}, file=sys.stdout if {code} == 0 else sys.stderr); sys.exit({code})"
        program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{note}\n{end}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return said

    return install


# settings


def test_the_command_line_has_what_the_settings_say(tmp_path):
    slurm = Slurm(nodes=4, gpus_per_node=8, time="1-12", partition="gpu", requeue=True, extra=["--constraint=h100"])
    line = command(slurm, tmp_path / "a b", ["engine.dtype=bfloat16"])
    logs = tmp_path / "a b" / "slurm"
    assert line == [
        *("sbatch", "--job-name=zoray-a b", "--nodes=4", "--gpus-per-node=8", "--time=1-12", "--partition=gpu"),
        *("--signal=B:USR1@120", f"--chdir={Path.cwd()}", "--export=ALL", f"--output={logs}/%j.log"),
        *("--exclusive", "--requeue", "--constraint=h100"),
        *(str(logs / "zoray.sbatch"), f'run.resume="{tmp_path}/a b"', "engine.dtype=bfloat16"),
    ]
    assert compose("config", [line[-2]]).run.resume == f"{tmp_path}/a b"
    shared = command(Slurm(exclusive=False, cpus_per_node=3, memory="8G"), tmp_path, [])
    assert {"--cpus-per-task=3", "--mem=8G", "--no-requeue"} < set(shared)
    assert not any(option.startswith(("--exclusive", "--gpus", "--time", "--account")) for option in shared)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("30", 1800), ("1:30", 90), ("4:00:00", 14_400), ("2-12", 216_000), ("1-0:30", 88_200), ("1-0:0:5", 86_405)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, expected):
    assert seconds(time) == expected
    assert build_experiment(compose("config", ["cluster=slurm", f"cluster.time={time}", "cluster.signal_s=30"]))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nodes=0", ["cluster.nodes to be at least 1; got 0"]),
        ("nodes=two", ["cluster.nodes to be a whole number; got 'two'"]),
        ("gpus_per_node=-1", ["cluster.gpus_per_node to be 0 or more; got -1"]),
        ("cpus_per_node=0", ["cluster.cpus_per_node to be at least 1, or null; got 0"]),
        ("exclusive=false", ["cluster.cpus_per_node with cluster.exclusive=false; got None", "one core a node"]),
        ("signal_s=10", ["cluster.signal_s to be from 30 to 65535 seconds; got 10"]),
        ("time=2", ["cluster.signal_s to be at least a minute shorter than cluster.time (2); got 120"]),
        ("time=1:00", ["shorter than cluster.time (1:00); got 120", "a whole number is minutes"]),
        ("time=4h", ["cluster.time as minutes, M:S, H:M:S", "got '4h'"]),
        ("time=1-2-3", ["got '1-2-3'"]),
        ("partition='a b'", ["cluster.partition as sbatch takes it, without spaces; got 'a b'"]),
        ("extra=[-C h100]", ["cluster.extra to be --name or --name=value, as for sbatch; got '-C h100'"]),
        ('extra=["--nodes=3"]', ["cluster.extra without --nodes=3: that is cluster.nodes"]),
        ('extra=["--output=x"]', ["cluster.extra without --output=x: cluster/slurm/zoray.sbatch has its own"]),
        ("address=a:1", ["unknown config key 'cluster.address'"]),
        ("replicas=0", ["cluster.replicas to be auto or a whole number"]),
        ("node=2", ["unknown config key 'cluster.node'", "Did you mean nodes?"]),
    ],
)
def test_bad_settings_are_refused_before_anything_is_submitted(override, says):
    with pytest.raises(ConfigError) as error:
        build_experiment(compose("config", ["cluster=slurm", f"cluster.{override}"]))
    assert all(part in str(error.value) for part in says), error.value


def test_the_script_is_sound_and_its_own_options_are_those_of_the_defaults():
    text = script_path().read_text()
    subprocess.run(["bash", "-n", script_path()], check=True)
    own = set(re.findall(r"^#SBATCH (--\S+)", text, re.MULTILINE))
    assert {"--nodes=1", f"--signal=B:USR1@{Slurm().signal_s}", "--no-requeue", "--open-mode=append"} < own


FACTS = "JobId=9 Requeue=1 Restarts=%d MinCPUsNode=1 %s MinTmpDiskNode=0 TRES=cpu=1 Command=x"


@pytest.mark.parametrize(
    ("restarts", "memory", "left"),
    [(0, "MinMemoryNode=1500M", "SLURM_MEM_PER_NODE"), (2, "MinMemoryCPU=7M", "SLURM_MEM_PER_CPU")],
)
def test_a_script_by_hand_has_nothing_of_the_job_it_was_submitted_in(tmp_path, restarts, memory, left):
    """Its steps, and what it takes itself to be: with a scontrol that knows the job, and an srun that only looks."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {"scontrol": f"echo '{FACTS % (restarts, memory)}'", "squeue": "", "scancel": ""}
    scripts |= {"srun": f"env > {tmp_path}/env", "python": ""}
    for name, lines in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tools / name).chmod(0o755)
    own = {"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_HOST": "login"}
    leaked = {"SLURM_MEM_PER_CPU": "7", "SLURM_MEM_PER_NODE": "1500", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "0"}
    leaked |= {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_PER_NODE": "4", "PMI_RANK": "0"}
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ZORAY_TMP": "/tmp",
    }
    done = subprocess.run(
        ["bash", script_path(), "run.folder=~/runs", "run.name=a"],
        env={**variables, **own, **leaked},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert f"run folder {tmp_path}/runs/a, start {restarts + 1}" in done.stdout, done
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert left in seen and not seen.keys() & (leaked.keys() - {left, "SLURM_RESTART_COUNT"})


# submission, without SLURM


def test_a_dry_run_prints_command_and_script_and_leaves_nothing(tmp_path, tiny_models, labelled_file):
    arguments = settings(tmp_path / "runs", tiny_models["llama"], labelled_file, "dry")
    done = subprocess.run(
        [sys.executable, "-m", "zoray.launch", *arguments, "cluster=slurm", "cluster.nodes=3", "dry_run=true"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": "/nowhere"},  # no sbatch is needed
    )
    assert done.returncode == 0, done.stderr
    shown, script = done.stdout.split("\n\n", 1)
    assert {"sbatch", "--nodes=3", f"ZORAY_PYTHON={sys.executable}"} < set(shlex.split(shown))
    assert script_path().read_text() in script
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "meant"), [("~/venv/bin/python", "/home/ada/venv/bin/python"), ("python3.11", "python3.11")]
)
def test_the_python_of_a_home_is_the_one_of_who_submits(monkeypatch, given, meant):
    monkeypatch.setenv("HOME", "/home/ada")
    assert environment(Slurm(python=given))["ZORAY_PYTHON"] == meant


def test_without_sbatch_nothing_is_written(tmp_path, tiny_models, labelled_file, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"expected sbatch on PATH.*login node; cluster.dry_run=true shows"):
        launch_here(
            monkeypatch, *settings(tmp_path / "runs", tiny_models["llama"], labelled_file, "none"), "cluster=slurm"
        )
    assert not (tmp_path / "runs").exists()


def test_what_sbatch_refuses_is_said_and_the_name_is_free_again(
    tmp_path, tiny_models, labelled_file, fake_sbatch, monkeypatch
):
    fake_sbatch("sbatch: error: invalid partition specified: nope", code=1)
    arguments = [*settings(tmp_path / "runs", tiny_models["llama"], labelled_file, "no"), "cluster=slurm"]
    with pytest.raises(ConfigError, match=r"sbatch to take the job; it says: .*invalid partition"):
        launch_here(monkeypatch, *arguments, "cluster.partition=nope")
    assert not (tmp_path / "runs" / "no").exists()


def test_a_bad_model_is_refused_on_the_login_node(tmp_path, labelled_file, fake_sbatch, monkeypatch):
    said = fake_sbatch("Submitted batch job 7")
    with pytest.raises(ConfigError, match="nowhere"):
        launch_here(
            monkeypatch, *settings(tmp_path / "runs", tmp_path / "nowhere", labelled_file, "bad"), "cluster=slurm"
        )
    assert not said.exists() and not (tmp_path / "runs").exists()


def test_a_submitted_run_has_its_config_and_a_resumed_one_the_changes(
    tmp_path, tiny_models, labelled_file, fake_sbatch, monkeypatch, capsys
):
    said, folder = fake_sbatch("Submitted batch job 7"), tmp_path / "runs" / "job"
    arguments = settings(tmp_path / "runs", tiny_models["llama"], labelled_file, "job")
    for name in (*OTHER_JOBS, *OUTSIDE):
        monkeypatch.setenv(name, "x")
    launch_here(monkeypatch, *arguments, "cluster=slurm", "cluster.setup=[module load a,source b]")
    line, variables = json.loads(said.read_text())
    assert line == command(Slurm(), folder, [])[1:]
    assert not OTHER_JOBS & variables.keys() and variables.keys() >= OUTSIDE
    assert variables["ZORAY_SETUP"] == "module load a\nsource b" and variables["ZORAY_PYTHON"] == sys.executable
    assert (folder / "slurm" / "zoray.sbatch").read_text() == script_path().read_text()
    assert load_run_config(folder).run.steps == STEPS and not (folder / "journal.jsonl").exists()
    out = capsys.readouterr().out
    assert f"{folder}/slurm/7.log" in out and "scancel --signal=TERM --batch 7" in out

    said.unlink()  # the noted command line submits the same once more
    subprocess.run(["bash", folder / "slurm" / "submit.sh"], check=True, capture_output=True, timeout=60)
    again, variables = json.loads(said.read_text())
    assert again == line and not OTHER_JOBS & variables.keys() and variables.keys() >= OUTSIDE
    with pytest.raises(ConfigError, match="not to exist yet"):
        launch_here(monkeypatch, *arguments, "cluster=slurm")
    launch_here(monkeypatch, f"run.resume={folder}")
    assert json.loads(said.read_text())[0] == line
    changes = ["cluster=slurm", "cluster.nodes=2", "engine=hf"]
    launch_here(monkeypatch, f"run.resume={folder}", *changes)
    assert json.loads(said.read_text())[0][-3:] == changes
    assert "--nodes=2" in json.loads(said.read_text())[0]


def test_in_its_job_the_run_joins_the_jobs_ray(tmp_path, tiny_models, labelled_file, local_ray, monkeypatch):
    monkeypatch.setenv("ZORAY_JOB", "7")
    arguments = settings(tmp_path, tiny_models["llama"], labelled_file, "inside")
    launch_here(monkeypatch, *arguments, "cluster=slurm", "cluster.cpus_per_replica=1", "run.steps=2", "run.test=false")
    assert summary_of(tmp_path / "inside")["steps"] == 2


# a real SLURM


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def steps_of(folder: Path) -> int:
    path = folder / "journal.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def await_steps(nodes: SlurmCluster, job: str, folder: Path, count: int) -> None:
    def there() -> bool:
        state = nodes.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), f"job {job}: {state}"
        return steps_of(folder) >= count

    wait(f"{count} steps", there, 240)


def commits_of(folder: Path) -> list:
    return [noted.commit for noted in journal.read(folder / "journal.jsonl").steps]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_models, labelled_file, local_ray) -> Path:
    """An undisturbed run of one replica, without SLURM. Its Ray is there all the time that jobs come and go."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        one_core = "cluster.cpus_per_replica=1"  # as on the nodes; two threads wait for each other on a busy machine
        launch_here(patch, *settings(root, tiny_models["llama"], labelled_file, "whole"), one_core)
    return root / "whole"


@pytest.fixture
def submit(nodes, tmp_path, tiny_models, labelled_file, whole):
    """A function that submits the settings of `whole` from the login node, and returns the job and the run's folder."""

    def submit(name: str, *more: str, inside: Sequence[str] = ()) -> tuple[str, Path]:
        arguments = settings(tmp_path, tiny_models["llama"], labelled_file, name)
        done = nodes.run(
            *inside, sys.executable, "-m", "zoray.launch", *arguments, "cluster=slurm", "cluster.nodes=2", *more
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split("batch job ")[1].split(":")[0], tmp_path / name

    yield submit
    for log in tmp_path.glob("**/*.log"):
        print(f"== {log}\n{log.read_text()}")  # pytest shows it where a test fails
    nodes.run("scancel", "--user=root")


def pids(nodes: SlurmCluster, node: str, words: str) -> list[int]:
    return [int(line.split()[0]) for line in nodes.processes_on(node) if words in line]


def driver_of(nodes: SlurmCluster) -> int:
    """The driver's process; its words also stand in the command lines of what has started it."""
    lines = [line.split(maxsplit=1) for line in nodes.processes_on("n1")]
    (found,) = [int(pid) for pid, words in lines if words.startswith(f"{sys.executable} -m zoray.launch")]
    return found


def replica_times(nodes: SlurmCluster) -> dict[str, list[float]]:
    """Seconds of processor time that the replicas on each node have used."""
    return {name: [nodes.cpu_seconds(name, pid) for pid in pids(nodes, name, "ray::ReplicaActor")] for name in NODES}


def check_free(nodes: SlurmCluster, others: set[int]) -> None:
    """The nodes are free within 30 s, and nothing of a job is left on them but what others have running there."""
    wait("the allocation is free", nodes.idle, 30)
    for name in NODES:
        wait("nothing of the job runs", lambda name=name: set(pids(nodes, name, "ray")) <= others, 10)
        assert nodes.run("ls", str(nodes.scratch), node=name).stdout == ""


def check_outsiders() -> None:
    """This machine's own Ray, which was there before the job, is there still."""
    assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42


@pytest.fixture
def other(nodes):
    """Something that runs on the second node, and that `ray stop` takes for Ray's by its name."""
    pid = nodes.start_other("n2", "raylet")
    yield pid
    nodes.run("kill", str(pid), node="n2")


@real
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_tunes_on_both_nodes_and_gives_them_back(nodes, submit, whole, other):
    shell = ["salloc", "-N1", "-n1", "-c1", "--mem-per-cpu=700", "env", "SLURM_RESTART_COUNT=1"]  # another job's
    job, folder = submit("both", "cluster.memory=1500M", inside=shell)
    await_steps(nodes, job, folder, 5)
    driver = driver_of(nodes)
    nodes.run("kill", "-STOP", str(driver), node="n1")  # what is looked at meanwhile takes longer than the steps
    before = replica_times(nodes)
    (url,) = re.findall(r"Ray dashboard: (http://127.0.0.1:\d+) on n1", (folder / "slurm" / f"{job}.log").read_text())
    ask = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).status)"
    answers = [nodes.run(sys.executable, "-c", ask, url.replace("127.0.0.1", at), node="n1") for at in ("127.0.0.1",)]
    answers += [nodes.run(sys.executable, "-c", ask, url.replace("127.0.0.1", NODES["n1"]), node="n1")]
    token = nodes.scratch / f"zoray-{job}" / "token"
    mode = nodes.run("stat", "-c", "%a", str(token), node="n1").stdout.strip()
    health = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", nodes.ray_address()]
    keys = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": nodes.run("cat", str(token), node="n1").stdout.strip()}
    friend = nodes.run(*health, node="n2", **keys)
    stranger = nodes.run(*health, node="n2", **{**keys, "RAY_AUTH_TOKEN": "0" * 64})
    nodes.run("kill", "-CONT", str(driver), node="n1")
    wait("most steps", lambda: steps_of(folder) >= 60, 120, every=0.05)
    after = replica_times(nodes)
    wait("the run's end", (folder / "summary.json").exists, 120)
    check_free(nodes, {other})

    assert nodes.job(job)["JobState"] == "COMPLETED" and nodes.job(job)["NumNodes"] == "2"
    for name in NODES:  # one replica on each, and both have worked for the steps in between
        assert len(before[name]) == len(after[name]) == 1, (before, after)
        assert after[name][0] - before[name][0] > 0.1, (before, after)
    assert summary_of(folder)["replicas"] == 2 and summary_of(folder)["lost_replicas"] == 0
    assert summary_of(folder)["digest"] == summary_of(whole)["digest"]
    assert commits_of(folder) == commits_of(whole)
    assert answers[0].stdout.strip() == "200", answers[0].stderr
    assert "refused" in answers[1].stderr
    assert mode == "600" and len(keys["RAY_AUTH_TOKEN"]) == 64
    assert friend.returncode == 0, friend.stderr
    assert stranger.returncode != 0 and "token" in stranger.stdout + stranger.stderr
    log = (folder / "slurm" / f"{job}.log").read_text()
    assert "ssh -N -L" in log and "2 replica(s) ready" in log and "the driver ended with exit code 0" in log
    assert {path.name for path in (folder / "slurm").iterdir()} == {"submit.sh", "zoray.sbatch", f"{job}.log"}
    assert other in pids(nodes, "n2", "raylet")
    check_outsiders()


@real
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_gives_the_nodes_back_and_the_run_can_be_resumed(
    nodes, submit, whole, tmp_path, tiny_models, labelled_file, monkeypatch
):
    """This one is submitted by hand, which is what the script is for as well."""
    arguments = settings(tmp_path, tiny_models["llama"], labelled_file, "killed")
    options = ["--nodes=2", "--exclusive", f"--chdir={tmp_path}"]
    variables = {"ZORAY_PYTHON": sys.executable, "ZORAY_DASHBOARD": "0"}
    done = nodes.run("sbatch", "--parsable", *options, str(script_path()), *arguments, **variables)
    assert done.returncode == 0, done.stderr
    job, folder = done.stdout.strip(), tmp_path / "killed"
    await_steps(nodes, job, folder, 5)
    driver = driver_of(nodes)
    nodes.run("kill", "-KILL", str(driver), node="n1")
    check_free(nodes, set())
    assert steps_of(folder) < STEPS, "killed too late to prove anything: raise STEPS"
    assert nodes.job(job)["JobState"] == "FAILED" and nodes.job(job)["ExitCode"] == "137:0"
    log = folder / "slurm" / f"zoray-{job}.log"  # a link: the job was there before the folder
    assert log.is_symlink() and f"go on with run.resume={folder}" in log.read_text()
    assert {path.name for path in (folder / "slurm").iterdir()} == {log.name, f"{job}-ray-n1", f"{job}-ray-n2"}
    check_outsiders()
    launch_here(monkeypatch, f"run.resume={folder}", "cluster=local", "cluster.cpus_per_replica=1")
    assert summary_of(folder)["digest"] == summary_of(whole)["digest"]


@real
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_at_its_time_limit_is_requeued_and_goes_on_to_the_same_digest(nodes, submit, whole):
    more = ("cluster.time=30", "cluster.signal_s=60", "cluster.requeue=true", "cluster.dashboard=false")
    job, folder = submit("limit", *more)
    log = folder / "slurm" / f"{job}.log"
    await_steps(nodes, job, folder, 5)
    driver = driver_of(nodes)
    nodes.run("kill", "-STOP", str(driver), node="n1")  # a long step, so that the limit comes in the middle of the run
    nodes.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # SLURM looks every 30 s
    wait("SLURM's signal", lambda: "asked to stop" in log.read_text(), 120)
    nodes.run("kill", "-CONT", str(driver), node="n1")
    wait("the requeue", lambda: nodes.job(job)["Restarts"] == "1", 60)
    stopped_at = steps_of(folder)
    nodes.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # one requeue is enough, however busy the machine
    wait("the end of the second start", lambda: nodes.job(job)["JobState"] == "COMPLETED", 240)
    check_free(nodes, set())
    said = log.read_text()
    assert 5 <= stopped_at < STEPS and f"stopped after step {stopped_at} of {STEPS}" in said
    assert "exit code 3" in said and "start 2" in said and said.count("2 replica(s) ready") == 2
    assert summary_of(folder)["digest"] == summary_of(whole)["digest"]
    assert commits_of(folder) == commits_of(whole)
    check_outsiders()
