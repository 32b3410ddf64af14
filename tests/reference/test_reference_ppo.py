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
CASES = {
    # Ranks, layout, and what differs from the settings.
    "one_rank": (1, (), {}),
    "dp2_and_tp2_without_whitening": (
        2,
        ("critic_parallel.tensor=2",),
        {
            "ppo.whiten_advantages": False,
            "ppo.kl_control": "fixed",
            "ppo.critic_warmup_iterations": 0,
            "ppo.ptx_coef": "auto",
            "policy.optimizer.clip_norm": 2.0,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ppo(name, reference_world, tmp_path):
    ranks, layout, changes = CASES[name]
    asked = settings.ppo(reference_world, tmp_path) | changes
    expected, samples = ppo.run(asked)
    left = run("ppo", asked, EXPORTS, ranks, layout)
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
    for name in ("policy/clip_fraction", "value/clip_fraction"):
        assert any(0 < row[name] < 0.9 for row in learning), name
    for role in ("policy", "value"):
        norms, limit = [row[f"{role}/grad_norm"] for row in learning], asked[f"{role}.optimizer.clip_norm"]
        assert min(norms) < limit < max(norms), f"{role}: gradients were clipped, and were not"
    assert sum(0 < row["rollout/stop_fraction"] < 1 for row in rows) > 2
    if asked["ppo.kl_control"] == "adaptive":
        errors = [row["kl/mean"] / asked["ppo.kl_target"] - 1 for row in learning[:-1]]
        assert min(map(abs, errors)) < 0.2 < max(map(abs, errors)), "the controller's error was clipped, and was not"
