"""Checks that no machine here can reach from the command line: those of fp8 and fp16."""

import pytest

from megatron_rlhf.config.checking import checks
from megatron_rlhf.config.data import PromptDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.stages import EvaluateConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.config.training import Fp8Config, RunConfig

MODEL = ModelConfig(num_layers=2, hidden_size=512, num_attention_heads=8, vocab_size=100, max_sequence_length=256)
DATA = PromptDataConfig(tokenizer="-", prompts="-")


def test_fp8_needs_its_library() -> None:
    checks.check_precision(Precision.bf16, Fp8Recipe.delayed, transformer_engine=False, gpu=False, capability=(0, 0))
    with pytest.raises(UserError, match="needs Transformer Engine"):
        checks.check_precision(Precision.fp8_hybrid, Fp8Recipe.delayed, False, gpu=True, capability=(9, 0))


@pytest.mark.parametrize(
    ("recipe", "capability", "instead"),
    [
        (Fp8Recipe.tensorwise, (8, 9), None),
        (Fp8Recipe.blockwise, (9, 0), None),
        (Fp8Recipe.mxfp8, (10, 0), None),
        (Fp8Recipe.nvfp4, (10, 0), None),
        (
            Fp8Recipe.nvfp4,
            (9, 0),
            r"fp8\.recipe=nvfp4 needs compute capability 10\.0 .*has 9\.0: choose fp8\.recipe=delayed",
        ),
        (Fp8Recipe.tensorwise, (8, 0), r"this GPU has 8\.0: choose precision=bf16"),
        (Fp8Recipe.blockwise, (8, 9), r"choose fp8\.recipe=delayed\|tensorwise, or precision=bf16"),
        (Fp8Recipe.mxfp8, (9, 0), r"choose fp8\.recipe=delayed\|tensorwise\|blockwise, or precision=bf16"),
    ],
)
def test_a_recipe_of_fp8_needs_its_hardware(recipe, capability, instead) -> None:
    def check() -> None:
        checks.check_precision(Precision.fp8_hybrid, recipe, transformer_engine=True, gpu=True, capability=capability)

    if instead is None:
        check()
        return
    with pytest.raises(UserError, match=instead):
        check()


@pytest.mark.parametrize(
    ("parallel", "recipe", "message"),
    [
        (ParallelConfig(tensor=8), Fp8Recipe.tensorwise, None),
        (ParallelConfig(tensor=8, sequence=True), Fp8Recipe.delayed, None),
        (ParallelConfig(tensor=4), Fp8Recipe.blockwise, None),
        (ParallelConfig(tensor=8), Fp8Recipe.mxfp8, None),
        (ParallelConfig(tensor=8), Fp8Recipe.blockwise, "the heads' width on each of parallel.tensor=8 is 64"),
        (ParallelConfig(tensor=4, sequence=True), Fp8Recipe.blockwise, "max_sequence_length is 64"),
    ],
)
def test_fp8_takes_whole_blocks(parallel: ParallelConfig, recipe: Fp8Recipe, message: str | None) -> None:
    if message is None:
        checks.check_fp8_shape(MODEL, parallel, recipe, "parallel")
        return
    with pytest.raises(UserError, match=message):
        checks.check_fp8_shape(MODEL, parallel, recipe, "parallel")


def test_roles_that_train_are_in_fp8_and_no_others() -> None:
    settings = {"run": RunConfig(dir="-"), "data": DATA, "precision": Precision.fp8_hybrid}

    def in_fp8(config) -> list[str]:
        roles = ("policy", "reference", "reward", "value")
        return [role for role in roles if config.precision_of(role) is Precision.fp8_hybrid]

    assert in_fp8(PPOConfig(**settings)) == ["policy", "value"]
    assert in_fp8(PPOConfig(**settings, fp8=Fp8Config(recipe=Fp8Recipe.delayed))) == ["policy"]
    assert in_fp8(SFTConfig(**settings)) == ["policy"]
    assert in_fp8(RewardModelConfig(**settings)) == ["reward"]
    assert in_fp8(EvaluateConfig(**settings)) == []
    assert PPOConfig(**settings).precision_of("reference") is Precision.bf16
    assert PPOConfig(**{**settings, "precision": Precision.fp16}).precision_of("reference") is Precision.fp16


@pytest.mark.parametrize(
    ("precision", "sampling", "allowed"),
    [
        (Precision.fp8_hybrid, Precision.fp8_hybrid, True),
        (Precision.fp8_hybrid, Precision.bf16, True),
        (Precision.bf16, Precision.bf16, True),
        (Precision.bf16, None, True),
        (Precision.bf16, Precision.fp8_hybrid, False),
        (Precision.fp8_hybrid, Precision.fp32, False),
    ],
)
def test_sampling_is_in_the_models_arithmetic(precision: Precision, sampling: Precision | None, allowed: bool) -> None:
    config = PPOConfig(run=RunConfig(dir="-"), data=DATA, precision=precision)
    config.rollout.precision = sampling
    if allowed:
        checks.check_fp8(config)
        return
    with pytest.raises(UserError, match=r"rollout\.precision="):
        checks.check_fp8(config)


def test_a_copy_for_sampling_is_not_in_fp8() -> None:
    config = PPOConfig(run=RunConfig(dir="-"), data=DATA, precision=Precision.fp8_hybrid)
    config.rollout.precision = Precision.fp8_hybrid
    config.rollout.parallel.tensor = 2
    with pytest.raises(UserError, match=r"a copy of the policy at rollout\.parallel samples in bf16"):
        checks.check_fp8(config)
    assert config.precision_of("sampler") is Precision.bf16
