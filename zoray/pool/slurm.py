"""A run as a SLURM job: checked and submitted from a login node; inside the job, the Ray cluster that the job started.

The job itself is cluster/slurm/zoray.sbatch, which works by hand as well: this file only knows its options. A submitted
run has its folder and config from the start, so the job, and each start after a requeue, continues that folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import zoray
from zoray.pool.on_ray.reach import check_reachable
from zoray.pool.settings import Cluster
from zoray.records import ConfigError, disk, require
from zoray.records.overrides import setting, value_of
from zoray.records.paths import user_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LOGS = "slurm"  # folder in the run's folder: log, script and command line of each job
IN_JOB = "ZORAY_JOB"  # set by the script
# Variables that a job, a step, MPI or a Ray has put into a shell must not leak into another job. How to reach SLURM and
# who pays are kept; all else in SBATCH_* comes from settings. The patterns mean the same in bash and in Python.
STATE = r"^((SLURM|SLURMD|SBATCH|SALLOC|SRUN|PMI[A-Z0-9]*|OMPI|ORTE|PRTE)_|(CUDA|ROCR|HIP|NVIDIA)_VISIBLE_DEVICES$"
STATE += r"|GPU_DEVICE_ORDINAL$|ZE_AFFINITY_MASK$|RAY_(ADDRESS|AUTH_TOKEN|TMPDIR|RAYLET|JOB|NODE|CLUSTER))"
KEPT = (
    r"^(SLURM_(CONF|CONF_SERVER|JWT|CLUSTERS|SACK_SOCKET)|SBATCH_(ACCOUNT|CLUSTERS|PARTITION|QOS|RESERVATION|WCKEY))$"
)
FORGET = f"""\
state='{STATE}' kept='{KEPT}' # of another job, in whose shell this may be
for name in $(compgen -e); do [[ ! $name =~ $state || $name =~ $kept ]] || unset "$name"; done
"""
SIGNALS = (30, 65535)  # seconds; SLURM takes no more, and the script itself needs some
OWN = {  # sbatch's options that have a setting, or that the script sets
    **{"nodes": "nodes", "gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus_per_node", "mem": "memory"},
    **{"time": "time", "partition": "partition", "account": "account", "qos": "qos", "signal": "signal_s"},
    **{"requeue": "requeue", "no-requeue": "requeue", "exclusive": "exclusive"},
    **dict.fromkeys(("output", "error", "open-mode", "ntasks", "ntasks-per-node", "array", "wrap", "export"), ""),
}


@dataclass(frozen=True)
class Slurm(Cluster):
    """A SLURM job with a Ray node on each of its nodes. See docs/slurm.md.

    Args:
        replicas: how many, or "auto": one per GPU, or one per node where there are none.
        cpus_per_replica: cores that each replica reserves and binds to; null shares each node's cores out evenly.
        gpus_per_replica: GPUs of each replica; null takes one where there are any.
        dashboard: serve Ray's dashboard on the first node (loopback only); the log has the command for a tunnel.
        dashboard_port: its port; the next free one, if it is taken.
        start_timeout_s: longest wait for the actors to be placed, and then between one connection and the next.
        ship: send this zoray to the nodes; seldom needed, as they share a file system.
        port: of the driver, where replicas connect throughout the run; 0 takes a free one.
        min_replicas: this and the next six are as in a cluster that is joined, see Cluster.
        wait_timeout_s: see Cluster.
        late_factor: see Cluster.
        late_floor_s: see Cluster.
        hang_timeout_s: see Cluster.
        snapshot_every: see Cluster.
        snapshot_mib: see Cluster.
        nodes: how many.
        gpus_per_node: GPUs to ask for on each; 0 for a run on CPUs.
        cpus_per_node: cores to ask for on each; null, with `exclusive`, takes what the nodes have.
        memory: to ask for on each node, as sbatch writes it ("64G", "0" for all); null is the partition's default.
        time: limit, as sbatch writes it ("30", "4:00:00", "2-12"); null is the partition's default.
        partition: to submit to; null is SLURM's default, as for the next two.
        account: to charge.
        qos: quality of service.
        exclusive: whole nodes, shared with no other job.
        signal_s: seconds before the time limit at which the run is told to stop after the current step.
        requeue: start the job again after the time limit, a preemption or the loss of a node, and go on.
        setup: shell lines to run on the first node before anything else, such as "module load cuda".
        python: the Python to run with; null is the one that submits.
        extra: further options of sbatch, e.g. ["--constraint=h100", "--mail-type=END"].
        dry_run: print the command and the script, and submit nothing.
    """

    replicas: int | str = "auto"
    address: str | None = field(default=None, init=False)  # the job's own, from RAY_ADDRESS
    ship: bool = False
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    memory: str | None = None
    time: int | str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclusive: bool = True
    signal_s: int = 120
    requeue: bool = False
    setup: tuple[str, ...] = ()
    python: str | None = None
    extra: tuple[str, ...] = ()
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("setup", "extra"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(self.nodes >= 1, "cluster.nodes to be at least 1", self.nodes)
        require(self.gpus_per_node >= 0, "cluster.gpus_per_node to be 0 or more", self.gpus_per_node)
        cpus = self.cpus_per_node
        require(cpus is None or cpus >= 1, "cluster.cpus_per_node to be at least 1, or null", cpus)
        require(
            self.exclusive or cpus is not None,
            "cluster.cpus_per_node with cluster.exclusive=false",
            cpus,
            "SLURM would give one core a node. Say how many",
        )
        low, high = SIGNALS
        require(low <= self.signal_s <= high, f"cluster.signal_s to be from {low} to {high} seconds", self.signal_s)
        limit = None if self.time is None else seconds(str(self.time))
        require(
            limit is None or self.signal_s + 60 <= limit,
            f"cluster.signal_s to be at least a minute shorter than cluster.time ({self.time})",
            self.signal_s,
            "Lower it, or raise cluster.time: a whole number is minutes",
        )
        for name in ("partition", "account", "qos", "memory"):
            value = getattr(self, name)
            ok = value is None or re.fullmatch(r"[\w.,+@:-]+", value) is not None
            require(ok, f"cluster.{name} as sbatch takes it, without spaces", value)
        for option in self.extra:
            self._check_extra(option)

    def _check_extra(self, option: str) -> None:
        name = re.fullmatch(r"--([a-z][a-z0-9-]*)(=.*)?", option)
        require(name is not None, "each item of cluster.extra to be --name or --name=value, as for sbatch", option)
        if name is not None and name[1] in OWN:
            setting = OWN[name[1]]
            raise ConfigError(
                f"expected cluster.extra without {option}: "
                + (f"that is cluster.{setting}" if setting else "cluster/slurm/zoray.sbatch has its own")
            )

    @property
    def submits(self) -> bool:
        """Whether a run is to be submitted; false in the job that runs it."""
        return IN_JOB not in os.environ

    def check(self) -> None:
        """Raise ConfigError unless jobs can be submitted here; in the job, unless its Ray cluster answers."""
        if not self.submits:
            check_reachable(self.joins)
        elif not self.dry_run:
            require(
                shutil.which("sbatch") is not None,
                "sbatch on PATH, since cluster=slurm submits a job",
                "none",
                "Run this on a login node; cluster.dry_run=true shows what would be submitted",
            )


def seconds(time: str) -> float:
    """A time limit as sbatch writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; UNLIMITED and 0 are no limit."""
    if time.upper() in ("UNLIMITED", "INFINITE", "0"):
        return float("inf")
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]):
        raise ConfigError(
            f"expected cluster.time as minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; got {time!r}. Take 30, or 4:00:00"
        )
    numbers = [int(part) for part in parts]
    if dash or len(numbers) == 3:
        hours, minutes, rest_s = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, rest_s) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_s


def script_path() -> Path:
    """zoray.sbatch: in a checkout, or the copy packed in the wheel."""
    here = Path(zoray.__file__).parent
    packed = here / "jobs" / "slurm" / "zoray.sbatch"
    return packed if packed.is_file() else here.parent / "cluster" / "slurm" / "zoray.sbatch"


def environment(slurm: Slurm) -> dict[str, str]:
    """What the script reads from its environment."""
    set_up = {"ZORAY_SETUP": "\n".join(slurm.setup)} if slurm.setup else {}
    return {
        **set_up,
        "ZORAY_PYTHON": str(user_path(slurm.python or sys.executable)),
        "ZORAY_DASHBOARD": str(slurm.dashboard_port if slurm.dashboard else 0),
    }


def outside(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that a shell outside any job would have."""
    return {name: value for name, value in variables.items() if re.match(KEPT, name) or not re.match(STATE, name)}


def command(slurm: Slurm, folder: Path, arguments: Sequence[str]) -> list[str]:
    """sbatch's command line for a run's folder. `arguments`: settings that change when a run is resumed.

    The job continues the folder, which already has the run's config.
    """
    options = {
        "job-name": f"zoray-{folder.name}",
        "nodes": slurm.nodes,
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "signal": f"B:USR1@{slurm.signal_s}",
        "chdir": Path.cwd(),
        "export": "ALL",
        "output": f"{str(folder / LOGS).replace('%', '%%')}/%j.log",
    }
    return [
        "sbatch",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        *(["--exclusive"] if slurm.exclusive else []),
        "--requeue" if slurm.requeue else "--no-requeue",
        *slurm.extra,
        str(folder / LOGS / "zoray.sbatch"),
        f"run.resume={value_of(str(folder))}",
        *arguments,
    ]


def submit(slurm: Slurm, folder: Path, arguments: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Write script and command line into the run's folder and submit them; with `dry_run`, only print them.

    Raises:
        ConfigError: sbatch refuses.
    """
    folder, script = folder.resolve(), script_path().read_text(encoding="utf-8")
    line = command(slurm, folder, arguments)
    variables = environment(slurm)
    shown = " \\\n  ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(line)])
    if slurm.dry_run:
        say(f"{shown}\n\n# {folder / LOGS / 'zoray.sbatch'}\n{script}")
        return
    logs = folder / LOGS
    with disk.naming(logs):
        logs.mkdir(exist_ok=True)
        (logs / "zoray.sbatch").write_text(script, encoding="utf-8")
        (logs / "submit.sh").write_text(
            f"# the job's command line; run it again to resume the run\n{FORGET}{shown}\n", encoding="utf-8"
        )
    done = subprocess.run(
        line, env={**outside(os.environ), **variables}, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise ConfigError(
            f"expected sbatch to take the job; it says: {' '.join(done.stderr.split())}. "
            "cluster.dry_run=true shows the command line"
        )
    job = done.stdout.split()[-1]
    say(f"{done.stdout.strip()}: {slurm.nodes} node(s), run folder {folder}")
    say(f"  log, with the dashboard's address:  tail -F {shlex.quote(f'{logs / job}.log')}")
    say(f"  stop it, so that it can be resumed: scancel --signal=TERM --batch {job}")
    say(f"  go on with it:                      python -m zoray.launch {setting('run.resume', str(folder))}")
