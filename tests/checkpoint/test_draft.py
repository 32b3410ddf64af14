"""Disks that are full, on one rank or all, and checkpoints that are written while the run continues."""

import resource
import threading

import psutil
import pytest
import torch.distributed as dist
from ranks import limited_rank, run_ranks
from toys import GPT2_LIKE, make_role

from megatron_rlhf.checkpoint import naming, sharded
from megatron_rlhf.checkpoint.draft import Draft
from megatron_rlhf.checkpoint.integrity import NotWritten, find_damage
from megatron_rlhf.checkpoint.role_files import RoleFiles
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig


def save_with_one_full_disk(root, rank, size):
    """The message that all ranks get, then what a second attempt leaves when there is room."""
    role = make_role(GPT2_LIKE, ParallelConfig(tensor=2))

    def save():
        with sharded.writing(root / "step_2") as aside:
            sharded.save_role(aside, SavedRole(role))
            sharded.write_meta(aside, {"policy": role}, {"step": 2})

    limited_rank(rank, size)
    with pytest.raises(NotWritten) as caught:
        save()
    left = sorted(path.name for path in root.iterdir())
    dist.barrier()
    limited_rank(rank, resource.RLIM_INFINITY)
    save()
    return str(caught.value), left, find_damage(root / "step_2")


# The first rank writes descriptions too: at which file it fails depends on how much room there is.
@pytest.mark.parametrize(("rank", "size"), [(1, 5000), (0, 5000), (0, 100), (0, 0)])
def test_a_full_disk_on_one_rank_is_told_to_all_and_none_waits(tmp_path, rank, size):
    results = run_ranks(2, save_with_one_full_disk, tmp_path, rank, size, timeout=60)
    for message, left, damage in results:
        assert message.endswith(f"(rank {rank})")
        assert left == []
        assert damage is None


def draft_in_background(root):
    """A draft whose writing waits until the role has changed."""
    role = make_role(GPT2_LIKE, ParallelConfig(tensor=2))
    may_write = threading.Event()
    write = RoleFiles.write

    def write_later(self):
        assert may_write.wait(30)
        write(self)

    before = [parameter.detach().clone() for parameter in role.modules[0].parameters()]
    RoleFiles.write = write_later  # type: ignore[method-assign]
    draft = Draft(root / "step_1", background=True)
    draft.add("policy", sharded.state_to_save(SavedRole(role)))
    sharded.write_meta(draft.path, {"policy": role}, {})
    draft.start()
    for parameter in role.modules[0].parameters():
        parameter.data.add_(1.0)
    unwritten = draft.is_written(), sharded.latest(root)
    may_write.set()
    draft.publish()
    sharded.load_weights(root / "step_1", role, "policy")
    same = all(bool((a == b).all()) for a, b in zip(before, role.modules[0].parameters(), strict=True))
    return unwritten, same, find_damage(root / "step_1")


def test_what_is_written_in_the_background_is_what_the_role_was(tmp_path):
    assert run_ranks(2, draft_in_background, tmp_path) == [((False, None), True, None)] * 2


def processes_after_a_save(root):
    role = make_role(GPT2_LIKE, ParallelConfig(tensor=2))
    with sharded.writing(root / "step_1") as aside:
        sharded.save_role(aside, SavedRole(role))
        sharded.write_meta(aside, {"policy": role}, {})
    return len(psutil.Process().children(recursive=True))


def test_saving_starts_no_processes(tmp_path):
    """Helper processes would outlive a rank that is killed."""
    assert run_ranks(2, processes_after_a_save, tmp_path) == [0, 0]


def write(folder, **keep):
    with sharded.writing(folder) as aside:
        (aside / sharded.META).write_text('{"format": 1, "roles": {}, "state": {}}')
    naming.delete_old(folder, **keep)


def test_the_last_ones_and_every_nth_are_kept(tmp_path, world):
    for step in range(5, 55, 5):
        write(tmp_path / f"step_{step}", keep_last=2, keep_every=20)
    assert [path.name for path in naming.steps(tmp_path)] == ["step_20", "step_40", "step_45", "step_50"]


def test_a_damaged_later_one_does_not_push_out_good_ones(tmp_path, world):
    write(tmp_path / "step_90", keep_last=0, keep_every=0)
    for step in (5, 10, 15):
        write(tmp_path / f"step_{step}", keep_last=2, keep_every=0)
    assert [path.name for path in naming.steps(tmp_path)] == ["step_10", "step_15", "step_90"]


def test_what_killed_processes_leave_is_swept(tmp_path, world):
    write(tmp_path / "step_5", keep_last=2, keep_every=0)
    for name in (".step_10.writing", ".step_1.leaving"):
        (tmp_path / name / "policy").mkdir(parents=True)
    (tmp_path / ".latest.writing").touch()
    naming.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_5"]
