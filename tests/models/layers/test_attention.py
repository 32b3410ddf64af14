"""Decoding with the key/value cache against full forward passes, token by token."""

import pytest
import torch
from ranks import run_ranks
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.layers import attention
from megatron_rlhf.rollout import runner
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import mix

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
STOP = 66


def numbers(*shape):
    return torch.randint(0, 66, shape, generator=torch.Generator().manual_seed(shape[-1]))


def test_cuda_gets_no_groups_together_with_a_mask(world, monkeypatch):
    """CUDA's fused kernels take one or the other; keys and values are repeated there, and the result is the same."""
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


def decoded_logprobs(model, parallel, lengths, responses, slots, static_shapes=False):
    """Log-probabilities over the vocabulary before each response token, read while decoding these same responses."""
    role = make_role(MODELS[model], parallel)
    prompts = [numbers(n).tolist() for n in lengths]
    seen = [[] for _ in prompts]

    rows, steps = torch.arange(len(prompts)), torch.arange(max(map(len, responses)))
    keys = {
        key: (row, step)
        for row, of_row in enumerate(mix(rows.unsqueeze(-1), steps).tolist())
        for step, key in enumerate(of_row)
    }

    def forced(logits_bv, keys_b, *_):
        assert logits_bv.shape[-1] == 67, "padding is cut off"
        places = [keys[key] for key in keys_b.tolist()]
        for (row, step), logits in zip(places, logits_bv, strict=True):
            assert len(seen[row]) == step
            seen[row].append(logits.log_softmax(-1))
        return torch.tensor([responses[row][step] for row, step in places]), torch.zeros(len(places))

    runner.Sampler = lambda *settings: forced
    config = SamplingConfig(max_response_tokens=max(map(len, responses)), batch_size=slots)
    done = generate(role, prompts, rows, config, (STOP,), static_shapes=static_shapes)
    assert [completion.tokens for completion in done] == responses, "on every stage"
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


@pytest.fixture(autouse=True)
def sampler():
    """Restores the sampler, whatever the test decodes with."""
    original = runner.Sampler
    yield
    runner.Sampler = original


RESPONSES = {
    # Prompt lengths, and how many tokens each row gets before it stops: rows leave the batch at different times.
    "one_length": ([6, 6, 6], [5, 3, 5]),
    "many_lengths": ([3, 9, 1, 6, 6], [7, 2, 4, 7, 1]),
    "single_token_prompts": ([1, 1], [4, 6]),
}


def responses_of(counts):
    longest = max(counts)
    rows = [numbers(longest + i).tolist()[:longest] for i in range(len(counts))]
    return [row if n == longest else [*row[: n - 1], STOP] for row, n in zip(rows, counts, strict=True)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", RESPONSES)
@pytest.mark.parametrize(("slots", "static_shapes"), [(8, False), (2, False), (2, True)])
def test_the_cache_gives_what_a_full_forward_pass_gives(case, model, slots, static_shapes, world):
    lengths, counts = RESPONSES[case]
    responses = responses_of(counts)
    decoded = decoded_logprobs(model, ParallelConfig(), lengths, responses, slots, static_shapes)
    for row, expected in zip(decoded, full_logprobs(model, lengths, responses), strict=True):
        assert_close(row, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)])
def test_the_cache_at_a_layout(parallel, model, world):
    lengths, counts = RESPONSES["many_lengths"]
    responses = responses_of(counts)
    expected = full_logprobs(model, lengths, responses)
    results = [r for r in run_ranks(2, decoded_logprobs, model, parallel, lengths, responses, 2) if r is not None]
    assert results
    for decoded in results:
        for row, reference in zip(decoded, expected, strict=True):
            assert_close(row, reference, rtol=1e-5, atol=2e-5)
