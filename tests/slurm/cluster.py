"""A real Slurm on this machine: munged, slurmctld and several slurmd of Debian's packages, as root, without systemd."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# States of a job that will not run again. COMPLETING is not one: its tasks are still being cleaned up.
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
ReturnToService=2
MailProg=/bin/true
KillWait=120
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


@dataclass
class Job:
    """What `scontrol show job` says."""

    id: int
    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def exit_code(self) -> int:
        return int(self.fields["ExitCode"].split(":")[0])

    @property
    def seconds(self) -> int:
        """Its run time so far."""
        hours, minutes, seconds = map(int, self.fields["RunTime"].split(":"))
        return 3600 * hours + 60 * minutes + seconds

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])


@dataclass
class Cluster:
    """Daemons below `folder`, whose path must be short: it holds a socket."""

    folder: Path
    nodes: int = 2
    _processes: list[subprocess.Popen] = field(default_factory=list)
    _hurried: dict[int, set[int]] = field(default_factory=dict)
    """Job -> the restarts that were hurried."""

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._cancel_all()
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    @property
    def environment(self) -> dict[str, str]:
        """For clients; a job must not accidentally inherit the test's own virtual environment."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        if (Path(sys.prefix) / "bin" / "activate").is_file():  # as by a user whose clone has no .venv
            kept["VENV"] = sys.prefix
        return {
            **kept,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "CLUSTER": "laptop",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def client(self, *command: str, check: bool = True, folder: Path | None = None, **environment: str) -> str:
        """Run a client of Slurm, or a script that calls some; returns what it prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(
        self,
        script: Path,
        *overrides: str,
        flags: Sequence[str] = (),
        submitted_in: Path | None = None,
        **environment: str,
    ) -> int:
        """sbatch; returns the job's id. Its log is `log(id)`."""
        command = ("sbatch", "--parsable", *flags, str(script), *overrides)
        return int(self.client(*command, folder=submitted_in, **environment))

    def job(self, number: int) -> Job:
        shown = self.client("scontrol", "show", "job", str(number)).split()
        return Job(number, dict(pair.split("=", 1) for pair in shown if "=" in pair))

    def wait(self, number: int, timeout: float, until: Sequence[str] = FINISHED) -> Job:
        """Waits until the job is in one of these states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number)).state not in until:
            assert time.monotonic() < deadline, (
                f"job {number} {job.state} ({job.fields['Reason']}) after {timeout} s\n{self.log(number)}"
            )
            time.sleep(0.3)
        return job

    def see_through(self, number: int, timeout: float) -> Job:
        """Waits for the job's end, through its restarts; they do not wait the two minutes that Slurm gives them."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number)).state not in FINISHED:
            assert time.monotonic() < deadline, f"job {number} {job.state} after {timeout} s\n{self.log(number)}"
            self.hurry()
            time.sleep(0.3)
        return job

    def hurry(self) -> None:
        """Start what was queued again, whichever job it is of."""
        listed = self.client("squeue", "--noheader", "--states=PENDING", "--format=%A %r", check=False).splitlines()
        for number, reason in (line.split() for line in listed if len(line.split()) == 2):
            starts = self._hurried.setdefault(int(number), set())
            if reason == "BeginTime" and (restarts := self.job(int(number)).restarts) not in starts:
                # In the second of the requeue, slurmd would still refuse this job's credential.
                self.client("scontrol", "update", f"JobId={number}", "StartTime=now+2", check=False)
                starts.add(restarts)

    def wait_for_file(self, path: Path, number: int, timeout: float) -> None:
        """Waits until the job has written something into a file."""
        deadline = time.monotonic() + timeout
        while not path.exists() or not path.stat().st_size:
            assert self.job(number).state not in FINISHED, self.log(number)
            assert time.monotonic() < deadline, f"no {path} after {timeout} s\n{self.log(number)}"
            time.sleep(0.1)

    def log(self, number: int) -> str:
        """What the job printed."""
        return "\n".join(path.read_text() for path in self.folder.glob(f"*_{number}.log"))

    def _start(self) -> None:
        for name in ("state", "munge"):
            (self.folder / name).mkdir(mode=0o700)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        self._configure()
        self._spawn(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={self.folder}/munge.key",
            f"--socket={self.folder}/munge.sock",
            f"--pid-file={self.folder}/munge/pid",
            f"--log-file={self.folder}/munge/log",
            f"--seed-file={self.folder}/munge/seed",
        )
        _wait_for(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._spawn("slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        for index in range(self.nodes):
            self._spawn("slurmd", "-D", "-f", f"{self.folder}/slurm.conf", "-N", f"n{index + 1}")
        _wait_for(self._all_idle, "nodes that are idle")

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(self.nodes + 1)
        nodes = [
            f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=8 Gres=gpu:8 State=UNKNOWN"
            for i in range(self.nodes)
        ]
        for index in range(8):  # Slurm counts only GPUs that are character devices
            subprocess.run(["mknod", f"{self.folder}/gpu{index}", "c", "195", str(index)], check=True)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        text = CONFIGURATION.format(host=host, port=ports[-1], folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)

    def _cancel_all(self) -> None:
        """A failed test may leave jobs; their tasks would outlive the daemons."""
        if not (self.folder / "slurm.conf").exists():
            return
        for signal in ("TERM", "KILL"):
            listed = self.client("squeue", "--noheader", "--format=%A", check=False).split()
            if jobs := [word for word in listed if word.isdigit()]:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for those that are being requeued
                    self.client("scancel", f"--signal={signal}", "--full", *jobs, check=False)
                self.client("scancel", *jobs, check=False)
                time.sleep(2)

    def _all_idle(self) -> bool:
        shown = self.client("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return shown == ["idle"] * self.nodes

    def _spawn(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.folder)
        self._processes.append(process)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _wait_for(ready, what: str, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {timeout:.0f} s"
        time.sleep(0.1)
