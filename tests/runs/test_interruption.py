"""A signal to one rank: all ranks save and stop after the same step, with an exit code of its own, and continue from there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import run_ranks
from recipe import Recipe, read_metrics, run_stage

from megatron_rlhf import cli


def signalled(overrides: Sequence[str], number: int, at_step: int) -> str:
    """One rank gets the signal while it logs a step; returns how the run ended."""
    import torch.distributed as dist

    from megatron_rlhf.config.errors import Interrupted
    from megatron_rlhf.runs.session import Session

    log = Session.log

    def log_and_signal(self, step, metrics):
        log(self, step, metrics)
        if step == at_step and dist.get_rank() == 1:
            os.kill(os.getpid(), number)

    Session.log = log_and_signal  # type: ignore[method-assign]
    try:
        run_stage("sft", overrides)
    except Interrupted as reason:
        return str(reason)
    return "ran to its end"


def sft(recipe: Recipe, name: str, *overrides: str) -> list[str]:
    return recipe.sft(name, "sft.epochs=2", "run.auto_resume=true", *overrides)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_all_ranks_save_and_stop_after_the_same_step(recipe: Recipe, number: int) -> None:
    name = f"signal_{number}"
    ends = run_ranks(2, signalled, sft(recipe, name), number, 2, timeout=120)
    assert (
        ends
        == [f"asked to stop: saved {recipe.root / name / 'checkpoints/step_2'}; go on with run.auto_resume=true"] * 2
    )
    assert checkpoints(recipe.root / name) == ["step_2"]


def test_the_next_start_goes_on_as_if_nothing_had_been(recipe: Recipe) -> None:
    run_ranks(2, run_stage, "sft", sft(recipe, "whole"), timeout=120)  # auto_resume with nothing to resume: a new run
    run_ranks(2, signalled, sft(recipe, "halves"), signal.SIGTERM, 2, timeout=120)
    run_ranks(2, run_stage, "sft", sft(recipe, "halves"), timeout=120)
    assert read_metrics(recipe.root / "halves") == read_metrics(recipe.root / "whole")
    state = json.loads((recipe.root / "halves" / "checkpoints" / "step_6" / "meta.json").read_text())["state"]
    assert state["step"] == 6


def test_a_signal_in_the_last_step_changes_nothing(recipe: Recipe) -> None:
    assert run_ranks(2, signalled, sft(recipe, "last"), signal.SIGTERM, 6, timeout=120) == ["ran to its end"] * 2


def leave_interrupted() -> None:
    from megatron_rlhf import cli

    with cli.exit_code_on_failure():
        raise cli.Interrupted("asked to stop")


def test_the_exit_code_is_the_first_ranks_alone() -> None:
    """If every rank had it, a launcher that kills all ranks at the first code would replace it with its own."""
    codes = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            leave_interrupted()
            os._exit(99)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert codes == [75, 0]


def test_handlers_are_given_back() -> None:
    from megatron_rlhf.runs.interruption import Interruption

    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption()
    interruption.listen()
    assert signal.getsignal(signal.SIGTERM) != before
    interruption.ignore()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_ends_an_evaluation_as_any_program(recipe: Recipe, world, monkeypatch, tmp_path) -> None:
    """It has no checkpoint to write, and no step between which to stop."""
    from megatron_rlhf.evaluation.evaluator import Evaluator

    run_stage("sft", recipe.sft(str(tmp_path / "sft"), "sft.max_steps=1"))
    before, handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)], []
    monkeypatch.setattr(
        Evaluator, "run", lambda self: handlers.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGUSR1)))
    )
    start = f"policy.init_from={tmp_path / 'sft/checkpoints/step_1'}"
    prompts = f"data.prompts={recipe.root / 'prompts.jsonl'}"
    cli.run_stage("evaluate", [f"run.dir={tmp_path / 'evaluation'}", start, *recipe.data, prompts])
    assert handlers == before


def test_no_helper_outlives_a_rank() -> None:
    """A process that a library starts keeps the rank's output open; a job step would last until it ends."""
    script = """
from multiprocessing import get_context
from megatron_rlhf import cli
if __name__ == "__main__":
    manager = get_context("spawn").Manager()
    with cli.exit_code_on_failure():
        raise cli.Interrupted("asked to stop")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 75, done.stderr
