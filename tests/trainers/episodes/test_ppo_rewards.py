"""Rewards by functions and models in real runs: their sums and metrics, at several layouts, and resumed."""

import json

import pytest
from ranks import RankFailed, run_ranks
from recipe import WORDS, read_metrics, run_stage, whole_weights, write_lines
from toys import assert_close

LENGTH = """
import time

def score(prompts, responses, records):
    return [len(response) / 10 for response in responses]

def wanted(prompts, responses, records):
    assert all(set(record) == {"word", "number"} for record in records), records
    assert all(prompt == f"say {record['word']}:" for prompt, record in zip(prompts, records))
    return [response.count(record["word"][0]) + record["number"] for response, record in zip(responses, records)]

def hangs(prompts, responses, records):
    if records[0]["number"] % 2:
        time.sleep(1000)
    return [1.0]
"""
AMONG = ["ppo.samples_per_prompt=2", "ppo.critic_warmup_iterations=0"]


@pytest.fixture(scope="module")
def rewards(recipe):
    """Arguments of PPO with prompts that have other columns, and a file with functions."""
    lines = [{"prompt": f"say {word}:", "user": word[0], "word": word, "number": i} for i, word in enumerate(WORDS)]
    write_lines(recipe.root / "prompts_with_columns.jsonl", lines)
    (recipe.root / "lengths.py").write_text(LENGTH)

    def arguments(name, *more):
        base = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model")
        base = [argument for argument in base if not argument.startswith(("reward.init_from", "data.prompts"))]
        return [*base, f"data.prompts={recipe.root / 'prompts_with_columns.jsonl'}", *more]

    return arguments


def function(recipe, name="score"):
    return f"{recipe.root / 'lengths.py'}:{name}"


def weighted(recipe):
    return [
        f"rewards.short.function={function(recipe)}",  # before a model: parts keep the order in which they are given
        "rewards.short.weight=-0.3",
        f"rewards.helpful.init_from={recipe.root / 'reward_model'}",
        f"rewards.right.function={function(recipe, 'wanted')}",
        "rewards.right.weight=2",
        "rewards.right.processes=3",
    ]


def samples(recipe, name):
    return [json.loads(line) for line in (recipe.root / name / "samples.jsonl").read_text().splitlines()]


def test_a_function_alone_needs_no_model_on_the_critics_side(rewards, recipe):
    name = "function_alone"
    more = [f"reward.function={function(recipe)}", "ppo.advantages=rloo", *AMONG, "ppo.iterations=2"]
    (weights,) = run_ranks(1, run_stage, "ppo", rewards(name, *more), timeout=300)
    assert set(weights) == {"policy"}
    for row in samples(recipe, name):
        assert row["score"] == pytest.approx(len(row["response"]) / 10)
    for row in read_metrics(recipe.root / name):
        assert not [metric for metric in row if metric.startswith("value/")]
        assert "reward/function_mean" not in row, "the score itself"
    checkpoint = recipe.root / name / "checkpoints" / "step_2"
    assert not (checkpoint / "value").exists()
    assert (checkpoint / "policy").exists()
    prompts = [row["prompt"] for row in samples(recipe, name) if row["step"] == 1]
    assert all(prompts[i] == prompts[i + 1] for i in range(0, 8, 2))
    responses = [row["response"] for row in samples(recipe, name) if row["step"] == 1]
    assert any(responses[i] != responses[i + 1] for i in range(0, 8, 2)), "two samples of a prompt"


def test_what_is_not_scored_in_time_scores_what_the_user_says(rewards, recipe):
    """With the first rank of two away from the function."""
    slow = [f"reward.function={function(recipe, 'hangs')}", "reward.timeout_s=3", "reward.timeout_score=-4"]
    more = ["reward.processes=8", "ppo.iterations=2", "placement=disaggregated", "placement.critic_ranks=1"]
    run_ranks(2, run_stage, "ppo", rewards("late", *slow, *more), timeout=300)
    row, _ = read_metrics(recipe.root / "late")
    numbers = {f"say {word}:": i for i, word in enumerate(WORDS)}
    shown = [sample for sample in samples(recipe, "late") if sample["step"] == 1]
    assert {-4.0, 1.0} == {row["score"] for row in shown}
    assert all(row["score"] == (-4.0 if numbers[row["prompt"]] % 2 else 1.0) for row in shown)
    late = row["reward/timeouts"]
    count = late * 5 / (1 - row["reward/score_mean"])  # episodes, from a mean of late times -4 and the rest times 1
    assert late > 0 and count == pytest.approx(round(count))
    assert f"for {late:.0f} of {count:.0f} responses, which score -4" in (recipe.root / "late" / "log.txt").read_text()


def test_with_gae_the_value_model_starts_from_the_policy(rewards, recipe):
    more = [f"reward.function={function(recipe)}", "ppo.iterations=2"]
    (weights,) = run_ranks(1, run_stage, "ppo", rewards("function_gae", *more), timeout=300)
    assert set(weights) == {"policy", "value"}
    assert all(row["value/grad_norm"] > 0 for row in read_metrics(recipe.root / "function_gae"))


@pytest.fixture(scope="module")
def sums(rewards, recipe):
    """A weighted sum of a model and two functions on one rank, resumed once."""
    base = [*weighted(recipe), "ppo.advantages=grpo", *AMONG, "policy.optimizer.epsilon=1e-4"]
    straight = run_ranks(1, run_stage, "ppo", rewards("sums", *base, "run.save_every=2"), timeout=300)
    return base, straight


def test_a_weighted_sum_of_models_and_functions(sums, recipe):
    for row in read_metrics(recipe.root / "sums"):
        total = row["reward/helpful_mean"] - 0.3 * row["reward/short_mean"] + 2 * row["reward/right_mean"]
        assert row["reward/score_mean"] == pytest.approx(total, rel=1e-5)
        assert row["reward/short_mean"] > 0
    numbers = {f"say {word}:": (word, i) for i, word in enumerate(WORDS)}
    for row in samples(recipe, "sums"):
        word, number = numbers[row["prompt"]]
        assert row["right"] == pytest.approx(row["response"].count(word[0]) + number)
        assert row["short"] == pytest.approx(len(row["response"]) / 10)
        assert row["score"] == pytest.approx(row["helpful"] - 0.3 * row["short"] + 2 * row["right"], rel=1e-5)


LAYOUTS = {
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "critic_parallel.pipeline=2"]),
    "dp2_and_critic": (3, ["placement=disaggregated", "placement.critic_ranks=1"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_at_every_layout(layout, sums, rewards, recipe):
    ranks, overrides = LAYOUTS[layout]
    base, straight = sums
    weights = run_ranks(ranks, run_stage, "ppo", rewards(f"sums_{layout}", *base, *overrides), timeout=300)
    rows, expected = read_metrics(recipe.root / f"sums_{layout}"), read_metrics(recipe.root / "sums")
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("reward/score_mean", "reward/helpful_mean", "reward/short_mean", "policy/entropy", "ptx/loss"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-5), name
    texts = [[row["response"] for row in samples(recipe, name)] for name in ("sums", f"sums_{layout}")]
    assert texts[0] == texts[1]
    members = [rank for rank in weights if rank["policy"]]
    assert_close(
        whole_weights([{"policy": rank["policy"]} for rank in members])["policy"],
        whole_weights(straight)["policy"],
        relative=1e-5,
    )


def test_resumed_bit_for_bit_but_not_with_another_function(sums, rewards, recipe, tmp_path):
    base, straight = sums
    run_ranks(1, run_stage, "ppo", rewards("sums_cut", *base, "run.save_every=2", "run.stop_at_step=2"), timeout=300)
    other = tmp_path / "lengths.py"
    other.write_text(LENGTH.replace("/ 10", "/ 11"))
    changed = [argument.replace(str(recipe.root / "lengths.py"), str(other)) for argument in base]
    with pytest.raises(RankFailed, match=r"rewards\.short\.function: .* with other reward function short \(source"):
        run_ranks(1, run_stage, "ppo", rewards("sums_cut", *changed, "run.resume=true"), timeout=300)
    other.write_text(LENGTH)  # moved, but the same
    resumed = run_ranks(
        1, run_stage, "ppo", rewards("sums_cut", *changed, "run.save_every=2", "run.resume=true"), timeout=300
    )
    assert read_metrics(recipe.root / "sums_cut") == read_metrics(recipe.root / "sums")
    assert samples(recipe, "sums_cut") == samples(recipe, "sums")
    assert_close(whole_weights(resumed)["policy"], whole_weights(straight)["policy"], relative=0)


def test_a_function_that_fails_in_the_middle_ends_all_ranks_with_one_message(rewards, recipe):
    path = recipe.root / "fails_later.py"
    path.write_text(
        "calls = []\ndef score(prompts, responses, records):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 2 else 0.0] * len(prompts)\n"
    )
    more = [f"reward.function={path}:score", "placement=disaggregated", "placement.critic_ranks=1"]
    with pytest.raises(
        RankFailed, match=r"UserError: reward\.function=\S+:score returned nan for the response to prompt \d"
    ):
        run_ranks(2, run_stage, "ppo", rewards("fails_later", *more), timeout=300)
    assert len(read_metrics(recipe.root / "fails_later")) == 1


RESUMED = {
    "rloo_dp2_distributed": (2, "rloo", ["parallel.distributed_optimizer=true"]),
    "reinforce_baseline_disaggregated": (
        2,
        "reinforce_baseline",
        ["placement=disaggregated", "placement.critic_ranks=1", "ppo.kl_control=adaptive", "ppo.kl_target=0.01"],
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_each_kind_of_advantages_resumes_bit_for_bit(name, rewards, recipe):
    """A grpo run, on one rank, is resumed above."""
    ranks, estimator, layout = RESUMED[name]
    more = [*weighted(recipe), f"ppo.advantages={estimator}", *AMONG, "run.save_every=2", *layout]
    straight = run_ranks(ranks, run_stage, "ppo", rewards(name, *more), timeout=300)
    run_ranks(ranks, run_stage, "ppo", rewards(f"{name}_cut", *more, "run.stop_at_step=2"), timeout=300)
    resumed = run_ranks(ranks, run_stage, "ppo", rewards(f"{name}_cut", *more, "run.resume=true"), timeout=300)
    assert read_metrics(recipe.root / f"{name}_cut") == read_metrics(recipe.root / name)
    assert samples(recipe, f"{name}_cut") == samples(recipe, name)
    whole = [whole_weights([{"policy": r["policy"]} for r in run if r["policy"]]) for run in (straight, resumed)]
    assert_close(whole[1]["policy"], whole[0]["policy"], relative=0)
