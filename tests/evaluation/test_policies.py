"""Win rates and best of n, by hand and by enumeration."""

from itertools import combinations

import numpy as np
import pytest

from megatron_rlhf.evaluation.policies import best_of_n, means, win_rates, win_rates_by_people
from megatron_rlhf.evaluation.statistics import best_of_n_kl, win_rate


def test_one_answer_each_is_the_plain_win_rate():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, size=(2, 50)).astype(float).tolist()
    rates = win_rates({"a": {i: [x] for i, x in enumerate(a)}, "b": {i: [x] for i, x in enumerate(b)}})
    percent, error = win_rate(a, b)
    assert rates["a", "b"].wins.mean == pytest.approx(percent)
    assert rates["a", "b"].wins.error == pytest.approx(error)
    assert rates["b", "a"].wins.mean == pytest.approx(100 - percent)
    assert rates["a", "b"].ties == pytest.approx(100 * np.mean(np.equal(a, b)))


def test_all_pairs_of_answers_and_only_shared_prompts():
    rates = win_rates({"a": {1: [3.0, 1.0], 2: [0.0]}, "b": {1: [2.0], 3: [9.0]}, "c": {4: [1.0]}})
    assert list(rates) == [("a", "b"), ("b", "a")]
    assert (rates["a", "b"].wins.mean, rates["a", "b"].wins.count) == (50.0, 2)


def test_people():
    rows = [
        {"prompt": "p", "ranks": [0, 1, 1], "sources": ["sft", "ppo", "base"]},
        {"prompt": "q", "ranks": [1, 0, 2], "sources": ["sft", "ppo", None]},
        {"prompt": "q", "ranks": [0, 0], "sources": ["sft", "sft"]},
    ]
    rates = win_rates_by_people(rows)
    assert rates["sft", "ppo"].wins.mean == 50 and rates["sft", "ppo"].ties == 0
    assert rates["base", "ppo"].ties == 100
    assert rates["sft", "base"].wins.mean == 100 and rates["base", "sft"].wins.mean == 0


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(3)
    scores = {i: rng.normal(size=5).tolist() for i in range(4)}
    gold = {i: rng.normal(size=5).tolist() for i in range(4)}
    for values in (scores, gold):
        for point in best_of_n(scores, values):
            expected = np.mean(
                [
                    np.mean(
                        [values[p][max(draw, key=scores[p].__getitem__)] for draw in combinations(range(5), point.n)]
                    )
                    for p in scores
                ]
            )
            assert point.mean.mean == pytest.approx(expected)
            assert point.kl == best_of_n_kl(point.n)
    assert [point.n for point in best_of_n(scores)] == [1, 2, 4]
    assert best_of_n(scores)[0].mean.mean == pytest.approx(means(scores).mean)
