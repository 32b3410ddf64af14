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
# With TORCHELASTIC_USE_AGENT_STORE a process waits at the agent's store for ranks of the world that it is not in; PET_* are
# options of torchrun.
_OF_A_RANK = re.compile(r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_.*")


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


def without_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment without torchrun's variables, for a process that is no rank of this world."""
    return {name: value for name, value in environment.items() if not _OF_A_RANK.fullmatch(name)}


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
    """Slurm's list of nodes, "gpu[01-03,7],rack[0-1]n[0-3]": a container may have no scontrol to expand it."""
    names = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", listed):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", pattern):
            parts = [text] if text else _numbers(ranges)
            expanded = [name + part for name in expanded for part in parts]
        names += expanded
    return names


def _numbers(ranges: str) -> list[str]:
    """ "01-03,7": 01, 02, 03 and 7."""
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return found


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
