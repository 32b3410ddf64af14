"""The gate over a model that really computes worse "in fp8": a CPU has no such kernels, so layers round their outputs to e4m3."""

import logging
import math

import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage
from toys import GPT2_LIKE, make_role

from megatron_rlhf.config.model import Fp8Recipe, ParallelConfig, Precision
from megatron_rlhf.config.training import Fp8Config
from megatron_rlhf.models.roles import Role
from megatron_rlhf.runs.fp8_gate import Fp8Gate

TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3, 9, 8, 8, 7, 5]]


def round_in_fp8(role: Role) -> Role:
    """Layers' matrix products are rounded to 3 bits of mantissa while, and only while, the model's configuration says fp8."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def rounded(layer, inputs, outputs):
        if layer.config.fp8 is None:
            return outputs
        scale = 448 / outputs[0].detach().abs().max().clamp(min=1e-12)
        coarse = (outputs[0].detach() * scale).to(torch.float8_e4m3fn).to(outputs[0].dtype) / scale
        return (outputs[0] + (coarse - outputs[0]).detach(), *outputs[1:])  # gradients pass unchanged

    for chunk in role.modules:
        for layer in chunk.decoder.modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                layer.register_forward_hook(rounded)
    return role


def policy(parallel: ParallelConfig | None = None) -> Role:
    return round_in_fp8(make_role(GPT2_LIKE, parallel, precision=Precision.fp8_hybrid))


def gate(role: Role, **settings) -> Fp8Gate:
    made = Fp8Gate.over(Fp8Config(**settings), role, TEXTS, micro_batch_size=2)
    assert made is not None
    return made


def test_there_is_no_gate_where_nothing_is_in_fp8(world) -> None:
    assert Fp8Gate.over(Fp8Config(), make_role(GPT2_LIKE, precision=Precision.bf16), TEXTS, 2) is None


def test_the_gap_is_that_of_the_tokens_that_are_compared(world) -> None:
    role = policy()
    mean, largest = gate(role).gap()
    tokens = torch.tensor(TEXTS[0]).unsqueeze(0)  # alone: without any padding
    quantized = role.logprobs(tokens, 1)
    with role.without_fp8():
        exact = role.logprobs(tokens, 1)
    alone = Fp8Gate.over(Fp8Config(gate_samples=1), role, TEXTS, 2)
    assert alone is not None
    expected = (quantized - exact).abs()
    assert alone.gap() == pytest.approx((float(expected.mean()), float(expected.max())), abs=1e-6)
    assert 0.001 < mean < largest


def test_a_small_gap_is_reported_and_changes_nothing(world, caplog) -> None:
    role = policy()
    guard = gate(role, gate_max_gap=10.0, gate_every=2)
    with caplog.at_level(logging.WARNING):
        metrics = guard.check(0)
    assert metrics.keys() == {"fp8/active", "fp8/logprob_gap_mean", "fp8/logprob_gap_max"}
    assert metrics["fp8/active"] == 1.0
    assert guard.check(1) == {"fp8/active": 1.0}, "not due"
    assert "fp8/logprob_gap_mean" in guard.check(2)
    assert role.in_fp8
    assert not caplog.records


def test_a_large_gap_ends_fp8_with_a_warning(world, caplog) -> None:
    role = policy()
    tokens = torch.tensor([TEXTS[0]])
    with role.without_fp8():
        exact = role.logprobs(tokens, 1)
    assert not torch.equal(role.logprobs(tokens, 1), exact)
    guard = gate(role, gate_max_gap=1e-4, gate_every=5)
    with caplog.at_level(logging.WARNING):
        metrics = guard.check(5)
    assert metrics["fp8/active"] == 0.0
    assert metrics["fp8/logprob_gap_mean"] > 1e-4
    assert "fp8.gate_max_gap=0.0001" in caplog.text
    assert "before step 6: the policy goes on in bf16" in caplog.text
    assert torch.equal(role.logprobs(tokens, 1), exact), "the model itself has changed over"
    assert guard.check(10) == {"fp8/active": 0.0}, "for good"


def test_a_gap_that_is_no_number_ends_fp8_too(world, monkeypatch) -> None:
    guard = gate(policy(), gate_max_gap=10.0)
    monkeypatch.setattr(guard, "gap", lambda: (math.nan, math.nan))
    assert guard.check(0)["fp8/active"] == 0.0


def test_never_means_never(world, monkeypatch) -> None:
    guard = gate(policy(), gate_every=0)
    monkeypatch.setattr(guard, "gap", lambda: pytest.fail("compared"))
    assert guard.check(0) == {"fp8/active": 1.0}


def test_the_decision_survives_a_resume(world) -> None:
    fallen = gate(policy(), gate_max_gap=1e-4)
    fallen.check(50)
    role = policy()
    resumed = gate(role, gate_max_gap=1e-4)
    resumed.load_state_dict(fallen.state_dict())
    assert resumed.fell_back_at == 50
    assert not role.in_fp8
    role = policy()
    gate(role).load_state_dict(gate(policy()).state_dict())
    assert role.in_fp8, "one that had not fallen back goes on in fp8"


def test_delayed_scales_settle_before_the_first_comparison(world) -> None:
    """Two training passes run through the layers, change no weights and leave no gradients for the next update."""
    from megatron_rlhf.config.training import OptimizerConfig
    from megatron_rlhf.trainers.step import TrainedRole

    role = policy()
    trained = TrainedRole.create(role, OptimizerConfig(), Precision.fp8_hybrid)
    passes = []
    role.modules[0].decoder.layers[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    before = [p.detach().clone() for p in role.modules[0].parameters()]
    guard = gate(trained.role, recipe=Fp8Recipe.delayed, gate_max_gap=10.0)
    guard.check(0)
    assert passes == [True, True, True, True, False, False, False, False]  # 2 passes of 2 microbatches, then both sides
    assert all(torch.equal(a, b) for a, b in zip(before, role.modules[0].parameters(), strict=True))
    passes.clear()
    guard.check(50)
    assert True not in passes


def ranks_gap(parallel: ParallelConfig) -> tuple[float, dict[str, float]]:
    guard = gate(policy(parallel), gate_max_gap=1e-4)
    return guard.gap()[0], guard.check(0)


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)])
def test_all_ranks_decide_alike(parallel: ParallelConfig) -> None:
    """Including ranks that hold no logits."""
    (first, one), (second, other) = run_ranks(2, ranks_gap, parallel, timeout=120)
    assert first == second > 1e-4
    assert one == other
    assert one["fp8/active"] == 0.0


def run_in_rounded_fp8(arguments: list[str]) -> None:
    from megatron_rlhf.config.checking import checks

    build = Role.build
    checks.check_precision = lambda *_: None  # it would say, rightly, that this machine has no fp8
    Role.build = lambda *settings: round_in_fp8(build(*settings))  # type: ignore[method-assign, assignment]
    run_stage("ppo", arguments)


def test_ppo_falls_back_and_stays_there_after_a_resume(recipe) -> None:
    base = [recipe.root / "sft", recipe.root / "reward_model"]
    fp8 = ["precision=fp8_hybrid", "fp8.gate_max_gap=1e-4", "fp8.gate_every=1", "run.save_every=1", "ppo.iterations=2"]

    def run(name: str, *more: str) -> list[dict[str, float]]:
        run_ranks(1, run_in_rounded_fp8, recipe.ppo(name, *base, *fp8, *more), timeout=200)
        return read_metrics(recipe.root / name)

    straight = run("fp8_straight")
    assert [row["fp8/active"] for row in straight] == [0.0, 0.0]
    assert ["fp8/logprob_gap_mean" in row for row in straight] == [True, False]
    run("fp8_resumed", "run.stop_at_step=1")
    assert run("fp8_resumed", "run.resume=true") == straight
    kept = run("fp8_kept", "fp8.gate_max_gap=10", "rollout.precision=fp8_hybrid")
    assert [row["fp8/active"] for row in kept] == [1.0, 1.0]
    assert kept[0]["policy/loss"] != straight[0]["policy/loss"]
