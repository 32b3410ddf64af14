"""Numbers worked by hand or printed in the papers."""

import math

import numpy as np
import pytest

from megatron_rlhf.evaluation.statistics import (
    best_of_n_kl,
    bootstrap,
    krippendorff_alpha,
    pairwise_agreement,
    win_rate,
)


def test_win_rate_counts_ties_half():
    percent, error = win_rate([1, 2, 3, 0], [0, 2, 1, 5])  # won, tied, won, lost
    assert percent == 62.5
    # Deviations 37.5, -12.5, 37.5, -62.5: variance 6875 / 3, error sqrt(6875 / 3 / 4).
    assert error == pytest.approx(math.sqrt(6875 / 12))
    assert win_rate([3, 3], [1, 1]) == (100.0, 0.0)


def test_best_of_n_kl():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.1931472)
    assert best_of_n_kl(64) == pytest.approx(3.1745081)


def test_best_of_n_kl_is_that_of_the_distribution():
    """The best of n continuous samples has density n F^(n-1) f; the KL is the mean of its logarithm."""
    n, quantiles = 8, (np.arange(200_000) + 0.5) / 200_000
    density = n * quantiles ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(float((density * np.log(density)).mean()), rel=1e-4)


def test_bootstrap_of_independent_values_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, size=400).tolist()
    low, high = bootstrap(values, range(400))
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)
    assert bootstrap(values, range(400)) == (low, high) != bootstrap(values, range(400), seed=1)
    assert bootstrap(values, range(400), level=0.5)[0] > low


def test_bootstrap_resamples_groups():
    """Four copies of each value in a group carry no more information than one."""
    values = np.random.default_rng(2).normal(size=100)
    alone = bootstrap(values.tolist(), range(100))
    copied = bootstrap(np.repeat(values, 4).tolist(), np.repeat(np.arange(100), 4).tolist())
    assert copied == pytest.approx(alone, rel=1e-9)
    assert bootstrap([1.0, 2.0], ["a", "a"]) == (1.5, 1.5)


def test_pairwise_agreement():
    # The pairs of items are (0,1), (0,2) and (1,2).
    assert pairwise_agreement([[0, 1, 2], [0, 1, 2]]) == 100
    assert pairwise_agreement([[0, 1, 2], [2, 1, 0]]) == 0
    assert pairwise_agreement([[0, 0, 1], [0, 0, 1]]) == 100
    assert pairwise_agreement([[0, 1, 2], [0, 0, 1]]) == pytest.approx(200 / 3)
    assert pairwise_agreement([[0, 1, 2], [0, 2, 1], [0, 0, 1]]) == pytest.approx(100 * (2 + 2 + 1) / 9)
    assert math.isnan(pairwise_agreement([[0, 1, 2]]))


def test_krippendorff_alpha_of_the_published_example():
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": four observers, twelve units, ordinal alpha 0.815."""
    observers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    rankings = [[None if rank == "." else float(rank) for rank in observer.split()] for observer in observers]
    assert krippendorff_alpha(rankings) == pytest.approx(0.815, abs=5e-4)


def test_krippendorff_alpha_at_its_ends():
    assert krippendorff_alpha([[0, 1, 2], [0, 1, 2]]) == 1
    assert krippendorff_alpha([[0, 1], [1, 0]]) < 0
    assert math.isnan(krippendorff_alpha([[0, 0], [0, 0]]))
    assert math.isnan(krippendorff_alpha([[0, None], [None, 1]]))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: win_rate([1.0], [1.0, 2.0]), "1 and 2 scores"),
        (lambda: win_rate([1.0, math.nan], [1.0, 2.0]), "value 1 is nan"),
        (lambda: bootstrap([], []), "at least one value"),
        (lambda: bootstrap([1.0], ["a"], level=1.0), "between 0 and 1"),
        (lambda: best_of_n_kl(0), "n = 0"),
        (lambda: pairwise_agreement([[0, 1], [0, 1, 2]]), "must rank the same ones"),
    ],
)
def test_what_makes_no_sense_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
