"""What a replica sends, and when: portions that follow from the order in which responses end, samples of a prompt together."""

import pytest

from megatron_rlhf.rollout.delivery import Sender
from megatron_rlhf.rollout.sequences import SampledSequence


def portions(prompts, size, order, rows=None):
    """Rows of the portions sent when responses end in this order."""
    sent = []
    sender = Sender(prompts, rows or range(len(prompts)), size, sent.append)
    for index in order:
        sender.take(SampledSequence(index, prompts[index], key=0, tokens=[index], logprobs=[-0.5], stopped=True))
    assert all(
        portion[row].tokens == [index] for portion in sent for index, row in enumerate(rows or ()) if row in portion
    )
    return [list(portion) for portion in sent]


ONE_EACH = [(1,), (2,), (3,), (4,), (5,)]


def test_a_portion_goes_when_enough_have_ended_and_the_last_when_all_have():
    assert portions(ONE_EACH, 2, [3, 0, 4, 2, 1]) == [[3, 0], [4, 2], [1]]
    assert portions(ONE_EACH, 9, [3, 0, 4, 2, 1]) == [[3, 0, 4, 2, 1]]
    assert portions(ONE_EACH, 2, [3, 0, 4]) == [[3, 0]], "the third waits for a fourth"


def test_rows_are_those_of_the_batch():
    assert portions([(1,), (2,)], 1, [1, 0], rows=[7, 4]) == [[4], [7]]


def test_samples_of_a_prompt_are_sent_together():
    prompts = [(1,), (1,), (2,), (2,), (3,)]
    assert portions(prompts, 2, [0, 2, 3, 4, 1]) == [[2, 3], [4, 0, 1]]
    assert portions(prompts, 1, [4, 0, 2, 1, 3]) == [[4], [0, 1], [2, 3]]


@pytest.mark.parametrize("size", range(1, 7))
def test_every_response_is_sent_once(size):
    sent = portions([(i // 3,) for i in range(9)], size, [8, 1, 4, 0, 5, 7, 2, 3, 6])
    assert sorted(row for portion in sent for row in portion) == list(range(9))
    assert all(len(portion) >= size for portion in sent[:-1])
