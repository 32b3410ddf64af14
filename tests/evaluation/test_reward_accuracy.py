"""Reward model figures, by hand and on simulated preferences."""

import math

import numpy as np
import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.evaluation.estimates import estimate
from megatron_rlhf.evaluation.reward_accuracy import (
    accuracy,
    accuracy_by,
    by_length,
    calibration,
    pairs_of,
    prefers_longer,
)


def row(prompt, ranks, scores, lengths=None, group=None):
    return {"prompt": prompt, "ranks": ranks, "scores": scores, "lengths": lengths or [10] * len(ranks), "group": group}


def test_an_estimate_over_groups():
    found = estimate([1, 0, 1, 1], ["a", "a", "b", "b"], scale=100)
    assert (found.mean, found.count) == (75.0, 4)
    # Residuals -0.5 and 0.5: sqrt(2 * 0.5) / 4.
    assert found.error == pytest.approx(25)
    assert (found.low, found.high) == (50.0, 100.0)
    one = estimate([1.0], ["a"])
    assert math.isnan(one.error) and one.low == one.high == 1
    rng = np.random.default_rng(0)
    values = rng.normal(size=300).tolist()
    single = estimate(values, range(300))
    assert single.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(300))


def test_pairs_ties_and_groups():
    pairs = pairs_of(
        [
            row("p", [0, 1, 1], [2.0, 1.0, 3.0], group="training"),  # right, wrong; the tie is no pair
            row("p", [1, 0], [0.0, 0.0], group="held_out"),  # equal scores
            row("q", [0, 1], [5.0, 4.0], group="training"),
        ]
    )
    assert accuracy(pairs).mean == 100 * 2.5 / 4
    by_k = accuracy_by(pairs, lambda pair: pair.k)
    assert [(k, found.mean, found.count) for k, found in by_k.items()] == [(2, 75.0, 2), (3, 50.0, 2)]
    by_team = accuracy_by(pairs, lambda pair: pair.group)
    assert {team: found.mean for team, found in by_team.items()} == {
        "held_out": 50.0,
        "training": pytest.approx(200 / 3),
    }
    with pytest.raises(UserError, match="nothing to measure"):
        pairs_of([row("p", [0, 0], [1.0, 2.0])])


def test_a_model_that_likes_length():
    rng = np.random.default_rng(1)
    lengths = rng.integers(10, 200, size=(400, 2)).tolist()
    pairs = pairs_of(row(i, [0, 1], [float(a), float(b)], [a, b]) for i, (a, b) in enumerate(lengths))
    found = by_length(pairs)
    assert found["preferred much shorter"].mean == found["preferred shorter"].mean == 0
    assert found["preferred much longer"].mean == found["preferred longer"].mean == 100
    assert sum(part.count for part in found.values()) == 400
    people, model = prefers_longer(pairs)
    assert model.mean == 100 and people.mean == pytest.approx(100 * np.mean([a > b for a, b in lengths]), abs=1)


def test_calibration_of_the_right_model_and_of_one_that_is_too_sure():
    """People prefer with probability sigmoid(difference): a model with these scores is calibrated, with thrice them not."""
    rng = np.random.default_rng(2)
    utilities = rng.normal(size=(4000, 2)) * 1.5
    first_wins = rng.random(4000) < 1 / (1 + np.exp(utilities[:, 1] - utilities[:, 0]))
    rows = [
        row(i, [0, 1] if wins else [1, 0], scores)
        for i, (wins, scores) in enumerate(zip(first_wins, utilities.tolist(), strict=True))
    ]
    bins, gap = calibration(pairs_of(rows))
    assert gap < 3
    assert all(abs(part.confidence - part.accuracy.mean) < 4 * part.accuracy.error for part in bins)
    _, sure = calibration(pairs_of({**each, "scores": [3 * score for score in each["scores"]]} for each in rows))
    assert sure > 10
