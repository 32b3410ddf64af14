"""From a configuration to a trainer: data and starting points are checked first, then models are built."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint.source import Source
from megatron_rlhf.config import checks
from megatron_rlhf.config.data import PretrainingDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.stages import BaseConfig, EvaluateConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.pretraining import PretrainingData, load_pretraining
from megatron_rlhf.data.prompts import load_prompts
from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer, require_tokenizer_fits
from megatron_rlhf.models.gpt import transformer_engine_serves
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.collect import Roles
from megatron_rlhf.trainers.evaluate import Evaluator
from megatron_rlhf.trainers.ppo import PPOTrainer
from megatron_rlhf.trainers.reward_model import RewardModelTrainer
from megatron_rlhf.trainers.session import Session
from megatron_rlhf.trainers.sft import SFTTrainer
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# Saved roles that a role can start from, the best fit first.
POLICY = ("policy",)
SCALAR = ("reward", "value", "policy")


def check_machine(config: BaseConfig, world_size: int) -> None:
    """Layouts against the world, precision against what is installed. No process group is needed."""
    engine = transformer_engine_serves()
    gpu = torch.cuda.is_available()
    checks.check_precision(config.precision, engine, gpu, torch.cuda.get_device_capability() if gpu else (0, 0))
    checks.check_fp8(config)
    for key, (parallel, ranks) in _layouts(config, world_size).items():
        whose = "of this job" if ranks == world_size else "that placement=disaggregated gives it"
        checks.check_layout(parallel, ranks, key, whose)
        checks.check_experts(parallel, key)


def _layouts(config: BaseConfig, world_size: int) -> dict[str, tuple[ParallelConfig, int]]:
    """Each layout of a run, by its key, and on how many ranks it is."""
    layouts = {"parallel": (config.parallel, world_size)}
    if isinstance(config, EvaluateConfig):
        layouts["critic_parallel"] = config.critic_parallel, world_size
    if isinstance(config, PPOConfig):
        checks.check_placement(config.placement, world_size)
        policy, critic = map(len, config.placement.ranks(world_size))
        layouts = {"parallel": (config.parallel, policy), "critic_parallel": (config.critic_parallel, critic)}
        if (sampling := config.rollout.parallel.of(config.parallel)) is not None:
            layouts["rollout.parallel"] = sampling, policy
    return layouts


def build_sft(config: SFTConfig, session: Session) -> SFTTrainer:
    """`examples/train_sft.py`."""
    data = config.data
    source, model = _start(config.policy.init_from, "policy.init_from", POLICY, config.model, "model")
    checks.check_model(model, config.parallel, "parallel")
    tokenizer = _tokenizer(data.tokenizer, model)
    limits = (data.max_prompt_tokens, data.max_response_tokens, model.max_sequence_length)
    demonstrations = validation = None
    if data.demonstrations is not None and data.pretraining_mix < 1:
        demonstrations = load_demonstrations(data.demonstrations, tokenizer, *limits, columns=data.columns.given())
        log.info(demonstrations.describe())
        if data.validation is not None:
            validation = load_demonstrations(data.validation, tokenizer, *limits, columns=data.columns.given())
    pretraining = None
    if data.pretraining_mix > 0:
        per_step = round(config.sft.batch_size * data.pretraining_mix)
        steps = config.sft.max_steps or config.sft.epochs * (
            -(-len(demonstrations or []) // max(config.sft.batch_size - per_step, 1))
        )
        pretraining = _pretraining(data.pretraining, tokenizer, model, steps * per_step, session)
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    policy = _role("policy", model, layout, config, source, dropout=config.sft.dropout)
    trained = TrainedRole.create(policy, config.policy.optimizer, config.precision, config.run.max_skipped_steps)
    reward = None
    if config.reward.init_from is not None:
        reward_source, reward_model = _start(config.reward.init_from, "reward.init_from", SCALAR, None, "model")
        reward = _role("reward", reward_model, layout, config, reward_source, scalar=True).frozen()
    return SFTTrainer(config, session, tokenizer, trained, demonstrations, validation, pretraining, reward)


def build_reward_model(config: RewardModelConfig, session: Session) -> RewardModelTrainer:
    """`examples/train_reward_model.py`."""
    data = config.data
    source, model = _start(config.reward.init_from, "reward.init_from", SCALAR, config.model, "model")
    checks.check_model(model, config.parallel, "parallel")
    tokenizer = _tokenizer(data.tokenizer, model)
    limits = (data.max_prompt_tokens, data.max_response_tokens, model.max_sequence_length)
    loaded = load_comparisons(data.comparisons, tokenizer, *limits)
    log.info(loaded.describe())
    if data.validation is not None:
        training, validation = list(loaded), list(load_comparisons(data.validation, tokenizer, *limits))
    else:
        training, validation = hold_out(list(loaded), data.validation_fraction, config.run.seed)
    if data.demonstrations is not None:
        demonstrations = [d.tokens.tolist() for d in load_demonstrations(data.demonstrations, tokenizer, *limits)]
    else:
        demonstrations = [
            [*c.prompt_tokens.tolist(), *c.responses_tokens[c.ranks.index(min(c.ranks))].tolist()] for c in training
        ]
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    role = _role("reward", model, layout, config, source, scalar=True)
    trained = TrainedRole.create(role, config.reward.optimizer, config.precision, config.run.max_skipped_steps)
    return RewardModelTrainer(config, session, trained, training, validation, demonstrations)


def build_ppo(config: PPOConfig, session: Session) -> PPOTrainer:
    """`examples/train_ppo.py`."""
    policy_source, model = _start(config.policy.init_from, "policy.init_from", POLICY, config.model, "model")
    reward_source, critic_model = _start(
        config.reward.init_from, "reward.init_from", SCALAR, config.critic_model, "critic_model"
    )
    value_from = config.value.init_from or config.reward.init_from
    value_source, value_model = _start(
        value_from, "value.init_from", ("value", "reward", "policy"), config.critic_model, "critic_model"
    )
    checks.check_model(model, config.parallel, "parallel")
    if (sampling := config.rollout.parallel.of(config.parallel)) is not None:
        checks.check_generation(model, sampling, config.parallel)
        model = _padded_for_both(model, config.parallel.tensor, sampling.tensor)
    checks.check_model(critic_model, config.critic_parallel, "critic_parallel")
    checks.check_model(value_model, config.critic_parallel, "critic_parallel")
    for shape in (model, critic_model, value_model):
        keys = ("data.max_prompt_tokens", "rollout.max_response_tokens")
        checks.check_fits_context(config.data.max_prompt_tokens, config.rollout.max_response_tokens, shape, keys)
    tokenizer = _tokenizer(config.data.tokenizer, model)
    require_tokenizer_fits(tokenizer, critic_model.vocab_size, "critic_model.vocab_size")
    require_tokenizer_fits(tokenizer, value_model.vocab_size, "critic_model.vocab_size")
    prompts = load_prompts(
        config.data.prompts, tokenizer, config.data.max_prompt_tokens, max_per_user=config.data.max_per_user
    )
    log.info(prompts.describe())
    pretraining = None
    if config.data.pretraining.source is not None:
        ppo = config.ppo
        examples = ppo.iterations * ppo.inner_epochs * ppo.batch_size * ppo.ptx_ratio if ppo.ptx_coef > 0 else 1
        pretraining = _pretraining(config.data.pretraining, tokenizer, model, examples, session)
    policy_ranks, critic_ranks = config.placement.ranks(dist.get_world_size())
    layout = ParallelLayout.create(config.parallel, policy_ranks)
    critic_layout = ParallelLayout.create(config.critic_parallel, critic_ranks)
    for each in (critic_layout, layout):
        each.seed(config.run.seed)
    policy = _role("policy", model, layout, config, policy_source)
    reference = _role("reference", model, layout, config, policy_source).frozen()
    reward = _role("reward", critic_model, critic_layout, config, reward_source, scalar=True).frozen()
    value = _role("value", value_model, critic_layout, config, value_source, scalar=True)
    for role, rests in ((reference, config.offload.reference), (reward, config.offload.reward)):
        if rests:
            role.offload()
    roles = Roles(policy, _sampler(policy, config), reference, reward, value)
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


def _padded_for_both(model: ModelConfig, training: int, sampling: int) -> ModelConfig:
    """The same model, its embedding padded so that either number of tensor-parallel ranks divides the rows."""
    multiple = math.lcm(model.vocab_multiple * training, sampling)
    return dataclasses.replace(model, vocab_multiple=multiple // training)


def _sampler(policy: Role, config: PPOConfig) -> Role:
    """The policy, or an empty copy of it at the layout to sample at."""
    layout = config.rollout.parallel.of(config.parallel)
    if layout is None:
        return policy
    rows = policy.model.padded_vocab_size(config.parallel.tensor)  # the copy has as many
    model = dataclasses.replace(policy.model, vocab_multiple=rows // layout.tensor)
    precision = config.precision_of("sampler")
    return Role.build("sampler", model, ParallelLayout.create(layout, policy.layout.ranks), precision).frozen()


def build_evaluate(config: EvaluateConfig, session: Session) -> Evaluator:
    """`examples/evaluate.py`."""
    wanted = ("policy_ema",) if config.evaluate.ema else POLICY
    source, model = _start(config.policy.init_from, "policy.init_from", wanted, config.model, "model")
    checks.check_model(model, config.parallel, "parallel")
    tokenizer = _tokenizer(config.data.tokenizer, model)
    prompts = load_prompts(config.data.prompts, tokenizer, config.data.max_prompt_tokens)
    few_shot = None
    if config.evaluate.few_shot is not None:
        few_shot = _read_text(config.evaluate.few_shot, "evaluate.few_shot")
    held_out = None
    if config.data.pretraining.source is not None:
        held_out = _pretraining(config.data.pretraining, tokenizer, model, 1, session).held_out
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    policy = _role("policy", model, layout, config, source).frozen()
    reward = None
    if config.reward.init_from is not None:
        reward_source, reward_model = _start(config.reward.init_from, "reward.init_from", SCALAR, None, "model")
        critic_layout = ParallelLayout.create(config.critic_parallel)
        checks.check_model(reward_model, config.critic_parallel, "critic_parallel")
        reward = _role("reward", reward_model, critic_layout, config, reward_source, scalar=True).frozen()
    return Evaluator(config, session, tokenizer, prompts, held_out, policy, reward, few_shot)


def hold_out(items: list[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training, validation): a seeded share of the items, at least one where the fraction is positive."""
    count = min(max(round(len(items) * fraction), 1), len(items) - 1) if fraction > 0 else 0
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


def _start(
    init_from: str | None, key: str, wanted: Sequence[str], shape: ModelConfig | None, shape_key: str
) -> tuple[Source | None, ModelConfig]:
    """Where weights come from, and the shape of the model: of the checkpoint, else of the configuration."""
    if init_from is None:
        if shape is None:
            raise UserError(f"give {key} (a checkpoint or Hugging Face folder)")
        return None, shape
    source = Source.find(init_from, key, tuple(wanted))
    source.require_shape(shape, shape_key)
    source.require_undamaged(key)
    return source, source.model


def _role(
    name: str,
    model: ModelConfig,
    layout: ParallelLayout,
    config: BaseConfig,
    source: Source | None,
    scalar: bool = False,
    dropout: float = 0.0,
) -> Role:
    precision = config.precision_of(name)
    if precision is Precision.fp8_hybrid:
        key = "critic_parallel" if layout.config is getattr(config, "critic_parallel", None) else "parallel"
        checks.check_fp8_shape(model, layout.config, config.fp8.recipe, key)
    role = Role.build(name, model, layout, precision, scalar, dropout, config.fp8.recipe)
    if scalar:
        role.reset_head(config.run.seed)
    if source is not None:
        source.load_into(role)
    origin = f", from {source.path}" if source else ", random weights"
    log.info("%s: %s parameters, %s%s", name, f"{role.num_parameters:,}", layout.describes, origin)
    return role


def _read_text(path: str, key: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read: {error.strerror}") from error


def _tokenizer(path: str, model: ModelConfig) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    require_tokenizer_fits(tokenizer, model.vocab_size, "model.vocab_size")
    return tokenizer


def _pretraining(
    config: PretrainingDataConfig, tokenizer: Tokenizer, model: ModelConfig, samples: int, session: Session
) -> PretrainingData:
    assert config.source is not None
    if config.sequence_length > model.max_sequence_length:
        raise UserError(
            f"data.pretraining.sequence_length={config.sequence_length} is more than the model's context of "
            f"{model.max_sequence_length} tokens"
        )
    return load_pretraining(
        config.source,
        tokenizer,
        config.sequence_length,
        samples=max(samples, 1),
        seed=session.config.seed,
        cache_dir=Path(session.config.dir) / "cache",
        held_out_fraction=config.held_out,
        is_builder=dist.get_rank() == 0,
        barrier=dist.barrier,
    )
