"""The plan of PPO-ptx: four roles, and the phases of an iteration."""

import math
from dataclasses import replace

from megatron_rlhf.config.checking.checks import check_fits_context, check_ppo_settings
from megatron_rlhf.config.checking.layout_checks import check_generation, check_placement
from megatron_rlhf.config.cluster import ClusterConfig, WorkloadConfig
from megatron_rlhf.config.lengths import share_context
from megatron_rlhf.config.placement import PlacementKind
from megatron_rlhf.config.rewards import named_rewards
from megatron_rlhf.config.rollout import BLOCK, SamplingEngine, blocks_of
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.config.stages.ppo import OldLogprobs
from megatron_rlhf.planning.activations import Shape, cache_bytes, forward_working, scoring_peak, training_peak
from megatron_rlhf.planning.phases import (
    BACKWARD_TOO,
    attended_length,
    micro_batch_setting,
    microbatches,
    place,
    training_phase,
)
from megatron_rlhf.planning.placement import FP32, PlacedModel
from megatron_rlhf.planning.plan import SAVING, Plan, PlannedPhase, PlannedRole
from megatron_rlhf.planning.speed import links
from megatron_rlhf.planning.speed.timing import (
    bubble,
    decode_passes,
    decode_seconds,
    forward_flops,
    schedule_seconds,
    update_seconds,
)

POLICY_SCORING, CRITIC_SCORING = "scoring by policy and reference", "scoring by reward and value"
SCORING_MEANWHILE = "scoring by reward and value, meanwhile"
"""Of responses that have ended, while others are sampled."""


def plan_ppo(config: PPOConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> Plan:
    """PPO-ptx: the four roles on all GPUs, or two separate pairs; the alignment tax's forward passes are left out."""
    check_ppo_settings(config)
    check_placement(config.placement, cluster.gpus)
    config = _with_lengths(config)
    side, critic_side = config.placement.ranks(cluster.gpus)
    policy = place("policy", config.model, config.parallel, config, side, "model", "parallel")
    rewards, value = _place_critics(config, critic_side)
    reference = replace(policy, precision=config.precision_of("reference"))
    sampling = replace(policy, precision=config.rollout.precision or reference.precision)
    roles = _ppo_roles(config, policy, reference, rewards, value)
    scoring = [*rewards.values(), *([value] if value is not None and not config.values_in_update else [])]
    if (layout := config.rollout.parallel.of(config.parallel)) is not None:
        check_generation(policy.model, layout, config.parallel)
        sampling = place("sampler", config.model, layout, config, side, "model", "rollout.parallel")
        sampling = replace(sampling, adapter=policy.adapter)
        roles.append(PlannedRole("sampler", sampling, trained=False))
    recomputes = config.ppo.old_logprobs is OldLogprobs.recomputed
    phases = [
        _rollout_phase(config, sampling, layout is not None, cluster, workload),
        _scoring_phase(POLICY_SCORING, [*[policy] * recomputes, reference], config, cluster, workload),
        *_critic_phases(scoring, config, cluster, workload),
        *_policy_phases(config, policy, cluster, workload),
        *([_value_phase(config, value, cluster, workload)] if value is not None else []),
        *_copy_phases(roles, cluster),
    ]
    ppo = config.ppo
    settings = micro_batch_setting("ppo", ppo.micro_batch) | {"rollout.batch_size": config.rollout.batch_size}
    if ppo.mixes_text:
        settings |= micro_batch_setting("ppo", ppo.ptx_micro_batch, "ptx_")
    return Plan("ppo", cluster, roles, phases, ppo.iterations, settings, config.run.async_save)


def _place_critics(config: PPOConfig, ranks: range) -> tuple[dict[str, PlacedModel], PlacedModel | None]:
    """Reward models by name and, where advantages need one, the value model: of one shape and layout."""
    if not has_critics(config):
        return {}, None
    critic = place(
        "value", config.critic_model, config.critic_parallel, config, ranks, "critic_model", "critic_parallel", True
    )
    reward = replace(critic, precision=config.precision_of("reward"), adapter=None, trainable=())
    return dict.fromkeys(_reward_models(config), reward), critic if config.ppo.has_critic else None


def has_critics(config: PPOConfig) -> bool:
    """There is something in `critic_parallel`; not where functions alone judge and advantages need no value model."""
    return config.ppo.has_critic or bool(_reward_models(config))


def _with_lengths(config: PPOConfig) -> PPOConfig:
    """A copy in which lengths that are not given follow the models' context."""
    config = replace(config, data=replace(config.data), rollout=replace(config.rollout))
    shapes = [shape for shape in (config.model, config.critic_model) if shape is not None]
    if shapes:  # else `place` says what is missing
        share_context(config.data, config.rollout, "rollout", min(shape.max_sequence_length for shape in shapes))
    for shape in shapes:
        limits = config.data.longest_prompt, config.rollout.longest_response
        check_fits_context(*limits, shape, ("data.max_prompt_tokens", "rollout.max_response_tokens"))
    return config


def _ppo_roles(
    config: PPOConfig,
    policy: PlacedModel,
    reference: PlacedModel,
    rewards: dict[str, PlacedModel],
    value: PlacedModel | None,
) -> list[PlannedRole]:
    """Policy, reference, reward models and, where advantages need one, value model; when parts of them are in host memory."""
    updates = ("policy", "ptx", "value")
    judging = ("rollout", POLICY_SCORING, CRITIC_SCORING, SCORING_MEANWHILE)
    optimizer = dict.fromkeys(("optimizer", "ema"), judging) if config.offload.optimizer else {}
    away = {"reference": CRITIC_SCORING, "reward": POLICY_SCORING}
    rests = {
        name: {"weights": ("rollout", other, *updates, SAVING)} if getattr(config.offload, name) else {}
        for name, other in away.items()
    }
    # Under adapters, the reference is the policy's own frozen weights.
    second = [] if policy.adapter else [PlannedRole("reference", reference, trained=False, rests=rests["reference"])]
    roles = [
        PlannedRole("policy", policy, trained=True, average=config.ppo.ema_decay > 0, rests=optimizer),
        *second,
        *(PlannedRole(name, reward, trained=False, rests=rests["reward"]) for name, reward in rewards.items()),
    ]
    if value is not None:
        roles.append(PlannedRole("value", value, trained=True, rests=optimizer))
    return roles


def _reward_models(config: PPOConfig) -> list[str]:
    """Their names in a plan; one is assumed where a configuration names neither models nor functions."""
    if len(config.reward_models) > 1:
        return [f"reward {part.name}" for part in config.reward_models]
    functions_alone = named_rewards(config.reward, config.rewards) and not config.reward_models
    return [] if functions_alone else ["reward"]


def _copy_phases(roles: list[PlannedRole], cluster: ClusterConfig) -> list[PlannedPhase]:
    """What rests on the host is copied there and back once an iteration."""
    phases = []
    for role in roles:
        held = max(
            role.host_bytes_on(rank) for rank in role.placed.ranks[:: role.placed.gpus // role.placed.parallel.pipeline]
        )
        if held:
            seconds = 2 * held / cluster.host_rate
            phases.append(
                PlannedPhase(f"copies of {role.name}", seconds, 0.0, role.placed, lambda stage: {}, part="copies")
            )
    return phases


def _rollout_phase(
    config: PPOConfig, policy: PlacedModel, is_copy: bool, cluster: ClusterConfig, workload: WorkloadConfig
) -> PlannedPhase:
    """Sampling, and before it the weights' way to another layout."""
    episodes, sampling = config.ppo.batch_size, config.rollout
    rows = math.ceil(episodes / policy.data)
    together = min(sampling.batch_size, rows)
    paged = sampling.engine is SamplingEngine.megatron
    batches = 1 if paged else policy.parallel.pipeline
    in_flight = min(rows, together * batches)
    length = config.data.longest_prompt + sampling.longest_response
    mean = workload.prompt_tokens + workload.response_tokens
    held = blocks_of(length) * BLOCK if paged else length  # tokens of each slot

    def memory(stage: int) -> dict[str, float]:
        whole = cache_bytes(policy, stage, in_flight, held)
        return {
            "kv cache": whole if sampling.cache_gb is None else sampling.cache_gb * 2**30,
            "buffers": forward_working(policy, Shape(together, config.data.longest_prompt)),
        }

    limit = sampling.longest_response
    passes = decode_passes(rows, in_flight, min(workload.response_tokens, limit), limit)
    prompt = min(workload.prompt_tokens, config.data.longest_prompt) / config.ppo.samples_per_prompt  # read once
    seconds = decode_seconds(policy, cluster, rows, together, prompt, passes, mean if paged else length, batches)
    if is_copy:
        seconds += links.message(max(map(policy.parameters, policy.ends)) * policy.element, policy, cluster)
    return PlannedPhase(
        "rollout", seconds, forward_flops(policy, episodes * mean, mean), policy, memory, part="rollout"
    )


def _scoring_phase(
    name: str, readers: list[PlacedModel], config: PPOConfig, cluster: ClusterConfig, workload: WorkloadConfig
) -> PlannedPhase:
    """Models of the same shape and layout read the episodes, one after the other: a prompt once for all its samples."""
    episodes, samples = config.ppo.batch_size, config.ppo.samples_per_prompt
    length = config.data.longest_prompt + config.rollout.longest_response
    mean = workload.prompt_tokens / samples + workload.response_tokens
    shape, batch = microbatches(episodes, config.ppo.micro_batch, readers[0], mean, length)
    shape = replace(shape, wanted=config.rollout.longest_response / length)
    batch = replace(batch, length=attended_length(workload, samples), wanted=workload.response_tokens / mean)
    seconds = sum(sum(schedule_seconds(placed, cluster, [batch], backward=False)) for placed in readers)
    flops = sum(forward_flops(placed, episodes * mean, batch.length, batch.wanted) for placed in readers)
    peak = scoring_peak(readers[0], shape)
    idle = bubble(readers[0], batch.microbatches)
    return PlannedPhase(name, seconds, flops, readers[0], lambda stage: peak, idle, part="scoring")


def _critic_phases(
    critics: list[PlacedModel], config: PPOConfig, cluster: ClusterConfig, workload: WorkloadConfig
) -> list[PlannedPhase]:
    """On ranks of their own, they read all portions but the last while the policy's still sample."""
    if not critics:
        return []
    phase = _scoring_phase(CRITIC_SCORING, critics, config, cluster, workload)
    last = 1 / config.placement.portions
    if config.placement.kind is PlacementKind.colocated or last == 1:
        return [phase]
    rest = 1 - last
    meanwhile = replace(phase, seconds=rest * phase.seconds, flops=rest * phase.flops, part="rollout")
    return [
        replace(meanwhile, name=SCORING_MEANWHILE),
        replace(phase, seconds=last * phase.seconds, flops=last * phase.flops),
    ]


def _policy_phases(
    config: PPOConfig, policy: PlacedModel, cluster: ClusterConfig, workload: WorkloadConfig
) -> list[PlannedPhase]:
    """PPO's and pretraining's microbatches, which share one schedule: its time is divided by their share of it."""
    ppo, text = config.ppo, config.data.pretraining.sequence_length
    mean = workload.prompt_tokens + workload.response_tokens
    length = config.data.longest_prompt + config.rollout.longest_response
    shape, batch = microbatches(ppo.minibatch_size, ppo.micro_batch, policy, mean, length)
    share = config.rollout.longest_response / length
    shapes, batches = [replace(shape, wanted=share)], [replace(batch, wanted=workload.response_share)]
    names, sequences, tokens = ["policy"], [ppo.minibatch_size], [mean]
    if ppo.mixes_text:
        examples = ppo.minibatch_size * ppo.ptx_ratio
        shape, batch = microbatches(examples, ppo.ptx_micro_batch, policy, text, text)
        shapes.append(shape)
        batches.append(batch)
        names, sequences, tokens = [*names, "ptx"], [*sequences, examples], [*tokens, text]
    total = sum(batch.microbatches for batch in batches)
    updates = ppo.batch_size // ppo.minibatch_size * ppo.inner_epochs
    seconds = schedule_seconds(policy, cluster, batches, backward=True)
    seconds[0] += update_seconds(policy, cluster, ppo.ema_decay > 0, beside=batches[-1])

    def memory(stage: int) -> dict[str, float]:
        peaks = [training_peak(policy, stage, shape, total) for shape in shapes]
        kept = {"text's gradient": policy.trained_parameters(stage) * FP32} if ppo.reports_gradients else {}
        return max(peaks, key=lambda peak: sum(peak.values())) | kept

    return [
        PlannedPhase(
            name,
            updates * seconds[i],
            updates * BACKWARD_TOO * forward_flops(policy, sequences[i] * tokens[i], tokens[i], batches[i].wanted),
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
    length = config.data.longest_prompt + config.rollout.longest_response
    shape, batch = microbatches(ppo.minibatch_size, ppo.micro_batch, critic, mean, length)
    updates = ppo.batch_size // ppo.minibatch_size * ppo.inner_epochs
    phase = training_phase("value", critic, cluster, shape, batch, ppo.minibatch_size * mean)
    return replace(phase, seconds=updates * phase.seconds, flops=updates * phase.flops)
