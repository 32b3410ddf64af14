"""Contradictions between keys, found before any model is built; messages name the key, its value and a fix.

Checks of single numbers: ranges.py.
"""

from megatron_rlhf.config.budgets import check_micro_batch
from megatron_rlhf.config.data import PretrainingDataConfig, PromptPart
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import check_sampling
from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, ParallelConfig, Positions, Precision
from megatron_rlhf.config.placement import PlacementKind
from megatron_rlhf.config.rewards import check_rewards, named_rewards
from megatron_rlhf.config.stages import (
    BaseConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)
from megatron_rlhf.config.training import AUTO, NOT_GIVEN, ExportChoice, KLControl, RunConfig, SamplingConfig, Selection


def check_run(run: RunConfig) -> None:
    """A folder; a number of steps between checkpoints, or the word for the planner's."""
    if run.dir == NOT_GIVEN:
        raise UserError("run.dir is not given: name the folder that gets the run's files")
    if run.dir.startswith("~/"):
        raise UserError(f"run.dir={run.dir}: a shell replaces ~ only where a word begins; write $HOME{run.dir[1:]}")
    if isinstance(run.save_every, str) and run.save_every != AUTO:
        raise UserError(
            f"run.save_every={run.save_every} must be a number of steps (0: a checkpoint only at the end), or {AUTO}"
        )


def check_precision(
    precision: Precision, recipe: Fp8Recipe, transformer_engine: bool, gpu: bool, capability: tuple[int, int]
) -> None:
    """fp8 needs Transformer Engine and a GPU that supports it; fp16 needs GPU kernels."""
    if precision is Precision.fp8_hybrid and not transformer_engine:
        raise UserError(
            "precision=fp8_hybrid needs Transformer Engine and a GPU, and it cannot be imported here: use NVIDIA's PyTorch "
            "container or install it (docs/cluster.md), or choose precision=bf16"
        )
    if precision is Precision.fp8_hybrid and capability < recipe.capability:
        others = [other.value for other in Fp8Recipe if capability >= other.capability]
        hint = f"fp8.recipe={'|'.join(others)}, or precision=bf16" if others else "precision=bf16"
        raise UserError(
            f"precision=fp8_hybrid with fp8.recipe={recipe.value} needs compute capability {recipe.capability[0]}."
            f"{recipe.capability[1]} (Ada 8.9, Hopper 9.0, Blackwell 10.0); this GPU has {capability[0]}.{capability[1]}: "
            f"choose {hint}"
        )
    if precision is Precision.fp16 and not gpu:
        raise UserError("precision=fp16 needs a GPU; on a CPU choose precision=fp32 or bf16")


def check_fp8(config: BaseConfig) -> None:
    """When sampling may be in fp8."""
    copied = isinstance(config, PPOConfig) and config.rollout.parallel.of(config.parallel) is not None
    if isinstance(config, PPOConfig) and copied and config.rollout.precision is Precision.fp8_hybrid:
        raise UserError("rollout.precision=fp8_hybrid: a copy of the policy at rollout.parallel samples in bf16")
    for key in ("rollout", "sampling"):
        sampling: SamplingConfig | None = getattr(config, key, None)
        if sampling is None or sampling.precision is None:
            continue
        fp8 = config.precision is Precision.fp8_hybrid
        allowed = (Precision.bf16, Precision.fp8_hybrid) if fp8 else (config.precision,)
        if sampling.precision not in allowed:
            raise UserError(
                f"{key}.precision={sampling.precision.value}: with precision={config.precision.value} the model that trains "
                f"can sample in {' or '.join(choice.value for choice in allowed)}"
            )


def check_fp8_shape(model: ModelConfig, parallel: ParallelConfig, recipe: Fp8Recipe, key: str) -> None:
    """Sizes of matrices and sequences must be multiples of what fp8 products need."""
    groups = model.num_query_groups or model.num_attention_heads
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    split = {
        "the heads' width": head * model.num_attention_heads,
        "the width of queries, keys and values": head * (model.num_attention_heads + 2 * groups),
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
    }
    needed = {f"{name} on each of {key}.tensor={parallel.tensor}": n // parallel.tensor for name, n in split.items()}
    needed["hidden_size"] = model.hidden_size
    if model.positions is Positions.learned:  # sequences are padded, never beyond the last position
        needed["max_sequence_length"] = model.max_sequence_length // parallel.token_multiple
    for name, size in needed.items():
        if size % recipe.multiple:
            raise UserError(
                f"precision=fp8_hybrid with fp8.recipe={recipe.value} needs multiples of {recipe.multiple}: {name} is {size}; "
                f"choose another {key}.tensor, or precision=bf16"
            )


def check_one_token(parallel: ParallelConfig, because: str) -> None:
    """Decoding goes token by token through non-interleaved stages, and leaves context parallelism nothing to split."""
    if parallel.virtual_stages > 1:
        raise UserError(
            f"parallel.virtual_stages={parallel.virtual_stages}: {because} decodes through plain stages; use 1"
        )
    if parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context}: {because} samples token by token; use parallel.context=1"
        )


def can_decode(parallel: ParallelConfig) -> bool:
    """A model at this layout can sample: token by token, through plain stages."""
    return parallel.virtual_stages == 1 and parallel.context == 1


def check_sft(config: SFTConfig) -> None:
    """Demonstrations, mix and length of the schedule must agree."""
    data, sft = config.data, config.sft
    if data.pretraining_mix > 0:
        _check_pretraining(data.pretraining, f"data.pretraining_mix={data.pretraining_mix}")
    if data.pretraining_mix < 1 and data.demonstrations is None:
        raise UserError("data.demonstrations is not given; only data.pretraining_mix=1 (text alone) does without")
    if data.pretraining_mix == 1 and sft.max_steps is None:
        raise UserError("data.pretraining_mix=1 has no epochs: give sft.max_steps")
    if config.policy.init_from is None and config.model is None:
        raise UserError(
            "give policy.init_from (a checkpoint or Hugging Face folder) or a model shape (model=gpt3_125m)"
        )
    if sft.max_steps is not None:
        check_warmup(sft.warmup_steps, sft.max_steps, "sft.warmup_steps")
    if config.run.export_hf is ExportChoice.best and (data.pretraining_mix == 1 or not _sft_chooses(config)):
        raise UserError(
            "run.export_hf=best: nothing decides which epoch is best; give data.validation, or sft.select_by=reward_model, or "
            "run.export_hf=last"
        )
    check_micro_batch("sft", sft.micro_batch_size, sft.micro_batch_tokens)
    if config.sft.select_by.value == "reward_model" and config.reward.init_from is None:
        raise UserError("sft.select_by=reward_model needs reward.init_from")
    if config.reward.init_from is not None:  # it scores samples of every epoch, selecting or not
        judging = f"reward.init_from={config.reward.init_from}"
        if data.pretraining_mix == 1:
            raise UserError(
                f"{judging} judges responses to demonstrations' prompts, and data.pretraining_mix=1 reads none"
            )
        check_one_token(config.parallel, "reward.init_from")
        check_sampling(config.sampling, "sampling")


def _sft_chooses(config: SFTConfig) -> bool:
    """Epochs have a figure that decides which is best."""
    return config.data.validation is not None or config.sft.select_by is Selection.reward_model


def check_reward_model(config: RewardModelConfig) -> None:
    """A start and sensible sizes."""
    if config.run.export_hf is ExportChoice.best:
        raise UserError(
            "run.export_hf=best: a reward model is what its last step is (one epoch); use run.export_hf=last"
        )
    if config.reward.init_from is None and config.model is None:
        raise UserError("give reward.init_from (a checkpoint or Hugging Face folder) or a model shape (model=gpt3_6b)")
    algorithm = config.reward_model
    check_micro_batch("reward_model", algorithm.micro_batch_size, algorithm.micro_batch_tokens)


def check_ppo(config: PPOConfig) -> None:
    """Batches, mix, sampling and starting points must agree."""
    ppo = config.ppo
    check_ppo_settings(config)
    if ppo.mixes_text:
        _check_pretraining(config.data.pretraining, f"ppo.ptx_coef={ppo.ptx_coef}")
    if config.policy.init_from is None:
        raise UserError("policy.init_from is not given: PPO starts from a fine-tuned model (megatron-rlhf sft)")
    if not named_rewards(config.reward, config.rewards):
        raise UserError(
            "reward.init_from is not given: PPO needs a reward model (megatron-rlhf reward-model), or reward.function, or "
            "several of them as rewards.NAME"
        )
    _check_held_out(config)
    if not ppo.has_critic and config.placement.kind is PlacementKind.disaggregated and not config.reward_models:
        raise UserError(
            f"placement=disaggregated: the critic's ranks would hold nothing, as ppo.advantages={ppo.advantages.value} has no "
            "value model and the reward is of functions alone; use placement=colocated"
        )


def check_ppo_settings(config: PPOConfig) -> None:
    """What must agree whatever the run starts from and reads."""
    ppo = config.ppo
    check_micro_batch("ppo", ppo.micro_batch_size, ppo.micro_batch_tokens)
    check_micro_batch("ppo", ppo.ptx_micro_batch_size, ppo.ptx_micro_batch_tokens, "ptx_")
    if ppo.batch_size % ppo.minibatch_size:
        raise UserError(f"ppo.minibatch_size={ppo.minibatch_size} does not divide ppo.batch_size={ppo.batch_size}")
    if isinstance(ppo.ptx_coef, str) and not ppo.steers_text:
        raise UserError(f"ppo.ptx_coef={ppo.ptx_coef} must be a number (0: plain PPO), or auto")
    _check_advantages(config)
    if ppo.critic_warmup_iterations > ppo.iterations:
        raise UserError(
            f"ppo.critic_warmup_iterations={ppo.critic_warmup_iterations} is longer than the run's {ppo.iterations} iterations"
        )
    if learning := ppo.iterations - ppo.critic_warmup_iterations:  # zero: only the value model learns
        check_warmup(ppo.warmup_iterations, learning, "ppo.warmup_iterations", "iterations in which the policy learns")
    if ppo.kl_control is KLControl.adaptive and ppo.kl_horizon <= ppo.batch_size / 5:
        raise UserError(
            f"ppo.kl_horizon={ppo.kl_horizon} with ppo.batch_size={ppo.batch_size}: one iteration could change the KL "
            f"coefficient by its whole size, and its sign; give more than {ppo.batch_size // 5}"
        )
    check_rewards(config.reward, config.rewards)
    if config.parallel.virtual_stages > 1:
        raise UserError(
            f"parallel.virtual_stages={config.parallel.virtual_stages}: sampling decodes through plain stages, and "
            "resharding moves weights from plain stages; use 1 for PPO"
        )
    check_profile(config.run, ppo.iterations, "iterations")
    check_sampling(config.rollout, "rollout")
    if config.rollout.repetition_penalty != 1:
        raise UserError(
            f"rollout.repetition_penalty={config.rollout.repetition_penalty}: text would be sampled from another distribution "
            "than the one that trains; use 1 (sampling.repetition_penalty is for evaluation and chat)"
        )
    if config.rollout.beams > 1:
        raise UserError(
            f"rollout.beams={config.rollout.beams}: PPO learns from samples; beams are for evaluation and chat"
        )
    if config.rollout.temperature <= 0:
        raise UserError(
            f"rollout.temperature={config.rollout.temperature} must be positive: greedy text has no gradient"
        )


def _check_advantages(config: PPOConfig) -> None:
    """Either a value model, or several samples of a prompt to compare."""
    ppo, samples = config.ppo, config.ppo.samples_per_prompt
    if ppo.batch_size % samples:
        raise UserError(f"ppo.samples_per_prompt={samples} does not divide ppo.batch_size={ppo.batch_size}")
    if ppo.has_critic:
        return
    chosen = f"ppo.advantages={ppo.advantages.value}"
    if samples == 1:
        raise UserError(
            f"{chosen} compares the samples of a prompt, and ppo.samples_per_prompt=1: give at least 2, or ppo.advantages=gae"
        )
    if config.value.init_from is not None:
        raise UserError(f"value.init_from={config.value.init_from}: {chosen} has no value model; leave it out")
    if ppo.critic_warmup_iterations:
        raise UserError(
            f"ppo.critic_warmup_iterations={ppo.critic_warmup_iterations}: {chosen} has no value model to warm up; use 0"
        )


def _check_held_out(config: PPOConfig) -> None:
    """Evaluations need prompts that the run does not train on."""
    evaluation = config.evaluation
    if evaluation.is_on and evaluation.prompts is None and config.data.part is not PromptPart.train:
        raise UserError(
            f"evaluation.every={evaluation.every} needs prompts that are not trained on: give evaluation.prompts, or "
            "data.part=train, which leaves the part `validation` for it"
        )
    if config.run.export_hf is ExportChoice.best and not evaluation.is_on:
        raise UserError(
            "run.export_hf=best: give evaluation.every, which decides what is best, or use run.export_hf=last"
        )
    for key in ("prompts", "patience"):
        value = getattr(evaluation, key)
        if value is not None and not evaluation.is_on:
            raise UserError(f"evaluation.{key}={value} is for evaluations during the run: give evaluation.every too")


def check_warmup(warmup: int, length: int, key: str, unit: str = "steps") -> None:
    """A learning rate must reach its peak before the run ends."""
    if warmup > length:
        raise UserError(
            f"{key}={warmup} is longer than the run's {length} {unit}: the learning rate would not reach its peak"
        )


def check_profile(run: RunConfig, length: int, unit: str = "steps") -> None:
    """The steps to trace must be steps of the run."""
    if (traced := run.profiled_steps()) and traced[0] > length:
        raise UserError(f"run.profile={run.profile} begins after the run's {length} {unit}: nothing would be traced")


def check_fits_context(prompt_tokens: int, response_tokens: int, model: ModelConfig, keys: tuple[str, str]) -> None:
    """The longest prompt and the longest response together must fit the model's context."""
    if prompt_tokens + response_tokens > model.max_sequence_length:
        raise UserError(
            f"{keys[0]}={prompt_tokens} + {keys[1]}={response_tokens} is more than the model's context of "
            f"{model.max_sequence_length} tokens; lower one of them"
        )


def check_response_fits(longest: int, which: str, response: int, model: ModelConfig, whose: str) -> None:
    """A response after the longest prompt must fit the context of the models that answer and that judge."""
    if longest + response > model.max_sequence_length:
        raise UserError(
            f"sampling.max_response_tokens={response} after {which} ({longest} tokens) is more than the {whose}'s context of "
            f"{model.max_sequence_length} tokens; lower it"
        )


def _check_pretraining(pretraining: PretrainingDataConfig, because: str) -> None:
    if pretraining.source is None:
        raise UserError(f"{because} needs data.pretraining.source")
