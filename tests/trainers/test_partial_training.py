"""Runs that train adapters, or some weights: at every layout, resumed, with one copy of weights for policy and reference."""

import json

import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assert_close

LORA = ["policy.lora.rank=3", "policy.lora.alpha=6", "policy.optimizer.lr=5e-3"]
VALUE = ["value.lora.rank=2", "value.lora.targets=[q_proj,*_proj]", "value.optimizer.lr=1e-3"]
UPPER = ["policy.trainable=[layers.2-,decoder.final_layernorm]", "policy.optimizer.lr=1e-3"]
FIGURES = ("policy/loss", "ptx/loss", "kl/mean", "reward/score_mean", "policy/grad_norm", "value/loss")


def ppo(recipe, name, *overrides):
    return recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *overrides)


RESUMED = {
    "sft_lora": (1, "sft", [*LORA, "policy.lora.dropout=0.2", "sft.epochs=2"]),
    "sft_layers_pp2": (2, "sft", [*UPPER, "sft.epochs=2", "parallel.pipeline=2", "parallel.recompute=full"]),
    "sft_layers_bf16_dp2": (
        2,
        "sft",
        [*UPPER, "sft.epochs=2", "precision=bf16", "parallel.distributed_optimizer=true"],
    ),
    "ppo_tp2": (2, "ppo", [*LORA, *VALUE, "parallel.tensor=2", "parallel.sequence=true", "critic_parallel.pipeline=2"]),
    "ppo_bf16_dp2": (2, "ppo", [*LORA, *VALUE, "precision=bf16", "parallel.distributed_optimizer=true"]),
    "ppo_apart": (2, "ppo", [*LORA, "placement=disaggregated", "placement.critic_ranks=1"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_goes_on_bit_for_bit(case, recipe):
    ranks, stage, overrides = RESUMED[case]
    stop = {"sft": 4, "ppo": 2}[stage]

    def run(name, *more):
        arguments = (*overrides, f"run.save_every={stop}", *more)
        made = recipe.sft(name, *arguments) if stage == "sft" else ppo(recipe, name, *arguments)
        return run_ranks(ranks, run_stage, stage, made, timeout=300)

    straight = whole_weights(run(f"partial_{case}_straight"))
    run(f"partial_{case}_stopped", f"run.stop_at_step={stop}")
    resumed = whole_weights(run(f"partial_{case}_stopped", "run.resume=true"))
    assert read_metrics(recipe.root / f"partial_{case}_stopped") == read_metrics(
        recipe.root / f"partial_{case}_straight"
    )
    for role, weights in straight.items():
        assert_close(resumed[role], weights, relative=0)


LAYOUTS = {
    "tp2_pp2": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2", "critic_parallel.tensor=2", "rollout.parallel.pipeline=1"],
    ),
    "tp2_sp_dp2": (
        4,
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.distributed_optimizer=true",
            "critic_parallel.pipeline=2",
            "critic_parallel.virtual_stages=2",
            "rollout.parallel.tensor=1",
        ],
    ),
    "cp2_recompute": (2, ["parallel.context=2", "parallel.recompute=full", "critic_parallel.tensor=2"]),
    "apart": (3, ["parallel.pipeline=2", "placement=disaggregated", "placement.critic_ranks=1"]),
}


@pytest.fixture(scope="module")
def one_rank(recipe):
    """PPO with adapters on policy and value model, from a model that has adapters already."""
    run_ranks(1, run_stage, "sft", recipe.sft("lora_sft", *LORA, f"policy.init_from={recipe.root / 'sft'}"))
    results = run_ranks(1, run_stage, "ppo", continued(recipe, "lora_one"), timeout=300)
    return whole_weights(results), read_metrics(recipe.root / "lora_one")


def continued(recipe, name, *more):
    arguments = (*LORA, *VALUE, "ppo.micro_batch_size=null", "ppo.micro_batch_tokens=64", *more)
    return recipe.ppo(name, recipe.root / "lora_sft", recipe.root / "reward_model", *arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_and_weights_do_not_depend_on_the_layout(layout, recipe, one_rank):
    ranks, overrides = LAYOUTS[layout]
    results = run_ranks(ranks, run_stage, "ppo", continued(recipe, f"lora_{layout}", *overrides), timeout=300)
    weights, metrics = one_rank
    for row, expected in zip(read_metrics(recipe.root / f"lora_{layout}"), metrics, strict=True):
        for figure in FIGURES:
            assert row[figure] == pytest.approx(expected[figure], rel=1e-4, abs=2e-5), figure
    for role, arrays in whole_weights(results).items():
        assert_close(arrays, weights[role], relative=2e-4)


def reference_of_a_run(overrides):
    """(is there one copy, log-probabilities of the reference after training and of the model that it started from)."""
    from megatron_rlhf import cli
    from megatron_rlhf.config.model import Precision
    from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
    from megatron_rlhf.models.roles import Role

    trainer = cli.run_stage("ppo", overrides)
    policy, reference = trainer.policy.role, trainer.roles.reference
    source = StartingPoint.find(trainer.config.policy.init_from, "policy.init_from", POLICY)
    start = Role.build("start", source.model, policy.layout, Precision.fp32, adapter=source.adapter)
    source.load_into(start)
    texts = torch.arange(60).view(4, 15) % 200
    shared = [p.data_ptr() for p in reference.modules[0].parameters()] == [
        p.data_ptr() for p in policy.modules[0].parameters()
    ]
    frozen = [p for n, p in policy.modules[0].named_parameters() if "_adapter." not in n]
    states = trainer.policy.optimizer.chained_optimizers[0].optimizer.state
    counts = (
        sum(p.requires_grad or hasattr(p, "main_grad") for p in frozen),
        sum(t.numel() for state in states.values() for t in state.values() if t.dim()),
        2 * sum(p.numel() for p in policy.modules[0].parameters() if p.requires_grad),
    )
    roles = (reference, start, policy)
    return shared, counts, [role.logprobs(texts, 2) for role in roles]


@pytest.mark.parametrize("start", ["sft", "lora_sft"])
def test_the_reference_is_the_policys_start_in_the_policys_memory(start, recipe, one_rank):
    overrides = recipe.ppo(f"shared_{start}", recipe.root / start, recipe.root / "reward_model", *LORA)
    ((shared, counts, logprobs),) = run_ranks(1, reference_of_a_run, overrides)
    reference, original, policy = logprobs
    assert shared
    frozen_with_gradients, state, expected_state = counts
    assert frozen_with_gradients == 0
    assert state == expected_state > 0
    assert torch.equal(reference, original)
    assert (policy - original).abs().max() > 1e-3, "the policy has learnt something"


def test_only_the_selected_weights_move(recipe):
    start = recipe.root / "sft"
    upper = ["policy.trainable=[layers.3,*.linear_fc1.bias]", f"policy.init_from={start}", "sft.epochs=1"]
    before = whole_weights(
        run_ranks(1, run_stage, "sft", recipe.sft("some_0", *upper, "sft.max_steps=1", "policy.optimizer.lr=1e-30"))
    )
    after = whole_weights(run_ranks(2, run_stage, "sft", recipe.sft("some_1", *upper, "parallel.pipeline=2")))
    for name, array in after["policy"].items():
        moved = (array != before["policy"][name]).reshape(len(array), -1).any(axis=1)
        if name == "decoder.layers.mlp.linear_fc1.bias":
            assert moved.all(), name
        elif name.startswith("decoder.layers."):
            assert moved.tolist() == [False, False, False, True], name
        else:
            assert not moved.any(), name


def test_adapters_are_in_the_description_of_a_checkpoint(recipe, one_rank):
    meta = json.loads((recipe.root / "lora_one" / "checkpoints" / "step_3" / "meta.json").read_text())
    assert meta["roles"]["policy"]["adapter"]["rank"] == 3
    assert meta["roles"]["policy_ema"]["adapter"] == meta["roles"]["policy"]["adapter"]
    assert meta["roles"]["value"]["adapter"]["targets"][0] == "q_proj"
