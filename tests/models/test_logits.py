"""Logits in parts of the vocabulary: values and gradients against autograd over all logits, and at every layout."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, assemble, gradient_blocks, make_role, train
from toys import assert_close as assert_arrays_close

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.models import logits as module
from megatron_rlhf.models.logits import Logits
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@contextlib.contextmanager
def at_once(count):
    before, module.AT_ONCE = module.AT_ONCE, {"cpu": count}
    try:
        yield
    finally:
        module.AT_ONCE = before


def inputs(dtype=torch.float64, rows=5, hidden=4, vocabulary=11):
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    weight = (2 * torch.randn(vocabulary, hidden, dtype=dtype)).requires_grad_()
    barred = torch.zeros(vocabulary, dtype=torch.bool)
    barred[[3, vocabulary - 1]] = True
    return states, weight, barred, torch.tensor([0, 10 - 1, 4, 4, 7])


def by_autograd(states, weight, barred, tokens, temperature):
    whole = (states @ weight.T).masked_fill(barred, -torch.inf).div(temperature).log_softmax(-1)
    entropy = -(whole.exp() * whole.masked_fill(barred, 0.0)).sum(-1)
    return whole.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("columns", [1, 3, 4, 100])
def test_values_and_gradients_are_those_of_all_logits(columns, temperature):
    states, weight, barred, tokens = inputs()
    expected = by_autograd(states, weight, barred, tokens, temperature)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64), torch.tensor([0.3, -1.0, 2.0, 0.1, 0.5], dtype=torch.float64)
    with at_once(columns * len(states)):
        made = Logits(states, weight, barred, ALONE, ALONE)
        found = made.logprobs_and_entropy(tokens, temperature, differentiable=True)
        gradients = torch.autograd.grad(
            sum((w * x).sum() for w, x in zip(weights, found, strict=True)), (states, weight)
        )
        alone = torch.autograd.grad((weights[0] * made.logprobs(tokens, temperature)).sum(), (states, weight))
        statistic = made.logprobs_and_entropy(tokens, temperature)[1]
    total = sum((w * x).sum() for w, x in zip(weights, expected, strict=True))
    assert_close(found, expected)
    assert_close(gradients, torch.autograd.grad(total, (states, weight), retain_graph=True))
    assert_close(alone, torch.autograd.grad((weights[0] * expected[0]).sum(), (states, weight)))
    assert_close(statistic.detach(), expected[1].detach())
    assert not statistic.requires_grad
    assert columns > 11 or "_InParts" in type(found[0].grad_fn).__name__


def test_huge_logits_stay_finite():
    states, weight, barred, tokens = inputs(torch.float32)
    with torch.no_grad(), at_once(10):
        logprobs = Logits(states * 1e4, weight, barred, ALONE, ALONE).logprobs(tokens)
    expected, _ = by_autograd(states.double() * 1e4, weight.double(), barred, tokens, 1.0)
    assert_close(logprobs.double(), expected.detach(), rtol=1e-5, atol=0.05)


def test_the_likeliest_token():
    states, weight, barred, _ = inputs()
    best = (states @ weight.T).masked_fill(barred, -torch.inf).argmax(-1)
    with at_once(10):
        made = Logits(states, weight, barred, ALONE, ALONE)
        assert made.is_likeliest(best).all()
        assert not made.is_likeliest((best + 1) % 11).any()


def test_frozen_weights_get_no_gradient():
    states, weight, barred, tokens = inputs()
    with at_once(10):
        Logits(states, weight.detach(), barred, ALONE, ALONE).logprobs(tokens).sum().backward()
    assert states.grad is not None


def step(model, parallel, columns):
    """Loss and gradients of a batch, and log-probabilities as they are scored."""
    torch.manual_seed(1)
    sequences = [torch.randint(67, (n,)).tolist() for n in (20, 12, 16, 9)]
    with at_once(columns) if columns else contextlib.nullcontext():
        trained = train(make_role(model, parallel))
        batch = TokenBatch.pack(sequences, (3, 5, 1, 4))
        microbatches = language_model_microbatches(batch, trained.role, 2, "loss")
        blocks = gradient_blocks(trained, microbatches)
        choices = trained.role.logprobs_and_choices(batch.sequences, 2)
        return trained.update(microbatches, 0.0).statistics["loss"], choices, blocks


LAYOUTS = {
    "one_rank": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2_sp_pp2": (4, ParallelConfig(tensor=2, sequence=True, pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [GPT2_LIKE, LLAMA_LIKE], ids=["tied", "untied"])
def test_a_batch_in_parts_at_every_layout(model, layout, world):
    """Seven columns at a time for 32 tokens or so; 67 rows do not divide by two, so some are padding."""
    loss, (logprobs, chosen), blocks = step(model, None, None)
    ranks, parallel = LAYOUTS[layout]
    results = run_ranks(ranks, step, model, parallel, 7 * 32)
    for found_loss, (found, likeliest), _ in results:
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_close(found, logprobs, rtol=1e-5, atol=2e-5)
        assert torch.equal(likeliest, chosen)
    arrays = assemble([result[2] for result in results], 67)
    assert_arrays_close(arrays, assemble([blocks], 67), relative=2e-5)
