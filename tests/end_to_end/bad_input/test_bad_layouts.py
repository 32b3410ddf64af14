"""Layouts and shapes of models that do not go together."""

import pytest
from bad_cases import Case

CASES: dict[str, Case] = {
    "world_too_small": Case("sft", ["parallel.tensor=2"], ["tensor 2 x pipeline 1 x context 1 = 2", "the 1 ranks"]),
    "world_not_divided": Case("sft", ["parallel.pipeline=2"], ["= 2 does not divide the 3 ranks"], ranks=3),
    "critic_world": Case("ppo", ["critic_parallel.tensor=2"], ["critic_parallel: tensor 2", "the 1 ranks"]),
    "tensor_of_zero": Case("sft", ["parallel.tensor=0"], [r"parallel\.tensor=0 must be at least 1"]),
    "virtual_without_pipeline": Case("sft", ["parallel.virtual_stages=2"], ["virtual_stages=2 needs", "pipeline"]),
    "heads": Case("sft", ["model.num_attention_heads=5"], ["hidden_size 32", "num_attention_heads 5"]),
    "heads_over_tensor": Case(
        "sft",
        ["model.num_attention_heads=1", "parallel.tensor=2"],
        [r"parallel\.tensor=2 does not divide num_attention_heads 1"],
        ranks=2,
    ),
    "query_groups": Case("sft", ["model.num_query_groups=3"], ["num_attention_heads 4", "num_query_groups 3"]),
    "layers": Case(
        "sft", ["model.num_layers=3", "parallel.pipeline=2"], ["2 stages do not divide num_layers 3"], ranks=2
    ),
    "virtual_layers": Case(
        "sft",
        ["model.num_layers=6", "parallel.pipeline=2", "parallel.virtual_stages=2"],
        ["pipeline 2 x virtual_stages 2 = 4 stages", "num_layers 6"],
        ranks=2,
    ),
    "fp8": Case("sft", ["precision=fp8_hybrid"], ["precision=fp8_hybrid", "Transformer Engine", "bf16"]),
    "fp16": Case("sft", ["precision=fp16"], ["precision=fp16 needs a GPU", "bf16"]),
    "fp8_gate_never_open": Case("ppo", ["fp8.gate_max_gap=0"], [r"fp8\.gate_max_gap=0\.0 must be more than 0"]),
    "sampling_in_fp8_alone": Case(
        "ppo", ["rollout.precision=fp8_hybrid"], [r"rollout\.precision=fp8_hybrid", "precision=fp32", "sample in fp32"]
    ),
    "fp8_recipe": Case("sft", ["fp8.recipe=nvfp8"], [r"fp8\.recipe=nvfp8", "tensorwise"]),
    "context": Case(
        "evaluate", ["parallel.context=2"], [r"parallel\.context=2: evaluation samples", "context=1"], ranks=2
    ),
    "experts": Case(
        "sft", ["parallel.expert=2"], [r"parallel\.expert=2", "models here have none", r"parallel\.tensor"], ranks=2
    ),
    "tokenizer_larger_than_vocabulary": Case(
        "sft", ["model.vocab_size=100"], [r"model\.vocab_size=100", r"has 29\d ids", r"at least 29\d"]
    ),
    "no_model": Case("sft", [], [r"policy\.init_from", "model="], without=["model"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name, mistake):
    mistake(CASES[name])
