"""Megatron-Core's gradient buffers and Adam around the chunks of a role."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout


def wrap(role: Role, config: OptimizerConfig, precision: Precision) -> MegatronOptimizer | None:
    """Wrap the role's chunks for data parallelism and build their optimizer. Collective; None on ranks outside the layout."""
    layout, parallel = role.layout, role.layout.config
    overlaps = parallel.distributed_optimizer and layout.dp_size * parallel.context > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=overlaps and parallel.overlap_grad_reduce,
        overlap_param_gather=overlaps and parallel.overlap_param_gather,
        align_param_gather=True,  # `gather_weights` begins to gather, not the first pass that needs them
    )
    with layout:
        role.chunks = [
            DistributedDataParallel(chunk.config, ddp_config, chunk, pg_collection=layout.groups)
            for chunk in role.chunks
        ]
        for chunk in role.chunks:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.broadcast_params()
        if not layout.is_member:
            return None
        optimizer = _build_optimizer(role, config, precision)
    transformer_config = role.unwrapped[0].config
    transformer_config.finalize_model_grads_func = _finalize
    transformer_config.grad_scale_func = optimizer.scale_loss
    if ddp_config.overlap_grad_reduce:
        sync = [chunk.no_sync for chunk in _wrapped(role)]  # until a chunk's last microbatch
        transformer_config.no_sync_func = sync if len(sync) > 1 else sync[0]
    keep_weights(role)
    return optimizer


@contextlib.contextmanager
def unreduced(role: Role) -> Iterator[None]:
    """A schedule inside only accumulates gradients on each rank."""
    config = role.unwrapped[0].config
    before = config.no_sync_func, config.finalize_model_grads_func
    config.no_sync_func = config.finalize_model_grads_func = None
    with contextlib.ExitStack() as stack:
        for chunk in _wrapped(role):
            stack.enter_context(chunk.no_sync())
        yield
    config.no_sync_func, config.finalize_model_grads_func = before


def reduce_gradients(role: Role) -> None:
    """Sum over ranks what they have accumulated, as the end of a schedule does. Collective over the role's layout."""
    with role.layout:
        for chunk in _wrapped(role):
            if chunk.ddp_config.overlap_grad_reduce:
                chunk.start_grad_sync()
        _finalize(list(role.chunks), pg_collection=role.layout.groups)
    for chunk in _wrapped(role):
        for (
            group
        ) in chunk.bucket_groups:  # since 0.19 one sums once in an update, and the update's own sum is still to come
            group.grad_reduce_finished = False
    keep_weights(role)


def gather_weights(role: Role) -> None:
    """After a step, where gathering is overlapped: begin to send every rank what others have updated. Collective.

    All is sent at once, and passes only wait: one that other data-parallel ranks have no part in must start nothing.
    """
    for chunk in _wrapped(role):
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()


def keep_weights(role: Role) -> None:
    """The weights are whole as they are: nothing is to be gathered, though Megatron-Core counts on a step after a sum."""
    for chunk in _wrapped(role):
        for group in chunk.bucket_groups:
            group.param_gather_dispatched = True


def _wrapped(role: Role) -> list[DistributedDataParallel]:
    return [chunk for chunk in role.chunks if isinstance(chunk, DistributedDataParallel)]


def _finalize(model, num_tokens=None, **kwargs) -> None:
    # Losses are already normalised: disable Megatron-Core's division by a token count.
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
        params_dtype=role.unwrapped[0].config.params_dtype,
        use_distributed_optimizer=role.layout.config.distributed_optimizer,
    )
    with _groups_of(role.layout):
        return get_megatron_optimizer(
            megatron_config,
            list(role.chunks),
            config_overrides=get_standard_config_overrides(megatron_config),  # a wd_mult of 0 for biases and norms
            use_gloo_process_groups=False,
            pg_collection=role.layout.groups,
        )


@contextlib.contextmanager
def _groups_of(layout: ParallelLayout) -> Iterator[None]:
    """Parameter groups that some rank of the layout fills.

    Megatron-Core asks all ranks of the world, and gives every rank the groups of all, other roles' too: a policy whose
    adapters need no group for biases would get one, and lose it at resume, depending on the value model's placement; and
    ranks that train nothing would be waited for. Here it asks the layout's.
    """
    of_the_world = megatron_optimizer._get_param_groups
    group, size, gather = layout.groups.intra_dist_opt, dist.get_world_size, dist.all_gather_object

    def of_the_layout(*args, **kwargs):
        dist.get_world_size = lambda: size(group)  # type: ignore[assignment,misc]
        dist.all_gather_object = lambda found, mine: gather(found, mine, group=group)  # type: ignore[assignment,misc]
        try:
            groups = of_the_world(*args, **kwargs)
        finally:
            dist.get_world_size, dist.all_gather_object = size, gather
        counts = torch.tensor([float(len(group["params"])) for group in groups], device=collectives.device())
        filled = collectives.sum_over(counts, group).tolist()
        return [group for group, count in zip(groups, filled, strict=True) if count]

    megatron_optimizer._get_param_groups = of_the_layout
    try:
        yield
    finally:
        megatron_optimizer._get_param_groups = of_the_world
