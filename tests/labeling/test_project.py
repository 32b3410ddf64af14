"""The database: who gets what, what a click leaves behind, and what undo takes back."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest
from labeling.projects import ROOT, make_project, ranked, task

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.labeling import database
from megatron_rlhf.labeling import project as project_module
from megatron_rlhf.labeling.collecting import check, collect
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import DEMONSTRATIONS, HELD_OUT, TRAINING, Refused, Settings, Task


def submit(project: Project, labeler: str, *ranks: int) -> int:
    number = project.current(labeler)
    project.record(labeler, number, "submit", ranked(*ranks), f"{labeler} submits {number}")
    return number


def test_each_prompt_goes_to_so_many_labelers_of_each_team(tmp_path):
    project = make_project(tmp_path / "p.sqlite", tasks=3, labels_per_prompt=1)
    given = {name: [] for name in ("ann", "bob", "cy", "di")}
    for _ in range(3):
        for labeler, numbers in given.items():
            if project.current(labeler) is not None:
                numbers.append(submit(project, labeler, 1, 2, 3, 4))
    assert sorted(given["ann"] + given["bob"]) == sorted(given["cy"] + given["di"]) == [1, 2, 3]
    assert all(len(numbers) >= 1 for numbers in given.values())

    both = make_project(tmp_path / "both.sqlite", tasks=2, labels_per_prompt=2)
    assert [[submit(both, name, 1, 1, 1, 1) for _ in range(2)] for name in ("ann", "bob")] == [[1, 2], [1, 2]]
    assert both.current("ann") is None and both.left("ann") == 0 and both.left("cy") == 2


def test_a_prompt_left_open_for_a_day_goes_to_another(tmp_path, monkeypatch):
    project = make_project(tmp_path / "p.sqlite", tasks=1)
    assert project.current("ann") == 1
    assert project.current("bob") is None
    tomorrow = time.time() + 25 * 3600
    monkeypatch.setattr(project_module.time, "time", lambda: tomorrow)
    assert project.current("bob") == 1
    assert project.current("ann") == 1, "who comes back late still finds it"


def test_outputs_that_are_all_the_same_leave_nothing_to_rank(tmp_path):
    project = make_project(tmp_path / "p.sqlite", tasks=0)
    project.add_tasks([Task("p", ("same", "same")), Task("q", ("same", "other"))])
    assert project.current("ann") == 2


def test_undo_takes_back_clicks_one_by_one_across_prompts(tmp_path):
    project = make_project(tmp_path / "p.sqlite")
    project.current("ann")
    project.record("ann", 1, "draft", ranked(1, None, None, None), "click 1")
    project.record("ann", 1, "draft", ranked(1, 2, 3, 4), "click 2")
    project.record("ann", 1, "submit", ranked(1, 2, 3, 4), "click 3")
    assert project.current("ann") == 2
    project.record("ann", 2, "skip", {"reason": "unclear", "note": ""}, "click 4")
    assert project.undo("ann", "undo 4") == 2 == project.current("ann")
    assert project.undo("ann", "undo 3") == 1 == project.current("ann")
    assert project.content("ann", 1)["ranks"] == [1, 2, 3, 4]
    assert project.undo("ann", "undo 2") == 1
    assert project.content("ann", 1)["ranks"] == [1, None, None, None]
    assert project.undo("ann", "undo 1") == 1 and project.content("ann", 1) == {}
    assert project.undo("ann", "undo 0") is None
    assert project.answers() == [] and project.skips() == []


def test_a_click_that_arrives_twice_counts_once(tmp_path):
    project = make_project(tmp_path / "p.sqlite")
    project.current("ann")
    for _ in range(2):
        project.record("ann", 1, "submit", ranked(1, 2, 3, 4), "the same")
    assert project.undo("ann", "one undo") == 1
    assert project.undo("ann", "one undo") is None, "the undo arrived twice: what came before it stands"
    with pytest.raises(Refused, match="not one of yours"):
        project.record("bob", 1, "submit", ranked(1, 2, 3, 4), "of another")
    project.record("ann", 1, "submit", ranked(4, 3, 2, 1), "again")
    with pytest.raises(Refused, match="done already"):
        project.record("ann", 1, "draft", ranked(1, 1, 1, 1), "another tab")
    (answer,) = project.answers()
    assert answer.content["ranks"] == [4, 3, 2, 1]


def test_a_text_grows_in_place_and_undo_leaves_it(tmp_path):
    project = Project.create(tmp_path / "d.sqlite", Settings(kind=DEMONSTRATIONS))
    project.add_tasks([Task("write"), Task("more")])
    project.add_labelers(["ann"], TRAINING)
    project.current("ann")
    for length in range(1, 6):
        project.record("ann", 1, "draft", {"response": "words"[:length]}, f"letter {length}")
    project.record("ann", 1, "submit", {"response": "words"}, "submitted")
    with sqlite3.connect(tmp_path / "d.sqlite") as database:
        assert database.execute("SELECT count(*) FROM events").fetchone() == (2,)
    project.record("ann", 1, "draft", {"response": "wo"}, "letter 2")  # sent again by a browser that was killed
    assert project.undo("ann", "undo submit") == 1
    assert project.undo("ann", "undo text") is None
    assert project.content("ann", 1) == {"response": "words"}


def test_a_wrong_task_or_labeler_leaves_the_project_as_it_was(tmp_path):
    project = make_project(tmp_path / "p.sqlite", tasks=1)
    for wrong in (Task("one", ("a",)), Task("ten", tuple("abcdefghij"))):
        with pytest.raises(UserError, match="2 to 9"):
            project.add_tasks([task("fine"), wrong])
    with pytest.raises(UserError, match="in the team 'training'"):
        project.add_labelers(["new", "ann"], HELD_OUT)
    with pytest.raises(UserError, match="labeler 'a/b'"):
        project.add_labelers(["a/b"], TRAINING)
    assert project.size() == 1 and set(project.labelers()) == {"ann", "bob", "cy", "di"}


def test_only_a_project_is_opened(tmp_path):
    for name, content in (("text", b"no database at all, but long enough to be looked at" * 9), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE tasks (id INTEGER)")
    newer = make_project(tmp_path / "newer.sqlite")
    newer._db.execute("PRAGMA user_version = 9")
    newer.close()
    for name, says in (
        ("missing", "no such labeling project"),
        ("text", "is no labeling project"),
        ("empty", "not a labeling project"),
        ("other.sqlite", "database of something else"),
        ("newer.sqlite", "version 9"),
    ):
        with pytest.raises(UserError, match=says):
            Project.open(tmp_path / name)
    with pytest.raises(UserError, match="there already"):
        make_project(tmp_path / "other.sqlite")


def test_a_project_that_cannot_be_written_is_one(tmp_path, monkeypatch):
    make_project(tmp_path / "p.sqlite").close()

    def refuse(*_):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(database, "_connect", refuse)
    with pytest.raises(UserError, match=r"p\.sqlite cannot be opened to read and write: attempt to write a readonly"):
        Project.open(tmp_path / "p.sqlite")


def test_what_was_recorded_survives_a_kill(tmp_path):
    """A process clicks as fast as it can and says so; killed at any moment, all it said is there."""
    make_project(tmp_path / "p.sqlite", tasks=200).close()
    clicks = textwrap.dedent("""
        import sys
        from pathlib import Path
        from labeling.projects import Project, ranked
        project = Project.open(Path(sys.argv[1]))
        while (task := project.current("ann")) is not None:
            for click in range(3):
                project.record("ann", task, "draft", ranked(click + 1, 2, 3, 4), f"{task} {click}")
                print(task, click, flush=True)
            project.record("ann", task, "submit", ranked(3, 2, 3, 4), f"{task} done")
            print(task, "done", flush=True)
    """)
    command = [sys.executable, "-c", clicks, str(tmp_path / "p.sqlite")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    said: list[str] = []
    for kill_after in (5, 12, 3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        said += [process.stdout.readline() for _ in range(kill_after)]
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        said += rest.splitlines(keepends=True)
    project = Project.open(tmp_path / "p.sqlite")
    done = {int(line.split()[0]) for line in said if "done" in line}
    assert len(done) >= 3
    assert done <= {answer.number for answer in project.answers()}
    nonces = {row["nonce"] for row in project._db.execute("SELECT nonce FROM nonces")}
    assert {line.strip() for line in said} <= nonces


def test_a_project_without_messages_goes_on(tmp_path):
    """Version 1 of the file had no column for them."""
    project = make_project(tmp_path / "p.sqlite", tasks=1)
    project._db.execute("ALTER TABLE tasks DROP COLUMN given")
    project._db.execute("PRAGMA user_version = 1")
    project.close()
    for _ in range(2):
        project = Project.open(tmp_path / "p.sqlite")
        assert project.task(1) == task("0")
        project.close()
    given = {"prompt": [{"role": "user", "content": "prompt 0"}]}
    more = [Task.of(given, ("a",), (name,), "u1") for name in ("sft", "ppo")]
    assert collect(tmp_path / "p.sqlite", more) == 2, "the same words as a text are another prompt"
    assert Project.open(tmp_path / "p.sqlite").task(2) == Task("prompt 0", ("a", "a"), ("sft", "ppo"), "u1", given)


def test_answers_of_several_policies_meet_in_one_project(tmp_path):
    path = tmp_path / "p.sqlite"
    assert collect(path, [Task("p", ("a", "b"), ("sft", "sft"), "u1"), Task("q", ("c",), ("sft",))]) == 2
    assert collect(path, [Task("p", ("d",), ("ppo",)), Task("r", ("e", "f"), ("ppo", "ppo"))]) == 3
    assert collect(path, [Task("p", ("g", "h"), ("sft", "sft"))]) == 3, "an evaluation again replaces its own"
    project = Project.open(path)
    assert project.task(1) == Task("p", ("d", "g", "h"), ("ppo", "sft", "sft"), "u1")
    with pytest.raises(UserError, match="would have 10 outputs; 9 at most"):
        project.merge_tasks([Task("q", tuple("abcdefghi"), ("new",) * 9)])
    project.add_labelers(["ann"], TRAINING)
    assert project.current("ann") == 1 and project.left("ann") == 2, "one output is not enough"
    late = [Task("r", ("x",), ("late",)), Task("p", ("i",), ("late",))]
    for refuses in (collect, check):  # before anything is sampled, and after it
        with pytest.raises(UserError, match="is being labeled"):
            refuses(path, late)
    with pytest.raises(UserError, match="would have 10 outputs; 9 at most"):
        check(tmp_path / "new.sqlite", [Task("q", ("",) * 10, ("new",) * 10)])
    check(path, late[:1])
    assert not (tmp_path / "new.sqlite").exists()
    assert project.task(3).sources == ("ppo", "ppo"), "all or nothing"
    Project.create(tmp_path / "d.sqlite", Settings(kind=DEMONSTRATIONS))
    with pytest.raises(UserError, match="collects demonstrations"):
        check(tmp_path / "d.sqlite")
