"""Contradictions between keys, found before any model is built; messages name key, value and what would be right.

Each number by itself: ranges.py.
"""

from megatron_rlhf.config.budgets import check_micro_batch
from megatron_rlhf.config.data import PretrainingDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, ParallelConfig, Positions, Precision
from megatron_rlhf.config.placement import PlacementConfig, PlacementKind
from megatron_rlhf.config.stages import (
    BaseConfig,
    EvaluateConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)
from megatron_rlhf.config.training import SamplingConfig


def check_placement(placement: PlacementConfig, world_size: int) -> None:
    """Two sides that share nothing leave at least one rank to each."""
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


def check_precision(
    precision: Precision, recipe: Fp8Recipe, transformer_engine: bool, gpu: bool, capability: tuple[int, int]
) -> None:
    """fp8 is Transformer Engine's, on GPUs that have it; fp16 wants a GPU's kernels."""
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
    """Where sampling may be in fp8."""
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
    """Matrices and sequences in multiples of what fp8 products take."""
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
    """Decoding goes token by token, and a context has nothing to share out."""
    if parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context}: {because} samples token by token; use parallel.context=1"
        )


def check_experts(parallel: ParallelConfig, key: str) -> None:
    """Experts are a mixture's; the models here have one MLP a layer."""
    if parallel.expert > 1:
        raise UserError(
            f"{key}.expert={parallel.expert} would spread the experts of a mixture over ranks, and models here have none; set "
            f"it to 1, and split each MLP with {key}.tensor"
        )


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
    check_micro_batch("sft", sft.micro_batch_size, sft.micro_batch_tokens)
    if config.sft.select_by.value == "reward_model" and config.reward.init_from is None:
        raise UserError("sft.select_by=reward_model needs reward.init_from")
    if config.sft.select_by.value == "reward_model":
        check_one_token(config.parallel, "sft.select_by=reward_model")


def check_reward_model(config: RewardModelConfig) -> None:
    """A start and sensible sizes."""
    if config.reward.init_from is None and config.model is None:
        raise UserError("give reward.init_from (a checkpoint or Hugging Face folder) or a model shape (model=gpt3_6b)")
    algorithm = config.reward_model
    check_micro_batch("reward_model", algorithm.micro_batch_size, algorithm.micro_batch_tokens)


def check_ppo(config: PPOConfig) -> None:
    """Batches, mix, sampling and starting points must agree."""
    ppo = config.ppo
    check_micro_batch("ppo", ppo.micro_batch_size, ppo.micro_batch_tokens)
    check_micro_batch("ppo", ppo.ptx_micro_batch_size, ppo.ptx_micro_batch_tokens, "ptx_")
    if ppo.batch_size % ppo.minibatch_size:
        raise UserError(f"ppo.minibatch_size={ppo.minibatch_size} does not divide ppo.batch_size={ppo.batch_size}")
    if isinstance(ppo.ptx_coef, str) and not ppo.steers_text:
        raise UserError(f"ppo.ptx_coef={ppo.ptx_coef} must be a number (0: plain PPO), or auto")
    if ppo.mixes_text:
        _check_pretraining(config.data.pretraining, f"ppo.ptx_coef={ppo.ptx_coef}")
    if ppo.critic_warmup_iterations > ppo.iterations:
        raise UserError(
            f"ppo.critic_warmup_iterations={ppo.critic_warmup_iterations} is longer than the run's {ppo.iterations} iterations"
        )
    if learning := ppo.iterations - ppo.critic_warmup_iterations:  # none: the value model learns alone
        check_warmup(ppo.warmup_iterations, learning, "ppo.warmup_iterations", "iterations in which the policy learns")
    if config.policy.init_from is None:
        raise UserError("policy.init_from is not given: PPO starts from a fine-tuned model (examples/train_sft.py)")
    if config.reward.init_from is None:
        raise UserError("reward.init_from is not given: PPO needs a reward model (examples/train_reward_model.py)")
    if config.parallel.virtual_stages > 1:
        raise UserError(
            f"parallel.virtual_stages={config.parallel.virtual_stages}: sampling decodes through plain stages, and "
            "resharding moves weights from plain stages; use 1 for PPO"
        )
    check_sampling(config.rollout, "rollout")
    if config.rollout.temperature <= 0:
        raise UserError(
            f"rollout.temperature={config.rollout.temperature} must be positive: greedy text has no gradient"
        )


def check_evaluate(config: EvaluateConfig) -> None:
    """A model to evaluate and a way to sample."""
    if config.policy.init_from is None:
        raise UserError("policy.init_from is not given: name the checkpoint or Hugging Face folder to evaluate")
    check_sampling(config.sampling, "sampling")
    check_one_token(config.parallel, "evaluation")


def check_sampling(sampling: SamplingConfig, key: str) -> None:
    """Limits that make sense together."""
    if sampling.min_response_tokens > sampling.max_response_tokens:
        raise UserError(
            f"{key}.min_response_tokens={sampling.min_response_tokens} must be at most "
            f"{key}.max_response_tokens={sampling.max_response_tokens}"
        )


def check_warmup(warmup: int, length: int, key: str, unit: str = "steps") -> None:
    """A learning rate must reach its peak before the run ends."""
    if warmup > length:
        raise UserError(
            f"{key}={warmup} is longer than the run's {length} {unit}: the learning rate would not reach its peak"
        )


def check_fits_context(prompt_tokens: int, response_tokens: int, model: ModelConfig, keys: tuple[str, str]) -> None:
    """The longest prompt and the longest response together must fit the model's context."""
    if prompt_tokens + response_tokens > model.max_sequence_length:
        raise UserError(
            f"{keys[0]}={prompt_tokens} + {keys[1]}={response_tokens} is more than the model's context of "
            f"{model.max_sequence_length} tokens; lower one of them"
        )


def _check_pretraining(pretraining: PretrainingDataConfig, because: str) -> None:
    if pretraining.source is None:
        raise UserError(f"{because} needs data.pretraining.source")
