"""Runs whose disk fills up, that write in the background, and that find their newest checkpoint damaged."""

import contextlib
import logging
import os
import subprocess
import threading
from pathlib import Path

import pytest
from ranks import run_ranks
from recipe import Recipe, file_checksums, read_metrics, run_stage

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.integrity import MANIFEST
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import RunConfig


def sft(recipe: Recipe, name: str, *overrides: str) -> list[str]:
    """Six steps at two ranks, with dropout."""
    return recipe.sft(name, "sft.epochs=2", "run.save_every=1", *overrides)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe) -> Path:
    run_ranks(2, run_stage, "sft", sft(recipe, "undisturbed", "run.keep_last=0"), timeout=120)
    return recipe.root / "undisturbed"


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, 8 MB large: a few checkpoints."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("in CI this test is never skipped: it has to run as root")
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def fill_the_disk(overrides: list[str], disk: Path, steps: range) -> tuple[list[str | None], list[str]]:
    """The disk is full during these steps. Returns the newest checkpoint after each step, and all warnings."""
    import torch.distributed as dist

    from megatron_rlhf.runs.session import Session

    filler, newest, log = disk / "filler", [], Session.log

    def log_and_fill(self, step, metrics):
        log(self, step, metrics)
        folder = sharded.latest(self.checkpoints)
        newest.append(folder.name if folder else None)
        if dist.get_rank() == 0 and step == steps.start:
            fill(filler)
        if dist.get_rank() == 0 and step == steps.stop:
            filler.unlink()
        dist.barrier()

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_rlhf").addHandler(handler)
    Session.log = log_and_fill  # type: ignore[method-assign]
    run_stage("sft", overrides)
    return newest, warnings


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(recipe, small_disk, undisturbed):
    name = "full"
    (recipe.root / name).symlink_to(small_disk)
    (newest, warnings), _ = run_ranks(2, fill_the_disk, sft(recipe, name), small_disk, range(3, 5), timeout=120)
    # A checkpoint is written after its step is logged: those of steps 3 and 4 are missing.
    assert newest == [None, "step_1", "step_2", "step_2", "step_2", "step_5"]
    said = [warning for warning in warnings if "could not be written" in warning]
    assert [warning.split()[1] for warning in said] == ["step_3", "step_4"]
    assert all("No space left" in warning for warning in said), said
    assert all("the last good checkpoint, step_2, stays; the run goes on" in line for line in said)
    assert read_metrics(recipe.root / name) == read_metrics(undisturbed)
    assert sharded.latest(small_disk / "checkpoints").name == "step_6"


# --- in the background -----------------------------------------------------------------------------------------------


def save_slowly(overrides: list[str]) -> list[str]:
    """Writing begins only after the update that follows the saved step. Returns the events in order."""
    from megatron_rlhf.checkpoint.role_files import RoleFiles
    from megatron_rlhf.trainers.sft import SFTTrainer

    events: list[str] = []
    stepped = threading.Event()
    write, train_step = RoleFiles.write, SFTTrainer.train_step

    def train_and_let_write(self):
        metrics = train_step(self)
        events.append(f"step {self.step + 1}")
        stepped.set()
        return metrics

    def write_after_the_next_step(self):
        if threading.current_thread() is not threading.main_thread():
            stepped.clear()
            assert stepped.wait(30)
        write(self)
        events.append(f"wrote {self.folder.parent.name}")

    SFTTrainer.train_step = train_and_let_write  # type: ignore[method-assign]
    RoleFiles.write = write_after_the_next_step  # type: ignore[method-assign]
    run_stage("sft", overrides)
    return events


def test_a_checkpoint_written_while_later_steps_run_is_of_its_own_step(recipe, undisturbed):
    more = ("run.save_every=2", "run.async_save=true", "run.keep_last=0")
    events, _ = run_ranks(2, save_slowly, sft(recipe, "background", *more), timeout=120)
    assert events.index("step 3") < events.index("wrote .step_2.writing") < events.index("step 6")
    for step in (2, 4, 6):
        checksums = [
            file_checksums(recipe.root / name / "checkpoints" / f"step_{step}")
            for name in ("background", "undisturbed")
        ]
        assert checksums[0] == checksums[1], (
            f"step {step}: every byte is that of a checkpoint written in the foreground"
        )


# --- which one to continue from --------------------------------------------------------------------------------------


def damage(step: Path) -> str:
    victim = max((step / "policy").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return f"policy/{victim.name}"


def test_a_damaged_checkpoint_is_named_and_passed_over(recipe, undisturbed):
    name = "damaged"
    run_ranks(2, run_stage, "sft", sft(recipe, name, "run.stop_at_step=4", "run.keep_last=0"), timeout=120)
    victim = damage(recipe.root / name / "checkpoints" / "step_4")
    (recipe.root / name / "checkpoints" / "step_3" / "policy" / ".metadata").unlink()
    run_ranks(2, run_stage, "sft", sft(recipe, name, "run.auto_resume=true"), timeout=120)
    log = (recipe.root / name / "log.txt").read_text()
    assert f"checkpoint step_4 is damaged, so the one before it is used: {victim} is not what" in log
    assert "checkpoint step_3 is damaged, so the one before it is used: policy/.metadata is missing" in log
    assert "checkpoints/step_2 at step 2" in log
    assert read_metrics(recipe.root / name) == read_metrics(undisturbed)


def write_step(folder: Path) -> None:
    with sharded.writing(folder) as aside:
        (aside / sharded.META).write_text('{"format": 1, "roles": {}, "state": {}}')


def test_only_damaged_checkpoints_are_not_taken_for_none(tmp_path, world):
    from megatron_rlhf.runs.checkpoints import choose_checkpoint

    config = RunConfig(dir=str(tmp_path), auto_resume=True)
    assert choose_checkpoint(tmp_path, config) == (None, {})
    for step in (1, 2):
        write_step(tmp_path / f"step_{step}")
        (tmp_path / f"step_{step}" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is undamaged \(step_2: .* is missing.*; step_1: "):
        choose_checkpoint(tmp_path, config)


def test_a_damaged_starting_point_is_refused_with_the_name_of_the_file(recipe, tmp_path):
    subprocess.run(["cp", "-r", str(recipe.root / "sft"), str(tmp_path / "start")], check=True)
    newest = sharded.find_checkpoint(tmp_path / "start", "policy.init_from")
    victim = damage(newest)
    with pytest.raises(AssertionError, match=rf"UserError: policy\.init_from: {newest} is damaged: {victim}"):
        run_ranks(1, run_stage, "sft", sft(recipe, "from_damaged", f"policy.init_from={tmp_path / 'start'}"))


def test_a_refused_resume_changes_nothing(recipe, tmp_path):
    name = "refused"
    run_ranks(1, run_stage, "sft", sft(recipe, name, "run.stop_at_step=2"), timeout=120)
    files = [recipe.root / name / file for file in ("config.yaml", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    other = ("run.seed=99", "run.resume=true")
    with pytest.raises(AssertionError, match=r"run\.seed=99, was 1234"):
        run_ranks(1, run_stage, "sft", sft(recipe, name, *other), timeout=120)
    assert [file.read_bytes() for file in files] == before
