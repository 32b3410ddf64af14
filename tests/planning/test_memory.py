"""The planner's bytes against what real roles allocate on a CPU: state within 5%, activations within 15%."""

import pytest
import torch
from measuring import (
    allocated_peak,
    layout,
    measure_kept,
    measure_saved,
    measure_state,
    text_batch,
    trained_role,
)
from ranks import run_ranks

from megatron_rlhf.config.data import PromptDataConfig
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, ParallelConfig, Positions, Precision
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.config.stages.ppo import PPOAlgorithmConfig
from megatron_rlhf.config.training import RunConfig, SamplingConfig
from megatron_rlhf.planning.activations import Shape, cache_bytes, layer_saved, training_peak
from megatron_rlhf.planning.parameters import total_parameters
from megatron_rlhf.planning.placement import FP32, PlacedModel
from megatron_rlhf.planning.state import frozen_bytes, trained_bytes

GPT = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=500, max_sequence_length=128)
LLAMA = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=160,
    vocab_size=500,
    max_sequence_length=128,
    positions=Positions.rope,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    linear_bias=False,
    tied_embeddings=False,
)
STATE = [
    (1, GPT, layout(), "fp32"),
    (1, LLAMA, layout(), "bf16"),
    (2, GPT, layout(tensor=2, sequence=True), "bf16"),
    (2, LLAMA, layout(pipeline=2), "fp32"),
    (2, GPT, layout(distributed_optimizer=True), "bf16"),
    (2, GPT, layout(pipeline=2, last_stage_layers=1), "bf16"),
    (4, GPT, layout(tensor=2, pipeline=2), "fp32"),
    (4, LLAMA, layout(pipeline=2, distributed_optimizer=True), "bf16"),
]
SAVED = [
    (2, GPT, layout(tensor=2), "fp32", 1),
    (2, LLAMA, layout(tensor=2, sequence=True), "fp32", 1),
    (2, GPT, layout(pipeline=2), "fp32", 4),
    (2, GPT, layout(pipeline=2, last_stage_layers=1), "fp32", 4),
    (2, GPT, layout(pipeline=2, virtual_stages=2), "fp32", 4),
    (2, GPT, layout(pipeline=2, recompute="full"), "fp32", 4),
]
ALLOCATED = [
    (GPT, layout(), "fp32", 0.0),
    (GPT, layout(), "fp32", 0.2),
    (GPT, layout(recompute="full"), "bf16", 0.0),
    (LLAMA, layout(), "bf16", 0.0),
]


def name(value: object) -> str | None:
    if isinstance(value, ParallelConfig):
        flags = [f for f in ("sequence", "distributed_optimizer") if getattr(value, f)]
        return "-".join([f"t{value.tensor}p{value.pipeline}v{value.virtual_stages}", value.recompute.value, *flags])
    if isinstance(value, ModelConfig):
        return "gpt" if value is GPT else "llama"
    return None


@pytest.mark.parametrize(("ranks", "model", "parallel", "precision"), STATE, ids=name)
def test_state_is_what_real_ranks_hold(
    ranks: int, model: ModelConfig, parallel: ParallelConfig, precision: str
) -> None:
    placed = PlacedModel(model, parallel, Precision(precision), ranks)
    for rank, real in enumerate(run_ranks(ranks, measure_state, model, parallel, precision, timeout=120)):
        planned = trained_bytes(placed, placed.stage_of(rank), average=True)
        assert planned == pytest.approx(real, rel=0.05), f"rank {rank}"


def test_the_copy_of_a_gradient_is_one_more_gradient_buffer() -> None:
    parallel = layout(pipeline=2)
    placed = PlacedModel(GPT, parallel, Precision.bf16, 2)
    for rank, real in enumerate(run_ranks(2, measure_kept, GPT, parallel, "bf16")):
        planned = trained_bytes(placed, placed.stage_of(rank))["gradients"]
        assert planned == pytest.approx(real, rel=0.05), f"rank {rank}"


@pytest.mark.parametrize(("ranks", "model", "parallel", "precision", "count"), SAVED, ids=name)
def test_activations_are_what_autograd_saves(
    ranks: int, model: ModelConfig, parallel: ParallelConfig, precision: str, count: int
) -> None:
    placed = PlacedModel(model, parallel, Precision(precision), ranks)
    for rank, real in enumerate(run_ranks(ranks, measure_saved, model, parallel, precision, count, timeout=120)):
        stage = placed.stage_of(rank)
        planned = training_peak(placed, stage, Shape(2, 128), count)["activations"]
        if placed.recomputes:
            planned += (
                layer_saved(placed, Shape(2, 128)) - 2 * 128 * 64 * FP32
            )  # the recomputed layer; its input is kept
        elif stage == parallel.pipeline - 1:
            planned += 2 * 127 * 500 / parallel.tensor * placed.element  # of everything for the loss, only the logits
        assert planned == pytest.approx(real, rel=0.15), f"rank {rank}"


@pytest.mark.parametrize(("model", "parallel", "precision", "dropout"), ALLOCATED, ids=name)
def test_peak_of_an_update_is_what_the_allocator_saw(
    world: None, model: ModelConfig, parallel: ParallelConfig, precision: str, dropout: float
) -> None:
    trained = trained_role(model, parallel, precision, dropout=dropout)
    trained.update(text_batch(trained, 4, 128, 4), 1e-4)  # the optimizer's state is made at the first update
    batch = text_batch(trained, 4, 128, 4)
    real = allocated_peak(lambda: trained.update(batch, 1e-4))
    placed = PlacedModel(model, parallel, Precision(precision), 1)
    planned = training_peak(placed, 0, Shape(4, 128), 1, dropout)
    assert sum(planned.values()) == pytest.approx(real, rel=0.15)


def test_peak_of_a_policy_update_is_what_the_allocator_saw(world: None) -> None:
    from megatron_rlhf.rollout.types import Completion, Experience, Responses, Rollout
    from megatron_rlhf.trainers.ppo import policy_microbatches

    trained = trained_role(GPT, layout())
    packed = Responses.pack([[1] * 64] * 4, [Completion([2] * 64, [-1.0] * 64, True)] * 4, 0, torch.device("cpu"))
    table = torch.zeros(4, 64)
    experience = Experience.of(
        Rollout(packed, table, table, table, table, torch.zeros(4), torch.arange(4)), table, table
    )
    config = PPOConfig(
        run=RunConfig(dir="-"),
        data=PromptDataConfig(tokenizer="-", prompts="-"),
        rollout=SamplingConfig(),
        ppo=PPOAlgorithmConfig(micro_batch_size=4),
    )
    batch = policy_microbatches(experience, trained, config)
    trained.update(batch, 1e-4)
    real = allocated_peak(lambda: trained.update(batch, 1e-4))
    planned = training_peak(PlacedModel(GPT, layout(), Precision.fp32, 1), 0, Shape(4, 128, wanted=0.5), 1)
    assert sum(planned.values()) == pytest.approx(real, rel=0.15)


def test_cache_is_what_decoding_allocates() -> None:
    from megatron_rlhf.models.layers.cache import KeyValueCache

    cache = KeyValueCache(slots=3, capacity=24)
    cache.prefill(torch.zeros(3, 8), rows=torch.arange(3))
    for layer in range(4):
        cache.append(layer, torch.zeros(8, 3, 2, 16), torch.zeros(8, 3, 2, 16))
    real = sum(x.untyped_storage().nbytes() for pair in cache.layers.values() for x in pair)
    placed = PlacedModel(LLAMA, layout(), Precision.fp32, 1)
    assert cache_bytes(placed, 0, 3, 24) == real


def test_parameters_of_the_published_shapes() -> None:
    def count(layers: int, hidden: int, heads: int, **shape: object) -> float:
        return total_parameters(
            ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, **shape)  # type: ignore[arg-type]
        )

    assert count(12, 768, 12, vocab_size=50257, max_sequence_length=1024) == 124_439_808  # GPT-2
    assert count(96, 12288, 96, vocab_size=50257) == 174_604_259_328
    llama = {
        "positions": Positions.rope,
        "norm": Norm.rmsnorm,
        "activation": Activation.swiglu,
        "linear_bias": False,
        "tied_embeddings": False,
    }
    assert count(32, 4096, 32, vocab_size=32000, ffn_hidden_size=11008, **llama) == 6_738_415_616  # Llama 2 7B
    assert (
        count(32, 4096, 32, vocab_size=128256, ffn_hidden_size=14336, num_query_groups=8, **llama) == 8_030_261_248
    )  # Llama 3 8B


def test_mixed_precision_state_by_hand() -> None:
    placed = PlacedModel(GPT, layout(distributed_optimizer=True), Precision.bf16, 4)
    count = placed.parameters(0)
    assert trained_bytes(placed, 0, average=True) == {
        "weights": 2 * count,
        "gradients": 4 * count,
        "optimizer": 12 * count / 4,
        "ema": 4 * count / 4,
    }
    assert frozen_bytes(placed, 0) == {"weights": 2 * count}
