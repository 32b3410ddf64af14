"""examples/evaluate.py scores answers as PPO does: by models, functions, and weighted sums of both."""

import json

import pytest
from commands import run_example
from recipe import WORDS, write_lines

from megatron_rlhf.commands.compare import judge_by_rule
from megatron_rlhf.evaluation.results import Run

FUNCTIONS = """
import time

def length(prompts, responses, records):
    return [len(response) / 10 for response in responses]

def wanted(prompts, responses, records):
    return [response.count(record["word"][0]) + record["number"] for response, record in zip(responses, records)]

def slow(prompts, responses, records):
    if records[0]["number"] == 1 and responses[0]:
        time.sleep(1000)
    return [1.0]

def raises(prompts, responses, records):
    raise ValueError("no")
"""


@pytest.fixture
def evaluate(recipe, tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    rows = [{"prompt": f"say {word}:", "word": word, "number": i} for i, word in enumerate(WORDS[:4])]
    write_lines(tmp_path / "prompts.jsonl", rows)

    def run(name: str, *arguments: str, ranks: int = 1):
        common = (f"policy.init_from={recipe.root / 'sft'}", f"data.prompts={tmp_path / 'prompts.jsonl'}")
        named = [argument.format(file=file, reward=recipe.root / "reward_model") for argument in arguments]
        more = ("sampling.max_response_tokens=8", "evaluate.samples_per_prompt=2")
        return run_example("evaluate", f"run.dir={tmp_path / name}", *recipe.data, *common, *more, *named, ranks=ranks)

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


WEIGHTED = [
    "rewards.helpful.init_from={reward}",
    *("rewards.short.function={file}:length", "rewards.short.weight=-0.3"),
    *("rewards.right.function={file}:wanted", "rewards.right.weight=2", "rewards.right.processes=2"),
]


def test_a_weighted_sum_at_two_layouts(evaluate, tmp_path):
    found = {}
    for name, ranks, layout in (("one", 1, []), ("two", 2, ["parallel.tensor=2", "critic_parallel.pipeline=2"])):
        finished = evaluate(name, *WEIGHTED, *layout, ranks=ranks)
        assert finished.codes == [0] * ranks, finished.output
        found[name] = rows = lines(tmp_path / name / "evaluation.jsonl")
        (metrics,) = lines(tmp_path / name / "metrics.jsonl")
        for row in rows:
            assert row["short"] == pytest.approx(len(row["response"]) / 10)
            word, number = row["record"]["word"], row["record"]["number"]
            assert row["right"] == row["response"].count(word[0]) + number
            assert row["score"] == pytest.approx(row["helpful"] - 0.3 * row["short"] + 2 * row["right"], rel=1e-5)
        for metric, column in (("score", "score"), *((part, part) for part in ("helpful", "short", "right"))):
            mean = sum(row[column] for row in rows) / len(rows)
            assert metrics[f"reward/{metric}_mean"] == pytest.approx(mean, rel=1e-5), metric
    for one, two in zip(*found.values(), strict=True):
        assert one["response"] == two["response"]
        assert one["helpful"] == pytest.approx(two["helpful"], abs=1e-5)
    run = Run.read("one", tmp_path / "one")
    judge_by_rule(run, f"{tmp_path / 'functions.py'}:wanted")
    assert [row["gold"] for row in run.answers] == [row["right"] for row in found["one"]], "the rule sees the columns"


def test_a_function_alone_and_what_it_does_not_score_in_time(evaluate, tmp_path):
    late = ("reward.function={file}:slow", "reward.timeout_s=3", "reward.timeout_score=-1", "reward.processes=3")
    finished = evaluate("late", *late)
    assert finished.codes == [0], finished.output
    rows = lines(tmp_path / "late" / "evaluation.jsonl")
    assert [row["score"] for row in rows] == [-1.0 if row["record"]["number"] == 1 else 1.0 for row in rows]
    (metrics,) = lines(tmp_path / "late" / "metrics.jsonl")
    assert metrics["reward/timeouts"] == 2 and metrics["reward/score_mean"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reward.function={file}:raises"], "raised ValueError: no ("),
        (["reward.function={file}:nothing"], "has no function nothing"),
        (["rewards.a.function={file}:length", "reward.init_from={reward}"], "make it one of them, as rewards.NAME"),
        (["reward.function={file}:length", "evaluate.comparisons=x"], "measure a reward model: give reward.init_from"),
        (
            ["reward.function={file}:length", "data.prompts=null", "data.pretraining.source=x"],
            "reward.function scores answers: give data.prompts, or leave it out",
        ),
        (
            ["rewards.a.init_from={reward}", "rewards.b.init_from={reward}", "evaluate.comparisons=x"],
            "rewards.a.init_from, rewards.b.init_from are several: leave all but one out",
        ),
    ],
)
def test_what_can_be_wrong(evaluate, arguments, says):
    finished = evaluate("wrong", *arguments)
    assert finished.codes == [2], finished.output
    assert says in finished.output
