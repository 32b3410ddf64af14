"""What `rollout.engine=megatron` refuses, and that our own engine is asked nothing."""

import pytest

from megatron_rlhf.config.checking import engine
from megatron_rlhf.config.data import PromptDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, Precision
from megatron_rlhf.config.placement import GenerationLayoutConfig
from megatron_rlhf.config.rollout import RolloutConfig, SamplingEngine
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.config.training import RunConfig

# Per token 2 x 2 bytes x 8 layers x 1,024 numbers: 8 MiB a block of 256.
MODEL = ModelConfig(num_layers=8, hidden_size=1024, num_attention_heads=16, vocab_size=1000, max_sequence_length=2048)


def config(precision=Precision.bf16, engine=SamplingEngine.megatron, **rollout):
    return PPOConfig(
        run=RunConfig(dir="run"),
        data=PromptDataConfig(prompts="prompts.jsonl", max_prompt_tokens=500),
        rollout=RolloutConfig(engine=engine, max_response_tokens=300, **rollout),
        precision=precision,
    )


def test_what_the_machine_lacks_is_said():
    engine.check_engine(config(), None)
    with pytest.raises(UserError, match=r"rollout\.engine=megatron: it needs a GPU, .*; use rollout\.engine=native"):
        engine.check_engine(config(), "it needs a GPU, and torch sees none")


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp8_hybrid])
def test_flash_attention_and_captured_passes_want_half_precision(precision):
    with pytest.raises(UserError, match=f"precision={precision.value}"):
        engine.check_engine(config(precision), None)
    engine.check_engine(config(precision, SamplingEngine.native), None)


def test_a_copy_in_bf16_samples_while_the_policy_trains_in_fp8():
    copy = GenerationLayoutConfig(tensor=2)
    engine.check_engine(config(Precision.fp8_hybrid, parallel=copy), None)


@pytest.mark.parametrize(("heads", "width"), [(256, 4), (2, 512)])
def test_heads_have_a_width_of_flash_attention(heads, width):
    model = ModelConfig(
        num_layers=8, hidden_size=1024, num_attention_heads=heads, vocab_size=1000, max_sequence_length=2048
    )
    with pytest.raises(UserError, match=rf"multiple of 8 numbers, at most 256, and the policy's have {width}"):
        engine.check_engine_model(config(), model)
    engine.check_engine_model(config(engine=SamplingEngine.native), model)
    engine.check_engine_model(config(), MODEL)


def test_a_cache_holds_the_longest_response():
    """800 tokens fill four blocks; a fifth is the engine's own."""
    engine.check_engine_model(config(cache_gb=40 / 1024), MODEL)
    with pytest.raises(UserError, match=r"rollout\.cache_gb=0\.038.*max_prompt_tokens=500.*needs 0\.039 GiB"):
        engine.check_engine_model(config(cache_gb=39 / 1024), MODEL)
    engine.check_engine_model(config(cache_gb=20 / 1024, parallel=GenerationLayoutConfig(tensor=2)), MODEL)


def test_a_cache_for_our_own_engine_is_a_mistake():
    with pytest.raises(UserError, match=r"rollout\.cache_gb=4 is for rollout\.engine=megatron"):
        engine.check_engine(config(engine=SamplingEngine.native, cache_gb=4.0), None)


def test_prompts_of_one_token_are_named():
    engine.check_engine_prompts(config(), 2, "data.prompts=prompts.jsonl")
    engine.check_engine_prompts(config(engine=SamplingEngine.native), 1, "data.prompts=prompts.jsonl")
    with pytest.raises(UserError, match=r"data\.prompts=prompts\.jsonl: a prompt of 1 token"):
        engine.check_engine_prompts(config(), 1, "data.prompts=prompts.jsonl")
