"""What a run takes from its own plan: shapes for the planner, and the steps between checkpoints of `run.save_every=auto`."""

import copy

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.checking.files import CONF
from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig, file_of_gpu
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.rewards import named_rewards
from megatron_rlhf.config.stages import BaseConfig, PPOConfig, RewardModelConfig
from megatron_rlhf.config.training import AUTO
from megatron_rlhf.planning.stages import plan_stage


def take_shapes(config: BaseConfig) -> None:
    """Fill in shapes that the configuration leaves to the checkpoints it starts from."""
    if isinstance(config, PPOConfig):
        _take_shapes_of_ppo(config)
        return
    role, wanted = ("reward", "TRAINED_REWARD") if isinstance(config, RewardModelConfig) else ("policy", "POLICY")
    config.model = config.model or _shape_at(getattr(config, role).init_from, f"{role}.init_from", wanted)


def _take_shapes_of_ppo(config: PPOConfig) -> None:
    config.model = config.model or _shape_at(config.policy.init_from, "policy.init_from", "POLICY")
    critics = [(part.config.init_from, f"{part.key}.init_from", "REWARD") for part in config.reward_models]
    for critic in [*critics, (config.value.init_from, "value.init_from", "VALUE")]:
        config.critic_model = config.critic_model or _shape_at(*critic)
    if config.ppo.has_critic and named_rewards(
        config.reward, config.rewards
    ):  # of functions: it starts from the policy
        config.critic_model = config.critic_model or config.model


def _shape_at(path: str | None, key: str, wanted: str) -> ModelConfig | None:
    """Of what a role starts from; `wanted` is the name of what it may be, in `conversion.starting_point`."""
    if path is None:
        return None
    from megatron_rlhf.conversion import starting_point  # imports Megatron-Core: seconds

    return starting_point.StartingPoint.find(path, key, getattr(starting_point, wanted)).model


def steps_between_saves(config: BaseConfig, ranks: int, gpu: str | None) -> int:
    """`run.save_every=auto` of a run on `ranks` GPUs of this name, None on a CPU.

    Raises:
        UserError: no cluster is described for these GPUs.
    """
    cluster = compose_config("plan", PlanConfig, [f"cluster={_cluster_name(config.run.cluster, gpu)}"])[0].cluster
    shaped = copy.deepcopy(config)
    take_shapes(shaped)
    return plan_stage(shaped, PlanConfig(cluster=_of_ranks(cluster, ranks))).save_every


def _of_ranks(cluster: ClusterConfig, ranks: int) -> ClusterConfig:
    """As many nodes as hold this number of ranks."""
    cluster.gpus_per_node = min(cluster.gpus_per_node, ranks)
    while ranks % cluster.gpus_per_node:
        cluster.gpus_per_node -= 1
    cluster.nodes = ranks // cluster.gpus_per_node
    return cluster


def _cluster_name(given: str | None, gpu: str | None) -> str:
    names = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))
    name = given or file_of_gpu(names, gpu)
    if name is None:
        raise UserError(
            f"run.save_every={AUTO}: no file of conf/cluster/ describes {gpu}; give run.cluster ({', '.join(names)}), or a "
            "number of steps"
        )
    return name
