"""Rankings from votes on pairs: worked by hand, and the way back for every ranking of four."""

import itertools

import pytest

from megatron_rlhf.data.formats.votes import Cycle, dense, ranks_from_votes, votes_from_ranks


@pytest.mark.parametrize(
    ("count", "votes", "ranks"),
    [
        (2, [(0, 1, 1)], [0, 1]),
        (2, [(1, 0, 1)], [1, 0]),
        (2, [], [0, 0]),
        (3, [(0, 1, 1), (1, 2, 1)], [0, 1, 2]),
        (3, [(2, 1, 1), (1, 0, 1), (0, 1, 0)], [2, 1, 0]),
        (2, [(0, 1, 1), (1, 0, 1), (1, 0, 1)], [1, 0]),  # two against one
        (2, [(0, 1, 1), (1, 0, 1)], [0, 0]),
    ],
)
def test_ranks(count, votes, ranks):
    assert ranks_from_votes(count, votes) == ranks


def test_there_and_back():
    for ranks in itertools.product(range(3), repeat=4):
        assert ranks_from_votes(4, votes_from_ranks(ranks)) == dense(ranks)


def test_a_circle_is_named():
    with pytest.raises(Cycle) as found:
        ranks_from_votes(5, [(0, 1, 1), (1, 3, 1), (3, 4, 1), (4, 1, 1), (2, 0, 1)])
    assert found.value.responses == (1, 3, 4)
    assert str(found.value) == "1 > 3 > 4 > 1"
