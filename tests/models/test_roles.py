"""Scalar heads, padded vocabularies, parameter counts, and what evaluation changes and restores."""

import dataclasses

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from ranks import run_ranks
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.packing import Sequences
from megatron_rlhf.parallel.vocab import PADDED_LOGIT


def tokens(rows=3, length=9):
    return torch.randint(0, 67, (rows, length), generator=torch.Generator().manual_seed(rows))


def fresh_head(parallel, hidden):
    """Weight and bias of a newly built scalar head; None on ranks without it."""
    layout = ParallelLayout.create(parallel)
    with layout:
        model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    model = dataclasses.replace(GPT2_LIKE, hidden_size=hidden, num_layers=2)
    role = Role.build("reward", model, layout, Precision.fp32, scalar=True)
    (chunk,) = role.modules
    return (chunk.output_layer.weight.detach(), chunk.output_layer.bias.detach()) if chunk.post_process else None


def test_scalar_head_starts_with_variance_one_over_width_plus_one(world):
    weight, bias = fresh_head(ParallelConfig(), 4096)
    assert weight.shape == (1, 4096)
    # The variance of 4096 normal numbers is within 9% of the true one, 4 standard errors.
    assert float(weight.var()) == pytest.approx(1 / 4097, rel=0.09)
    assert abs(float(weight.mean())) < 4 / 4096
    assert bias.tolist() == [0.0]


def test_tensor_parallel_ranks_start_with_one_head_on_the_last_stage():
    first_stage, other_first, (weight, bias), (other_weight, other_bias) = run_ranks(
        4, fresh_head, ParallelConfig(tensor=2, pipeline=2), 32
    )
    assert first_stage is None
    assert other_first is None
    assert_close(weight, other_weight, rtol=0, atol=0)
    assert_close(bias, other_bias)


def values_at(parallel, dtype=Precision.fp32):
    role = make_role(GPT2_LIKE, parallel, "value", scalar=True, precision=dtype)
    return role.values(tokens(5), micro_batch_size=2)


def test_a_value_is_read_at_its_own_token_and_knows_no_later_one(world):
    role = make_role(GPT2_LIKE, name="value", scalar=True)
    (chunk,) = role.modules
    before = tokens()
    after = before.clone()
    after[:, 6:] = (after[:, 6:] + 1) % 67
    values, changed = role.values(before, 2), role.values(after, 2)
    assert values.shape == (3, 9)
    assert values.dtype is torch.float32
    assert_close(values[:, :6], changed[:, :6], rtol=0, atol=1e-6)
    assert (values[:, 6:] - changed[:, 6:]).abs().min() > 1e-4
    with torch.no_grad():
        chunk.output_layer.bias += 3.0
    assert_close(role.values(before, 2), values + 3.0)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(),
    ],
)
def test_values_at_every_layout(parallel):
    (expected,) = run_ranks(1, values_at, ParallelConfig())
    for result in run_ranks(2, values_at, parallel):
        assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_values_are_fp32_in_half_precision(world):
    values = values_at(ParallelConfig(), Precision.bf16)
    assert values.dtype is torch.float32
    assert_close(values, values_at(ParallelConfig()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shared", [None, [4, 4, 4]], ids=["own prompts", "one prompt"])
def test_a_score_is_the_value_at_the_last_token(shared, world):
    """One text ends with its prompt."""
    role = make_role(LLAMA_LIKE, name="reward", scalar=True)
    texts, lengths = tokens(), [9, 6, 4]
    texts[:, :4] = texts[0, :4]
    asked = Sequences(texts, lengths, None, shared, shared and [0, 0, 0])
    assert asked.at_ends().wanted_ns.nonzero().tolist() == [[0, 8], [1, 5], [2, 3]]
    alone = [role.values(texts[[i], :n], 1)[0, -1] for i, n in enumerate(lengths)]
    assert_close(role.scores(asked, 3), torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_language_model_has_no_values(world):
    with pytest.raises(AssertionError, match="policy has no scalar head"):
        make_role(GPT2_LIKE).values(tokens(), 2)


def test_padded_vocabulary_entries_get_a_logit_without_probability(world):
    model = dataclasses.replace(GPT2_LIKE, vocab_multiple=64)
    assert model.padded_vocab_size(1) == 128
    assert model.padded_vocab_size(4) == 256
    role = make_role(model)
    with role.layout, role.evaluating():
        logits = role.modules[0](tokens(), torch.arange(9).expand(3, -1), None)
    assert logits.shape == (3, 9, 128)
    assert (logits[..., 67:] == PADDED_LOGIT).all()
    assert float(logits[..., 67:].softmax(-1).amax()) < 1
    assert_close(logits.softmax(-1)[..., :67].sum(-1), torch.ones(3, 9))
    assert float(logits.softmax(-1)[..., 67:].max()) == 0.0


def count(model, parallel, scalar):
    return make_role(model, parallel, scalar=scalar).num_parameters


H, LAYERS = 32, 4
GPT2_BODY = 48 * H + LAYERS * (12 * H * H + 13 * H) + 2 * H
LLAMA_BODY = LAYERS * ((32 + 2 * 16) * H + H * H + 3 * 48 * H + 2 * H) + H


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(tensor=2, sequence=True)),
        (2, ParallelConfig(pipeline=2, virtual_stages=2)),
        (4, ParallelConfig(tensor=2, pipeline=2)),
        (2, ParallelConfig()),
    ],
)
def test_parameters_are_counted_once_at_every_layout_and_padding_never(ranks, parallel):
    for model, scalar, expected in (
        (GPT2_LIKE, False, 67 * H + GPT2_BODY),
        (GPT2_LIKE, True, 67 * H + GPT2_BODY + H + 1),
        (LLAMA_LIKE, False, 2 * 67 * H + LLAMA_BODY),
    ):
        assert run_ranks(ranks, count, model, parallel, scalar) == [expected] * ranks


def test_evaluating_switches_dropout_and_gradients_off_and_back(world):
    role = make_role(GPT2_LIKE, dropout=0.5)
    (chunk,) = role.modules
    chunk.train()
    first, second = role.logprobs(tokens(), 2), role.logprobs(tokens(), 2)
    assert_close(first, second, rtol=0, atol=0)
    assert chunk.training
    assert torch.is_grad_enabled()
    with role.evaluating(decoding=True):
        assert not chunk.training
    assert chunk.training
    with pytest.raises(ZeroDivisionError), role.evaluating(decoding=True):
        raise ZeroDivisionError
    assert chunk.training


def test_a_frozen_role_has_no_gradients(world):
    role = make_role(GPT2_LIKE, dropout=0.5).frozen()
    assert not any(p.requires_grad for p in role.modules[0].parameters())
    assert not role.modules[0].training


def test_temperature_divides_the_logits(world):
    role = make_role(GPT2_LIKE)
    with role.layout, role.evaluating():
        logits = role.modules[0](tokens(), torch.arange(9).expand(3, -1), None)
    expected = (logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, tokens()[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert_close(role.logprobs(tokens(), 2, temperature=0.5), expected, rtol=1e-5, atol=1e-5)


def test_a_text_as_long_as_the_context_and_one_token_to_predict(world):
    """The last token is only predicted, never read: 49 tokens fit a context of 48."""
    for model in (GPT2_LIKE, LLAMA_LIKE):
        long = tokens(2, 49)
        logprobs = make_role(model).logprobs(long, 2)
        assert logprobs.shape == (2, 48)
        assert_close(logprobs[:, :47], make_role(model).logprobs(long[:, :48], 2), rtol=1e-5, atol=1e-5)
