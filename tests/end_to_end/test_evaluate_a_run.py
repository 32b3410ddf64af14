"""An evaluation in a training run's folder adds files of its own and leaves the run's unchanged."""

import json
import shutil

import pytest
from commands import run_example


@pytest.fixture
def run(recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(recipe.root / "sft", folder)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluate(recipe, run, *more: str):
    arguments = [
        f"run.dir={run}",
        *recipe.data,
        f"policy.init_from={run}",
        f"data.prompts={recipe.root / 'prompts.jsonl'}",
    ]
    return run_example("evaluate", *arguments, "sampling.max_response_tokens=6", *more)


@pytest.mark.parametrize("knows_its_stage", [True, False])
def test_a_training_keeps_all_that_it_has(recipe, run, knows_its_stage):
    if not knows_its_stage:  # a run from before this file existed
        (run / "stage").unlink()
    before = contents(run)
    for samples, output in ((4, "out/answers.jsonl"), (3, "out/answers.jsonl"), (2, "evaluation.jsonl")):
        finished = evaluate(recipe, run, f"evaluate.samples={samples}", f"evaluate.output={output}")
        assert finished.codes == [0], finished.output
        assert len((run / output).read_text().splitlines()) == samples, "an earlier one is replaced"
    after = contents(run)
    assert {name: after.get(name) for name in before} == before
    added = {name.split("/")[0] for name in set(after) - set(before)}
    assert added == {"out", "evaluation", "evaluation.jsonl"}
    own = {path.name for path in (run / "evaluation").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "log.txt", "report.html", "stage"} <= own
    (row,) = [json.loads(line) for line in (run / "evaluation" / "metrics.jsonl").read_text().splitlines()]
    assert "rollout/response_length_mean" in row


def test_the_training_goes_on_afterwards(recipe, run):
    assert evaluate(recipe, run, "evaluate.samples=2").codes == [0]
    longer = ("sft.epochs=11", "sft.dropout=0", "policy.optimizer.lr=4e-3", "run.resume=true")
    finished = run_example("train_sft", *recipe.sft(str(run), *longer))
    assert finished.codes == [0], finished.output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 34))
