"""The reward model's training as its command runs it, compared with the reference."""

import pytest
from reference import data, reward_model, settings
from reference.comparing import assert_same_data, assert_same_figures, assert_same_weights
from reference.running import Export, run

EXPORTS = {"reward": Export("latest", "reward", "llama")}


def validated_by_a_file(world):
    """Without demonstrations the best responses score 0 on average."""
    return {"data.validation": str(world.data("more_comparisons")), "data.demonstrations": None}


CASES = {
    # Ranks, layout, and what differs from the settings.
    "one_rank": (1, (), lambda world: {}),
    "tp2_and_a_file": (2, ("parallel.tensor=2", "parallel.sequence=true"), validated_by_a_file),
}


@pytest.mark.parametrize("name", CASES)
def test_reward_model(name, reference_world, tmp_path):
    ranks, layout, changes = CASES[name]
    asked = settings.reward_model(reference_world, tmp_path) | changes(reference_world)
    expected = reward_model.run(asked)
    left = run("reward_model", asked, EXPORTS, ranks, layout)
    assert_same_data(left.read, expected.read)
    assert_same_figures(left.rows, expected.rows)
    assert_same_weights(left.weights, expected.weights)
    assert_every_rule_was_at_work(expected, asked)


def assert_every_rule_was_at_work(expected, asked):
    """The comparison depends on this."""
    norms = [row["rm/grad_norm"] for row in expected.rows]
    assert min(norms) < asked["reward.optimizer.clip_norm"] < max(norms), "gradients were clipped, and were not"
    rankings = data.rankings(asked["data.comparisons"], asked)
    assert {2, 3, 4, 5} <= {k for ranking in rankings for _, _, k in ranking.pairs}
    assert any(len({k for _, _, k in ranking.pairs}) > 1 for ranking in rankings), "several records of one prompt"
    assert any(len(ranking.texts) > asked["reward_model.max_completions"] for ranking in rankings)
    assert any(0 < row.get("rm/validation_accuracy", 0) < 1 for row in expected.rows)
