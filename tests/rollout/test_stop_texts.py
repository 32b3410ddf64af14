"""Responses that a stop text ends: at the same token in every batch and at every layout."""

from dataclasses import replace

import pytest
from ranks import run_ranks
from toys import LLAMA_LIKE, make_role

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.data.tokenizer import train_tokenizer
from megatron_rlhf.rollout.collect import sample_responses

MODEL = replace(LLAMA_LIKE, vocab_size=259)
PROMPTS = [[30, 40, 50], [60], [70, 80, 90, 100, 110], [33, 44], [55]]


def completions(folder, texts, parallel=None, **settings):
    tokenizer = train_tokenizer(["aa"], 259, folder)
    tokenizer.stop_also_at(texts)
    config = SamplingConfig(**{"max_response_tokens": 25, "batch_size": 4, **settings})
    role = make_role(MODEL, parallel)
    done = sample_responses(role, PROMPTS, list(range(5)), config, (), (3, 0), tokenizer.stop_watch)
    return [(completion.tokens, completion.stopped, len(completion.logprobs)) for completion in done]


@pytest.fixture(scope="module")
def unstopped(world, tmp_path_factory):
    """Texts without any stop, and for two of them a piece of three tokens from the middle."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(["aa"], 259, folder)
    letters = [i for i in range(2, 259) if tokenizer.decode([i]).isascii()]
    texts = [tokens for tokens, _, _ in completions(folder, [])]
    pieces = []
    for tokens in texts:
        runs = [t for t in range(2, 20) if all(token in letters for token in tokens[t : t + 3])]
        pieces += [tokenizer.decode(tokens[runs[0] : runs[0] + 3])] if runs else []
    return tokenizer, texts, pieces[:2]


def expected(unstopped, minimum=1):
    tokenizer, texts, pieces = unstopped
    assert len(pieces) == 2 and all(len(piece) >= 3 for piece in pieces)
    result = []
    for tokens in texts:
        ends = []
        for count in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
            before = tokenizer.decode(tokens[: count - 1], skip_special_tokens=False)
            if count >= minimum and any(text.count(piece) > before.count(piece) for piece in pieces):
                ends.append(count)
        end = ends[0] if ends else len(tokens)
        result.append((tokens[:end], bool(ends), end))
    return result


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_they_end_where_the_text_is_complete(unstopped, tmp_path, batch_size):
    want = expected(unstopped)
    assert 2 <= sum(stopped for _, stopped, _ in want) < len(want)
    assert completions(tmp_path, unstopped[2], batch_size=batch_size) == want


def test_not_before_the_minimum(unstopped, tmp_path):
    want = expected(unstopped, minimum=22)
    assert completions(tmp_path, unstopped[2], min_response_tokens=22) == want
    assert want != expected(unstopped)


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)], ids=str
)
def test_at_a_layout(unstopped, tmp_path, parallel):
    for done in run_ranks(2, completions, tmp_path, unstopped[2], parallel):
        assert done == expected(unstopped)
