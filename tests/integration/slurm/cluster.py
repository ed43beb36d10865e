"""A real Slurm on this machine: slurmctld and four virtual nodes, in a process and a mount namespace of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# Nothing takes that long, whatever else the machine does: it hangs.
HANG_S, POLL_S = 1800.0, 0.2
NODES = [f"node{number}" for number in range(1, 5)]
GPUS_OF_A_NODE = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "unshare")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.socket
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=node[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=node[1-4] Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
)
# Process 1 of the namespace. It waits for the end of its standard input, which comes when the tests close it or when
# they die: then it ends, and with it the kernel ends every process of the namespace, jobs included.
_INIT = """\
set -euo pipefail
cd "$1"
mount --bind hosts /etc/hosts
munged --force --key-file="$1/munge.key" --socket="$1/run/munge.socket" --pid-file="$1/run/munged.pid" \
    --log-file="$1/log/munged.log" --seed-file="$1/run/munged.seed"
slurmctld -c
for node in "${@:2}"; do slurmd -N "$node"; done
cat > /dev/null
"""


def missing() -> str | None:
    """Why Slurm cannot run here, in one sentence; None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} not found): tools/install_slurm.sh installs it"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    words = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        return "this machine allows no namespaces (unshare)"
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for single in sockets:
        single.bind(("127.0.0.1", 0))
    ports = [int(single.getsockname()[1]) for single in sockets]
    for single in sockets:
        single.close()
    return ports


def wait_for(what: str, done: Callable[[], object], state: Callable[[], str] = str) -> None:
    """Poll until `done()` is true; AssertionError with `what` and `state()` when it hangs."""
    deadline = time.monotonic() + HANG_S
    while not done():
        assert time.monotonic() < deadline, f"{HANG_S:.0f} s were not enough for: {what}\n{state()}"
        time.sleep(POLL_S)


class Cluster:
    """Start it with `with`. Every command of Slurm goes through `ask`.

    The names of the nodes resolve inside of its mount namespace only, where its jobs run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._init: subprocess.Popen[str] | None = None

    def __enter__(self) -> Cluster:
        self._write_files()
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / "log" / "init.log").open("w") as log:
            self._init = subprocess.Popen(
                [*namespace, "bash", "-c", _INIT, "init", str(self.folder), *NODES],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                text=True,
            )
        try:
            wait_for("idle nodes", self._is_idle, self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        if self._init is not None:
            self._init.communicate(timeout=HANG_S)  # closes its input

    def ask(self, *words: str, check: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command printed; AssertionError with its error output if it failed (unless `check` is false)."""
        result = subprocess.run(
            words,
            cwd=cwd,
            env=self.environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert not check or result.returncode == 0, f"{' '.join(words)}: {result.stderr}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """Such as PENDING or COMPLETED; of a heterogeneous job, that of its first component."""
        return self.ask("squeue", "--jobs", job, "--states", "all", "--noheader", "--format", "%T").splitlines()[0]

    def exit_code(self, job: str) -> int:
        """Of the batch script of a job that has ended."""
        told = self.ask("scontrol", "show", "job", job)
        return int(told.split("ExitCode=")[1].split(":")[0])

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        tails = []
        for log in sorted((self.folder / "log").iterdir()):
            tails += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(tails)

    def _is_idle(self) -> bool:
        assert self._init is not None and self._init.poll() is None, self.logs()
        return self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split() == ["idle"] * len(NODES)

    def _write_files(self) -> None:
        folder, host = self.folder, socket.gethostname()
        for name in ("state", "log", "run", "dev", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        ports = free_ports(1 + len(NODES))
        nodes = [
            _NODE.format(name=name, host=host, port=port, gpus=GPUS_OF_A_NODE)
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, ports=ports, nodes="\n".join(nodes)))
        # Slurm hands out GPUs that are character devices: these are /dev/null by another name.
        for index in range(GPUS_OF_A_NODE):
            os.mknod(folder / "dev" / f"gpu{index}", 0o666 | 0o020000, os.makedev(1, 3))
        last = GPUS_OF_A_NODE - 1
        (folder / "gres.conf").write_text(f"NodeName=node[1-4] Name=gpu File={folder}/dev/gpu[0-{last}]\n")
        known = Path("/etc/hosts").read_text()
        (folder / "hosts").write_text(f"{known}\n127.0.0.1 {' '.join(NODES)}\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
