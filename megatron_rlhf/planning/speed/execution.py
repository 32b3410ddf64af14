"""How a program executes a layout: which exchanges wait for nothing, which kernels it has. What the layout leaves open."""

from dataclasses import dataclass

from megatron_rlhf.config.model import ParallelConfig


@dataclass(frozen=True)
class Execution:
    """What is hidden behind computation, and how attention and gradients are stored. The defaults are Megatron-Core's
    without options."""

    fused_attention: bool = True
    """Scores stay on the chip; without it they are written, masked and read as matrices (Megatron-LM before 2023)."""
    hides_tensor: bool = False
    """Tensor parallelism's exchanges run in pieces beside the matrix products: all but the first piece is hidden."""
    hides_pipeline: bool = False
    """Messages between stages are sent while the next chunk computes."""
    hides_gradients: bool = False
    """They are reduced over data parallelism during the last backward pass."""
    hides_weights: bool = False
    """Updated ones are gathered during the next forward pass."""
    scatters_messages: bool = False
    """Tensor-parallel ranks send a part each to the next stage even without sequence parallelism."""
    gradient_bytes: int = 4
    """Bytes of a gradient that is reduced over data parallelism."""
    weight_bytes: int | None = None
    """Bytes of a weight that is gathered afterwards; None: as it is kept."""
    recomputed_share: float = 1.0
    """recompute=full: share of the layers that are recomputed."""

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Execution":
        """How this project executes a layout: the interleaved schedule sends beside its work, the distributed optimizer as it
        is configured."""
        return cls(
            hides_pipeline=parallel.virtual_stages > 1,
            hides_gradients=parallel.distributed_optimizer and parallel.overlap_grad_reduce,
            hides_weights=parallel.distributed_optimizer and parallel.overlap_param_gather,
        )
