"""Which column is which: prompts and responses of different lengths, worked out by hand."""

import torch
from torch.testing import assert_close

from megatron_rlhf.rollout.types import Completion, Experience, Responses, Rollout

PAD = 9
PROMPTS = [[1, 2, 3], [4], [5, 6]]
COMPLETIONS = [
    Completion([7, 8], [-0.1, -0.2], True),
    Completion([1, 2, 3, 4], [-0.3] * 4, False),
    Completion([3], [-0.5], True),
]


def responses():
    return Responses.pack(PROMPTS, COMPLETIONS, PAD, torch.device("cpu"))


def test_pack():
    packed = responses()
    assert packed.tokens_bs.tolist() == [[1, 2, 3, 7, 8], [4, 1, 2, 3, 4], [5, 6, 3, PAD, PAD]]
    assert packed.prompt_lengths_b.tolist() == [3, 1, 2]
    assert packed.response_lengths_b.tolist() == [2, 4, 1]
    assert packed.stopped_b.tolist() == [True, False, True]


def test_masks_and_positions():
    packed = responses()
    assert packed.mask_bt.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    # Response token t is predicted at prompt_length - 1 + t; masked positions stay inside the sequence.
    assert packed.positions_bt.tolist() == [[2, 3, 3, 3], [0, 1, 2, 3], [1, 2, 3, 3]]
    assert packed.last_b.tolist() == [4, 4, 2]
    targets = packed.tokens_bs.gather(1, packed.positions_bt + 1)
    assert targets[packed.mask_bt].tolist() == [7, 8, 1, 2, 3, 4, 3]


def test_at_response_takes_whole_sequences_and_next_token_columns():
    packed = responses()
    values = torch.arange(15.0).reshape(3, 5)
    expected = torch.tensor([[2.0, 3, 0, 0], [5, 6, 7, 8], [11, 0, 0, 0]])
    assert_close(packed.at_response(values), expected)
    assert_close(packed.at_response(values[:, :-1]), expected)


def test_nan_after_the_end_does_not_reach_a_response():
    values = torch.zeros(3, 5)
    values[2, 3:] = torch.nan
    assert not packed_has_nan(values)


def packed_has_nan(values):
    return bool(responses().at_response(values).isnan().any())


def experience():
    packed = responses()
    table = torch.arange(12.0).reshape(3, 4)
    rollout = Rollout(packed, table, table + 1, table + 2, table + 3, torch.zeros(3), torch.arange(3))
    return Experience.of(rollout, table + 4, table + 5)


def test_experience_takes_the_old_logprobs_and_values_of_the_rollout():
    whole = experience()
    assert len(whole) == 3
    assert whole.tokens_bs.tolist() == responses().tokens_bs.tolist()
    assert whole.mask_bt.tolist() == responses().mask_bt.tolist()
    for name, first in (("logprobs_bt", 1.0), ("values_bt", 3.0), ("advantages_bt", 4.0), ("returns_bt", 5.0)):
        assert float(getattr(whole, name)[0, 0]) == first, name


def test_response_tokens_come_with_what_is_known_of_each():
    whole = experience()
    part = whole.response_tokens([2, 0])
    assert part.targets_n.tolist() == [token for row in (2, 0) for token in COMPLETIONS[row].tokens]
    assert part.logprobs_n.tolist() == [9.0, 1.0, 2.0, 3.0][: len(part.targets_n)]
    assert part.mask_n.all()
    assert not whole.response_tokens([1], counts=False).mask_n.any()


def test_the_wanted_tokens_are_those_that_predict_the_response():
    sequences = experience().sequences
    for row, completion in enumerate(COMPLETIONS):
        places = sequences.wanted([row])[0].nonzero().flatten()
        text = sequences.tokens_ns[row].tolist()
        assert [text[place + 1] for place in places] == completion.tokens
        assert sequences.lengths[row] == int(places[-1]) + 1, "the last token is never read"


def test_minibatches_are_shuffled_complete_and_the_same_for_the_same_seed():
    whole = experience()

    def order(seed, size=2, epochs=1):
        return [batch.tokens_bs[:, 0].tolist() for batch in whole.minibatches(size, seed, epochs)]

    assert [len(batch) for batch in order((1, 2))] == [2, 1]
    assert sorted(token for batch in order((1, 2)) for token in batch) == [1, 4, 5]
    assert order((1, 2), epochs=2) == order((1, 2), epochs=2)
    assert [len(batch) for batch in order((1, 2), epochs=2)] == [2, 1, 2, 1]
    assert len(set(map(str, order((1, 2), 3, epochs=8)))) > 2
    assert len({str(order((1, step), 3)) for step in range(8)}) > 2


def test_rows_of_a_minibatch_belong_together():
    for batch in experience().minibatches(1, (0,), 1):
        row = [1, 4, 5].index(int(batch.tokens_bs[0, 0]))
        assert batch.logprobs_bt[0, 0] == 4 * row + 1
        assert batch.returns_bt[0, 0] == 4 * row + 5
