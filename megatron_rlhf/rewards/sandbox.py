"""Runs a model's program with tests, for verifiers: in processes of their own, within limits, and nothing of it is left.

    from megatron_rlhf.rewards.sandbox import pass_share

    def score(prompts, responses, records):
        return [pass_share(response, record["tests"]) for response, record in zip(responses, records)]

This is a fence against accidents and cheap tricks, not against an attacker: a program can read, and in places write, what the
user can, and one that searches its interpreter finds its tests. docs/rewards.md has the list.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_rlhf.rewards.cell import PASSED, START

PACKAGE = Path(__file__).resolve().parents[2]
"""The folder in which megatron_rlhf is."""
OVERHEAD_S = 30.0
"""A machine under load may take this long to start and end processes."""


def pass_share(program: str, tests: Sequence[str], *, seconds: float = 5.0, memory_mb: int = 1024) -> float:
    """The share of the tests that pass, from 0 to 1; 0 where the program itself fails.

    Args:
        program: source code in Python. It is imported, not run as a script.
        tests: source code, each on its own after the program, in its namespace: passed if it runs to its end.
        seconds: for the program and one test.
        memory_mb: address space of each process.
    """
    outcomes = run_tests(program, tests, seconds=seconds, memory_mb=memory_mb)
    return outcomes.count(PASSED) / len(outcomes)


def run_tests(
    program: str,
    tests: Sequence[str],
    *,
    seconds: float = 5.0,
    memory_mb: int = 1024,
    file_mb: int = 16,
    processes: int = 64,
    namespaces: bool = True,
) -> list[str]:
    """What became of each test: `passed`, or why it did not.

    Args:
        file_mb: the largest file that may be written.
        processes: that may run at the same time, where a user namespace is allowed (and not for root).
        namespaces: no network, no other processes in sight, where unshare(2) is allowed.
    """
    if isinstance(tests, str) or not tests:
        raise ValueError(f"tests are a list of one or more texts of Python, not {type(tests).__name__} {tests!r:.60}")
    job = {
        **{"program": program, "tests": list(tests), "seconds": seconds, "memory_mb": memory_mb},
        **{"file_mb": file_mb, "processes": processes, "namespaces": namespaces},
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        finished = subprocess.run(
            [sys.executable, "-s", "-c", START, str(PACKAGE)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
            timeout=len(tests) * (seconds + OVERHEAD_S),
            check=False,
        )
    if finished.returncode < 0:  # nobody else knows of it
        return [f"ended the sandbox (signal {-finished.returncode})"] * len(tests)
    if finished.returncode != 0:
        raise RuntimeError(f"the sandbox itself failed (exit code {finished.returncode}): {finished.stderr[-500:]}")
    return json.loads(finished.stdout)


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the user's, such as keys; the order of sets is the same in every run, and libraries use one thread."""
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    return fixed | {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder}
