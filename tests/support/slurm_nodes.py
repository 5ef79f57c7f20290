"""A real SLURM of two nodes on one machine, for tests: slurmctld and two slurmd, each in namespaces of its own.

Every node has its own network, host name, process table and scratch folder, as real ones have; all see the same files.
The bridge between them lies in the controller's network namespace, so nothing of the machine's own network, processes,
/etc or munge is touched, and everything is gone when the processes are: the kernel takes what was in a namespace along.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
NODES = {"n1": "10.99.0.1", "n2": "10.99.0.2"}
CONTROLLER = "10.99.0.254"
CONF = """\
ClusterName=test
SlurmctldHost={host}({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What this machine lacks for it; empty if nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if absent:
        return f"lacks {', '.join(absent)}: apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:
        return "needs root, to run daemons of SLURM in namespaces"
    done = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "--uts", "true"], capture_output=True)
    return "" if done.returncode == 0 else f"needs namespaces: {done.stderr.decode().strip()}"


def wait(what: str, condition: Callable[[], object], seconds: float, every: float = 0.2) -> float:
    """Seconds until the condition holds; AssertionError, with what it is, after so many."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds} s"
        time.sleep(every)
    return time.monotonic() - began


class SlurmCluster:
    """Use as a context manager. `scratch` is a folder that each node has for itself."""

    def __init__(self, root: Path, cpus: int = 1) -> None:
        self.root, self.cpus = root, cpus
        self.scratch = Path(tempfile.mkdtemp(prefix="zs"))  # Ray's sockets need a short path
        self.processes: list[subprocess.Popen[bytes]] = []
        self.holders: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        (self.root / "state").mkdir()
        os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={address} CPUs={self.cpus} RealMemory=4000 State=UNKNOWN"
            for name, address in NODES.items()
        )
        (self.root / "slurm.conf").write_text(
            CONF.format(host=host, controller=CONTROLLER, root=self.root, nodes=nodes)
        )
        hosts = [f"{address} {name}" for name, address in {**NODES, host: CONTROLLER}.items()]
        (self.root / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (self.root / "cgroup.conf").write_text("")
        self._munge()
        self._hold("controller", host)
        for name in NODES:
            self._hold(name, name)
        self._wire()
        self._daemon("controller", "slurmctld", "-D", "-i", "-f", str(self.root / "slurm.conf"))
        cores = sorted(os.sched_getaffinity(0))
        for i, name in enumerate(NODES):  # each with cores of its own, as far as there are
            core = str(cores[i % len(cores)]) if self.cpus == 1 else ",".join(map(str, cores))
            self._daemon(name, "taskset", "-c", core, "slurmd", "-D", "-N", name, "-f", str(self.root / "slurm.conf"))
        wait("two idle nodes", lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "2", 30)

    def _munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.root}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        command = ["munged", "--force", "--foreground", f"--socket={self.root}/munge.socket", *files]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait("munged's socket", (self.root / "munge.socket").exists, 10)

    def _hold(self, name: str, host: str) -> None:
        """A process that holds the namespaces of a node; all others in them die with it.

        bash is their first process, and as such takes in orphans, as a node's init does.
        """
        inside = f"""hostname {host}; mount --bind {self.root}/hosts /etc/hosts; mount -t tmpfs tmpfs {self.scratch}
            ip link set lo up; echo ready; while read -r; do :; done"""
        command = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", inside]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.holders[name] = holder
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n", name

    def enter(self, name: str) -> list[str]:
        """The beginning of a command line that runs in a node's namespaces; "controller" is the login node."""
        children = Path(f"/proc/{self.holders[name].pid}/task/{self.holders[name].pid}/children").read_text()
        return ["nsenter", "-t", children.split()[0], "--net", "--uts", "--mount", "--pid", f"--wd={Path.cwd()}"]

    def _wire(self) -> None:
        """A bridge in the controller's network, and a cable from each node to it."""

        def ip(node: str, *arguments: str) -> None:
            subprocess.run([*self.enter(node), "ip", *arguments], check=True, timeout=20)

        ip("controller", "link", "add", "bridge", "type", "bridge")
        ip("controller", "addr", "add", f"{CONTROLLER}/24", "dev", "bridge")
        ip("controller", "link", "set", "bridge", "up")
        for name, address in NODES.items():
            ip("controller", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0")
            inner = self.enter(name)[2]
            ip("controller", "link", "set", f"to-{name}", "master", "bridge", "up")
            subprocess.run(
                ["nsenter", "-t", self.enter("controller")[2], "--net", "ip", "link", "set", "eth0", "netns", inner],
                check=True,
                timeout=20,
            )
            ip(name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip(name, "link", "set", "eth0", "up")

    def _daemon(self, node: str, *command: str) -> None:
        log = (self.root / f"daemon-{node}.out").open("wb")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAY"))}
        self.processes.append(subprocess.Popen([*self.enter(node), *command], stdout=log, stderr=log, env=environment))

    def environment(self, **more: str) -> dict[str, str]:
        """For a command on the login node."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAY_"))}
        return {**kept, "SLURM_CONF": str(self.root / "slurm.conf"), "ZORAY_TMP": str(self.scratch), **more}

    def run(self, *command: str, node: str = "controller", **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, or on another one."""
        return subprocess.run(
            [*self.enter(node), *command], capture_output=True, text=True, timeout=120, env=self.environment(**more)
        )

    def job(self, number: int | str) -> dict[str, str]:
        """What the controller knows of a job; it is asked again where it is too busy to answer."""
        for _ in range(10):
            said = self.run("scontrol", "show", "job", "-o", str(number))
            found = dict(item.split("=", 1) for item in said.stdout.split() if "=" in item)
            if "JobState" in found:
                return found
            time.sleep(1.0)
        raise AssertionError(f"scontrol says nothing of job {number}: {said.stdout}{said.stderr}")

    def idle(self) -> bool:
        """Whether every node is free."""
        return self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == str(len(NODES))

    def processes_on(self, node: str) -> list[str]:
        """Command lines of what runs on a node."""
        lines = self.run("ps", "-e", "-ww", "-o", "pid=,args=", node=node).stdout.splitlines()
        return [line.strip() for line in lines]

    def cpu_seconds(self, node: str, pid: int) -> float:
        """Processor time that a process on a node has used."""
        fields = self.run("cat", f"/proc/{pid}/stat", node=node).stdout.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def start_other(self, node: str, name: str) -> int:
        """A process that is called `name` and no part of any job; its number on the node."""
        program = self.root / name
        shutil.copy("/bin/sleep", program)
        self.processes.append(subprocess.Popen([*self.enter(node), str(program), "100000"]))
        found = []
        wait(name, lambda: found.extend(line for line in self.processes_on(node) if str(program) in line) or found, 10)
        return int(found[0].split()[0])

    def ray_address(self) -> str:
        """Where Ray's head on the first node listens."""
        (found,) = {word for line in self.processes_on("n1") for word in line.split() if "--gcs-address=" in word}
        return found.partition("=")[2]

    def close(self) -> None:
        """End all of it."""
        for process in (*self.holders.values(), *self.processes):
            process.terminate() if process in self.processes else process.kill()
        for process in (*self.holders.values(), *self.processes):
            process.wait(timeout=20)
        self.holders.clear()
        self.processes.clear()
        self.scratch.rmdir()  # what was mounted on it went with the nodes

    def __exit__(self, *exception: object) -> None:
        self.close()
