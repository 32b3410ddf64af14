"""What a user can get wrong about rewards and held-out prompts: exit code 2, one message, before any model is built."""

import re

import pytest
from commands import run_example

FILE = """
import time

def good(prompts, responses, records):
    return [0.0] * len(prompts)

def column(prompts, responses, records):
    return [float(record["number"]) for record in records]

def empty(prompts, responses, records):
    return [float(response.split()[0] == "x") for response in responses]

def hangs(prompts, responses, records):
    time.sleep(1000)

def texts(prompts, responses, records):
    return ["good"] * len(prompts)

def few(prompts, responses, records):
    return [0.0]

def nan(prompts, responses, records):
    return [float("nan")] * len(prompts)

def two(prompts, responses):
    return [0.0] * len(prompts)
"""
FUNCTION = "reward.function={file}:"
# Arguments, what the message says, and on how many ranks. The reward model of the good arguments is left out.
CASES: dict[str, tuple[list[str], str, int]] = {
    "no_reward": ([], r"reward\.init_from is not given: .*reward\.function, or several of them as rewards\.NAME", 1),
    "no_file": (["reward.function={folder}/nothing.py:score"], r"reward\.function=.*there is no file .*nothing\.py", 1),
    "no_module": (["reward.function=nothing_here:score"], r"there is no module nothing_here", 1),
    "no_name": (["reward.function={file}"], r"is not PATH/TO/FILE\.py:NAME or MODULE:NAME", 1),
    "no_function": ([FUNCTION + "godo"], r"has no function godo; it has good, column", 1),
    "two_arguments": ([FUNCTION + "two"], r"does not take \(prompts, responses, records\)", 1),
    "raises": ([FUNCTION + "column"], r"raised KeyError: 'number' \(.*functions\.py, line 8\)", 1),
    "raises_on_many_ranks": (
        [FUNCTION + "column", "placement=disaggregated", "placement.critic_ranks=1"],
        r"raised KeyError: 'number'",
        2,
    ),
    "raises_for_an_empty_response": ([FUNCTION + "empty"], r"raised IndexError: .*line 11", 1),
    "hangs": (
        [FUNCTION + "hangs", "reward.timeout_s=1"],
        r"did not return within reward\.timeout_s=1 for 2 responses",
        1,
    ),
    "texts": ([FUNCTION + "texts"], r"returned str 'good' for the response to prompt 0, not a number", 1),
    "few": ([FUNCTION + "few"], r"returned 1 numbers for 2 responses", 1),
    "nan": ([FUNCTION + "nan"], r"returned nan for the response to prompt 0; a score must be finite", 1),
    "no_processes": ([FUNCTION + "good", "reward.processes=0"], r"reward\.processes=0 must be at least 1", 1),
    "no_time": ([FUNCTION + "good", "reward.timeout_s=0"], r"reward\.timeout_s=0\.0 must be more than 0", 1),
    "both_ways": (
        [FUNCTION + "good", "rewards.x.function={file}:good"],
        r"reward\.function=.* beside rewards \(x\)",
        1,
    ),
    "model_and_function_in_one": (
        ["rewards.x.function={file}:good", "rewards.x.init_from={recipe}/reward_model"],
        r"rewards\.x: give either init_from or function, not both",
        1,
    ),
    "nothing_in_one": (["rewards.x.weight=2"], r"rewards\.x: give either init_from or function", 1),
    "name_of_the_sum": (["rewards.total.function={file}:good"], r"rewards\.total: a name .* none of score, total", 1),
    "name_with_a_dash": (["rewards.a-b.function={file}:good"], r"rewards\.a-b: a name has letters", 1),
    "late_score_of_a_model": (
        ["rewards.x.init_from={recipe}/reward_model", "rewards.x.timeout_score=0"],
        r"rewards\.x\.timeout_score=0 is for a function: give rewards\.x\.function too",
        1,
    ),
    "name_of_a_column": (["rewards.response.function={file}:good"], r"rewards\.response: a name .* none of", 1),
    "unknown_key_of_one": (
        ["rewards.x.wieght=2"],
        r"no key rewards\.x\.wieght; did you mean rewards\.NAME\.weight\?",
        1,
    ),
    "weight_of_text": (["rewards.x.weight=heavy"], r"rewards\.x\.weight=heavy: .*Float", 1),
    "weight_infinite": (
        ["rewards.x.function={file}:good", "rewards.x.weight=inf"],
        r"rewards\.x\.weight=inf must be",
        1,
    ),
    "model_that_is_none": (["rewards.x.init_from={recipe}/sft"], r"rewards\.x\.init_from=.*holds policy", 1),
    "evaluation_of_no_prompts": (
        [FUNCTION + "good", "evaluation.every=2"],
        r"evaluation\.every=2 needs prompts that are not trained on: give evaluation\.prompts, or data\.part=train",
        1,
    ),
    "evaluation_of_a_missing_file": (
        [FUNCTION + "good", "evaluation.every=2", "evaluation.prompts={folder}/nothing.jsonl"],
        r"nothing\.jsonl: no such file",
        1,
    ),
    "patience_without_evaluations": (
        [FUNCTION + "good", "evaluation.patience=2"],
        r"evaluation\.patience=2 .*give evaluation\.every too",
        1,
    ),
    "no_patience": ([FUNCTION + "good", "evaluation.patience=0"], r"evaluation\.patience=0 must be at least 1", 1),
    "no_kl": ([FUNCTION + "good", "evaluation.max_kl=0"], r"evaluation\.max_kl=0\.0 must be more than 0", 1),
    "nothing_on_the_critics_side": (
        [
            *(FUNCTION + "good", "placement=disaggregated", "placement.critic_ranks=1"),
            *("ppo.advantages=rloo", "ppo.samples_per_prompt=2"),
        ],
        r"placement=disaggregated: the critic's ranks would hold nothing, as ppo\.advantages=rloo",
        2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named(name, recipe, tmp_path):
    wrong, message, ranks = CASES[name]
    file = tmp_path / "functions.py"
    file.write_text(FILE)
    names = {"file": file, "folder": tmp_path, "recipe": recipe.root}
    good = recipe.ppo(str(tmp_path / "run"), recipe.root / "sft", recipe.root / "reward_model")
    good = [argument for argument in good if not argument.startswith("reward.init_from=")]
    finished = run_example(
        "train_ppo", *good, *(argument.format(**names) for argument in wrong), ranks=ranks, timeout=200
    )
    assert finished.codes == [2] * ranks, finished.output
    messages = [line for line in finished.output.splitlines() if line.startswith("error")]
    # Before ranks have met, each says it (a launcher ends the others first).
    assert len({line.partition(": ")[2] for line in messages}) == 1, finished.output
    assert re.search(message, messages[0]), messages[0]
    assert "Traceback" not in finished.output
    assert not list(tmp_path.rglob("checkpoints"))
