"""One update of one role: accumulate over microbatches, clip, Adam, moving average; non-finite gradients are skipped."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.offload import storage_of
from megatron_rlhf.parallel.pipeline import Microbatch, Statistics, forward_backward
from megatron_rlhf.trainers.guards import Guard

log = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


@dataclass
class Update:
    """What one update did. `statistics` are global: summed over microbatches and data-parallel ranks."""

    statistics: dict[str, float]
    grad_norm: float
    skipped: bool


@dataclass
class TrainedRole:
    """A role with gradients and an optimizer. Losses arrive divided by global counts: gradients are summed, not averaged."""

    role: Role
    optimizer: MegatronOptimizer | None
    """None on ranks outside the role's layout."""
    max_skipped: int
    average: "MovingAverage | None" = None
    skipped_in_a_row: int = 0
    ahead: list[Statistics] | None = None
    """Statistics of the microbatches that the next update has accumulated already; None before its first."""
    _ahead_microbatches: Sequence[Microbatch] = ()
    guard: Guard | None = None
    """Told of updates that were skipped."""

    @classmethod
    def create(
        cls,
        role: Role,
        config: OptimizerConfig,
        precision: Precision,
        max_skipped: int = 5,
        ema_decay: float = 0.0,
    ) -> "TrainedRole":
        """Wrap the role's chunks for data parallelism and build Megatron-Core's optimizer for them. Collective."""
        layout = role.layout
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=layout.config.distributed_optimizer
        )
        with layout:
            average = MovingAverage(role, ema_decay) if ema_decay else None
            role.chunks = [
                DistributedDataParallel(chunk.config, ddp_config, chunk, pg_collection=layout.groups)
                for chunk in role.chunks
            ]
            for chunk in role.chunks:
                assert isinstance(chunk, DistributedDataParallel)
                chunk.broadcast_params()
                _keep_padding_between_buckets(chunk)
            if not layout.is_member:
                return cls(role, None, max_skipped, average)
            optimizer = _build_optimizer(role, config, precision)
        transformer_config = role.modules[0].config
        transformer_config.finalize_model_grads_func = _finalize
        transformer_config.grad_scale_func = optimizer.scale_loss
        return cls(role, optimizer, max_skipped, average)

    def accumulate(self, microbatches: Sequence[Microbatch]) -> None:
        """Gradients of a first part of the next update's microbatches, in a schedule of their own, not yet reduced over ranks."""
        self.ahead = []
        if self.optimizer is None:
            return
        self._clear_gradients()
        config = self.role.modules[0].config
        config.finalize_model_grads_func, finalize = None, config.finalize_model_grads_func
        self.ahead = forward_backward(self.role.chunks, microbatches, self.role.layout)
        self._ahead_microbatches = microbatches
        config.finalize_model_grads_func = finalize

    def update(self, microbatches: Sequence[Microbatch], lr: float) -> Update:
        """One optimizer step on the sum of the microbatches' losses; on ranks outside the layout nothing, and no statistics."""
        layout = self.role.layout
        ahead, self.ahead = self.ahead, None
        if self.optimizer is None:
            return Update({}, 0.0, False)
        if ahead is None:
            self._clear_gradients()
        statistics = [*(ahead or []), *forward_backward(self.role.chunks, microbatches, layout)]
        totals = collectives.reduce_statistics(statistics, layout)
        with layout:
            grad_norm, skipped = self._apply_gradients(lr, loss_is_finite(totals))
        # In fp16 gradients overflow now and then: the loss scale is lowered, and that is all there is to it.
        by_scale = self.optimizer.chained_optimizers[0].config.fp16 and all(map(math.isfinite, totals.values()))
        if skipped and self.guard is not None and not by_scale:
            self.guard.report_update(self.role, [*self._ahead_microbatches, *microbatches], statistics, totals)
        self._ahead_microbatches = ()
        self._count_skips(skipped, grad_norm, totals)
        if self.average is not None and not skipped:
            self.average.update()
        return Update(totals, grad_norm, skipped)

    def share(self, updates: list[Update]) -> list[Update]:
        """What the role's ranks know of its updates, to all ranks of the world. Collective over the world."""
        updates, self.skipped_in_a_row = collectives.publish_object((updates, self.skipped_in_a_row), self.role.layout)
        return updates

    def weights_have_changed(self) -> None:
        """After a change of weights outside an update: the optimizer may keep master copies."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def optimizer_tensors(self) -> list[Tensor]:
        """Master weights, moments and the moving average: what an update needs and nothing else does."""
        if self.optimizer is None:
            return []
        weights = {storage_of(parameter) for chunk in self.role.modules for parameter in chunk.parameters()}
        tensors = [tensor for shadow in self.average.shadows for tensor in shadow.values()] if self.average else []
        for part in self.optimizer.chained_optimizers:
            # In fp32 the optimizer works on the model's own weights, or on views of them.
            tensors += [p for group in part.param_groups for p in group["params"] if storage_of(p) not in weights]
            tensors += [t for state in part.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return tensors

    def _clear_gradients(self) -> None:
        assert self.optimizer is not None
        for chunk in self.role.chunks:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _apply_gradients(self, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        optimizer = self.optimizer
        assert optimizer is not None
        for part in optimizer.chained_optimizers:
            for group in part.param_groups:
                group["lr"] = lr
                # Megatron-Core leaves it to its scheduler to spare biases and norms.
                group["weight_decay"] = part.config.weight_decay * group["wd_mult"]
        overflow = optimizer.prepare_grads()
        grad_norm = float("inf") if overflow else float(optimizer.get_grad_norm())
        if not math.isfinite(grad_norm) or not loss_is_finite:
            return grad_norm, True
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if part.config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        optimizer.step_with_ready_grads()
        return grad_norm, False

    def _count_skips(self, skipped: bool, grad_norm: float, statistics: dict[str, float]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        bad = [f"{name} = {value}" for name, value in statistics.items() if not math.isfinite(value)]
        cause = f"{self.role.name}: gradient norm {grad_norm}" + (f"; {', '.join(bad)}" if bad else "")
        log.warning("update skipped, %s (%d in a row)", cause, self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} updates in a row were skipped (run.max_skipped_steps={self.max_skipped}); {cause}. "
                "Lower the learning rate, or look at the data of these steps."
            )


def loss_is_finite(statistics: Mapping[str, float]) -> bool:
    """Whether every loss is. Its gradient alone does not tell: that of a constant NaN is 0."""
    return all(math.isfinite(value) for name, value in statistics.items() if name.endswith("/loss"))


@dataclass
class MovingAverage:
    """Exponential moving average of a role's weights, in fp32 (InstructGPT, appendix C.4: decay 0.992)."""

    role: Role
    decay: float
    shadows: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Taken before the chunks are wrapped, so that names are the model's own.
        self.shadows = [
            {name: p.detach().float().clone() for name, p in chunk.named_parameters()} for chunk in self.role.chunks
        ]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        for chunk, shadow in zip(self.role.modules, self.shadows, strict=True):
            for name, parameter in chunk.named_parameters():
                shadow[name].lerp_(parameter.float(), 1 - self.decay)

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[Role]:
        """The role, named `..._ema`, with the average itself (fp32, no copy) in place of its weights: to save, load, sample."""
        current = [{name: p.data for name, p in chunk.named_parameters()} for chunk in self.role.modules]
        self._point_to(self.shadows)
        try:
            yield dataclasses.replace(self.role, name=f"{self.role.name}_ema")
        finally:
            self._point_to(current)

    def _point_to(self, weights: list[dict[str, Tensor]]) -> None:
        for chunk, tensors in zip(self.role.modules, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.data = tensors[name]


def _keep_padding_between_buckets(chunk: DistributedDataParallel) -> None:
    # Megatron-Core 0.16.1 drops the padding between gradient buckets when it gathers the optimizer's state for a fully
    # reshardable checkpoint, yet cuts parameters out of it at offsets that count the padding: with tied embeddings (a
    # bucket of their own) whose size is no multiple of 128, moments of other weights are saved. Calling padding content
    # makes both agree.
    for buffer in chunk.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _finalize(model, num_tokens=None, **kwargs) -> None:
    # Losses are normalised already: leave out Megatron-Core's division by a token count.
    finalize_model_grads(model, None, **kwargs)


def _build_optimizer(role: Role, config: OptimizerConfig, precision: Precision) -> MegatronOptimizer:
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.epsilon,
        clip_grad=config.clip_norm,
        initial_loss_scale=2.0**16,  # fp16; Megatron-Core's 2**32 would skip the first sixteen updates
        bf16=precision in (Precision.bf16, Precision.fp8_hybrid),
        fp16=precision is Precision.fp16,
        params_dtype=role.modules[0].config.params_dtype,
        use_distributed_optimizer=role.layout.config.distributed_optimizer,
    )
    return get_megatron_optimizer(
        megatron_config,
        list(role.chunks),
        config_overrides=get_standard_config_overrides(megatron_config),  # a wd_mult of 0 for biases and norms
        use_gloo_process_groups=False,
        pg_collection=role.layout.groups,
    )
