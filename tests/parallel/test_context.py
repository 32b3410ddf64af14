"""Which rank holds which tokens under context parallelism, and how gradients are combined."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.placement import GenerationLayoutConfig
from megatron_rlhf.parallel import context


def there_and_back(sum_gradients):
    group = dist.group.WORLD
    whole = torch.arange(8.0).view(1, 8)
    local = context.split(whole, 1, group).requires_grad_()
    gathered = context.gather(local, 1, group, sum_gradients)
    # Each rank weighs the whole sequence in its own way.
    (gathered * (1 + dist.get_rank()) * torch.arange(8.0)).sum().backward()
    return local.detach().tolist(), gathered.detach().tolist(), local.grad.tolist()


@pytest.mark.parametrize(("sum_gradients", "weights"), [(True, (3, 3)), (False, (1, 2))])
def test_an_early_and_a_late_piece_come_back_in_order(sum_gradients, weights):
    results = run_ranks(2, there_and_back, sum_gradients)
    for (local, gathered, gradient), tokens, weight in zip(results, ([0, 1, 6, 7], [2, 3, 4, 5]), weights, strict=True):
        assert local == [tokens]
        assert gathered == [list(range(8))]
        assert gradient == [[weight * token for token in tokens]]


def test_sequences_are_padded_to_whole_pieces():
    assert ParallelConfig().token_multiple == 1
    assert ParallelConfig(context=2).token_multiple == 4
    assert ParallelConfig(context=2, tensor=4, sequence=True).token_multiple == 16


def test_a_sampling_layout_takes_over_what_it_is_not_told():
    training = ParallelConfig(tensor=2, pipeline=2, last_stage_layers=2)
    assert GenerationLayoutConfig().of(training) is None
    assert GenerationLayoutConfig(tensor=1).of(training) == ParallelConfig(pipeline=2, last_stage_layers=2)
    assert GenerationLayoutConfig(pipeline=1).of(training) == ParallelConfig(tensor=2)
    assert GenerationLayoutConfig().of(ParallelConfig(context=2)) == ParallelConfig()
