"""This process's rank among all, from what python, torchrun or srun left in the environment."""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlhf.config.errors import UserError

# Slurm numbers steps that srun did not start (interactive shell, batch script, extern) from here up.
FIRST_RESERVED_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Launch:
    """This process's place among all."""

    rank: int
    world_size: int
    local_rank: int


def detect_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read rank and world size from torchrun's variables, else Slurm's, else take one rank.

    Raises:
        UserError: for half of torchrun's variables, or numbers that are none.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if environment.get(name)]
    if len(given) == 2:
        return _launch(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if _is_srun_step(environment):
        return _launch(environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    alone = {"RANK": 0, "WORLD_SIZE": 1}
    for name in given:
        if _whole_number(environment, name) != alone[name]:
            missing = "WORLD_SIZE" if name == "RANK" else "RANK"
            raise UserError(
                f"{name}={environment[name]} is set and {missing} is not: set both, as torchrun does, or neither for one "
                "process alone"
            )
    return Launch(0, 1, 0)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """What Slurm calls this node, else its host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def expected_nodes(world_size: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The node of each rank of an srun step; none where nothing says so."""
    nodes = node_names(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "")
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    tasks: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    if len(nodes) != len(tasks) or sum(tasks) != world_size:
        return []
    kind = environment.get("SLURM_DISTRIBUTION", "block").split(":")[0].split(",")[0]
    if kind == "cyclic":  # a task for each node that has room, round after round
        return [node for turn in range(max(tasks)) for node, count in zip(nodes, tasks, strict=True) if turn < count]
    blocks = [node for node, count in zip(nodes, tasks, strict=True) for _ in range(count)]
    return blocks if kind in ("block", "*") else []


def tell_launcher(reason: str, environment: Mapping[str, str] = os.environ) -> None:
    """Leave the reason of a failure where torchrun looks for it: it ends its own report with that of the first rank to fail."""
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # In whole seconds: what follows from the reason, such as ranks that are killed, must not look as early as it.
        about = {"py_callstack": reason, "timestamp": str(int(time.time()) - 1)}
        with (
            contextlib.suppress(OSError),
            open(path, "w", encoding="utf-8") as file,
        ):  # the reason is on the screen already
            json.dump({"message": {"message": reason, "extraInfo": about}}, file)


def node_names(listed: str) -> list[str]:
    """Slurm's list of nodes, "gpu[01-03,7],login": a container may have no scontrol to expand it."""
    names = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", listed):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1) if part else [""]
            names += [f"{prefix}{str(number).zfill(len(first))}{suffix}" for number in numbers]
    return names


def _is_srun_step(environment: Mapping[str, str]) -> bool:
    """A shell inside an allocation has SLURM_NTASKS too, but only the tasks of an srun are numbered within a step of
    their own."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < FIRST_RESERVED_STEP


def _launch(environment: Mapping[str, str], rank_name: str, size_name: str, local_name: str) -> Launch:
    rank, size = _whole_number(environment, rank_name), _whole_number(environment, size_name)
    if size < 1 or rank >= size:
        raise UserError(f"{rank_name}={rank}, {size_name}={size}: ranks go from 0 to one less than their number")
    return Launch(rank, size, _whole_number(environment, local_name, "0"))


def _whole_number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default).strip()
    if not text.isdecimal():
        raise UserError(f"{name}={text}: a whole number is expected in the environment, as torchrun and srun set it")
    return int(text)
