"""examples/evaluate.py: several answers a prompt into a labeling project, and a reward model on people's comparisons."""

import json

import pytest
from commands import run_example

from megatron_rlhf.evaluation.reward_accuracy import pairs_of
from megatron_rlhf.labeling.project import Project


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def evaluate(recipe, tmp_path):
    def run(name: str, *arguments: str, ranks: int = 1):
        finished = run_example("evaluate", f"run.dir={tmp_path / name}", *recipe.data, *arguments, ranks=ranks)
        assert finished.codes == [0] * ranks, finished.output
        return tmp_path / name

    return run


def test_answers_go_into_a_labeling_project(recipe, evaluate, tmp_path):
    labels = tmp_path / "labels.sqlite"
    prompts = f"data.prompts={recipe.root / 'prompts.jsonl'}"
    common = (prompts, "evaluate.samples=3", "sampling.max_response_tokens=6", f"evaluate.labels={labels}")
    sft = (f"policy.init_from={recipe.root / 'sft'}", "evaluate.samples_per_prompt=2", "evaluate.greedy=true")
    reward = f"reward.init_from={recipe.root / 'reward_model'}"
    rows = rows_of(evaluate("one", *common, *sft, reward) / "evaluation.jsonl")
    assert [row["source"] for row in rows] == ["sft", "sft", "sft (greedy)"] * 3
    assert all(rows[i]["prompt"] == rows[i + 1]["prompt"] == rows[i + 2]["prompt"] for i in (0, 3, 6))
    alone = rows_of(
        evaluate("two", prompts, *sft[:1], "evaluate.samples=3", "sampling.max_response_tokens=6") / "evaluation.jsonl"
    )
    assert [row["response"] for row in alone] == [row["response"] for row in rows[::3]], "the first sample is the same"
    greedy = evaluate("three", *common, *sft[:1], "sampling.temperature=0", "evaluate.name=other", ranks=2)
    assert [row["response"] for row in rows_of(greedy / "evaluation.jsonl")] == [row["response"] for row in rows[2::3]]
    evaluate("four", *common, *sft)  # again: its answers replace those of the first time
    project = Project.open(labels)
    assert project.size() == 3
    task = project.task(1)
    assert sorted(task.sources) == ["other", "sft", "sft", "sft (greedy)"]
    assert task.outputs[task.sources.index("other")] == task.outputs[task.sources.index("sft (greedy)")]


def test_a_reward_model_on_comparisons(recipe, evaluate, tmp_path):
    """Scores are those that answers get, figures those of the scores, at one rank and at tensor parallel 2."""
    reward = f"reward.init_from={recipe.root / 'reward_model'}"
    prompts = (f"data.prompts={recipe.root / 'prompts.jsonl'}", f"policy.init_from={recipe.root / 'sft'}")
    answers = evaluate("answers", *prompts, reward, "evaluate.samples_per_prompt=4", "sampling.max_response_tokens=12")
    by_prompt: dict[str, dict[str, float]] = {}
    for row in rows_of(answers / "evaluation.jsonl"):
        # With its end token, as responses of comparisons have it, and of whole characters, whose tokens are the same again.
        if row["stopped"] and row["response"].strip() and "\N{REPLACEMENT CHARACTER}" not in row["response"]:
            by_prompt.setdefault(row["prompt"], {})[row["response"]] = row["score"]
    several = {prompt: of for prompt, of in by_prompt.items() if len(of) > 1}
    assert len(several) >= 2
    lines = [
        {"prompt": prompt, "responses": list(of), "ranks": list(range(len(of))), "labeler": "ann", "team": team}
        for prompt, of in several.items()
        for team in ("training", "held_out")
    ]
    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = evaluate("one", reward, f"evaluate.comparisons={file}")
    two = evaluate("two", reward, f"evaluate.comparisons={file}", "critic_parallel.tensor=2", ranks=2)
    rows = rows_of(one / "comparisons.jsonl")
    assert [row["group"] for row in rows] == [line["team"] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        assert row["scores"] == pytest.approx(list(several[line["prompt"]].values()), abs=1e-5)
    (metrics,), (other,) = rows_of(one / "metrics.jsonl"), rows_of(two / "metrics.jsonl")
    pairs = pairs_of(rows)
    assert metrics["rm/accuracy"] == pytest.approx(sum(pair.correct for pair in pairs) / len(pairs))
    assert metrics["rm/accuracy_training"] == metrics["rm/accuracy_held_out"] == metrics["rm/accuracy"]
    assert other["rm/accuracy"] == metrics["rm/accuracy"]
    assert "evaluate.py" in (one / "command").read_text() or "pytest" in (one / "command").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate.samples_per_prompt=2", "sampling.temperature=0"], "the same answer again and again"),
        (["evaluate.comparisons=x.jsonl"], "evaluate.comparisons measure a reward model: give reward.init_from"),
        (["evaluate.labels={other}"], "is a database of something else"),
        (["evaluate.comparisons={cut}", "reward.init_from={reward}"], "line 2: not JSON"),
    ],
)
def test_what_can_be_wrong(recipe, tmp_path, arguments, says):
    import sqlite3

    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE tasks (id INTEGER)")
    good = '{"prompt": "say beta:", "responses": [" beta", " beta beta"], "ranks": [0, 1]}\n'
    (tmp_path / "cut.jsonl").write_text(good + good[:20])
    places = {"other": tmp_path / "other.sqlite", "cut": tmp_path / "cut.jsonl", "reward": recipe.root / "reward_model"}
    common = [f"run.dir={tmp_path / 'run'}", *recipe.data, f"policy.init_from={recipe.root / 'sft'}"]
    common += [f"data.prompts={recipe.root / 'prompts.jsonl'}", "sampling.max_response_tokens=4"]
    finished = run_example("evaluate", *common, *(argument.format(**places) for argument in arguments))
    assert finished.codes == [2], finished.output
    assert says in finished.output
