"""What a user can get wrong about adapters and frozen weights: one message that says what would be right, before any model."""

import pytest
from ranks import run_ranks
from recipe import run_stage

LORA = ["policy.lora.rank=3", "policy.lora.alpha=6"]


@pytest.fixture(scope="module")
def with_adapters(recipe):
    """A run of fine-tuning that trained adapters."""
    start = f"policy.init_from={recipe.root / 'sft'}"
    run_ranks(1, run_stage, "sft", recipe.sft("bad_start", start, *LORA, "sft.max_steps=1"))
    return recipe.root / "bad_start"


def message(stage, overrides):
    from megatron_rlhf import cli
    from megatron_rlhf.config.errors import UserError
    from megatron_rlhf.models import gpt

    def never(*args):
        raise AssertionError("a model is built")

    gpt.transformer_config = never
    try:
        cli.run_stage(stage, overrides)
    except UserError as error:
        return str(error)
    return "no error"


CASES = {
    "rank_0": ("sft", ["policy.lora.rank=0"], ["policy.lora.rank=0 must be at least 1"]),
    "alpha_0": ("sft", ["policy.lora.rank=2", "policy.lora.alpha=0"], ["policy.lora.alpha=0", "more than 0"]),
    "no_such_target": (
        "sft",
        ["policy.lora.rank=2", "policy.lora.targets=[q_proj,gate_proj]"],
        ["policy.lora.targets: gate_proj matches no projection", "q_proj, k_proj, v_proj, o_proj, up_proj, down_proj"],
    ),
    "settings_without_rank": ("sft", ["policy.lora.dropout=0.1"], ["policy.lora needs policy.lora.rank"]),
    "no_such_weight": (
        "sft",
        ["policy.trainable=[layers.2,attention.*]"],
        ["policy.trainable: attention.* matches no weight", "layers.0-3", "embedding.word_embeddings.weight"],
    ),
    "no_such_layer": ("sft", ["policy.trainable=[layers.4-]"], ["layers.4- matches no weight", "layers.0-3"]),
    "tied_head": ("sft", ["policy.trainable=[output_layer]"], ["output_layer matches no weight"]),
    "both": ("sft", [*LORA, "policy.trainable=[layers.2]"], ["policy.trainable and policy.lora.rank=3", "give one"]),
    "reference_away": ("ppo", [*LORA, "offload.reference=true"], ["offload.reference=true with policy.lora"]),
    "value_target": (
        "ppo",
        ["value.lora.rank=2", "value.lora.targets=[gate]"],
        ["value.lora.targets: gate matches no"],
    ),
    "other_rank": ("sft", ["policy.init_from={adapters}", "policy.lora.rank=4"], ["policy.lora.rank=4", "have 3"]),
    "other_alpha": (
        "sft",
        ["policy.init_from={adapters}", "policy.lora.rank=3", "policy.lora.alpha=7"],
        ["policy.lora.alpha=7: the adapters that policy.init_from brings", "have 6"],
    ),
    "other_targets": (
        "ppo",
        ["policy.init_from={adapters}", *LORA, "policy.lora.targets=[q_proj]"],
        ["policy.lora.targets=[q_proj]", "[q_proj,k_proj,v_proj,o_proj,up_proj,down_proj]"],
    ),
    "resumed_with_another_rank": (
        "sft",
        ["run.dir={adapters}", "policy.init_from={recipe}/sft", "run.resume=true", "policy.lora.rank=2"],
        ["policy.lora.rank=2, was 3", "cannot be resumed"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named(name, recipe, with_adapters, tmp_path):
    stage, wrong, says = CASES[name]
    run = str(tmp_path / "run")
    start = recipe.root / "sft"
    good = recipe.ppo(run, start, recipe.root / "reward_model") if stage == "ppo" else recipe.sft(run)
    overrides = [*good, *(text.format(adapters=with_adapters, recipe=recipe.root) for text in wrong)]
    (said,) = run_ranks(1, message, stage, overrides)
    for expected in says:
        assert expected in said, said
