"""Seconds of passes, exchanges, updates and decoding, worked by hand on a cluster with round figures."""

import math
from dataclasses import replace

import pytest

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision, Recompute
from megatron_rlhf.planning.placement import PlacedModel
from megatron_rlhf.planning.speed import links
from megatron_rlhf.planning.speed.execution import Execution
from megatron_rlhf.planning.speed.layers import layer
from megatron_rlhf.planning.speed.save import seconds_between_saves, steps_between_saves
from megatron_rlhf.planning.speed.timing import (
    REFILLS,
    Batch,
    bubble,
    decode_passes,
    decode_seconds,
    microbatch_seconds,
    schedule_seconds,
    update_seconds,
)

NO_MEMORY_TRAFFIC = 1e12
"""GB/s."""
CLUSTER = ClusterConfig(
    name="GPU",
    nodes=1,
    gpus_per_node=8,
    memory_gib=80,
    bf16_tflops=100,
    fp32_tflops=10,
    fp8_tflops=200,
    matmul_efficiency=0.5,
    attention_efficiency=0.25,
    memory_gb_per_s=1000,
    memory_efficiency=0.5,
    node_gb_per_s=100,
    network_gb_per_s=10,
    link_efficiency=1.0,
    node_latency_us=0,
    network_latency_us=0,
    layer_launch_us=0,
)
PRODUCTS = replace(CLUSTER, memory_gb_per_s=NO_MEMORY_TRAFFIC)
"""Only FLOPs and exchanges take time."""
MODEL = ModelConfig(num_layers=8, hidden_size=1024, num_attention_heads=16, vocab_size=1024)
LAYER, HEAD = 12 * 1024**2, 1024**2
"""Weights."""


def placed(gpus: int = 8, precision: str = "bf16", **parallel: object) -> PlacedModel:
    return PlacedModel(MODEL, ParallelConfig(**parallel), Precision(precision), gpus)  # type: ignore[arg-type]


def test_seconds_of_a_microbatch_by_hand() -> None:
    tokens, length = 2048, 512
    products = 3 * 2 * tokens * (8 * LAYER + HEAD) / 50e12
    attention = 8 * (2 * tokens * 1024 * length) * 3.5 / 25e12  # half of 4 s h a token, and 2.5 times it backward
    sums = 8 * 4 * 7 / 8 * tokens * 1024 * 2 / 100e9  # forward: two gathers and two sums scattered, or two all-reduces
    seconds = microbatch_seconds(placed(tensor=8), PRODUCTS, Batch(1, tokens, length), backward=True)
    assert seconds == pytest.approx((products + attention) / 8 + sums)


def test_sequence_parallelism_gathers_twice_more_backward() -> None:
    batch = Batch(1, 2048, 512)
    plain, split = (
        microbatch_seconds(placed(tensor=8, sequence=sequence), PRODUCTS, batch, backward=True)
        for sequence in (False, True)
    )
    assert split - plain == pytest.approx(8 * 2 * 7 / 8 * 2048 * 1024 * 2 / 100e9)


def test_recomputation_is_one_more_forward_pass() -> None:
    kept, again = (layer(placed(recompute=Recompute(r)), CLUSTER, 2048, 512) for r in ("none", "full"))
    assert again.forward == kept.forward
    assert again.backward == pytest.approx(kept.backward + kept.forward)


def test_small_products_reach_a_smaller_share_of_the_peak() -> None:
    """[t, h] x [h, 12 h] in all: FLOPs, and its operands through memory; the fewer tokens, the more the weights count."""
    many, few = (layer(placed(), CLUSTER, tokens, 1).forward / tokens for tokens in (8192, 64))
    flops = 2 * LAYER / 50e12
    weights = 2 * LAYER / 500e9 / 64
    assert few > flops + weights
    assert few - many == pytest.approx(weights * (1 - 64 / 8192), rel=1e-6)


def test_a_layer_takes_as_long_as_its_launches() -> None:
    slow = replace(CLUSTER, layer_launch_us=500)
    passes = layer(placed(), slow, 1, 1)
    assert (passes.forward, passes.backward) == pytest.approx((500e-6, 1000e-6))
    busy = layer(placed(), slow, 65536, 512)
    assert busy == layer(placed(), CLUSTER, 65536, 512)


def test_only_products_of_layers_are_in_fp8() -> None:
    batch = Batch(1, 2048, 512)
    bf16, fp8 = (
        microbatch_seconds(placed(precision=p), PRODUCTS, batch, backward=True) for p in ("bf16", "fp8_hybrid")
    )
    assert bf16 - fp8 == pytest.approx(3 * 2 * 2048 * 8 * LAYER * (1 / 50e12 - 1 / 100e12))


def test_an_exchange_is_latency_and_bytes_over_the_slowest_link() -> None:
    slow = replace(CLUSTER, node_latency_us=3, network_latency_us=8)
    inside = links.Group(8, 8)
    assert links.gather(8e9, inside, slow) == pytest.approx(7 / 8 * 8 / 100 + 3 * 3e-6)
    assert links.all_reduce(8e9, inside, slow) == pytest.approx(2 * links.gather(8e9, inside, slow))
    # 32 ranks, two a node: each of the two rings leaves the node over a port of its own.
    spread = links.Group.every(4, 32, slow)
    assert spread == links.Group(32, 2)
    assert links.gather(8e9, spread, slow) == pytest.approx(31 / 32 * 8 / 20 + 5 * 8e-6)
    assert links.gather(8e9, links.Group(1, 1), slow) == 0.0


def test_context_parallelism_gathers_keys_and_values() -> None:
    tokens, length = 4096, 4096
    whole = layer(placed(), PRODUCTS, tokens, length)
    shared = layer(placed(context=2), PRODUCTS, tokens, length)
    size = 2 * tokens * 1024 * 2
    assert shared.forward == pytest.approx(whole.forward / 2 + size / 2 / 100e9)
    assert shared.backward == pytest.approx(whole.backward / 2 + size / 100e9)


def test_bubble_of_a_pipeline() -> None:
    four = placed(pipeline=4)
    assert bubble(four, 12) == pytest.approx(3 / 15)
    assert bubble(four.with_parallel(virtual_stages=2), 12) == pytest.approx(1.5 / 13.5)
    batch = Batch(12, 2048, 1024)
    one = layer(four, PRODUCTS, 2048, 1024).total(True)
    head = 3 * 2 * 2048 * HEAD / 50e12
    messages = 2 * 2048 * 1024 * 2 / 100e9
    # The last stage works twelve times; one microbatch passes through the three stages before it.
    expected = 12 * (2 * one + head + messages) + 3 / 4 * (8 * one + head)
    assert sum(schedule_seconds(four, PRODUCTS, [batch], backward=True)) == pytest.approx(expected)


def test_an_update_sums_gradients_and_gathers_weights() -> None:
    one = placed(distributed_optimizer=True)
    count = one.parameters(0)
    exchanged = 7 / 8 * count * (4 + 2) / 100e9
    touched = count * (4 * 4 + 2 + 24 / 8) / 500e9
    assert update_seconds(one, CLUSTER) == pytest.approx(exchanged + touched)
    hidden = {"overlap_grad_reduce": 4, "overlap_param_gather": 2}
    for off, size in [(None, 0), *hidden.items()]:
        parallel = replace(one.parallel, **({} if off is None else {off: False}))
        as_configured = replace(one, parallel=parallel, execution=Execution.of(parallel))
        seconds = update_seconds(as_configured, CLUSTER, beside=Batch(1, 8192, 512))
        assert seconds == pytest.approx(7 / 8 * count * size / 100e9 + touched)
    plain = replace(one.parallel, distributed_optimizer=False)
    assert not (Execution.of(plain).hides_gradients or Execution.of(plain).hides_weights)


def test_decoding_reads_weights_and_cache_for_every_token() -> None:
    seconds = decode_seconds(placed(), CLUSTER, rows=1, slots=64, prompt=0, passes=100, cached=50, batches=1)
    weights = 2 * (8 * LAYER + HEAD)
    cache = 50 * 2 * 1024 * 8 * 2  # keys and values, 8 layers of 1024, 2 bytes
    products = 2 * (8 * LAYER + HEAD) / 50e12
    # And one token's activations.
    assert seconds == pytest.approx(100 * ((weights + cache) / 500e9 + products), rel=0.003)


def test_waiting_prompts_refill_the_slots_of_finished_sequences() -> None:
    # Enough slots for all: as many passes as the longest response has tokens.
    assert decode_passes(rows=8, slots=8, response=30.0, limit=100) == 100
    # Four times as many rows as slots: three rounds of 30 tokens each before the last sequences begin, and a slot is free
    # for half of the time between two refills of an eighth of them.
    assert decode_passes(rows=32, slots=8, response=30.0, limit=100) == pytest.approx(100 + 3 * 30 * 16 / 15)


def test_decoding_passes_are_those_of_the_scheduler() -> None:
    """Responses of 20 to 100 tokens, one of them of 100 at the end, in slots that the scheduler refills."""
    from collections import deque

    from megatron_rlhf.rollout.scheduler import REFILL_SHARE, Scheduler
    from megatron_rlhf.rollout.sequences import SampledSequence

    assert REFILLS == REFILL_SHARE
    lengths = [20 + 7 * i % 61 for i in range(127)] + [100]
    sequences = [SampledSequence(i, [1], i, None) for i in range(128)]
    scheduler, decodes, reads = Scheduler(deque(sequences), slots=16), 0, 0
    while (step := scheduler.next()) is not None:
        reads, decodes = reads + step.prefill, decodes + (not step.prefill)
        for sequence in step.sequences:
            last = len(sequence.tokens) + 1 == lengths[sequence.index]
            sequence.append(2 if last else 3, -1.0, frozenset([2]), 1, 100)
        scheduler.drop_finished()
    mean = sum(lengths) / 128
    assert decode_passes(128, 16, mean, 100) == pytest.approx(decodes, rel=0.05)
    assert pytest.approx(reads, rel=0.15) == 1 + REFILLS * (128 / 16 - 1)


def test_an_uneven_last_stage_by_hand() -> None:
    uneven = placed(3, pipeline=3, last_stage_layers=2)
    assert [uneven.stage_layers(stage) for stage in range(3)] == [3, 3, 2]
    assert uneven.most_layers == 3
    even = placed(4, pipeline=4)
    weights = even.parameters(1) // 2
    assert uneven.parameters(1) == 3 * weights
    assert even.parameters(3) == uneven.parameters(2)  # two layers, the last norm and the unembedding
    # The first stages are the slowest: three of eight layers, and messages both ways.
    seconds = microbatch_seconds(uneven, CLUSTER, Batch(4, 1000, 100), backward=True)
    messages = 2 * 1000 * 1024 * 2 / 100e9
    assert seconds == pytest.approx(3 * layer(uneven, CLUSTER, 1000, 100).total(True) + messages)


def test_checkpoints_are_as_far_apart_as_young_and_daly_say() -> None:
    # Daly 2006, equation 37: 60 s to save, a failure a day. Young's first order is sqrt(2 x 60 x 86400) = 3220 s.
    assert seconds_between_saves(60, 86400) == pytest.approx(3220 * (1 + 0.0186339 / 3 + 0.000347222 / 9) - 60, abs=1)
    assert seconds_between_saves(1000, 400) == 400  # saving takes longer than the machine lasts
    cluster = replace(CLUSTER, nodes=128, gpu_hours_per_failure=24 * 1024)
    assert steps_between_saves(30, 60, cluster) == 106

    # The closed form is near the best by trial: expected time per second of work, restarts included.
    def cost(interval: float) -> float:
        return 86400 * (math.exp((interval + 60) / 86400) - 1) / interval

    best = min(range(500, 10000, 10), key=cost)
    assert seconds_between_saves(60, 86400) == pytest.approx(best, rel=0.02)
