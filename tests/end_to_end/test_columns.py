"""Records with other column names, at every stage: `data.columns`."""

import json

import pytest
from commands import run_example
from recipe import read_metrics, write_lines


def records(path, names):
    """Those of a file that have all of these columns."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if row.keys() - {"prompt"} == names.keys()]


@pytest.fixture
def renamed(recipe, tmp_path):
    """Writes a file of the recipe with other names for its columns; `prompt` becomes two columns."""

    def write(name, names):
        rows = []
        for record in records(recipe.root / name, names):
            verb, _, rest = record.pop("prompt").partition(" ")
            rows.append({"verb": verb, "rest": rest, **{names[key]: value for key, value in record.items()}})
        return write_lines(tmp_path / name, rows)

    return write


PROMPT = "data.columns.prompt={verb} {rest}"


def test_reward_model(recipe, renamed, tmp_path):
    columns = [PROMPT, "data.columns.responses={texts}", "data.columns.ranks={order}"]
    names = {"responses": "texts", "ranks": "order"}
    demonstrations = renamed("demonstrations.jsonl", {"response": "answer"})
    own = ["data.demonstration_columns.prompt={verb} {rest}", "data.demonstration_columns.response={answer}"]
    here = [f"data.comparisons={renamed('comparisons.jsonl', names)}", *columns]
    here += [f"data.demonstrations={demonstrations}", *own]
    finished = run_example(
        "train_reward_model", *recipe.reward_model(str(tmp_path / "run"), recipe.root / "sft", *here)
    )
    assert finished.codes == [0], finished.output
    assert "27 demonstrations now score 0" in finished.output
    plain = write_lines(tmp_path / "plain.jsonl", records(recipe.root / "comparisons.jsonl", names))
    arguments = recipe.reward_model(str(tmp_path / "same"), recipe.root / "sft", f"data.comparisons={plain}")
    assert run_example("train_reward_model", *arguments).codes == [0]
    losses, expected = ([row["rm/loss"] for row in read_metrics(tmp_path / run)] for run in ("run", "same"))
    assert losses == expected


@pytest.mark.parametrize("stage", ["train_ppo", "evaluate"])
def test_prompts(recipe, renamed, tmp_path, stage):
    prompts = [f"data.prompts={renamed('prompts.jsonl', {'user': 'who'})}", PROMPT, "data.columns.user={who}"]
    if stage == "train_ppo":
        short = ["ppo.iterations=1", "ppo.warmup_iterations=0", "ppo.ptx_coef=0", "data.max_per_user=1"]
        start = recipe.root / "sft", recipe.root / "reward_model"
        arguments = recipe.ppo(str(tmp_path / "run"), *start, *short, *prompts)
    else:
        arguments = [f"run.dir={tmp_path / 'run'}", *recipe.data, f"policy.init_from={recipe.root / 'sft'}", *prompts]
        arguments += ["data.max_prompt_tokens=32", "sampling.max_response_tokens=4"]
    finished = run_example(stage, *arguments)
    assert finished.codes == [0], finished.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert rows and all(row["prompt"].startswith("say ") for row in rows)
    # epsilon and eta have the same user
    assert stage == "evaluate" or "over_user_limit" in finished.output
