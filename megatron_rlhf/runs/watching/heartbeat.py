"""What a rank tells the others about itself, taken from the Python stack of its main thread."""

import dataclasses
import json
import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from enum import Enum
from itertools import accumulate, repeat, takewhile
from pathlib import Path
from types import CodeType, FrameType, TracebackType

from megatron_rlhf.config.launch import node_name

# Frames of these files mean that the rank waits for others; the innermost function's name is the collective's.
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py")
# Megatron-Core waits here for the gradient reduction that it started earlier.
_GRADIENTS = ("param_and_grad_buffer.py", "finish_grad_sync")
# Here a rank waits for the first one, however long that takes: whether that one moves is what counts.
_PATIENT = ("megatron_rlhf/parallel/collectives.py", "wait_for_first_rank")
_INNERMOST = 8
"""Frames among which a collective is looked for."""
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
# Phases that concern other roles than all trained ones.
_ROLES = {
    "policy": "policy",
    "value": "value",
    "rollout": "policy",
    "resharding": "policy",
    "pretraining_ahead": "policy",
    "scoring": "policy, reference, reward, value",
    "exchange": "policy, reference, reward, value",
}


class State(str, Enum):
    """The state of a rank."""

    running = "running"
    ending = "ending"
    """It is done, and waits for the others."""
    broken = "broken"
    """A collective failed: most likely another rank is gone."""
    left = "left"
    """It has failed, and reported why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank's main thread is."""

    collective: str | None
    """Name of the collective that it waits in; None outside any."""
    line: str
    """The innermost line that is not in a library."""


@dataclasses.dataclass
class Beat:
    """One heartbeat of a rank."""

    rank: int
    count: int = 0
    state: State = State.running
    role: str = ""
    """The role being worked on."""
    phase: str = "start"
    step: int = 0
    still_s: float = 0.0
    """Seconds since the main thread last moved."""
    place: Place = dataclasses.field(default_factory=lambda: Place(None, "?"))
    host: str = dataclasses.field(default_factory=node_name)
    pid: int = dataclasses.field(default_factory=os.getpid)
    space: str = dataclasses.field(default_factory=lambda: _process_space())
    """The namespace of the process id: containers on one host may have their own."""

    stacks: int = -1
    """Descriptor of the open file with its answer to `stacks.SIGNAL`."""

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str | bytes) -> "Beat":
        content = json.loads(text)
        return cls(**{**content, "place": Place(**content["place"]), "state": State(content["state"])})

    def describe(self) -> str:
        """rank, host, role, phase, step, collective."""
        role = f"role {self.role}, " if self.role else ""
        waits = f"waiting in {self.place.collective}" if self.place.collective else "in no collective"
        return (
            f"rank {self.rank} on {self.host}: {role}phase {self.phase}, step {self.step}, {waits} ({self.place.line})"
        )


class MainThread:
    """The main thread, observed from another thread."""

    def __init__(self) -> None:
        self._id = threading.main_thread().ident
        self._seen: tuple[tuple[int, int], ...] = ()

    def has_moved(self) -> bool:
        """Whether it is at a different instruction, in any frame, from the last call, or waits where that tells nothing."""
        frames = self._frames()
        now = tuple((id(frame.f_code), frame.f_lasti) for frame in frames)
        moved, self._seen = now != self._seen, now
        return moved or any(_is_of(frame.f_code, _PATIENT) for frame in frames[:_INNERMOST])

    def place(self) -> Place:
        return _place([(frame.f_code, frame.f_lineno) for frame in self._frames()])

    def waits(self) -> bool:
        """Whether it is in a collective."""
        return _collective([frame.f_code for frame in self._frames()[:_INNERMOST]]) is not None

    def _frames(self) -> list[FrameType]:
        """Innermost frame first."""
        frame = sys._current_frames().get(self._id or 0)
        if frame is None:
            return []
        # No step of this is in Python, where the main thread could go on: its frames would end while their callers are looked up,
        # which has crashed CPython 3.11.
        return list(takewhile(bool, accumulate(repeat("f_back"), getattr, initial=frame)))


def place_of(trace: TracebackType | None) -> Place:
    """Where an exception came from."""
    calls = []
    while trace is not None:
        calls.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return _place(calls[::-1])


def _place(calls: Sequence[tuple[CodeType, int]]) -> Place:
    """From the stack's functions and lines, innermost first."""
    if not calls:
        return Place(None, "?")
    code, number = next((call for call in calls if not call[0].co_filename.startswith(_LIBRARIES)), calls[0])
    return Place(_collective([code for code, _ in calls]), f"{Path(code.co_filename).name}:{number} {code.co_name}")


def _collective(codes: Sequence[CodeType]) -> str | None:
    """The outermost function of torch's collectives, of those not far from the innermost call."""
    found = None
    for code in codes[:_INNERMOST]:
        if code.co_filename.endswith(_COLLECTIVES):
            found = code.co_name
        elif _is_of(code, _GRADIENTS):
            return "gradient reduction"
        elif _is_of(code, _PATIENT):
            return code.co_name
    return found


def _is_of(code: CodeType, function: tuple[str, str]) -> bool:
    return code.co_filename.endswith(function[0]) and code.co_name == function[1]


def role_at_work(phase: str, trained: Sequence[str]) -> str:
    """The role that a phase concerns; outside PPO's phases, those that the run trains."""
    return _ROLES.get(phase, ", ".join(trained))


def _process_space() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown {os.getpid()}"
