"""Decoding with the key/value cache against full forward passes, token by token."""

import pytest
import torch
from ranks import run_ranks
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models import attention
from megatron_rlhf.models.attention import KeyValueCache
from megatron_rlhf.parallel.pipeline import forward_backward
from megatron_rlhf.rollout.generate import Decoder

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
STOP = 66


def numbers(*shape):
    return torch.randint(0, 66, shape, generator=torch.Generator().manual_seed(shape[-1]))


def test_cuda_gets_no_groups_together_with_a_mask(world, monkeypatch):
    """Its fused kernels take one or the other; keys and values are repeated there, and the result is the same."""
    (module,) = make_role(LLAMA_LIKE).modules
    core, kernel, grouped = (
        module.decoder.layers[0].self_attention.core_attention,
        attention.F.scaled_dot_product_attention,
        [],
    )

    def watched(*given, **named):
        grouped.append(named["enable_gqa"])
        return kernel(*given, **named)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 2, heads, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    assert not attention.kernels_refuse_groups_with_a_mask(query.device)
    assert attention.kernels_refuse_groups_with_a_mask(torch.device("cuda", 0))
    expected = core(query, key, value, mask)
    monkeypatch.setattr(attention, "kernels_refuse_groups_with_a_mask", lambda device: True)
    assert_close(core(query, key, value, mask), expected)
    core(query, key, value, None)
    assert grouped == [True, False, True], "without a mask groups are fine"


def decoded_logprobs(model, parallel, lengths, responses):
    """Log-probabilities over the vocabulary before each response token, read while decoding these very responses."""
    role = make_role(MODELS[model], parallel)
    prompts = [numbers(n).tolist() for n in lengths]
    config = SamplingConfig(max_response_tokens=max(map(len, responses)), batch_size=8)
    decoder = Decoder(
        role, list(range(len(prompts))), prompts, torch.zeros(len(prompts), dtype=torch.long), config, (STOP,)
    )
    seen = [[] for _ in prompts]

    def forced(logits_bv, keys_b, positions_b, banned=None):
        assert logits_bv.shape[-1] == 67, "padding is cut off"
        rows = decoder.rows_b.tolist()
        for row, logits in zip(rows, logits_bv, strict=True):
            seen[row].append(logits.log_softmax(-1))
        tokens = torch.tensor([responses[row][decoder.step] for row in rows])
        return tokens, torch.zeros(len(rows))

    decoder.sampler = forced
    with role.evaluating(decoding=True):
        while decoder.unfinished:
            forward_backward(role.chunks, [decoder.microbatch()], role.layout, forward_only=True)
            decoder.advance()
    completions = decoder.completions()
    assert [completions[i].tokens for i in range(len(prompts))] == responses, "on every stage"
    return [torch.stack(rows) for rows in seen] if role.layout.is_last_stage else None


def full_logprobs(model, lengths, responses):
    role = make_role(MODELS[model])
    result = []
    for length, response in zip(lengths, responses, strict=True):
        text = torch.tensor([numbers(length).tolist() + response])
        with role.layout, role.evaluating():
            logits = role.modules[0](text, torch.arange(text.shape[1]).unsqueeze(0), None)[0, :, :67]
        result.append(logits.log_softmax(-1)[length - 1 : -1])
    return result


RESPONSES = {
    # Prompt lengths, and how many tokens each row gets before it stops: rows leave the batch at different times.
    "one_length": ([6, 6, 6], [5, 3, 5]),
    "left_padding": ([3, 9, 1, 6], [7, 2, 4, 7]),
    "single_token_prompts": ([1, 1], [4, 6]),
}


def responses_of(counts):
    longest = max(counts)
    rows = [numbers(longest + i).tolist()[:longest] for i in range(len(counts))]
    return [row if n == longest else [*row[: n - 1], STOP] for row, n in zip(rows, counts, strict=True)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", RESPONSES)
def test_the_cache_gives_what_a_full_forward_pass_gives(case, model, world):
    lengths, counts = RESPONSES[case]
    responses = responses_of(counts)
    decoded = decoded_logprobs(model, ParallelConfig(), lengths, responses)
    for row, expected in zip(decoded, full_logprobs(model, lengths, responses), strict=True):
        assert_close(row, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)])
def test_the_cache_at_a_layout(parallel, model, world):
    lengths, counts = RESPONSES["left_padding"]
    responses = responses_of(counts)
    expected = full_logprobs(model, lengths, responses)
    results = [r for r in run_ranks(2, decoded_logprobs, model, parallel, lengths, responses) if r is not None]
    assert results
    for decoded in results:
        for row, reference in zip(decoded, expected, strict=True):
            assert_close(row, reference, rtol=1e-5, atol=2e-5)


def test_a_full_cache_says_so():
    cache = KeyValueCache(capacity=3)
    cache.append(1, torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    cache.length = 2
    with pytest.raises(AssertionError, match="cache of 3 tokens asked to hold 4"):
        cache.append(1, torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))


def test_rows_that_are_kept_keep_their_keys():
    cache = KeyValueCache(capacity=2)
    keys = torch.arange(3.0).view(1, 3, 1, 1)
    cache.append(1, keys, 10 * keys)
    cache.keep_rows(torch.tensor([2, 0]))
    cache.length = 1
    keys, values = cache.append(1, torch.full((1, 2, 1, 1), 7.0), torch.full((1, 2, 1, 1), 8.0))
    assert keys.squeeze().T.tolist() == [[2.0, 7.0], [0.0, 7.0]]
    assert values.squeeze().T.tolist() == [[20.0, 8.0], [0.0, 8.0]]
