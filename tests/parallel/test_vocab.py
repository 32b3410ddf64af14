"""Log-probabilities and entropy over a split vocabulary: literals, compared with autograd, two ranks compared with one."""

import math

import pytest
import torch
from ranks import run_ranks
from torch.testing import assert_close

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.vocab import entropy, token_logprobs, token_logprobs_and_entropy


def test_literal_logprobs():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    assert_close(token_logprobs(logits, torch.tensor([[1, 1]]), None), torch.tensor([[math.log(0.75), math.log(0.2)]]))


def test_literal_gradient():
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    (2.0 * token_logprobs(logits, torch.tensor([0]), None)).sum().backward()
    assert_close(logits.grad, torch.tensor([[2 * (1 - 0.25), 2 * -0.75]]))


def test_temperature_divides_logits_and_gradients():
    logits = torch.tensor([[0.0, math.log(9.0)]], requires_grad=True)
    logprob = token_logprobs(logits, torch.tensor([1]), None, temperature=2.0)  # sqrt(9) = 3
    assert_close(logprob, torch.tensor([math.log(0.75)]))
    logprob.backward(torch.ones(1))
    assert_close(logits.grad, torch.tensor([[-0.25 / 2, 0.25 / 2]]))


def test_literal_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -torch.inf, -torch.inf]])
    expected = [math.log(4.0), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert_close(entropy(logits, None), torch.tensor(expected))


def test_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, None, 0.7), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(x, None), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_fp32_and_gradient_of_the_logits_type(dtype):
    logits = torch.randn(3, 7).to(dtype).requires_grad_()
    tokens = torch.tensor([0, 3, 6])
    logprobs = token_logprobs(logits, tokens, None)
    expected = torch.log_softmax(logits.detach().float(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert logprobs.dtype is torch.float32
    assert entropy(logits, None).dtype is torch.float32
    assert_close(logprobs, expected)
    logprobs.sum().backward()
    assert logits.grad.dtype is dtype


def test_extreme_logits_neither_overflow_nor_lose_the_difference():
    logits = torch.tensor([[1e4, 1e4 - 1.0], [-1e4, -1e4 - 1.0], [3e38, -3e38]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([1, 1, 0]), None)
    second = -1 - math.log1p(math.exp(-1))
    assert_close(logprobs, torch.tensor([second, second, 0.0]))
    assert_close(entropy(logits, None)[2], torch.tensor(0.0))
    (logprobs.sum() + entropy(logits, None).sum()).backward()
    assert torch.isfinite(logits.grad).all()


def test_logits_of_minus_infinity_have_no_probability_and_no_gradient():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    logprob = token_logprobs(logits, torch.tensor([2]), None)
    (logprob + entropy(logits, None)).sum().backward()
    without = torch.tensor([[0.0, 1.0]], requires_grad=True)
    expected = token_logprobs(without, torch.tensor([1]), None)
    (expected + entropy(without, None)).sum().backward()
    assert_close(logprob, expected)
    assert_close(logits.grad, torch.tensor([[without.grad[0, 0], 0.0, without.grad[0, 1]]]))
    assert token_logprobs(logits, torch.tensor([1]), None).item() == -torch.inf


def test_shapes_and_temperature_are_checked():
    with pytest.raises(AssertionError, match="do not fit"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.long), None)
    with pytest.raises(AssertionError, match="temperature"):
        token_logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), None, temperature=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_in_parts(dtype):
    """More logits than are processed at once, and the entropy from the same pass."""
    random = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 60, 2000, generator=random)).to(dtype).requires_grad_()
    tokens = torch.randint(0, 2000, (7, 60), generator=random)
    logprobs, entropies = token_logprobs_and_entropy(logits, tokens, None, 0.8)
    plain = logits.detach().float().requires_grad_()
    expected = torch.log_softmax(plain / 0.8, -1)
    assert_close(logprobs, expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), rtol=1e-6, atol=1e-5)
    assert_close(entropies, -(expected.exp() * expected).sum(-1).detach(), rtol=1e-5, atol=1e-5)
    assert not entropies.requires_grad, "a statistic"
    weights = torch.randn(7, 60, generator=random)
    (logprobs * weights).sum().backward()
    (expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * weights).sum().backward()
    assert_close(logits.grad, plain.grad.to(dtype), rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)


def whole_logits():
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(2, 6, 12, generator=generator)
    logits[0, 0, :6] = -torch.inf  # the first rank's whole part
    return logits, torch.randint(6, 12, (2, 6), generator=generator)


def shard_results():
    layout = ParallelLayout.create(ParallelConfig(tensor=2))
    logits, tokens = whole_logits()
    group = layout.groups.tp
    part = logits.chunk(2, dim=-1)[group.rank()].clone().requires_grad_()
    logprobs, statistic = token_logprobs_and_entropy(part, tokens, group, 1.3)
    entropies = entropy(part, group)
    assert_close(statistic, entropy(part / 1.3, group).detach(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logprobs.square().sum() + entropies.square().sum(), part)
    return logprobs.detach(), entropies.detach(), gradient


def test_two_ranks_agree_with_one():
    logits, tokens = whole_logits()
    logits.requires_grad_()
    reference = torch.log_softmax(logits / 1.3, dim=-1)
    logprobs = reference.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    plain = torch.log_softmax(logits, dim=-1)
    entropies = -(plain.exp() * plain.masked_fill(torch.isinf(plain), 0.0)).sum(-1)
    (expected,) = torch.autograd.grad(logprobs.square().sum() + entropies.square().sum(), logits)
    expected = torch.nan_to_num(expected)
    ranks = run_ranks(2, shard_results)
    for values, entropy_values, _ in ranks:
        assert_close(values, logprobs.detach(), rtol=1e-6, atol=1e-6)
        assert_close(entropy_values, entropies.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([rank[2] for rank in ranks], dim=-1)
    assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
