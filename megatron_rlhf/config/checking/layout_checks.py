"""Layouts against the ranks of a job and the shapes of models, before any is built; messages name the key, its value
and what fits."""

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Positions
from megatron_rlhf.config.placement import PlacementConfig, PlacementKind


def check_placement(placement: PlacementConfig, world_size: int) -> None:
    """Two sides that share no ranks must each have at least one."""
    if placement.kind is PlacementKind.disaggregated and not 0 < placement.critic_ranks < world_size:
        raise UserError(
            f"placement.critic_ranks={placement.critic_ranks}: placement=disaggregated splits the {world_size} ranks of this "
            f"job, so it needs 1 to {world_size - 1} of them"
            + ("" if world_size > 1 else ", which one rank cannot give")
        )
    if placement.kind is PlacementKind.colocated and placement.critic_ranks:
        raise UserError(f"placement.critic_ranks={placement.critic_ranks} is for placement=disaggregated")


def check_generation(model: ModelConfig, sampling: ParallelConfig, training: ParallelConfig) -> None:
    """The copy of the policy that samples must be a layout that the weights can move to."""
    check_model(model, sampling, "rollout.parallel")
    if sampling.pipeline > training.pipeline:
        raise UserError(
            f"rollout.parallel.pipeline={sampling.pipeline} is more than parallel.pipeline={training.pipeline}: stages make "
            "a token wait, and weights that the first and last stage share would have to be made up"
        )


def check_layout(parallel: ParallelConfig, ranks: int, key: str, whose: str = "of this job") -> None:
    """The layout must divide its ranks."""
    for name in ("tensor", "pipeline", "virtual_stages", "context", "expert"):
        if getattr(parallel, name) < 1:
            raise UserError(f"{key}.{name}={getattr(parallel, name)} must be at least 1")
    needed = parallel.model_ranks
    if ranks % needed:
        raise UserError(
            f"{key}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {needed} "
            f"does not divide the {ranks} ranks {whose}"
        )
    if parallel.virtual_stages > 1 and parallel.pipeline == 1:
        raise UserError(f"{key}.virtual_stages={parallel.virtual_stages} needs {key}.pipeline of at least 2")


def check_model(model: ModelConfig, parallel: ParallelConfig, key: str) -> None:
    """The model's dimensions must be divisible by the layout's."""

    def require(divides: bool, message: str) -> None:
        if not divides:
            raise UserError(message)

    t = parallel.tensor
    groups = model.num_query_groups or model.num_attention_heads
    require(
        model.head_dim is not None or model.hidden_size % model.num_attention_heads == 0,
        f"hidden_size {model.hidden_size} is not divisible by num_attention_heads {model.num_attention_heads}",
    )
    require(
        model.num_attention_heads % groups == 0,
        f"num_attention_heads {model.num_attention_heads} is not divisible by num_query_groups {groups}",
    )
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", groups),
        ("ffn_hidden_size", model.ffn_hidden_size or 4 * model.hidden_size),
    ):
        require(value % t == 0, f"{key}.tensor={t} does not divide {name} {value}")
    _check_stages(model.num_layers, parallel, key)
    parts = parallel.token_multiple
    if model.positions is Positions.learned and model.max_sequence_length % parts:
        raise UserError(
            f"{key}.sequence={str(parallel.sequence).lower()} with {key}.tensor={t} and {key}.context={parallel.context} cuts "
            f"sequences into {parts} parts, which does not divide max_sequence_length {model.max_sequence_length}"
        )


def _check_stages(layers: int, parallel: ParallelConfig, key: str) -> None:
    last = parallel.last_stage_layers
    if last is not None:
        others = parallel.pipeline - 1
        if others < 1 or parallel.virtual_stages > 1 or last < 1 or layers <= last or (layers - last) % others:
            raise UserError(
                f"{key}.last_stage_layers={last} leaves {layers - last} of {layers} layers, which {others} plain pipeline "
                "stages cannot share evenly"
            )
        return
    stages = parallel.pipeline * parallel.virtual_stages
    if layers % stages:
        even = -(-layers // parallel.pipeline)
        rest = layers - even * (parallel.pipeline - 1)
        hint = (
            f"; {key}.last_stage_layers={rest} would make it {even} a stage and {rest} on the last" if rest > 0 else ""
        )
        raise UserError(
            f"{key}: pipeline {parallel.pipeline} x virtual_stages {parallel.virtual_stages} = {stages} stages do not "
            f"divide num_layers {layers}{hint if parallel.virtual_stages == 1 else ''}"
        )


def check_experts(parallel: ParallelConfig, key: str) -> None:
    """Only mixture-of-experts models have experts; the models here have one MLP per layer."""
    if parallel.expert > 1:
        raise UserError(
            f"{key}.expert={parallel.expert} would spread the experts of a mixture over ranks, and models here have none; set "
            f"it to 1, and split each MLP with {key}.tensor"
        )
