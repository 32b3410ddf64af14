"""examples/iterate.py: rounds of answers, rankings, reward model and PPO, stopped between stages and gone on with."""

import json
from pathlib import Path

import pytest
from commands import run_example
from recipe import write_lines

from megatron_rlhf.commands.iterate import Loop, _parser
from megatron_rlhf.labeling.project import Project

SHORT = [
    *(
        "evaluate.samples=6",
        "sampling.max_response_tokens=8",
        "rollout.max_response_tokens=8",
        "data.max_prompt_tokens=32",
    ),
    *("reward_model.batch_size=5", "ppo.iterations=2", "ppo.batch_size=10", "ppo.minibatch_size=5", "ppo.ptx_coef=0"),
    *("data.validation_fraction=0.2", "ppo.warmup_iterations=1", "ppo.tax_every=0"),
]


@pytest.fixture
def iterate(recipe, tmp_path):
    def run(folder: str, *arguments: str):
        common = ["--policy", str(recipe.root / "sft"), "--prompts", str(recipe.root / "prompts.jsonl")]
        return run_example("iterate", str(tmp_path / folder), *common, *arguments, *recipe.data, *SHORT)

    return run


def lines(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "memory/", "throughput/"))}
        for row in rows
    ]


def test_a_stopped_loop_ends_as_one_that_was_not(recipe, iterate, tmp_path):
    rule = tmp_path / "rules.py"
    rule.write_text("def score(prompts, responses, records):\n    return [float(len(r)) for r in responses]\n")
    judge = ("--rule", f"{rule}:score", "--comparisons", str(recipe.root / "comparisons.jsonl"))
    whole = iterate("whole", "--rounds", "2", *judge)
    assert whole.codes == [0], whole.output
    assert iterate("parts", "--rounds", "1", *judge).codes == [0]
    state = tmp_path / "parts" / "state.json"
    found = json.loads(state.read_text())
    found["done"] = found["done"][:3]  # as if it had been stopped in PPO
    state.write_text(json.dumps(found))
    again = iterate("parts", "--rounds", "2", *judge)
    assert again.codes == [0], again.output
    for file in ("round_1/comparisons.jsonl", "round_2/ppo/metrics.jsonl", "round_3/answers/evaluation.jsonl"):
        assert lines(tmp_path / "parts" / file) == lines(tmp_path / "whole" / file), file
    counts = [len(lines(tmp_path / "whole" / f"round_{n}" / "comparisons.jsonl")) for n in (1, 2)]
    given = len((recipe.root / "comparisons.jsonl").read_text().splitlines())
    assert given < counts[0] < counts[1]
    assert "after 2 rounds" in (tmp_path / "whole" / "report.html").read_text()
    other = iterate("whole", "--rounds", "2", "--people", "ann")
    assert other.codes == [2] and "was begun with judge" in other.output


def test_people_are_waited_for(iterate, tmp_path):
    first = iterate("loop", "--rounds", "1", "--people", "ann")
    assert first.codes == [0], first.output
    assert "megatron-rlhf label serve" in first.output and "ann: " in first.output
    project = Project.open(tmp_path / "loop" / "round_1" / "labels.sqlite")
    while (task := project.current("ann")) is not None:
        size = len(project.task(task).outputs)
        content = {"ranks": list(range(1, size + 1)), "ratings": [None] * size, "metadata": [[]] * size, "note": ""}
        project.record("ann", task, "submit", content, f"submit {task}")
    second = iterate("loop", "--rounds", "1", "--people", "ann")
    assert second.codes == [0], second.output
    assert (tmp_path / "loop" / "round_2" / "answers" / "evaluation.jsonl").exists()


def test_what_can_be_wrong(iterate, tmp_path):
    for arguments, says in (
        ((), "give --rule FILE.py:NAME or --people NAME"),
        (("--rule", "a.py:score", "--people", "ann"), "give --rule FILE.py:NAME or --people NAME"),
        (("--people", "ann", "--round", "2"), "--round: neither an option"),
        (("--rule", "a.py:score", "ppo.iteration=3"), "did you mean ppo.iterations"),
        (("--people", "a/b"), "labeler 'a/b'"),
    ):
        finished = iterate("wrong", *arguments)
        assert finished.codes == [2], finished.output
        assert says in finished.output


@pytest.fixture
def loop_of(tmp_path):
    (tmp_path / "rules.py").write_text("def score(prompts, responses, records):\n    return list(map(len, prompts))\n")
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    common = [str(tmp_path / "loop"), "--policy", "-", "--prompts", str(tmp_path / "prompts.jsonl")]

    def make(*arguments: str) -> Loop:
        judge = ["--rule", f"{tmp_path / 'rules.py'}:score"]
        return Loop(*_parser().parse_known_args([*common, *judge, *arguments]))

    return make


def test_comparisons_have_prompts_as_they_were_given(loop_of, tmp_path):
    (tmp_path / "rules.py").write_text(
        "def score(prompts, responses, records):\n    return list(map(len, responses))\n"
    )
    given = {"prompt": [{"role": "user", "content": "Hi"}], "tools": [{"name": "clock"}]}
    rows = [{"prompt": "<s>user: Hi<s>", "given": given}, {"prompt": "text"}]
    answers = [{**row, "response": response, "source": "x"} for row in rows for response in ("a", "bb", " ")]
    (tmp_path / "round_1" / "answers").mkdir(parents=True)
    write_lines(tmp_path / "round_1" / "answers" / "evaluation.jsonl", answers)
    ranked = {"responses": ["a", "bb"], "ranks": [1, 0]}
    assert loop_of()._by_rule(tmp_path / "round_1") == [{**given, **ranked}, {"prompt": "text", **ranked}]


@pytest.mark.parametrize(
    ("record", "overrides", "columns"),
    [
        (
            {"q": "Hi", "good": "yes", "bad": "no"},
            ["data.columns.prompt={q}", "data.columns.chosen={good}", "data.columns.rejected={bad}"],
            {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        ),
        (
            {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
            ["data.chat=true"],
            {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no"},
        ),
        (
            {"instruction": "Hi", "completions": [{"response": r, "overall_score": i} for i, r in enumerate("ab")]},
            ["data.format=ultrafeedback"],
            {"prompt": "Hi\n\n", "responses": ["a", "b"], "ranks": [1, 0]},
        ),
    ],
)
def test_comparisons_that_are_given_get_our_columns(loop_of, tmp_path, record, overrides, columns):
    flawed = {"instruction": "Hi", "completions": []}
    source = write_lines(tmp_path / "given.jsonl", [record, *([flawed] if "completions" in record else [])])
    (row,) = loop_of("--comparisons", str(source), *overrides)._given_comparisons()
    assert {name: row[name] for name in columns} == columns
