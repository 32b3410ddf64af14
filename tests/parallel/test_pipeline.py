"""One schedule for microbatches of several lengths: losses and every gradient the same at every layout."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from ranks import run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, assemble, assert_close, gradient_blocks, make_role, train, weight_blocks

from megatron_rlhf.config.model import ParallelConfig, Recompute
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import Microbatch, forward_backward
from megatron_rlhf.parallel.vocab import token_logprobs

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
LENGTHS = [5, 12, 7, 12, 3, 9]  # tokens that count, one sequence per microbatch
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(),
    "pp2_virtual2": ParallelConfig(pipeline=2, virtual_stages=2),
    "cp2": ParallelConfig(context=2),
    "tp2_sp_pp2": ParallelConfig(tensor=2, sequence=True, pipeline=2),
    "pp4": ParallelConfig(pipeline=4),
    "tp2_recompute": ParallelConfig(tensor=2, sequence=True, recompute=Recompute.full),
    "selective": ParallelConfig(recompute=Recompute.selective),
}
RANKS = {"tp2_sp_pp2": 4, "pp4": 4, "selective": 1}


def microbatch(index, role, total):
    length = LENGTHS[index]
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, 67, (1, length), generator=generator)
    padded = torch.nn.functional.pad(tokens, (0, role.pad_length(length) - length))

    def loss_of(logits):
        logprobs = token_logprobs(logits[:, : length - 1], tokens[:, 1:], role.layout.groups.tp)
        loss = -logprobs.sum() / total
        return loss, {"loss": loss.detach(), f"loss_{index}": loss.detach(), "length_max": torch.tensor(float(length))}

    return Microbatch(padded, loss_of)


def losses_and_gradients(model, parallel, count):
    role = make_role(MODELS[model], parallel)
    trained = train(role)
    mine = range(role.layout.dp_rank, count, role.layout.dp_size)
    total = sum(LENGTHS[i] - 1 for i in range(count))
    batches = [microbatch(i, role, total) for i in mine]
    blocks = gradient_blocks(trained, batches)
    with role.evaluating():
        statistics = forward_backward(role.chunks, batches, role.layout, forward_only=True)
    if role.layout.is_last_stage:
        assert [s[f"loss_{i}"] for i, s in zip(mine, statistics, strict=True)], "in order, without filling"
    total_loss = collectives.reduce_statistics(
        [{k: s[k] for k in ("loss", "length_max")} for s in statistics], role.layout
    )
    return blocks, total_loss


@pytest.fixture(scope="module")
def one_rank():
    """Losses and gradients by plain autograd: no schedule, no wrapper, one sequence after the other."""
    cache = {}

    def result(model, count):
        if (model, count) not in cache:
            cache[model, count] = run_ranks(1, plain_autograd, model, count)[0]
        return cache[model, count]

    return result


def plain_autograd(model, count):
    role = make_role(MODELS[model])
    (chunk,) = role.modules
    total, losses = sum(LENGTHS[i] - 1 for i in range(count)), 0.0
    with role.layout:
        for index in range(count):
            batch = microbatch(index, role, total)
            positions = torch.arange(batch.tokens_bs.shape[1]).unsqueeze(0)
            loss, _ = batch.loss(chunk(batch.tokens_bs, positions, None))
            loss.backward()
            losses += float(loss)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.grad)
    return assemble([weight_blocks(role)], vocab_size=67), losses


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_equal_plain_autograd(layout, model, one_rank):
    expected, loss = one_rank(model, len(LENGTHS))
    results = run_ranks(RANKS.get(layout, 2), losses_and_gradients, model, LAYOUTS[layout], len(LENGTHS))
    for _, statistics in results:
        assert statistics["loss"] == pytest.approx(loss, rel=1e-6), "on every rank"
        assert statistics["length_max"] == 12.0, "by maximum, not by sum"
    # fp32 sums in another order, over tensors whose largest entry is about 10^3 times the typical rounding error.
    assert_close(assemble([blocks for blocks, _ in results], vocab_size=67), expected, relative=5e-6)


def test_virtual_stages_take_a_number_of_microbatches_that_does_not_fill_the_pipeline(one_rank):
    expected, loss = one_rank("gpt2", 5)
    results = run_ranks(2, losses_and_gradients, "gpt2", LAYOUTS["pp2_virtual2"], 5)
    assert all(statistics["loss"] == pytest.approx(loss, rel=1e-6) for _, statistics in results)
    assert_close(assemble([blocks for blocks, _ in results], vocab_size=67), expected, relative=5e-6)


def ticks(parallel):
    """How often this rank's chunk ran forward, and how many messages it sent, for 6 microbatches in one schedule."""
    role = make_role(GPT2_LIKE, parallel)
    trained = train(role)
    calls = []
    role.modules[0].register_forward_hook(lambda *_: calls.append(dist.get_rank()))
    gradient_blocks(trained, [microbatch(i, role, 1.0) for i in range(6)])
    return len(calls)


def test_each_microbatch_passes_each_stage_once():
    assert run_ranks(2, ticks, ParallelConfig(pipeline=2)) == [6, 6]


def gradients_while_freed_memory_is_overwritten(parallel, times):
    """Schedules free a stage's output once it is sent; here it is overwritten with NaN first."""
    free = schedules.deallocate_output_tensor

    def overwrite_and_free(output, deallocate=False):
        if deallocate and isinstance(output, torch.Tensor):  # 0.19 calls this again for each tensor of a list
            with torch.no_grad():
                output.detach().fill_(torch.nan)
        free(output, deallocate)

    schedules.deallocate_output_tensor = overwrite_and_free
    trained = train(make_role(GPT2_LIKE, parallel))
    runs = [gradient_blocks(trained, [microbatch(i, trained.role, 1.0) for i in range(6)]) for _ in range(times)]
    return [all(np.isfinite(block.values).all() for block in blocks) for blocks in runs]


@pytest.mark.parametrize("layout", ["pp2", "pp2_virtual2", "pp4"])
def test_nothing_is_freed_while_it_is_sent(layout):
    """Interleaved over gloo, one update in ten read freed memory: the wrong numbers would go unnoticed."""
    times = 30 if layout == "pp2_virtual2" else 3
    finite = run_ranks(RANKS.get(layout, 2), gradients_while_freed_memory_is_overwritten, LAYOUTS[layout], times)
    assert all(all(rank) for rank in finite)


def rows_of_ranks(count):
    role = make_role(GPT2_LIKE)
    layout = role.layout
    rows = torch.zeros(count)
    for i in range(layout.dp_rank, count, layout.dp_size):
        rows[i] = i + 1.0
    total = collectives.sum_over(layout.dp_rank + 1, layout.groups.dp)
    return (
        collectives.gather_over_data(f"of {layout.dp_rank}", layout),
        collectives.share_rows(rows, layout).tolist(),
        float(total),
    )


@pytest.mark.parametrize("count", [1, 4, 5])
def test_rows_dealt_out_come_back(count):
    expected = ["of 0", "of 1", "of 2"], [i + 1.0 for i in range(count)], 6.0
    assert run_ranks(3, rows_of_ranks, count) == [expected] * 3
