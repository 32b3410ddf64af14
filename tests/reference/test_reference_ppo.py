"""PPO-ptx as its command runs it, compared with the reference."""

import pytest
from reference import ppo, settings
from reference.comparing import ABSOLUTE, RELATIVE, assert_same_data, assert_same_figures, assert_same_weights
from reference.data import read_lines
from reference.running import Export, run

EXPORTS = {
    "policy": Export("latest", "policy", "gpt2"),
    "average": Export("latest", "policy_ema", "gpt2"),
    "value": Export("latest", "value", "llama"),
}


def among(estimator, samples):
    """Advantages from several samples of a prompt: no value model, whose warmup would have been the first iteration."""
    return {
        "ppo.advantages": estimator,
        "ppo.samples_per_prompt": samples,
        "ppo.iterations": 3,
        "ppo.kl_control": "fixed",
        "ppo.critic_warmup_iterations": 0,
        "ppo.whiten_advantages": None,
        "value.init_from": None,
    }


CASES = {
    # Ranks, layout, and what differs from the settings.
    "one_rank": (1, (), {}),
    "dp2_and_tp2_without_whitening": (
        2,
        ("critic_parallel.tensor=2",),
        {
            "ppo.whiten_advantages": False,
            "ppo.old_logprobs": "recomputed",
            "ppo.kl_control": "fixed",
            "ppo.critic_warmup_iterations": 0,
            "ppo.ptx_coef": "auto",
            "policy.optimizer.clip_norm": 2.0,
        },
    ),
    "rloo_on_tp2_pp2": (4, ("parallel.tensor=2", "parallel.pipeline=2", "critic_parallel.tensor=2"), among("rloo", 3)),
    "grpo_on_dp2": (2, ("parallel.distributed_optimizer=true",), among("grpo", 2)),
    "reinforce_baseline_disaggregated": (
        3,
        ("placement=disaggregated", "placement.critic_ranks=1"),
        among("reinforce_baseline", 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ppo(name, reference_world, tmp_path):
    ranks, layout, changes = CASES[name]
    asked = settings.ppo(reference_world, tmp_path) | changes
    expected, samples = ppo.run(asked)
    exports = {name: export for name, export in EXPORTS.items() if name in expected.weights}
    left = run("ppo", asked, exports, ranks, layout)
    assert_same_data(left.read, expected.read)
    assert_same_samples(read_lines(tmp_path / "samples.jsonl"), samples)
    assert_same_figures(left.rows, expected.rows)
    assert_same_weights(left.weights, expected.weights)
    assert_every_rule_was_at_work(expected.rows, asked)


def assert_same_samples(rows, expected):
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == {
            name: x
            if name in ("step", "prompt", "response")
            else pytest.approx(x, rel=RELATIVE, abs=ABSOLUTE["kl/mean"])
            for name, x in wanted.items()
        }


def assert_every_rule_was_at_work(rows, asked):
    """The comparison depends on this."""
    learning = [row for row in rows if "policy/loss" in row]
    roles = ("policy", "value") if asked["ppo.advantages"] == "gae" else ("policy",)
    for role in roles:
        assert any(0 < row[f"{role}/clip_fraction"] < 0.9 for row in learning), role
    for role in roles:
        norms, limit = [row[f"{role}/grad_norm"] for row in learning], asked[f"{role}.optimizer.clip_norm"]
        assert min(norms) < limit < max(norms), f"{role}: gradients were clipped, and were not"
    assert sum(0 < row["rollout/stop_fraction"] < 1 for row in rows) > 2
    if asked["ppo.kl_control"] == "adaptive":
        errors = [row["kl/mean"] / asked["ppo.kl_target"] - 1 for row in learning[:-1]]
        assert min(map(abs, errors)) < 0.2 < max(map(abs, errors)), "the controller's error was clipped, and was not"
