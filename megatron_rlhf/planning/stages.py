"""Plans of the three training stages, from the same configurations that would run."""

import math
from dataclasses import replace

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.cluster import ClusterConfig, PlanConfig, WorkloadConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.layout_checks import check_layout, check_model, check_placement
from megatron_rlhf.config.model import ModelConfig, ParallelConfig
from megatron_rlhf.config.rewards import named_rewards
from megatron_rlhf.config.stages import BaseConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.planning.activations import Shape, cache_bytes, forward_working, scoring_peak, training_peak
from megatron_rlhf.planning.placement import FP32, PlacedModel
from megatron_rlhf.planning.plan import Plan, PlannedPhase, PlannedRole
from megatron_rlhf.planning.timing import (
    Batch,
    bubble,
    decode_passes,
    decode_seconds,
    forward_flops,
    schedule_seconds,
    update_seconds,
)

STAGES: dict[type[BaseConfig], str] = {SFTConfig: "sft", RewardModelConfig: "reward_model", PPOConfig: "ppo"}

POLICY_SCORING, CRITIC_SCORING = "scoring by policy and reference", "scoring by reward and value"
_BACKWARD_TOO = 3  # forward and backward together take three times the FLOPs of the forward pass


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
    placed = _place("policy", config.model, config.parallel, config, range(cluster.gpus), "model", "parallel")
    from_text = sft.batch_size * data.pretraining_mix
    longest = _longest(data.max_prompt_tokens + data.max_response_tokens, placed.model)
    mean: float = workload.prompt_tokens + workload.response_tokens
    if from_text:
        longest = max(longest, data.pretraining.sequence_length)
        mean += (data.pretraining.sequence_length - mean) * from_text / sft.batch_size
    shape, batch = _microbatches(sft.batch_size, sft.micro_batch, placed, mean, longest)
    steps = sft.max_steps or sft.epochs * math.ceil(workload.demonstrations / max(sft.batch_size - from_text, 1))
    phase = _training_phase("update", placed, cluster, shape, batch, sft.batch_size * mean, sft.dropout)
    role = PlannedRole("policy", placed, trained=True)
    return Plan("sft", cluster, [role], [phase], steps, f"micro batch {sft.micro_batch}")


def plan_reward_model(config: RewardModelConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Plan:
    """The reward model; a prompt passes once, with all its completions: the largest K decides a microbatch's memory."""
    algorithm, data = config.reward_model, config.data
    placed = _place(
        "reward", config.model, config.parallel, config, range(cluster.gpus), "model", "parallel", scalar=True
    )
    response = min(data.max_response_tokens, placed.model.max_sequence_length - 1)
    prompt = min(data.max_prompt_tokens, placed.model.max_sequence_length - response)
    longest = prompt + min(workload.max_completions, algorithm.max_completions) * response
    mean = workload.prompt_tokens + workload.completions * workload.response_tokens
    shape, batch = _microbatches(algorithm.batch_size, algorithm.micro_batch, placed, mean, longest)
    batch = replace(batch, length=workload.prompt_tokens + workload.response_tokens)
    steps = algorithm.epochs * math.ceil(workload.rankings / algorithm.batch_size)
    phase = _training_phase("update", placed, cluster, shape, batch, algorithm.batch_size * mean)
    role = PlannedRole("reward", placed, trained=True)
    unit = "" if algorithm.micro_batch.tokens else " prompts"
    return Plan("reward_model", cluster, [role], [phase], steps, f"micro batch {algorithm.micro_batch}{unit}")


def plan_ppo(config: PPOConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Plan:
    """PPO-ptx: the four roles on all GPUs, or two separate pairs; the alignment tax's forward passes are left out."""
    check_placement(config.placement, cluster.gpus)
    side, critic_side = config.placement.ranks(cluster.gpus)
    policy = _place("policy", config.model, config.parallel, config, side, "model", "parallel")
    value = _place(
        "value",
        config.critic_model,
        config.critic_parallel,
        config,
        critic_side,
        "critic_model",
        "critic_parallel",
        True,
    )
    reference = replace(policy, precision=config.precision_of("reference"))
    reward = replace(value, precision=config.precision_of("reward"))
    sampling = replace(policy, precision=config.rollout.precision or reference.precision)
    roles = _ppo_roles(config, policy, reference, reward, value)
    critics = [*[reward] * len(_reward_models(config)), *([value] if config.ppo.has_critic else [])]
    if (layout := config.rollout.parallel.of(config.parallel)) is not None:
        sampling = _place("sampler", config.model, layout, config, side, "model", "rollout.parallel")
        roles.append(PlannedRole("sampler", sampling, trained=False))
    phases = [
        _rollout_phase(config, sampling, cluster, workload),
        _scoring_phase(POLICY_SCORING, [policy, reference], config, cluster, workload),
        *([_scoring_phase(CRITIC_SCORING, critics, config, cluster, workload)] if critics else []),
        *_policy_phases(config, policy, cluster, workload),
    ]
    if config.ppo.has_critic:
        phases.append(_value_phase(config, value, cluster, workload))
    ppo = config.ppo
    microbatch = f"micro batch {ppo.micro_batch}, ptx {ppo.ptx_micro_batch}, decoding {config.rollout.batch_size}"
    return Plan("ppo", cluster, roles, phases, ppo.iterations, microbatch)


def _ppo_roles(
    config: PPOConfig, policy: PlacedModel, reference: PlacedModel, reward: PlacedModel, value: PlacedModel
) -> list[PlannedRole]:
    """Policy, reference, reward models and, where advantages need one, value model; when parts of them are in host memory."""
    updates = ("policy", "ptx", "value")
    judging = ("rollout", POLICY_SCORING, CRITIC_SCORING)
    optimizer = dict.fromkeys(("optimizer", "ema"), judging) if config.offload.optimizer else {}
    away = {"reference": CRITIC_SCORING, "reward": POLICY_SCORING}
    rests = {
        name: {"weights": ("rollout", other, *updates)} if getattr(config.offload, name) else {}
        for name, other in away.items()
    }
    roles = [
        PlannedRole("policy", policy, trained=True, average=config.ppo.ema_decay > 0, rests=optimizer),
        PlannedRole("reference", reference, trained=False, rests=rests["reference"]),
        *(PlannedRole(name, reward, trained=False, rests=rests["reward"]) for name in _reward_models(config)),
    ]
    if config.ppo.has_critic:
        roles.append(PlannedRole("value", value, trained=True, rests=optimizer))
    return roles


def _reward_models(config: PPOConfig) -> list[str]:
    """Their names in a plan; one is assumed where a configuration names neither models nor functions."""
    if len(config.reward_models) > 1:
        return [f"reward {part.name}" for part in config.reward_models]
    functions_alone = named_rewards(config.reward, config.rewards) and not config.reward_models
    return [] if functions_alone else ["reward"]


def _rollout_phase(
    config: PPOConfig, policy: PlacedModel, cluster: ClusterConfig, workload: WorkloadConfig
) -> PlannedPhase:
    episodes, sampling = config.ppo.batch_size, config.rollout
    rows = math.ceil(episodes / policy.data)
    together = min(sampling.batch_size, rows)
    in_flight = min(rows, together * policy.parallel.pipeline)
    length = config.data.max_prompt_tokens + sampling.max_response_tokens
    mean = workload.prompt_tokens + workload.response_tokens

    def memory(stage: int) -> dict[str, float]:
        return {
            "kv cache": cache_bytes(policy, stage, in_flight, length),
            "buffers": forward_working(policy, Shape(together, config.data.max_prompt_tokens)),
        }

    limit = sampling.max_response_tokens
    passes = decode_passes(rows, in_flight, min(workload.response_tokens, limit), limit)
    seconds = decode_seconds(policy, cluster, rows, together, workload.prompt_tokens, passes, limit)
    return PlannedPhase(
        "rollout", seconds, forward_flops(policy, episodes * mean, mean), policy, memory, part="rollout"
    )


def _scoring_phase(
    name: str, readers: list[PlacedModel], config: PPOConfig, cluster: ClusterConfig, workload: WorkloadConfig
) -> PlannedPhase:
    """Two models of the same shape and layout read the episodes, one after the other."""
    episodes, length = config.ppo.batch_size, config.data.max_prompt_tokens + config.rollout.max_response_tokens
    mean = workload.prompt_tokens + workload.response_tokens
    shape, batch = _microbatches(episodes, config.ppo.micro_batch, readers[0], mean, length)
    seconds = sum(sum(schedule_seconds(placed, cluster, [batch], backward=False)) for placed in readers)
    flops = sum(forward_flops(placed, episodes * mean, mean) for placed in readers)
    peak = scoring_peak(readers[0], shape)
    idle = bubble(readers[0], batch.microbatches)
    return PlannedPhase(name, seconds, flops, readers[0], lambda stage: peak, idle, part="scoring")


def _policy_phases(
    config: PPOConfig, policy: PlacedModel, cluster: ClusterConfig, workload: WorkloadConfig
) -> list[PlannedPhase]:
    """PPO's and pretraining's microbatches, which share one schedule: its time is divided by their share of it."""
    ppo, text = config.ppo, config.data.pretraining.sequence_length
    mean = workload.prompt_tokens + workload.response_tokens
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    shape, batch = _microbatches(ppo.minibatch_size, ppo.micro_batch, policy, mean, length)
    share = config.rollout.max_response_tokens / length
    shapes, batches = [replace(shape, wanted=share)], [batch]
    names, sequences, tokens = ["policy"], [ppo.minibatch_size], [mean]
    if ppo.mixes_text:
        examples = ppo.minibatch_size * ppo.ptx_ratio
        shape, batch = _microbatches(examples, ppo.ptx_micro_batch, policy, text, text)
        shapes.append(shape)
        batches.append(batch)
        names, sequences, tokens = [*names, "ptx"], [*sequences, examples], [*tokens, text]
    total = sum(batch.microbatches for batch in batches)
    updates = ppo.batch_size // ppo.minibatch_size * ppo.inner_epochs
    seconds = schedule_seconds(policy, cluster, batches, backward=True)
    seconds[0] += update_seconds(policy, cluster, ppo.ema_decay > 0)

    def memory(stage: int) -> dict[str, float]:
        peaks = [training_peak(policy, stage, shape, total) for shape in shapes]
        kept = {"text's gradient": policy.parameters(stage) * FP32} if ppo.reports_gradients else {}
        return max(peaks, key=lambda peak: sum(peak.values())) | kept

    return [
        PlannedPhase(
            name,
            updates * seconds[i],
            updates * _BACKWARD_TOO * forward_flops(policy, sequences[i] * tokens[i], tokens[i]),
            policy,
            memory,
            bubble(policy, total),
        )
        for i, name in enumerate(names)
    ]


def _value_phase(
    config: PPOConfig, critic: PlacedModel, cluster: ClusterConfig, workload: WorkloadConfig
) -> PlannedPhase:
    ppo, mean = config.ppo, workload.prompt_tokens + workload.response_tokens
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    shape, batch = _microbatches(ppo.minibatch_size, ppo.micro_batch, critic, mean, length)
    updates = ppo.batch_size // ppo.minibatch_size * ppo.inner_epochs
    phase = _training_phase("value", critic, cluster, shape, batch, ppo.minibatch_size * mean)
    return PlannedPhase("value", updates * phase.seconds, updates * phase.flops, critic, phase.memory, phase.bubble)


def _training_phase(
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
        sum(schedule_seconds(placed, cluster, [batch], backward=True)) + update_seconds(placed, cluster),
        _BACKWARD_TOO * forward_flops(placed, tokens, batch.length),
        placed,
        lambda stage: training_peak(placed, stage, shape, batch.microbatches, dropout),
        bubble(placed, batch.microbatches),
    )


def _place(
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
    check_layout(parallel, len(ranks), parallel_key)
    check_model(model, parallel, parallel_key)
    return PlacedModel(model, parallel, config.precision_of(role), len(ranks), scalar, ranks.start)


def _microbatches(
    sequences: int, budget: Budget, placed: PlacedModel, mean: float, longest: int
) -> tuple[Shape, Batch]:
    """The largest microbatch, and all of them on a data-parallel copy: sequences of similar length share one, so there
    is little padding; a budget in tokens has none."""
    mine = math.ceil(sequences / placed.data)
    if budget.tokens is not None:
        count = math.ceil(mine * mean / budget.tokens)
        return Shape(1, min(budget.tokens, mine * longest)), Batch(count, mine * mean / count, mean)
    rows = min(budget.sequences or 1, mine)
    return Shape(rows, longest), Batch(math.ceil(mine / rows), rows * mean, mean)


def _longest(tokens: int, model: ModelConfig) -> int:
    return min(tokens, model.max_sequence_length)
