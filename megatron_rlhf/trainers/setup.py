"""From a configuration to a trainer: data and starting points are checked first, then models are built."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from megatron_rlhf.config import checks
from megatron_rlhf.config.budgets import require_room
from megatron_rlhf.config.stages import EvaluateConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.conversion.starting_point import AVERAGE, POLICY, REWARD, TRAINED_REWARD, VALUE
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.mix import Mix
from megatron_rlhf.data.splits import hold_out
from megatron_rlhf.data.tokenizer import require_tokenizer_fits
from megatron_rlhf.evaluation.evaluator import Evaluator
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.collect import Roles
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers import parts
from megatron_rlhf.trainers.ppo import PPOTrainer
from megatron_rlhf.trainers.reward_model import RewardModelTrainer
from megatron_rlhf.trainers.sft import SFTTrainer
from megatron_rlhf.trainers.step import TrainedRole
from megatron_rlhf.trainers.tokenizer_choice import choose_tokenizer

log = logging.getLogger(__name__)


def build_sft(config: SFTConfig, session: Session) -> SFTTrainer:
    """`examples/train_sft.py`."""
    data = config.data
    source, model = parts.find_start(config.policy.init_from, "policy.init_from", POLICY, config.model, "model")
    reward_source = reward_model = None
    if config.reward.init_from is not None:
        reward_source, reward_model = parts.find_start(
            config.reward.init_from, "reward.init_from", REWARD, None, "model"
        )
    checks.check_model(model, config.parallel, "parallel")
    tokenizer = choose_tokenizer(data, {"policy.init_from": source, "reward.init_from": reward_source}, session)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    limits = (data.max_prompt_tokens, data.max_response_tokens, model.max_sequence_length)
    demonstrations = validation = None
    if data.demonstrations is not None and data.pretraining_mix < 1:
        demonstrations = load_demonstrations(data.demonstrations, tokenizer, *limits, columns=data.columns.given())
        log.info(demonstrations.describe())
        if data.validation is not None:
            validation = load_demonstrations(data.validation, tokenizer, *limits, columns=data.columns.given())
            prompts = ([d.tokens[: d.prompt_length] for d in part] for part in (demonstrations, validation))
            parts.warn_of_shared_prompts(*prompts)
    mix = Mix(config.sft.batch_size, data.pretraining_mix)
    steps = config.sft.max_steps or mix.steps(len(demonstrations or []), config.sft.epochs)
    checks.check_warmup(config.sft.warmup_steps, steps, "sft.warmup_steps")
    pretraining = None
    if data.pretraining_mix > 0:
        pretraining = parts.make_pretraining(data.pretraining, tokenizer, model, mix.texts_before(steps), session)
    longest = max((len(d.tokens) for part in (demonstrations, validation) for d in part or ()), default=0)
    if pretraining is not None:
        longest = max(longest, data.pretraining.sequence_length)
    require_room("sft.micro_batch_tokens", config.sft.micro_batch_tokens, longest, "the longest sequence")
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    policy = parts.make_role("policy", model, layout, config, source, dropout=config.sft.dropout)
    policy.know_only(tokenizer.known_ids)
    trained = TrainedRole.create(policy, config.policy.optimizer, config.precision, config.run.max_skipped_steps)
    reward = None
    if reward_model is not None:
        reward = parts.make_role("reward", reward_model, layout, config, reward_source, scalar=True).frozen()
    return SFTTrainer(config, session, tokenizer, trained, demonstrations, validation, pretraining, reward)


def build_reward_model(config: RewardModelConfig, session: Session) -> RewardModelTrainer:
    """`examples/train_reward_model.py`."""
    data = config.data
    source, model = parts.find_start(config.reward.init_from, "reward.init_from", TRAINED_REWARD, config.model, "model")
    checks.check_model(model, config.parallel, "parallel")
    tokenizer = choose_tokenizer(data, {"reward.init_from": source}, session)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    limits = (data.max_prompt_tokens, data.max_response_tokens, model.max_sequence_length)
    columns = data.columns.given()
    loaded = load_comparisons(data.comparisons, tokenizer, *limits, columns)
    log.info(loaded.describe())
    if data.validation is not None:
        training, validation = list(loaded), list(load_comparisons(data.validation, tokenizer, *limits, columns))
        parts.warn_of_shared_prompts(*([c.prompt_tokens for c in part] for part in (training, validation)))
    else:
        training, validation = hold_out(list(loaded), data.validation_fraction, config.run.seed, lambda c: c.users)
    log.info("%d prompts to train on, %d held out", len(training), len(validation))
    algorithm = config.reward_model
    steps = algorithm.epochs * -(-len(training) // algorithm.batch_size)
    checks.check_warmup(algorithm.warmup_steps, steps, "reward_model.warmup_steps")
    if data.demonstrations is not None:
        columns = data.demonstration_columns.given()
        loaded_demonstrations = load_demonstrations(data.demonstrations, tokenizer, *limits, columns)
        demonstrations = [d.tokens.tolist() for d in loaded_demonstrations]
    else:
        demonstrations = [
            [*c.prompt_tokens.tolist(), *c.responses_tokens[i].tolist()] for c in training for i in c.best
        ]
    texts = [len(c.prompt_tokens) + len(r) for part in (training, validation) for c in part for r in c.responses_tokens]
    longest = max([*texts, *map(len, demonstrations)])
    require_room(
        "reward_model.micro_batch_tokens",
        config.reward_model.micro_batch_tokens,
        longest,
        "the longest prompt and response",
    )
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    role = parts.make_role("reward", model, layout, config, source, scalar=True)
    role.freeze_head_bias()  # no comparison depends on it, and Adam would make steps of the rounding
    trained = TrainedRole.create(role, config.reward.optimizer, config.precision, config.run.max_skipped_steps)
    return RewardModelTrainer(config, session, trained, training, validation, demonstrations)


def build_ppo(config: PPOConfig, session: Session) -> PPOTrainer:
    """`examples/train_ppo.py`."""
    policy_source, model = parts.find_start(config.policy.init_from, "policy.init_from", POLICY, config.model, "model")
    reward_source, critic_model = parts.find_start(
        config.reward.init_from, "reward.init_from", REWARD, config.critic_model, "critic_model"
    )
    # The reward model's own weights, unless another model is named: then a language model gets a head drawn anew.
    value_from, value_key = config.value.init_from, "value.init_from"
    if value_from is None:
        value_from, value_key = config.reward.init_from, "reward.init_from"
    value_source, value_model = parts.find_start(value_from, value_key, VALUE, config.critic_model, "critic_model")
    checks.check_model(model, config.parallel, "parallel")
    if (sampling := config.rollout.parallel.of(config.parallel)) is not None:
        checks.check_generation(model, sampling, config.parallel)
        model = parts.padded_for_both(model, config.parallel.tensor, sampling.tensor)
    checks.check_model(critic_model, config.critic_parallel, "critic_parallel")
    checks.check_model(value_model, config.critic_parallel, "critic_parallel")
    for shape in (model, critic_model, value_model):
        keys = ("data.max_prompt_tokens", "rollout.max_response_tokens")
        checks.check_fits_context(config.data.max_prompt_tokens, config.rollout.max_response_tokens, shape, keys)
    starts = {"policy.init_from": policy_source, "reward.init_from": reward_source, "value.init_from": value_source}
    tokenizer = choose_tokenizer(config.data, starts, session)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    require_tokenizer_fits(tokenizer, critic_model.vocab_size, "critic_model.vocab_size")
    require_tokenizer_fits(tokenizer, value_model.vocab_size, "critic_model.vocab_size")
    prompts = parts.make_prompts(config.data, tokenizer)
    ppo, pretraining = config.ppo, None
    longest = max(len(prompt.tokens) for prompt in prompts) + config.rollout.max_response_tokens
    require_room("ppo.micro_batch_tokens", ppo.micro_batch_tokens, longest, "the longest prompt and response")
    if config.data.pretraining.source is not None:
        text = config.data.pretraining.sequence_length
        require_room("ppo.ptx_micro_batch_tokens", ppo.ptx_micro_batch_tokens, text, "a pretraining sequence")
        examples = ppo.iterations * ppo.inner_epochs * ppo.batch_size * ppo.ptx_ratio if ppo.mixes_text else 1
        pretraining = parts.make_pretraining(config.data.pretraining, tokenizer, model, examples, session)
    policy_ranks, critic_ranks = config.placement.ranks(dist.get_world_size())
    layout = ParallelLayout.create(config.parallel, policy_ranks)
    critic_layout = ParallelLayout.create(config.critic_parallel, critic_ranks)
    for each in (critic_layout, layout):
        each.seed(config.run.seed)
    policy = parts.make_role("policy", model, layout, config, policy_source)
    reference = parts.make_role("reference", model, layout, config, policy_source).frozen()
    reward = parts.make_role("reward", critic_model, critic_layout, config, reward_source, scalar=True).frozen()
    value = parts.make_role("value", value_model, critic_layout, config, value_source, scalar=True)
    for role, rests in ((reference, config.offload.reference), (reward, config.offload.reward)):
        if rests:
            role.offload()
    roles = Roles(policy, parts.make_sampler(policy, config), reference, reward, value)
    for role in (policy, roles.sampler, reference):
        role.know_only(tokenizer.known_ids)
    skips = config.run.max_skipped_steps
    return PPOTrainer(
        config,
        session,
        tokenizer,
        prompts,
        pretraining,
        TrainedRole.create(policy, config.policy.optimizer, config.precision, skips, config.ppo.ema_decay),
        TrainedRole.create(value, config.value.optimizer, config.precision, skips),
        roles,
    )


def build_evaluate(config: EvaluateConfig, session: Session) -> Evaluator:
    """`examples/evaluate.py`."""
    wanted = AVERAGE if config.evaluate.ema else POLICY
    source, model = parts.find_start(config.policy.init_from, "policy.init_from", wanted, config.model, "model")
    checks.check_model(model, config.parallel, "parallel")
    reward_source = reward_model = None
    if config.reward.init_from is not None:
        reward_source, reward_model = parts.find_start(
            config.reward.init_from, "reward.init_from", REWARD, None, "model"
        )
        checks.check_model(reward_model, config.critic_parallel, "critic_parallel")
    starts = {"policy.init_from": source, "reward.init_from": reward_source}
    tokenizer = choose_tokenizer(config.data, starts, session)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    prompts = parts.make_prompts(config.data, tokenizer)
    few_shot = None
    if config.evaluate.few_shot is not None:
        few_shot = parts.read_text(config.evaluate.few_shot, "evaluate.few_shot")
    held_out = None
    if config.data.pretraining.source is not None:
        held_out = parts.make_pretraining(config.data.pretraining, tokenizer, model, 1, session).held_out
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    policy = parts.make_role("policy", model, layout, config, source).frozen()
    policy.know_only(tokenizer.known_ids)
    reward = None
    if reward_model is not None:
        critic_layout = ParallelLayout.create(config.critic_parallel)
        reward = parts.make_role("reward", reward_model, critic_layout, config, reward_source, scalar=True).frozen()
    return Evaluator(config, session, tokenizer, prompts, held_out, policy, reward, few_shot)


# Stage -> what makes its trainer.
BUILD: Mapping[str, Callable[[Any, Session], Any]] = {
    "sft": build_sft,
    "reward_model": build_reward_model,
    "ppo": build_ppo,
    "evaluate": build_evaluate,
}
