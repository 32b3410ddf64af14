import pytest
import torch
from torch.autograd import gradcheck

from megatron_rlhf.algorithms.masking import masked_mean, masked_sum, masked_var, response_mask, whiten

NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_sum_and_mean_for_every_kind_of_mask(dtype):
    mask = MASK.to(dtype)
    assert masked_sum(VALUES, mask).item() == 9.0
    assert masked_mean(VALUES, mask).item() == 3.0
    assert masked_mean(VALUES, mask, dim=1).tolist() == [1.5, 6.0]
    assert masked_mean(VALUES, mask, dim=0).tolist() == [3.5, 2.0, 0.0]  # nothing in the last column


def test_variance_by_hand():
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14.
    assert masked_var(VALUES, MASK).item() == 7.0
    assert masked_var(VALUES, MASK, unbiased=False).item() == pytest.approx(14 / 3, rel=1e-15)


@pytest.mark.parametrize("unbiased", [True, False])
def test_variance_of_one_token_is_zero(unbiased):
    assert masked_var(VALUES, torch.tensor([[0, 0, 0], [1, 0, 0]]), unbiased).item() == 0.0


def test_whiten_by_hand():
    # Deviations -2, -1, 3 over sqrt(7).
    root = 7**0.5
    expected = torch.tensor([[-2 / root, -1 / root, 0], [3 / root, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(VALUES, MASK, eps=0.0), expected)
    torch.testing.assert_close(whiten(VALUES, MASK, shift_mean=False, eps=0.0), expected + 3 * MASK)
    # eps is added to the variance: 7 + 2 = 3^2.
    expected = torch.tensor([[-2 / 3, -1 / 3, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(VALUES, MASK, eps=2.0), expected)


def test_whitened_tokens_have_mean_0_and_variance_1():
    generator = torch.Generator().manual_seed(0)
    values = 5 + 3 * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    whitened = whiten(values, mask)
    assert abs(whitened[mask].mean().item()) < 1e-14
    assert whitened[mask].var().item() == pytest.approx(1, abs=1e-8)  # var / (var + eps)
    assert whitened[~mask].eq(0).all()


def test_whitening_a_constant_is_finite():
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).eq(0).all()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, whiten])
def test_empty_mask_gives_zero_with_gradient_zero(function):
    values = VALUES.clone().requires_grad_()
    result = function(values, torch.zeros_like(MASK))
    result.sum().backward()
    assert result.eq(0).all()
    assert values.grad.eq(0).all()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, whiten])
def test_gradient_is_right_and_masked_garbage_does_not_reach_it(function):
    clean = torch.where(MASK.bool(), VALUES, 0).requires_grad_()
    assert gradcheck(function, (clean, MASK))

    dirty = VALUES.clone().requires_grad_()
    weights = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 11.0]], dtype=torch.float64)
    for values in (clean, dirty):
        (weights * function(values, MASK)).sum().backward()
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[MASK == 0].eq(0).all()


def test_response_mask_keeps_the_first_stop_token():
    tokens = torch.tensor([[5, 9, 5, 9], [9, 9, 9, 9], [5, 6, 7, 5], [5, 5, 5, 8]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert response_mask(tokens, [9, 8]).tolist() == expected
    assert response_mask(tokens, []).all()


def test_shapes_must_be_equal():
    with pytest.raises(AssertionError, match=r"'values': \(2, 3\), 'mask': \(1, 3\)"):
        masked_mean(VALUES, MASK[:1])
