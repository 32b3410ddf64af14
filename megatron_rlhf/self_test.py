"""What each rank of the doctor's self-test does."""

import torch
import torch.distributed as dist

from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives, runtime
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.trainers.step import TrainedRole


def main() -> None:
    """Collectives, then one update of a small model."""
    rank, size = runtime.initialize().rank, dist.get_world_size()
    total = torch.full((1024,), float(rank + 1), device=collectives.device())
    dist.all_reduce(total)
    if not bool((total == size * (size + 1) / 2).all()):
        raise RuntimeError(f"Error: the sum over {size} ranks is {float(total[0])}")
    parts = [torch.empty_like(total) for _ in range(size)]
    dist.all_gather(parts, torch.full_like(total, float(rank)))
    if [int(part[0]) for part in parts] != list(range(size)):
        raise RuntimeError("Error: all_gather mixed up the ranks")
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=8, vocab_size=128, max_sequence_length=32)
    layout = ParallelLayout.create(ParallelConfig(tensor=2 if size % 2 == 0 else 1))
    layout.seed(1234)
    precision = Precision.bf16 if torch.cuda.is_available() else Precision.fp32
    trained = TrainedRole.create(Role.build("policy", model, layout, precision), OptimizerConfig(), precision)
    tokens = torch.arange(64, device=collectives.device()).reshape(2, 32)

    def loss_of(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = logits.float().square().mean()
        return loss, {"loss": loss.detach()}

    update = trained.update([Microbatch(tokens, loss_of)], 1e-4)
    if update.skipped:
        raise RuntimeError(f"Error: gradient norm {update.grad_norm}")
    runtime.shutdown()


if __name__ == "__main__":
    main()
