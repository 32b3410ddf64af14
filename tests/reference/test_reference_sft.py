"""SFT as its command runs it, compared with the reference."""

import pytest
from reference import settings, sft
from reference.comparing import assert_same_data, assert_same_figures, assert_same_weights
from reference.running import Export, run

EXPORTS = {"policy": Export("latest", "policy", "gpt2"), "best": Export("best", "policy", "gpt2")}
CASES = {
    # Ranks, layout, and what differs from the settings.
    "one_rank": (1, (), {}),
    # A share small enough that only every other batch has a text.
    "dp2_by_loss": (
        2,
        ("parallel.distributed_optimizer=true",),
        {"sft.select_by": "validation_loss", "data.pretraining_mix": 0.1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sft(name, reference_world, tmp_path):
    ranks, layout, changes = CASES[name]
    asked = settings.sft(reference_world, tmp_path) | changes
    expected = sft.run(asked)
    left = run("sft", asked, EXPORTS, ranks, layout)
    assert_same_data(left.read, expected.read)
    assert_same_figures(left.rows, expected.rows)
    assert_same_weights(left.weights, expected.weights)
    assert_every_rule_was_at_work(expected, asked)


def assert_every_rule_was_at_work(expected, asked):
    """The comparison depends on this."""
    norms = [row["sft/grad_norm"] for row in expected.rows]
    assert min(norms) < asked["policy.optimizer.clip_norm"] < max(norms), "gradients were clipped, and were not"
    texts = [str(text) for step in expected.read for text in step["text"]]
    assert len(set(texts)) > len(texts) / 2, "each step reads on"
    assert len({len(step["text"]) for step in expected.read}) > 1, "not all batches have as many"
