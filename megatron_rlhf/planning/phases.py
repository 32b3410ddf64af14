"""What the stages' plans share: models in their layouts, their microbatches, the phase of an update."""

import math

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.checking.layout_checks import check_experts, check_layout, check_model
from megatron_rlhf.config.cluster import ClusterConfig, WorkloadConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig
from megatron_rlhf.config.stages import BaseConfig
from megatron_rlhf.config.training import TrainedRoleConfig
from megatron_rlhf.planning.activations import Shape, training_peak
from megatron_rlhf.planning.placement import PlacedModel
from megatron_rlhf.planning.plan import PlannedPhase
from megatron_rlhf.planning.speed.execution import Execution
from megatron_rlhf.planning.speed.timing import Batch, bubble, forward_flops, schedule_seconds, update_seconds

BACKWARD_TOO = 3
"""Forward and backward together take three times the FLOPs of the forward pass."""


def training_phase(
    name: str,
    placed: PlacedModel,
    cluster: ClusterConfig,
    shape: Shape,
    batch: Batch,
    tokens: float,
    dropout: float = 0.0,
) -> PlannedPhase:
    """One update on this many tokens, over all copies."""
    return PlannedPhase(
        name,
        sum(schedule_seconds(placed, cluster, [batch], backward=True)) + update_seconds(placed, cluster, beside=batch),
        BACKWARD_TOO * forward_flops(placed, tokens, batch.length, batch.wanted),
        placed,
        lambda stage: training_peak(placed, stage, shape, batch.microbatches, dropout),
        bubble(placed, batch.microbatches),
    )


def place(
    role: str,
    model: ModelConfig | None,
    parallel: ParallelConfig,
    config: BaseConfig,
    ranks: range,
    key: str,
    parallel_key: str,
    scalar: bool = False,
) -> PlacedModel:
    if model is None:
        choice = key if key == "model" else f"model@{key}"
        raise UserError(
            f"{key} is not given: a plan needs its shape, as in {choice}=gpt3_1_3b or a checkpoint to start from"
        )
    check_experts(parallel, parallel_key)
    check_layout(parallel, len(ranks), parallel_key)
    check_model(model, parallel, parallel_key)
    precision, execution = config.precision_of(role), Execution.of(parallel)
    trained = getattr(config, role, None)
    adapter, patterns = None, tuple[str, ...]()
    if isinstance(trained, TrainedRoleConfig):
        adapter, patterns = trained.lora.adapter(model, f"{role}.lora"), tuple(trained.trainable)
        patterns = (*patterns, "output_layer") if patterns and scalar else patterns
    return PlacedModel(model, parallel, precision, len(ranks), scalar, ranks.start, execution, adapter, patterns)


def microbatches(sequences: int, budget: Budget, placed: PlacedModel, mean: float, longest: int) -> tuple[Shape, Batch]:
    """The largest microbatch, and all of them on a data-parallel copy: sequences of similar length share one, so there
    is little padding; a budget in tokens has none."""
    mine = math.ceil(sequences / placed.data)
    if budget.tokens is not None:
        count = math.ceil(mine * mean / budget.tokens)
        return Shape(1, min(budget.tokens, mine * longest)), Batch(count, mine * mean / count, mean)
    rows = min(budget.sequences or 1, mine)
    return Shape(rows, longest), Batch(math.ceil(mine / rows), rows * mean, mean)


def micro_batch_setting(group: str, budget: Budget, prefix: str = "") -> dict[str, float | None]:
    """The key of the two that is given."""
    name = "size" if budget.tokens is None else "tokens"
    return {f"{group}.{prefix}micro_batch_{name}": budget.sequences if budget.tokens is None else budget.tokens}


def longest_of(tokens: int, model: ModelConfig) -> int:
    return min(tokens, model.max_sequence_length)


def attended_length(workload: WorkloadConfig, completions: float) -> float:
    """Length of a plain sequence whose tokens attend to as many others as those of a prompt with all its completions."""
    prompt, response = workload.prompt_tokens, workload.response_tokens
    all_of_them = completions * response
    return (prompt * prompt + all_of_them * (2 * prompt + response)) / (prompt + all_of_them)
