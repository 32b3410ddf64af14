"""tools/label.py as a command: from files to a project, from a project to what training reads; and what can be wrong."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from labeling.projects import ROOT, make_project, ranked, write_lines

from megatron_rlhf.commands.label import agreement_by_team, main
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.tokenizer import Tokenizer, train_tokenizer
from megatron_rlhf.evaluation.policies import win_rates_by_people
from megatron_rlhf.evaluation.results import read_rankings
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import TRAINING, Settings, Task

RANKED = {"prompt": "p", "responses": ["a", "b", "c", "d"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["aa"], 259, tmp_path_factory.mktemp("tokenizer"))


def label(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def answer_all(path: Path, labeler: str, content) -> None:
    project = Project.open(path)
    while (task := project.current(labeler)) is not None:
        project.record(labeler, task, "submit", content, f"{labeler} {task} submit")


def test_the_command_itself(tmp_path, capsys):
    tasks = write_lines(tmp_path / "t.jsonl", [RANKED])
    project = tmp_path / "p.sqlite"
    labelers = ("--labelers", "ann", "bob", "--held-out", "cy", "--labels-per-prompt", 2)
    assert label("create", project, "--tasks", tasks, *labelers) == 0
    answer_all(project, "ann", ranked(1, 2, 3, 4))
    answer_all(project, "bob", ranked(2, 1, 3, 4))
    command = [sys.executable, ROOT / "tools" / "label.py", "status", project]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "cy (held_out): 0 done" in output
    assert "training: pairwise agreement 83.3%, Krippendorff's alpha 0.8" in output
    assert label("create", project, "--tasks", tasks) == 2
    assert "is there already" in capsys.readouterr().err


def test_rankings_are_exported_as_comparisons(tmp_path, tokenizer):
    project = make_project(tmp_path / "p.sqlite", tasks=2, labels_per_prompt=2)
    project.close()
    for labeler, ranks in (("ann", (1, 1, 3, 4)), ("bob", (4, 3, 2, 1)), ("cy", (2, 1, 1, 2))):
        answer_all(tmp_path / "p.sqlite", labeler, ranked(*ranks))
    assert label("export", tmp_path / "p.sqlite", "--output", tmp_path / "c.jsonl", "--team", "training") == 0
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [(row["task"], row["labeler"], row["ranks"]) for row in rows] == [
        (1, "ann", [0, 0, 1, 2]),
        (1, "bob", [3, 2, 1, 0]),
        (2, "ann", [0, 0, 1, 2]),
        (2, "bob", [3, 2, 1, 0]),
    ]
    assert rows[0]["sources"] == ["policy-0", "policy-1", "policy-2", "policy-3"]
    comparisons = load_comparisons(tmp_path / "c.jsonl", tokenizer, 100, 100, 200)
    assert len(comparisons) == 2, "both labelers' rankings of a prompt are one element"
    assert len(comparisons[0].pairs) == 5 + 6
    assert label("export", tmp_path / "p.sqlite", "--output", tmp_path / "h.jsonl", "--team", "held_out") == 0
    assert {json.loads(line)["labeler"] for line in (tmp_path / "h.jsonl").read_text().splitlines()} == {"cy"}


def test_a_response_without_a_text_is_ranked_but_not_trained_on(tmp_path, tokenizer):
    rows = [{"prompt": "p", "responses": ["a", " ", "b"]}, {"prompt": "q", "responses": ["a", ""]}]
    path = tmp_path / "p.sqlite"
    project = Project.create(path, Settings())
    project.add_tasks(Task(row["prompt"], tuple(row["responses"])) for row in rows)
    project.add_labelers(["ann"], TRAINING)
    project.record("ann", project.current("ann"), "submit", ranked(3, 2, 1), "submit 1 of ann")
    project.record("ann", project.current("ann"), "submit", ranked(1, 2), "submit 2 of ann")
    assert label("export", path, "--output", tmp_path / "c.jsonl") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert (row["responses"], row["ranks"], len(row["ratings"])) == (["a", "b"], [1, 0], 2)
    assert len(load_comparisons(tmp_path / "c.jsonl", tokenizer, 100, 100, 200)) == 1
    assert label("export", path, "--output", tmp_path / "all.jsonl", "--blank") == 0
    kept = [json.loads(line)["ranks"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert kept == [[2, 1, 0], [0, 1]]


@pytest.mark.parametrize("column", ["prompt", "messages", "given"])
def test_prompts_of_messages_are_shown_as_turns_and_exported_as_messages(tmp_path, column):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    prompt = {"prompt": turns, "tools": [{"name": "clock"}]}
    fields = {
        "prompt": prompt,
        "messages": {"messages": [*turns, {"role": "assistant", "content": "so"}], "tools": prompt["tools"]},
        "given": {"prompt": "<s>Be brief.<s>why?<s>", "given": prompt},  # as evaluate writes it
    }[column]
    tasks = write_lines(tmp_path / "t.jsonl", [{**fields, "response": answer} for answer in ("a", "b")])
    path = tmp_path / "p.sqlite"
    assert label("create", path, "--tasks", tasks, "--labelers", "ann") == 0
    assert Project.open(path).task(1).prompt == "system: Be brief.\n\nuser: why?"
    answer_all(path, "ann", ranked(2, 1))
    assert label("export", path, "--output", tmp_path / "c.jsonl") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {name: row[name] for name in ("prompt", "tools", "responses", "ranks")} == {
        **prompt,
        "responses": ["a", "b"],
        "ranks": [1, 0],
    }
    assert win_rates_by_people(read_rankings(tmp_path / "c.jsonl")) == {}, "of one source"


def test_demonstrations_are_exported_as_demonstrations(tmp_path, tokenizer):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"question": "why?", "user": "u7"}])
    path = tmp_path / "d.sqlite"
    options = ("--kind", "demonstrations", "--labelers", "ann", "--column", "prompt={question}")
    assert label("create", path, "--tasks", prompts, *options) == 0
    answer_all(path, "ann", {"response": "because"})
    assert label("export", path, "--output", tmp_path / "out.jsonl") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row == {
        **{"prompt": "why?", "response": "because", "user": "u7"},
        **{"labeler": "ann", "team": "training", "task": 1},
    }
    assert len(load_demonstrations(tmp_path / "out.jsonl", tokenizer, 100, 100, 200)) == 1


def test_responses_of_several_files_become_one_task_a_prompt(tmp_path):
    sft = write_lines(
        tmp_path / "sft.jsonl", [{"prompt": p, "response": f"sft {p} {i}"} for p in "xy" for i in range(2)]
    )
    ppo = write_lines(tmp_path / "ppo.jsonl", [{"prompt": p, "response": f"ppo {p}", "source": "best"} for p in "yx"])
    path = tmp_path / "p.sqlite"
    assert label("create", path, "--tasks", f"first={sft}", ppo, "--labelers", "ann") == 0
    project = Project.open(path)
    assert project.task(2).outputs == ("sft y 0", "sft y 1", "ppo y")
    assert project.task(2).sources == ("first", "first", "best")


def test_the_same_text_twice_is_no_pair_to_agree_on(tmp_path, capsys):
    path = tmp_path / "p.sqlite"
    project = Project.create(path, Settings(labels_per_prompt=2))
    project.add_tasks([Task("p", ("a", "a", "b")), Task("q", ("a", "b"))])
    project.add_labelers(["ann", "bob"], TRAINING)
    for labeler, ranks in (("ann", ([1, 1, 2], [1, 1])), ("bob", ([2, 2, 1], [1, 1]))):
        for content in ranks:
            project.record(labeler, task := project.current(labeler), "submit", ranked(*content), f"{labeler} {task}")
    found = agreement_by_team(project)[TRAINING]
    assert (found.percent, found.comparisons) == (50.0, 2)
    assert label("status", path) == 0
    assert "nan" not in capsys.readouterr().out


def test_what_is_added_twice_is_there_once(tmp_path, capsys):
    rows = [{"question": "p", "responses": ["a", "b"]}, {"question": "q", "responses": ["a", "b"]}]
    path, tasks = tmp_path / "p.sqlite", write_lines(tmp_path / "t.jsonl", rows)
    column = ("--column", "prompt=Q: {question}\\n")
    assert label("create", path, "--tasks", tasks, "--labelers", "ann", *column) == 0
    write_lines(tasks, [*rows, {"question": "p", "responses": ["a", "c"]}])
    capsys.readouterr()
    assert label("add", path, "--tasks", tasks, *column) == 0
    assert "2 of 3 prompts are in the project already, with the same outputs: left out" in capsys.readouterr().out
    project = Project.open(path)
    assert [project.task(number).prompt for number in (1, 2, 3)] == ["Q: p\n", "Q: q\n", "Q: p\n"]
    assert project.size() == 3


def test_real_rankings(tmp_path, shared_data):
    path = tmp_path / "p.sqlite"
    assert label("create", path, "--tasks", shared_data / "qa_feedback_k4_400.jsonl", "--labelers", "ann") == 0
    assert label("add", path, "--tasks", shared_data / "oasst_ranked_212.jsonl") == 0
    assert Project.open(path).size() == 612


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([RANKED, '{"prompt": "p", "resp'], "t.jsonl, line 2: "),
        ([{"question": "p", "responses": ["a", "b"]}], "line 1: no column 'prompt'"),
        ([{"prompt": "p"}], "line 1: no column 'response'"),
        ([{"prompt": "p", "responses": ["a"]}], "line 1: column 'responses' must be a list of 2 to 9"),
        (
            [{"prompt": "p", "responses": [str(i) for i in range(10)]}],
            "line 1: column 'responses' must be a list of 2 to 9",
        ),
        ([{"prompt": "p", "responses": ["a", 3]}], "line 1: column 'responses' must hold text"),
        ([{"prompt": " ", "responses": ["a", "b"]}], "line 1: column 'prompt' is blank"),
        ([{"messages": [{"role": "assistant", "content": "a"}], "response": "b"}], "line 1: column 'prompt' is blank"),
        ([{"messages": ["hi"], "response": "b"}], "line 1: column 'messages', turn 1: a message must be an object"),
        ([{**RANKED, "sources": ["one", "two"]}], "line 1: column 'sources' must be a list of 4 names"),
        ([{"prompt": "p", "response": "alone"}], "line 1: prompt 'p' has 1 responses in all files"),
        ([], "empty"),
    ],
)
def test_wrong_tasks_make_no_project(tmp_path, capsys, lines, says):
    tasks = write_lines(tmp_path / "t.jsonl", lines)
    assert label("create", tmp_path / "p.sqlite", "--tasks", tasks, "--labelers", "ann") == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_wrong_options(tmp_path, capsys, monkeypatch):
    tasks = write_lines(tmp_path / "t.jsonl", [RANKED])
    (tmp_path / "p.sqlite.bak").write_text("mine")
    assert label("create", tmp_path / "p.sqlite", "--tasks", tasks, "--labelers", "a/b") == 2
    assert "labeler 'a/b'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.sqlite.bak", "t.jsonl"]
    assert label("create", tmp_path / "p.sqlite", "--tasks", tasks, "--labels-per-prompt", "0") == 2
    assert "at least 1" in capsys.readouterr().err
    project = make_project(tmp_path / "q.sqlite")
    assert label("serve", tmp_path / "q.sqlite", "--host", "0.0.0.0") == 2
    assert "needs --token" in capsys.readouterr().err
    assert label("serve", tmp_path / "q.sqlite", "--token", "short") == 2
    assert "at least 16" in capsys.readouterr().err
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "access", lambda *_: False)
        for command in (("add", tmp_path / "q.sqlite", "--labelers", "eve"), ("serve", tmp_path / "q.sqlite")):
            assert label(*command) == 2
            assert "q.sqlite cannot be written to: it is read-only" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        label("serve", tmp_path / "q.sqlite", "--port", 99999)
    assert "argument --port: 99999: must be a whole number, 0 to 65535" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert label("serve", tmp_path / "q.sqlite", "--port", port) == 2
        assert f"--port {port}: [Errno 98] Address already in use" in capsys.readouterr().err
    kept = json.dumps({"prompt": "p", "response": "r", "labeler": "ann", "team": "training", "task": 1})
    (tmp_path / "out.jsonl").write_text(kept)
    assert label("export", tmp_path / "q.sqlite", "--output", tmp_path / "out.jsonl") == 2
    assert "no answers" in capsys.readouterr().err and (tmp_path / "out.jsonl").read_text() == kept
    assert label("add", tmp_path / "q.sqlite", "--held-out", "ann") == 2
    assert "in the team 'training'" in capsys.readouterr().err
    assert project.size() == 3
