"""A model in its layout on a number of GPUs: the basis for memory and time estimates."""

from dataclasses import dataclass, field, replace

from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision, Recompute
from megatron_rlhf.planning import parameters
from megatron_rlhf.planning.speed.execution import Execution

FP32 = 4
GIB = 2**30


def element_bytes(precision: Precision) -> int:
    """Bytes of a weight or an activation; fp8 keeps both in bf16."""
    return FP32 if precision is Precision.fp32 else 2


@dataclass(frozen=True)
class PlacedModel:
    """One model over `gpus` ranks from `first` on, tensor x context x data x pipeline (neighbours first)."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: Precision
    gpus: int
    scalar: bool = False
    first: int = 0
    execution: Execution = field(default_factory=Execution)
    adapter: Adapter | None = None
    """Its adapters; with any, they and a scalar head are all that trains."""
    trainable: tuple[str, ...] = ()
    """Patterns of the weights that train; all, if there are none."""

    @property
    def ranks(self) -> range:
        """Ranks that hold a part of it."""
        return range(self.first, self.first + self.gpus)

    @property
    def data(self) -> int:
        """Data-parallel copies."""
        return self.gpus // self.parallel.model_ranks

    @property
    def element(self) -> int:
        return element_bytes(self.precision)

    @property
    def outside_fp8(self) -> Precision:
        """The precision of what is never in fp8: attention's scores, the head."""
        return Precision.bf16 if self.precision is Precision.fp8_hybrid else self.precision

    @property
    def sequence_parts(self) -> int:
        """Ranks among which norms and the residual stream are split."""
        return self.parallel.tensor if self.parallel.sequence else 1

    def stage_layers(self, stage: int) -> int:
        """Layers on one rank of a stage, over all its virtual stages."""
        return parameters.stage_layers(self.model, self.parallel, stage)

    @property
    def ends(self) -> tuple[int, int]:
        """First and last stage, which have what the others lack."""
        return 0, self.parallel.pipeline - 1

    @property
    def most_layers(self) -> int:
        """Layers of the fullest stage."""
        return max(map(self.stage_layers, self.ends))

    @property
    def recomputes(self) -> bool:
        """Layers recomputed in the backward pass; `selective` drops only what fused attention never keeps."""
        return self.parallel.recompute is Recompute.full

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return (rank - self.first) // (self.gpus // self.parallel.pipeline)

    def parameters(self, stage: int) -> int:
        """Weights on one rank of a stage, adapters included."""
        return self._own_parameters(stage) + self._adapter_parameters(stage)

    def trained_parameters(self, stage: int) -> int:
        """Those that have gradients and an optimizer's state."""
        patterns = self.trainable
        if self.adapter is not None:
            patterns = ("output_layer",) if self.scalar else ()
        elif not patterns:
            return self._own_parameters(stage)
        own = parameters.trained_parameters(self.model, self.parallel, stage, self.scalar, patterns)
        return own + self._adapter_parameters(stage)

    def _own_parameters(self, stage: int) -> int:
        return parameters.stage_parameters(self.model, self.parallel, stage, self.scalar)

    def _adapter_parameters(self, stage: int) -> int:
        if self.adapter is None:
            return 0
        return self.stage_layers(stage) * self.adapter.parameters(self.model, self.parallel.tensor)

    def with_parallel(self, **changes) -> "PlacedModel":
        return replace(self, parallel=replace(self.parallel, **changes))
