"""What `rollout.engine=megatron` needs: of the machine, of the model, of the prompts, of the memory it is given."""

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, Precision
from megatron_rlhf.config.rollout import BLOCK, SamplingEngine, blocks_of
from megatron_rlhf.config.stages import PPOConfig

_KEY = f"rollout.engine={SamplingEngine.megatron.value}"
_OTHER = f"use rollout.engine={SamplingEngine.native.value}"
LARGEST_HEAD = 256
"""flash-attn's kernels take heads up to this width, in multiples of 8."""


def check_engine(config: PPOConfig, missing: str | None) -> None:
    """The engine can run: `missing` says why not on this machine."""
    if not _is_chosen(config):
        if config.rollout.cache_gb is not None:
            raise UserError(
                f"rollout.cache_gb={config.rollout.cache_gb:g} is for {_KEY}: leave it out, or give that engine too"
            )
        return
    if missing is not None:
        raise UserError(f"{_KEY}: {missing}; {_OTHER}")
    copied = config.rollout.parallel.of(config.parallel) is not None
    if config.precision is Precision.fp32:
        raise UserError(f"{_KEY}: flash-attn computes in bf16 and fp16, not in precision=fp32; {_OTHER}")
    if config.precision is Precision.fp8_hybrid and not copied:
        raise UserError(
            f"{_KEY} samples from a model in bf16, not from one that trains with precision=fp8_hybrid: give rollout.parallel, "
            f"which makes a copy in bf16, or {_OTHER}"
        )


def check_engine_model(config: PPOConfig, model: ModelConfig) -> None:
    """The policy's heads fit flash-attn, and its longest response the cache. Lengths must be known."""
    if not _is_chosen(config):
        return
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    if head % 8 or head > LARGEST_HEAD:
        raise UserError(
            f"{_KEY}: flash-attn takes heads of a multiple of 8 numbers, at most {LARGEST_HEAD}, and the policy's have {head}; "
            f"{_OTHER}"
        )
    if config.rollout.cache_gb is None:
        return
    layout = config.rollout.parallel.of(config.parallel) or config.parallel
    heads = (model.num_query_groups or model.num_attention_heads) / layout.tensor
    blocks = blocks_of(config.data.longest_prompt + config.rollout.longest_response) + 1  # one is for padding
    layers = -(-model.num_layers // layout.pipeline)
    least = blocks * BLOCK * 2 * 2 * layers * heads * head / 2**30  # keys and values, two bytes each
    if config.rollout.cache_gb < least:
        raise UserError(
            f"rollout.cache_gb={config.rollout.cache_gb:g} does not hold one response of the greatest length "
            f"(data.max_prompt_tokens={config.data.longest_prompt} + rollout.max_response_tokens="
            f"{config.rollout.longest_response}), which needs {least:.2g} GiB; give at least that, or leave it out"
        )


def check_engine_prompts(config: PPOConfig, shortest: int, key: str) -> None:
    """flash-attn cannot read a prompt of one token beside padding (its issue 1537)."""
    if _is_chosen(config) and shortest < 2:
        raise UserError(
            f"{key}: a prompt of {shortest} token, and {_KEY} reads prompts of at least 2: leave it out, or {_OTHER}"
        )


def _is_chosen(config: PPOConfig) -> bool:
    return config.rollout.engine is SamplingEngine.megatron
