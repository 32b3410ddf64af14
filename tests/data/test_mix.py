"""Shares of a batch: exact over the batches, whatever the batch size."""

from fractions import Fraction

import pytest

from megatron_rlhf.data.mix import Mix

SHARES = [(12, 0.25), (32, 0.1), (8, 0.1), (4, 0.1), (1, 0.1), (4, 0.95), (100, 0.29), (7, 0.3)]


@pytest.mark.parametrize(("batch_size", "share"), SHARES)
def test_counts_and_weights_come_to_the_share(batch_size, share):
    """Over a period of 100 steps, in exact arithmetic: a share with two decimals divides it."""
    mix = Mix(batch_size, share)
    counts = [mix.texts(step) for step in range(100)]
    assert sum(counts) == mix.texts_before(100) == 100 * batch_size * Fraction(str(share))
    assert max(counts) - min(counts) <= 1, "spread evenly"
    weights = [mix.weight(batch_size - count, count) for count in counts]
    assert sum(weights) / 100 == pytest.approx(share, rel=1e-9)
    if 1 <= batch_size * share <= batch_size - 1:
        assert set(weights) == {share}, "in every batch"


def test_one_text_now_and_then():
    mix = Mix(4, 0.1)
    assert [mix.texts(step) for step in range(10)] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert (mix.weight(4, 0), mix.weight(3, 1)) == (0, 0.25)


@pytest.mark.parametrize(("share", "weight"), [(0.0, 0.0), (1.0, 1.0)])
def test_of_one_kind_alone(share, weight):
    mix = Mix(3, share)
    assert [mix.texts(step) for step in range(3)] == [3 * share] * 3
    assert mix.weight(3 - mix.texts(0), mix.texts(0)) == weight


def test_an_epoch_is_a_pass_over_the_demonstrations():
    assert Mix(12, 0.25).steps(27, 2) == 6, "nine a batch"
    assert Mix(12, 0.25).steps(28, 2) == 8, "the fourth batch of an epoch has one"
    # 4 4 3 4 3 4 4 3 4 3: the first pass over ten ends after the third batch, the second after three more.
    assert Mix(4, 0.1).steps(10, 1) == 3
    assert Mix(4, 0.1).steps(10, 2) == 6
    assert Mix(4, 0.1).steps(0, 3) == 0
