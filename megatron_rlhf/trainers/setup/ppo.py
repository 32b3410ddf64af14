"""PPO's roles and data: checked first, then built."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist

from megatron_rlhf.config.budgets import require_room
from megatron_rlhf.config.checking import checks, layout_checks
from megatron_rlhf.config.checking import engine as engine_checks
from megatron_rlhf.config.data import PromptPart
from megatron_rlhf.config.lengths import share_context
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.conversion.starting_point import POLICY, REWARD, VALUE, StartingPoint
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.pretraining import PretrainingData
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer, require_tokenizer_fits
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.collect import Roles
from megatron_rlhf.rollout.delivery import Delivery
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers import partial_training
from megatron_rlhf.trainers.episodes.functions import find_functions
from megatron_rlhf.trainers.export import require_exportable
from megatron_rlhf.trainers.ppo import PPOTrainer
from megatron_rlhf.trainers.setup import parts
from megatron_rlhf.trainers.setup.records import found_once, watched
from megatron_rlhf.trainers.setup.tokenizer_choice import choose_tokenizer
from megatron_rlhf.trainers.step import TrainedRole


@dataclass(frozen=True)
class Start:
    """Where a role's weights come from, and its shape."""

    key: str
    source: StartingPoint | None
    model: ModelConfig


def build_ppo(config: PPOConfig, session: Session) -> PPOTrainer:
    """`megatron-rlhf ppo`."""
    starts = _find_starts(config, session)
    policy_start = starts["policy"]
    sources = {start.key: start.source for start in starts.values()}
    tokenizer = choose_tokenizer(config.data, sources, session)
    for name, start in starts.items():
        shape_key = "model.vocab_size" if name == "policy" else "critic_model.vocab_size"
        require_tokenizer_fits(tokenizer, start.model.vocab_size, shape_key)

    def build(start: Start, role: str) -> Role:
        return parts.make_role(role, start.model, critic_layout, config, start.source, scalar=True)

    prompts, pretraining = _read_data(config, tokenizer, policy_start.model, session)
    held_out = _read_held_out(config, tokenizer, session)
    parts.warn_of_shared_prompts(
        session, (p.tokens for p in prompts), (p.tokens for p in held_out), key="evaluation.prompts"
    )
    policy_ranks, critic_ranks = config.placement.ranks(dist.get_world_size())
    layout = ParallelLayout.create(config.parallel, policy_ranks)
    critic_layout = ParallelLayout.create(config.critic_parallel, critic_ranks)
    reward = find_functions(config, critic_layout, prompts, session)
    for each in (critic_layout, layout):
        each.seed(config.run.seed)
    policy = parts.make_role("policy", policy_start.model, layout, config, policy_start.source)
    reference = parts.make_reference(policy, policy_start.model, layout, config, policy_start.source)
    reward.models = {part.name: build(starts[part.key], "reward").frozen() for part in config.reward_models}
    value = build(starts["value"], "value") if "value" in starts else None
    away = [reference] if config.offload.reference else []
    away += reward.models.values() if config.offload.reward else []
    for role in away:
        role.offload()
    sampler = parts.make_sampler(policy, config)
    roles = Roles(policy, sampler, reference, reward, value, _delivery(config, sampler.layout, critic_layout))
    for role in (policy, roles.sampler, reference):
        role.know_only(tokenizer.known_ids)
    skips = config.run.max_skipped_steps
    trained = TrainedRole.create(policy, config.policy.optimizer, config.precision, skips, config.ppo.ema_decay)
    trained_value = TrainedRole.create(value, config.value.optimizer, config.precision, skips) if value else None
    return PPOTrainer(config, session, tokenizer, prompts, pretraining, trained, trained_value, roles, held_out)


def _delivery(config: PPOConfig, sampler: ParallelLayout, critic: ParallelLayout) -> Delivery | None:
    return None if sampler.spans_world else Delivery(sampler, critic, config.placement.portions)


def _find_starts(config: PPOConfig, session: Session) -> dict[str, Start]:
    """Policy, reward models and, if advantages need one, value model: found, and checked against layouts and lengths.

    The value model starts from the first reward model's own weights, or from the policy's where there is none, unless
    another model is named: a language model then gets a new random head.
    """
    source, model = parts.find_start(config.policy.init_from, "policy.init_from", POLICY, config.model, "model")
    parts.keep_start(session, "policy", source, model, "policy.init_from")
    parts.check_role("policy", model, config)
    partial_training.check("policy", config, model, source, scalar=False)
    named = {f"{part.key}.init_from": part.config.init_from for part in config.reward_models}
    named |= {"policy.init_from": config.policy.init_from, "value.init_from": config.value.init_from}
    require_exportable(config.run, model, named)
    if (sampling := config.rollout.parallel.of(config.parallel)) is not None:
        layout_checks.check_generation(model, sampling, config.parallel)
        model = parts.padded_for_both(model, config.parallel.tensor, sampling.tensor)
    starts = {"policy": Start("policy.init_from", source, model)}
    critics = [
        (
            part.key,
            "reward model" if part.key == "reward" else f"reward model {part.name}",
            REWARD,
            part.config.init_from,
        )
        for part in config.reward_models
    ]
    keys = {role: f"{role}.init_from" for role, *_ in critics}
    if config.ppo.has_critic:
        first = [(f"{key}.init_from", init_from) for key, _, _, init_from in critics]
        own = [("value.init_from", config.value.init_from)] if config.value.init_from else []
        keys["value"], init_from = [*own, *first, ("policy.init_from", config.policy.init_from)][0]
        critics.append(("value", "value model", VALUE, init_from))
    for role, what, wanted, init_from in critics:
        source, shape = parts.find_start(init_from, keys[role], wanted, config.critic_model, "critic_model")
        parts.keep_start(session, what, source, shape, keys[role], "critic_model")
        parts.check_role("value" if role == "value" else "reward", shape, config, "critic_parallel")
        if role == "value":
            partial_training.check("value", config, shape, source, scalar=True, key=keys[role])
        starts[role] = Start(keys[role], source, shape)
    share_context(
        config.data, config.rollout, "rollout", min(start.model.max_sequence_length for start in starts.values())
    )
    session.settle(config)
    for start in starts.values():
        limits = config.data.longest_prompt, config.rollout.longest_response
        checks.check_fits_context(*limits, start.model, ("data.max_prompt_tokens", "rollout.max_response_tokens"))
    engine_checks.check_engine_model(config, model)
    return starts


def _read_data(
    config: PPOConfig, tokenizer: Tokenizer, model: ModelConfig, session: Session
) -> tuple[Examples[Prompt], PretrainingData | None]:
    """Prompts and, where there is some, pretraining text; budgets in tokens must have room for both."""
    prompts = parts.make_prompts(config.data.prompts, config.data, tokenizer, session)
    chosen_by = ("data.prompts", "data.max_prompt_tokens", "data.max_per_user", "data.tokenizer")
    parts.keep_data(session, "prompts", chosen_by, prompts.items, _pieces)
    ppo, pretraining = config.ppo, None
    lengths = found_once(
        prompts.items,
        "lengths",
        lambda: sorted({len(prompt.tokens) for prompt in watched(session, prompts.items, "prompts", "measured")}),
    )
    engine_checks.check_engine_prompts(config, lengths[0], f"data.prompts={config.data.prompts}")
    longest = lengths[-1] + config.rollout.longest_response
    require_room("ppo.micro_batch_tokens", ppo.micro_batch_tokens, longest, "the longest prompt and response")
    if config.data.pretraining.source is not None:
        text = config.data.pretraining.sequence_length
        require_room("ppo.ptx_micro_batch_tokens", ppo.ptx_micro_batch_tokens, text, "a pretraining sequence")
        examples = ppo.iterations * ppo.inner_epochs * ppo.batch_size * ppo.ptx_ratio if ppo.mixes_text else 1
        pretraining = parts.make_pretraining(config.data.pretraining, tokenizer, model, examples, session)
    return prompts, pretraining


def _read_held_out(config: PPOConfig, tokenizer: Tokenizer, session: Session) -> list[Prompt]:
    """Prompts that are answered at times and not trained on; none where no evaluation is asked for."""
    evaluation = config.evaluation
    if not evaluation.is_on:
        return []
    part = PromptPart.validation if evaluation.prompts is None else PromptPart.all
    source = evaluation.prompts or config.data.prompts
    prompts = parts.make_prompts(source, replace(config.data, part=part), tokenizer, session)
    chosen = [prompts[i] for i in range(min(evaluation.samples, len(prompts)))]
    engine_checks.check_engine_prompts(
        config, min(len(prompt.tokens) for prompt in chosen), f"evaluation.prompts={source}"
    )
    keys = ("evaluation.prompts", "data.prompts", "data.part_shares")
    parts.keep_data(session, "held-out prompts", keys, chosen, _pieces)
    return chosen


def _pieces(prompts: Iterable[Prompt]) -> Iterator[np.ndarray]:
    return (np.append(prompt.tokens, prompt.id) for prompt in prompts)
