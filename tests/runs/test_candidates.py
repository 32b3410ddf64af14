"""Which candidates are kept, under which names, and that the best is never touched."""

import json
from pathlib import Path

import pytest

from megatron_rlhf.checkpoint import naming, sharded
from megatron_rlhf.checkpoint.naming import read_meta
from megatron_rlhf.runs import candidates


class Writer:
    """Writes what it is given, without a model."""

    def __init__(self, root: Path):
        self.root = root
        self.written: list[str] = []

    def save(self, name, roles, state, with_optimizer):
        assert not with_optimizer, "a candidate is weights alone"
        with sharded.writing(self.root / name) as aside:
            (aside / sharded.META).write_text(json.dumps({"format": 1, "roles": {}, "state": dict(state)}))
        self.written.append(name)
        return True


@pytest.fixture
def writer(world, tmp_path) -> Writer:
    return Writer(tmp_path)


def offer(writer: Writer, name: str, step: int, figure: float, keep_last: int = 2) -> None:
    candidates.offer(writer, name, [], {"step": step, "figure": figure, "metrics": {"x": figure}}, keep_last)


def names(writer: Writer) -> list[str]:
    return [path.name for path in candidates.candidates(writer.root)]


def best(writer: Writer) -> str:
    return (writer.root / "best").read_text()


def test_best_and_the_last_are_kept(writer):
    for step, figure in enumerate([3.0, 1.0, 2.0, 4.0, 1.5, 2.5], start=1):
        offer(writer, f"epoch_{step}", step, figure)
    assert names(writer) == ["epoch_2", "epoch_5", "epoch_6"]
    assert best(writer) == "epoch_2"
    offer(writer, "epoch_7", 7, 0.5, keep_last=1)
    assert names(writer) == ["epoch_7"]
    for step in (8, 9, 10):
        offer(writer, f"epoch_{step}", step, 1.0, keep_last=0)
    assert names(writer) == ["epoch_7", "epoch_8", "epoch_9", "epoch_10"], "0 keeps all"


def test_a_name_is_not_used_twice(writer):
    offer(writer, "epoch_1", 2, 2.2222)
    before = (writer.root / "epoch_1" / sharded.META).read_bytes()
    offer(writer, "epoch_1", 3, 2.2545)
    assert names(writer) == ["epoch_1", "epoch_1_v2"]
    assert (writer.root / "epoch_1" / sharded.META).read_bytes() == before
    assert best(writer) == "epoch_1"


def test_the_same_step_of_the_same_run_is_not_written_again(writer):
    offer(writer, "epoch_1", 2, 2.0)
    offer(writer, "epoch_2", 4, 1.0)
    inode = (writer.root / "epoch_2" / sharded.META).stat().st_ino
    offer(writer, "epoch_2", 4, 1.0)
    assert writer.written == ["epoch_1", "epoch_2"]
    assert (writer.root / "epoch_2" / sharded.META).stat().st_ino == inode


def test_a_run_that_goes_on_from_earlier_makes_later_ones_anew_but_never_the_best(writer):
    for step, figure in ((2, 3.0), (4, 1.0), (6, 2.0)):
        offer(writer, f"epoch_{step // 2}", step, figure, keep_last=0)
    candidates.forget_after(writer.root, 3)
    assert names(writer) == ["epoch_1", "epoch_2"]
    offer(writer, "epoch_2", 4, 1.5, keep_last=0)  # the settings have changed, and it is worse
    assert names(writer) == ["epoch_1", "epoch_2", "epoch_2_v2"]
    assert best(writer) == "epoch_2"
    assert read_meta(writer.root / "epoch_2")["state"]["figure"] == 1.0


def test_what_is_not_finite_is_never_best(writer):
    offer(writer, "epoch_1", 1, float("nan"))
    assert not (writer.root / "best").exists()
    offer(writer, "epoch_2", 2, 5.0)
    offer(writer, "epoch_3", 3, float("nan"))
    assert best(writer) == "epoch_2"


def test_steps_are_pruned_around_the_best(writer):
    for step in range(1, 6):
        writer.save(f"step_{step}", [], {"step": step}, with_optimizer=False)
        if step == 1:
            naming.point(writer.root, "best", "step_1")
        naming.delete_old(writer.root / f"step_{step}", keep_last=2, keep_every=0)
    assert [path.name for path in naming.steps(writer.root)] == ["step_1", "step_4", "step_5"]
