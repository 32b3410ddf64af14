import math

import pytest

from megatron_rlhf.algorithms.schedules import constant_lr, cosine_lr


def test_cosine_ends_are_exact():
    for peak, fraction in [(9.65e-6, 0.1), (3e-4, 0.0), (1.0, 0.35), (9e-6, 1.0)]:
        assert cosine_lr(0, 100, peak, fraction) == peak
        assert cosine_lr(100, 100, peak, fraction) == peak * fraction
        assert cosine_lr(1000, 100, peak, fraction) == peak * fraction


def test_cosine_by_hand():
    # f = 0.1: halfway (1 + 0.1) / 2; at a quarter 0.1 + 0.9 (1 + sqrt(1/2)) / 2.
    assert cosine_lr(50, 100, 2.0) == pytest.approx(2 * 0.55, rel=1e-12)
    assert cosine_lr(25, 100, 2.0) == pytest.approx(2 * (0.1 + 0.45 * (1 + math.sqrt(0.5))), rel=1e-12)


def test_cosine_warmup():
    rates = [cosine_lr(step, 14, 8.0, warmup=4) for step in range(15)]
    assert rates[:5] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert rates[4:] == [cosine_lr(step, 10, 8.0) for step in range(11)]  # after the warmup, the same as without one


def test_cosine_of_a_run_shorter_than_its_warmup():
    assert [cosine_lr(step, 2, 8.0, warmup=4) for step in range(4)] == [0.0, 2.0, 0.8, 0.8]


def test_constant():
    # f = 0.1: 1, then 9/4 more each step.
    rates = [constant_lr(step, 10.0, warmup=4) for step in range(7)]
    assert rates == pytest.approx([1.0, 3.25, 5.5, 7.75, 10.0, 10.0, 10.0], rel=1e-12)
    assert constant_lr(4, 9e-6, warmup=4) == 9e-6
    assert constant_lr(0, 9e-6, warmup=0) == 9e-6
    assert constant_lr(0, 8.0, warmup=4, start_fraction=0.5) == 4.0
