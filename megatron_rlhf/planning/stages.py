"""Plans of the three training stages, from the same configurations that would run."""

import math
from dataclasses import replace

from megatron_rlhf.config.budgets import check_micro_batch
from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig, WorkloadConfig
from megatron_rlhf.config.stages import BaseConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.planning.phases import (
    attended_length,
    longest_of,
    micro_batch_setting,
    microbatches,
    place,
    training_phase,
)
from megatron_rlhf.planning.plan import Plan, PlannedRole
from megatron_rlhf.planning.ppo import plan_ppo

STAGES: dict[type[BaseConfig], str] = {SFTConfig: "sft", RewardModelConfig: "reward_model", PPOConfig: "ppo"}


def plan_stage(config: BaseConfig, plan: PlanConfig) -> Plan:
    """The plan of a stage's configuration.

    Raises:
        UserError: no model shape, or a layout that does not divide the GPUs or the model.
    """
    cluster = plan.cluster_for(stage_name(config))
    if isinstance(config, PPOConfig):
        return plan_ppo(config, cluster, plan.workload)
    if isinstance(config, RewardModelConfig):
        return plan_reward_model(config, cluster, plan.workload)
    assert isinstance(config, SFTConfig)
    return plan_sft(config, cluster, plan.workload)


def stage_name(config: BaseConfig) -> str:
    """As in `conf/<stage>.yaml`."""
    return STAGES[type(config)]


def plan_sft(config: SFTConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Plan:
    """Supervised fine-tuning; validation and the choice of the best epoch are left out."""
    sft, data = config.sft, config.data
    check_micro_batch("sft", sft.micro_batch_size, sft.micro_batch_tokens)
    placed = place("policy", config.model, config.parallel, config, range(cluster.gpus), "model", "parallel")
    from_text = sft.batch_size * data.pretraining_mix
    longest = longest_of(data.max_prompt_tokens + data.max_response_tokens, placed.model)
    mean: float = workload.prompt_tokens + workload.response_tokens
    if from_text:
        longest = max(longest, data.pretraining.sequence_length)
        mean += (data.pretraining.sequence_length - mean) * from_text / sft.batch_size
    shape, batch = microbatches(sft.batch_size, sft.micro_batch, placed, mean, longest)
    demonstrations = (sft.batch_size - from_text) / sft.batch_size
    batch = replace(batch, wanted=1 - demonstrations * workload.prompt_tokens / mean)
    steps = sft.max_steps or sft.epochs * math.ceil(workload.demonstrations / max(sft.batch_size - from_text, 1))
    phase = training_phase("update", placed, cluster, shape, batch, sft.batch_size * mean, sft.dropout)
    role = PlannedRole("policy", placed, trained=True)
    return Plan(
        "sft", cluster, [role], [phase], steps, micro_batch_setting("sft", sft.micro_batch), config.run.async_save
    )


def plan_reward_model(config: RewardModelConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Plan:
    """The reward model; a prompt passes once, with all its completions: the largest K decides a microbatch's memory."""
    algorithm, data = config.reward_model, config.data
    check_micro_batch("reward_model", algorithm.micro_batch_size, algorithm.micro_batch_tokens)
    placed = place(
        "reward", config.model, config.parallel, config, range(cluster.gpus), "model", "parallel", scalar=True
    )
    response = min(data.max_response_tokens, placed.model.max_sequence_length - 1)
    prompt = min(data.max_prompt_tokens, placed.model.max_sequence_length - response)
    longest = prompt + min(workload.max_completions, algorithm.max_completions) * response
    mean = workload.prompt_tokens + workload.completions * workload.response_tokens
    shape, batch = microbatches(algorithm.batch_size, algorithm.micro_batch, placed, mean, longest)
    batch = replace(batch, length=attended_length(workload, workload.completions))
    steps = algorithm.max_steps or algorithm.epochs * math.ceil(workload.rankings / algorithm.batch_size)
    phase = training_phase("update", placed, cluster, shape, batch, algorithm.batch_size * mean)
    role = PlannedRole("reward", placed, trained=True)
    settings = micro_batch_setting("reward_model", algorithm.micro_batch)
    return Plan("reward_model", cluster, [role], [phase], steps, settings, config.run.async_save)
