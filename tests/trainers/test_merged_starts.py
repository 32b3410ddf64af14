"""All weights train where a run without adapters starts from a model that has some: as from the same model without any."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers
from ranks import run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assert_close

from megatron_rlhf.checkpoint import naming
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles

LORA = ["lora.rank=3", "lora.alpha=6", "optimizer.lr=5e-3"]


def of(role: str) -> list[str]:
    return [f"{role}.{setting}" for setting in LORA]


@pytest.fixture(scope="module")
def starts(recipe):
    """Runs that trained adapters, of a policy and of a reward model, and the policy with these added, as a folder of
    Hugging Face's, by the converter."""
    sft = recipe.root / "sft"
    run_ranks(1, run_stage, "sft", recipe.sft("adapted_sft", f"policy.init_from={sft}", *of("policy")))
    run_ranks(1, run_stage, "reward_model", recipe.reward_model("adapted_reward", sft, *of("reward")))
    run_ranks(1, export_merged, recipe.root)
    return recipe.root


def export_merged(root) -> None:
    checkpoint = naming.latest(root / "adapted_sft" / "checkpoints")
    extra = replace(ExtraFiles.find(checkpoint, None), special_tokens={})
    convert.export_huggingface(checkpoint, root / "merged_sft", "policy", None, None, extra, CheckOptions())


def test_fine_tuning_all_weights(recipe, starts):
    """Adam's first step moves each weight by the learning rate, and so does not depend on small gradients' rounding."""
    ours, theirs = (
        run_ranks(
            1,
            run_stage,
            "sft",
            recipe.sft(f"from_{start}", f"policy.init_from={starts / start}", "policy.optimizer.lr=1e-3"),
        )
        for start in ("adapted_sft", "merged_sft")
    )
    rows = [read_metrics(starts / f"from_{start}") for start in ("adapted_sft", "merged_sft")]
    for row, expected in zip(*rows, strict=True):
        for figure in ("sft/loss", "sft/grad_norm"):
            assert row[figure] == pytest.approx(expected[figure], rel=1e-4), figure
    assert_close(whole_weights(ours)["policy"], whole_weights(theirs)["policy"], relative=1e-3)


def trained_shares(stage, overrides):
    """Of each trained role's weights, how many moved."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.loop import Trainer

    before = {}
    original = Trainer._restore

    def remember(trainer):
        original(trainer)
        before.update({t.role.name: [p.clone() for p in t.role.modules[0].parameters()] for t in trainer.trained})

    Trainer._restore = remember
    trainer = cli.run_stage(stage, overrides)
    return {
        t.role.name: {
            name: not torch.equal(parameter, old)
            for (name, parameter), old in zip(t.role.modules[0].named_parameters(), before[t.role.name], strict=True)
        }
        for t in trainer.trained
    }


def test_ppo_without_adapters_moves_every_weight_of_policy_and_value_model(recipe, starts):
    overrides = recipe.ppo("from_adapted", starts / "adapted_sft", starts / "adapted_reward")
    (moved,) = run_ranks(1, trained_shares, "ppo", overrides)
    assert set(moved) == {"policy", "value"}
    for role, weights in moved.items():
        assert [name for name, has_moved in weights.items() if not has_moved] == [], role


def test_a_reward_model_of_a_folder_of_peft(recipe, starts, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(starts / "merged_sft")
    linear = {name.split(".")[-1] for name, module in model.named_modules() if module.__class__.__name__ == "Conv1D"}
    settings = peft.LoraConfig(r=2, target_modules=sorted(linear), init_lora_weights=False, fan_in_fan_out=True)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    overrides = recipe.reward_model("from_peft", tmp_path / "adapter")
    (moved,) = run_ranks(1, trained_shares, "reward_model", overrides)
    frozen = [name for name, has_moved in moved["reward"].items() if not has_moved]
    assert frozen == [], frozen
