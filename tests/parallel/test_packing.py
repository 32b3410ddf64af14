"""Which sequences share a pass: budgets, balance, and where tokens lie; attention by segment against whole sequences."""

import pytest
import torch
from torch.nn import functional as F
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.parallel.packing import Block, Segments, Sequences, Tally, arrange, plan, share_out
from megatron_rlhf.trainers.loop import padding_share

LENGTHS = [3, 9, 4, 9, 1, 6]


def sequences(lengths=LENGTHS, **shared):
    """Row i holds 100 i + 1, 100 i + 2, ..."""
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 100 * row + 1 + torch.arange(length)
    return Sequences(tokens, lengths, **shared)


@pytest.mark.parametrize(
    ("size", "ranks", "expected"),
    [
        (2, 1, [[[1, 3], [5, 2], [0, 4]]]),  # longest first, similar lengths together
        (9, 1, [[[1, 3, 5, 2, 0, 4]]]),
        (2, 2, [[[1, 5], [4]], [[3, 2], [0]]]),  # 16 tokens each
        (Budget(tokens=10), 1, [[[1, 4], [3], [5, 2], [0]]]),  # first fit
        (Budget(tokens=32), 1, [[[1, 3, 5, 2, 0, 4]]]),
    ],
)
def test_microbatches_by_length_and_budget(size, ranks, expected):
    assert plan(sequences(), size, ranks) == expected
    assert share_out(LENGTHS, size, ranks) == expected


@pytest.mark.parametrize(
    ("rows", "packed", "multiple", "read", "padding"),
    [
        ([0, 1], False, 1, 18, 6),  # 3 and 9 tokens, both in rows of 9
        ([0, 1], False, 4, 24, 12),  # in rows of 12
        ([0, 1], True, 1, 12, 0),
        ([0, 2], True, 4, 8, 1),
        ([4], False, 1, 1, 0),
    ],
)
def test_padding_is_counted(rows, packed, multiple, read, padding):
    tally = Tally()
    for _ in range(2):
        tally.add(arrange(sequences(), rows, multiple, packed))
    assert tally.take() == (2 * read, 2 * padding)
    assert tally.take() == (0, 0)


def test_a_prompt_that_is_read_once_is_no_padding():
    asked = sequences([5, 6, 4], prompt_lengths=[3, 3, 3], prompt_index=[0, 0, 0])
    arranged = arrange(asked, [0, 1, 2], 2, packed=False)
    assert arranged.tokens_bs.numel() == 10  # 3 of the prompt, then 2, 3 and 1, and one to make it even
    assert arranged.num_padding == 1


def test_the_share_of_padding_over_roles(world):
    policy, critic = make_role(GPT2_LIKE), make_role(GPT2_LIKE, scalar=True)
    asked = Sequences(torch.zeros(2, 9, dtype=torch.long), [4, 9])
    policy.logprobs(asked, 2)  # reads 3 and 8 tokens in rows of 8
    critic.values(asked, Budget(tokens=20))
    assert padding_share([policy.tally, critic.tally]) == pytest.approx(5 / (16 + 13))
    assert padding_share([policy.tally, critic.tally]) == 0


def test_equal_lengths_are_dealt_in_turn():
    assert plan(sequences([5] * 5), 2, 2) == [[[0, 2], [4]], [[1, 3]]]


def test_more_ranks_than_rows():
    assert plan(sequences([5]), 2, 3) == [[[0]], [], []]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, Budget(tokens=150)])
def test_every_row_once_within_the_budget_and_ranks_balanced_by_tokens(size, ranks):
    random = torch.Generator().manual_seed(ranks)
    lengths = torch.randint(1, 120, (60,), generator=random).tolist()
    made = plan(sequences(lengths), size, ranks)
    assert sorted(row for share in made for part in share for row in part) == list(range(60))
    loads = [sum(lengths[row] for part in share for row in part) for share in made]
    assert max(loads) - min(loads) <= max(lengths)
    for part in (part for share in made for part in share):
        assert len(part) <= size if isinstance(size, int) else sum(lengths[row] for row in part) <= size.tokens


def test_samples_of_a_prompt_stay_together_as_far_as_they_fit():
    shared = {"prompt_lengths": [2] * 6, "prompt_index": [7, 5, 7, 5, 7, 6]}
    asked = sequences(**shared)
    assert asked.groups(range(6)) == [[0, 2, 4], [1, 3], [5]]
    assert [asked.shared(group) for group in asked.groups(range(6))] == [1, 2, 0], "no more than the shortest has"
    assert [asked.tokens_of(group) for group in asked.groups(range(6))] == [6, 16, 6]
    assert plan(asked, Budget(tokens=22), 1) == [[[1, 3, 0, 2, 4], [5]]]
    assert plan(asked, 2, 1) == [[[1, 3], [5, 4], [0, 2]]]


def test_rows_padded_to_a_multiple():
    made = arrange(sequences(), [0, 2], 4, packed=False)
    assert made.tokens_bs.tolist() == [[1, 2, 3, 0], [201, 202, 203, 204]]
    assert made.place_ns.tolist() == [[0, 1, 2, -1], [4, 5, 6, 7]]
    assert made.positions_bs is None and made.segments is None
    assert arrange(sequences(), [4], 4, packed=False).tokens_bs.shape == (1, 4)


def test_a_packed_row_restarts_its_positions():
    made = arrange(sequences(), [0, 4, 2], 3, packed=True)
    assert made.tokens_bs[0, :8].tolist() == [1, 2, 3, 401, 201, 202, 203, 204]
    assert made.positions_bs.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0]]
    assert made.place_ns.tolist() == [[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, 7]]
    assert made.segments.lengths == (3, 1, 4, 1), "the last is padding"
    assert set(made.segments.prefixes) == {None}


def test_rows_that_need_no_padding_stay_rows():
    """Attention then takes them all at once, and counts positions itself."""
    made = arrange(sequences([3, 4, 4]), [1, 2], 2, packed=True)
    assert made.tokens_bs.shape == (2, 4) and made.segments is None
    assert arrange(sequences([3, 3]), [0, 1], 2, packed=True).tokens_bs.shape == (1, 6)
    assert arrange(sequences([4, 3]), [0, 1], 2, packed=True).tokens_bs.shape == (1, 8)


def test_a_shared_prompt_stands_once_and_positions_go_on_from_its_end():
    asked = sequences([4, 5, 3], prompt_lengths=[2, 2, 2], prompt_index=[0, 0, 0])
    made = arrange(asked, [0, 1, 2], 1, packed=False)
    assert made.tokens_bs.tolist() == [[1, 2, 3, 4, 103, 104, 105, 203]]
    assert made.positions_bs.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2]]
    assert made.place_ns.tolist() == [[0, 1, 2, 3, -1], [0, 1, 4, 5, 6], [0, 1, 7, -1, -1]]
    assert (made.segments.lengths, made.segments.prefixes) == ((2, 2, 3, 1), (None, 0, 0, 0))


def test_a_response_of_one_token_that_is_not_read():
    """Log-probabilities read all but the last token: nothing of that response is left."""
    asked = sequences([3, 5], prompt_lengths=[2, 2], prompt_index=[0, 0]).until(-1)
    made = arrange(asked, [0, 1], 1, packed=False)
    assert made.tokens_bs.tolist() == [[1, 2, 103, 104]]
    assert made.place_ns.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]


def test_blocks_of_a_rank_that_holds_two_pieces_of_the_row():
    """Under context parallelism queries are those of one rank; keys are those of the whole row."""
    segments = Segments.of([2, 4, 2], [None, 0, None], 6)
    assert segments.blocks([(0, 8)]) == ([2, 4, 2], [Block(0, (0,)), Block(1, (0, 1)), Block(2, (2,))])
    sizes, blocks = segments.blocks([(2, 4), (4, 6)])
    assert sizes == [2, 2, 2, 2]
    assert blocks == [Block(1, (0, 1)), Block(2, (0, 1, 2))]


def test_blocks_attend_as_whole_sequences_do(world):
    """A prompt of 3 with completions of 4, 1 and 2, then a text of 5, compared with each of them alone."""
    lengths, prompts = [7, 4, 5, 5], [3, 3, 3, 0]
    asked = sequences(lengths, prompt_lengths=prompts, prompt_index=[0, 0, 0, 1])
    made = arrange(asked, range(4), 1, packed=True)
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(made.tokens_bs.shape[1], 1, 2, 8, generator=random) for _ in range(3))
    (chunk,) = make_role(GPT2_LIKE).modules
    attention = chunk.decoder.layers[0].self_attention.core_attention
    attended = attention(query, key, value, None, packed_seq_params=made.segments).view(-1, 2, 8)
    for row, length in enumerate(lengths):
        places = made.place_ns[row, :length]
        q, k, v = (part[places, 0].transpose(0, 1) for part in (query, key, value))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.softmax_scale)
        torch.testing.assert_close(attended[places], expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [GPT2_LIKE, LLAMA_LIKE], ids=["learned positions", "rotary"])
def test_scores_of_several_samples_of_a_prompt(model, world):
    """Packed, with the prompt read once, compared with each text alone."""
    random = torch.Generator().manual_seed(3)
    prompt, other = torch.randint(0, 67, (6,), generator=random), torch.randint(0, 67, (4,), generator=random)
    lengths = [10, 7, 12, 9]
    tokens = torch.randint(0, 67, (4, 12), generator=random)
    tokens[[0, 1, 3], :6], tokens[2, :4] = prompt, other
    asked = Sequences(tokens, lengths, None, [6, 6, 4, 6], [0, 0, 1, 0])
    critic, policy = make_role(model, scalar=True), make_role(model)
    for size in (1, 3, Budget(tokens=20), Budget(tokens=99)):
        values, logprobs = critic.values(asked, size), policy.logprobs(asked, size)
        for row, length in enumerate(lengths):
            alone = tokens[row : row + 1, :length]
            torch.testing.assert_close(values[row, :length], critic.values(alone, 1)[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logprobs[row, : length - 1], policy.logprobs(alone, 1)[0], rtol=1e-5, atol=1e-5)
            assert not values[row, length:].any() and not logprobs[row, length - 1 :].any()
