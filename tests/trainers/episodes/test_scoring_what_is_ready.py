"""Disaggregated: responses that have ended are scored while others are sampled, and nothing else changes."""

import json
import time

import pytest
from ranks import run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assert_close

SIDES = ["placement=disaggregated", "placement.critic_ranks=1", "ppo.micro_batch_size=1"]
# Rounding of the differences of nearly equal numbers: tests/distributed/test_layout_matrix.py. A portion of one text has other
# shapes, whose scores differ by 3e-7; after Adam's first step the KL divergence, summed over a response, differs by 4e-7.
ABSOLUTE = {
    "policy/loss": 1e-6,
    "value/explained_variance": 2e-6,
    "policy/approx_kl": 1e-7,
    "policy/first_ratio_max_gap": 2e-6,
    "kl/mean": 2e-6,
}


def run(recipe, name, *more, ranks=2):
    arguments = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", "ppo.iterations=2", *SIDES, *more)
    weights = whole_weights(run_ranks(ranks, run_stage, "ppo", arguments, timeout=300))
    rows = read_metrics(recipe.root / name)
    samples = [json.loads(line) for line in (recipe.root / name / "samples.jsonl").read_text().splitlines()]
    return weights, rows, samples


def assert_same(found, expected):
    weights, rows, samples = found
    for row, wanted in zip(rows, expected[1], strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-5, abs=ABSOLUTE.get(key, 1e-9)), key
    for role, arrays in expected[0].items():
        assert_close(weights[role], arrays, relative=1e-5)
    texts = [[(row["prompt"], row["response"]) for row in some] for some in (samples, expected[2])]
    assert texts[0] == texts[1]
    return rows


def test_portions_change_no_figure(recipe):
    held_out = [f"evaluation.prompts={recipe.root / 'prompts.jsonl'}", "evaluation.every=1"]
    expected = run(recipe, "portions_1", *held_out, "placement.portions=1")
    rows = assert_same(run(recipe, "portions_10", *held_out, "placement.portions=10"), expected)
    assert all("evaluation/score_mean" in row for row in rows)


def test_samples_of_a_prompt_change_no_figure(recipe):
    rloo = ["ppo.advantages=rloo", "ppo.samples_per_prompt=5", "ppo.micro_batch_size=2"]
    expected = run(recipe, "samples_1", *rloo, "placement.portions=1")
    assert_same(run(recipe, "samples_5", *rloo, "placement.portions=5"), expected)


def when(stage, overrides):
    """When this rank sampled and when it scored, of decoding steps that take a while."""
    from megatron_rlhf import cli
    from megatron_rlhf.models.roles import Role
    from megatron_rlhf.rollout import collect
    from megatron_rlhf.rollout.runner import ModelRunner

    sampled, scored = [], []
    sample, results, values = collect.sample_responses, ModelRunner.results, Role.values

    def slowly(self, step):
        time.sleep(0.03)
        return results(self, step)

    def watched(function, times):
        def call(*given, **named):
            began = time.monotonic()
            result = function(*given, **named)
            times.append((began, time.monotonic()))
            return result

        return call

    ModelRunner.results = slowly
    collect.sample_responses = watched(sample, sampled)
    Role.values = watched(values, scored)
    cli.run_stage(stage, overrides)
    return sampled, scored


@pytest.mark.parametrize("portions", [1, 10])
def test_what_has_ended_is_scored_while_others_are_sampled(recipe, portions):
    name = f"while_{portions}"
    more = [
        *SIDES,
        "ppo.iterations=1",
        "ppo.warmup_iterations=1",
        "rollout.batch_size=2",
        f"placement.portions={portions}",
    ]
    arguments = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *more)
    ((sampling,), _), (_, scored) = run_ranks(2, when, "ppo", arguments, timeout=300)
    meanwhile = sum(end < sampling[1] for _, end in scored)
    assert len(scored) == 2 * portions, "reward and value model read every portion"
    assert meanwhile >= portions if portions > 1 else meanwhile == 0
    (step,) = [json.loads(line) for line in (recipe.root / name / "timeline.jsonl").read_text().splitlines()]
    (policy, critic), seconds = step["sides"].items(), metrics_of(recipe.root / name)["time/scoring_while_sampling_s"]
    assert (policy[0], critic[0]) == ("policy, reference", "reward, value")
    assert [phase for phase, *_ in policy[1]][:2] == ["rollout", "scoring"]
    assert {phase for phase, *_ in critic[1]} >= {"scoring", "value"} and "waiting" not in str(critic)
    assert seconds >= 0.5 * sum(end - begin for begin, end in scored if end < sampling[1])


def metrics_of(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
