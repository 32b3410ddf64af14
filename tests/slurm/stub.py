"""Jobs of stub_training.py: what is tested is what the scripts do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, Job

TWO_NODES = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
LIMIT = 240.0


@dataclass(frozen=True)
class Stub:
    """The repository of the stub and its run folders."""

    cluster: Cluster
    repository: Path

    def submit(
        self,
        name: str,
        *overrides: str,
        flags: Sequence[str] = (),
        script: Path | None = None,
        submitted_in: Path | None = None,
        run_dir_by: str = "run.dir",
        **variables: str,
    ) -> "StubJob":
        """`run_dir_by`: the key that gives it, or names a file of settings that does: config or recipe."""
        folder = given = self.cluster.folder / "runs" / name
        if run_dir_by != "run.dir":
            given = self.cluster.folder / f"{name}.yaml"
            given.write_text(f"run.dir: {folder}\n")
        script = script or self.repository / "slurm" / "ppo_175b.sh"
        # No VENV: the repository has one.
        settings = {"VENV": "", "CLUSTER": "h100_80gb", **variables}
        flags = [*TWO_NODES, f"--output={self.cluster.folder}/%x_%j.log", *flags]
        number = self.cluster.submit(
            script, f"{run_dir_by}={given}", *overrides, flags=flags, submitted_in=submitted_in, **settings
        )
        return StubJob(self.cluster, number, folder)


@dataclass(frozen=True)
class StubJob:
    cluster: Cluster
    number: int
    folder: Path

    def end(self) -> Job:
        return self.cluster.see_through(self.number, LIMIT)

    @property
    def log(self) -> str:
        return self.cluster.log(self.number)

    @property
    def last_line(self) -> str:
        return self.log.strip().splitlines()[-1]

    @property
    def record(self) -> list[dict[str, str]]:
        """The lines of restarts.tsv."""
        lines = [line.split("\t") for line in (self.folder / "restarts.tsv").read_text().splitlines()]
        return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]

    def ranks(self, start: int) -> list[list[str]]:
        """Start, rank, number of ranks, node and overrides of each rank of a start."""
        lines = [line.split("|") for line in (self.folder / "ranks.txt").read_text().splitlines()]
        return sorted(line for line in lines if line[0] == str(start))
