"""Collectives, arithmetic and memory of one GPU."""

import pytest
import torch
import torch.distributed as dist
from toys import make_role

from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.planning.activations import Shape, training_peak
from megatron_rlhf.planning.placement import PlacedModel
from megatron_rlhf.planning.state import trained_bytes
from megatron_rlhf.trainers.step import TrainedRole

MODEL = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, vocab_size=1024, max_sequence_length=256)
# Large enough that Megatron-Core's and cuBLAS' fixed buffers are negligible.
LARGE = ModelConfig(num_layers=8, hidden_size=2048, num_attention_heads=16, vocab_size=8192, max_sequence_length=1024)


def trained_role(precision: Precision, model: ModelConfig = MODEL, **optimizer) -> TrainedRole:
    settings = {"lr": 1e-3, **optimizer}
    role = make_role(model, ParallelConfig(), precision=precision)
    return TrainedRole.create(role, OptimizerConfig(**settings), precision)


def tokens(rows: int, length: int, vocabulary: int = 1024) -> torch.Tensor:
    drawn = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0), device="cpu")
    return drawn.to(collectives.device())


def text(role: Role, rows: int = 4, length: int = 129, micro_batch_size: int = 4):
    batch = TokenBatch.pack(list(tokens(rows, length, role.model.vocab_size).cpu()), [1] * rows)
    return language_model_microbatches(batch, role, micro_batch_size, "loss")


def test_the_world_is_nccls(world: None) -> None:
    assert dist.get_backend_config() == "cpu:gloo,cuda:nccl"
    total = torch.full((1024,), 3.0, device=collectives.device())
    dist.all_reduce(total)
    assert total.is_cuda
    assert bool((total == 3.0 * dist.get_world_size()).all())


def test_megatron_core_is_not_patched(world: None) -> None:
    """The CPU layer stands in for CUDA only where there is none."""
    from megatron_rlhf.parallel import cpu

    assert cpu.install() is False
    assert not getattr(torch.cuda, "_answered_by_cpu", False)
    assert torch.zeros(1, device="cuda").is_cuda


@pytest.mark.parametrize(("precision", "gap"), [(Precision.bf16, 0.1), (Precision.fp16, 0.02)])
def test_half_precision_is_fp32_up_to_rounding(world: None, precision: Precision, gap: float) -> None:
    exact = make_role(MODEL, precision=Precision.fp32).logprobs(tokens(4, 128), 2)
    half = make_role(MODEL, precision=precision).logprobs(tokens(4, 128), 2)
    assert half.dtype == torch.float32
    assert 0 < float((half - exact).abs().mean()) < gap


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16, Precision.fp16])
def test_a_text_is_learned(world: None, precision: Precision) -> None:
    trained = trained_role(precision)
    losses = [trained.update(text(trained.role), 1e-3).statistics["loss"] for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_memory_is_the_planners(world: None) -> None:
    """State within 5%, the peak of an update within 15%."""
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    trained = trained_role(Precision.bf16, LARGE)
    trained.update(text(trained.role, length=1025), 1e-4)
    placed = PlacedModel(LARGE, ParallelConfig(), Precision.bf16, 1)
    state = sum(trained_bytes(placed, 0).values())
    held = torch.cuda.memory_allocated()
    assert held - start == pytest.approx(state, rel=0.05)
    torch.cuda.reset_peak_memory_stats()
    trained.update(text(trained.role, length=1025), 1e-4)
    passing = sum(training_peak(placed, 0, Shape(4, 1024), 1).values())
    # Transformer Engine's fused layers save less than ours: the plan is an upper bound, not twice too high.
    assert 0.5 * passing < torch.cuda.max_memory_allocated() - held < 1.15 * passing
