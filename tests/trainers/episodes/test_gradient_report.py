"""PPO's and the text's gradient measured separately: compared with two backward passes, and without effect on the run."""

import logging
import math

import numpy as np
import pytest
from ranks import run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import GPT2_LIKE, assemble, assert_close, make_role, train, weight_blocks
from update_losses import EPISODES, GAMMA, config, experience, plain_gradients, texts

from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.microbatches import language_model_microbatches
from megatron_rlhf.trainers.episodes.microbatches import policy_microbatches
from megatron_rlhf.trainers.gradients import DominanceWatch
from megatron_rlhf.trainers.step import TrainedRole

ROWS, TEXT_ROWS = len(EPISODES), 3
REPORT = ("policy/ppo_grad_norm", "policy/ptx_grad_norm", "policy/grad_cosine")
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2_tied_embeddings": (2, ParallelConfig(pipeline=2)),
    "pp2_virtual2": (2, ParallelConfig(pipeline=2, virtual_stages=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "dp2_distributed": (2, ParallelConfig(distributed_optimizer=True)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "pp2_dp2_distributed": (4, ParallelConfig(pipeline=2, distributed_optimizer=True)),
}


def parts(trained):
    """Microbatches of the text, weighted by gamma, and of PPO."""
    text = language_model_microbatches(texts(TEXT_ROWS), trained.role, 1, "ptx/loss", weight=GAMMA)
    return text, policy_microbatches(experience(ROWS), trained, config(2))


def update_told_apart(parallel, precision=Precision.fp32):
    """One update; the text's gradient was accumulated first and a copy kept."""
    trained = train(make_role(GPT2_LIKE, parallel)) if precision is Precision.fp32 else in_precision(precision)
    text, ppo = parts(trained)
    update = trained.update(ppo, 1e-3, trained.accumulate(text, keep=True))
    while update.skipped:  # fp16: the loss scale is lowered first, and nothing else changes
        assert update.gradients is None
        update = trained.update(ppo, 1e-3, trained.accumulate(text, keep=True))
    return update.gradients, update.grad_norm, weight_blocks(trained.role)


def in_precision(precision):
    role = make_role(GPT2_LIKE, precision=precision)
    return TrainedRole.create(role, OptimizerConfig(lr=1e-3, clip_norm=0.0), precision, max_skipped=100)


def update_at_once(parallel):
    """The same update with both kinds in one schedule."""
    trained = train(make_role(GPT2_LIKE, parallel))
    text, ppo = parts(trained)
    update = trained.update([*text, *ppo], 1e-3)
    assert update.gradients is None
    return update.grad_norm, weight_blocks(trained.role)


@pytest.fixture(scope="module")
def separate(world):
    """(norm of PPO's gradient, norm of gamma times the text's, cosine), each from a backward pass of its own."""
    _, ppo = plain_gradients("policy", ROWS)
    _, text = plain_gradients("text", TEXT_ROWS)
    p = np.concatenate([ppo[name].ravel() for name in ppo]).astype(np.float64)
    t = GAMMA * np.concatenate([text[name].ravel() for name in ppo]).astype(np.float64)
    return np.linalg.norm(p), np.linalg.norm(t), p @ t / np.linalg.norm(p) / np.linalg.norm(t), np.linalg.norm(p + t)


def check(found, grad_norm, separate, relative=1e-5):
    ppo, text, cosine, both = separate
    assert found.rest_norm == pytest.approx(ppo, rel=relative)
    assert found.first_norm == pytest.approx(text, rel=relative)
    assert found.cosine == pytest.approx(cosine, abs=relative)
    assert grad_norm == pytest.approx(both, rel=relative)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_and_cosine_are_those_of_two_backward_passes(layout, separate):
    ranks, parallel = LAYOUTS[layout]
    for found, grad_norm, _ in run_ranks(ranks, update_told_apart, parallel):
        check(found, grad_norm, separate)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_in_half_precision_they_are_those_of_the_fp32_buffers(precision, separate):
    """In fp16 the buffers include the loss scale, which is not part of a norm."""
    ((found, grad_norm, _),) = run_ranks(1, update_told_apart, ParallelConfig(), precision)
    check(found, grad_norm, separate, relative=0.02)
    square = found.first_norm**2 + found.rest_norm**2 + 2 * found.cosine * found.first_norm * found.rest_norm
    assert math.sqrt(square) == pytest.approx(grad_norm, rel=1e-5)


@pytest.mark.parametrize("layout", ["one", "tp2_pp2", "pp2_dp2_distributed"])
def test_the_update_is_the_same_to_the_last_bit(layout):
    ranks, parallel = LAYOUTS[layout]
    apart = run_ranks(ranks, update_told_apart, parallel)
    together = run_ranks(ranks, update_at_once, parallel)
    assert [norm for _, norm, _ in apart] == [norm for norm, _ in together]
    weights = [assemble([rank[-1] for rank in results], 67) for results in (apart, together)]
    assert_close(*weights, relative=0)


def run(recipe, name, *more, ranks=1):
    arguments = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *more)
    return run_ranks(ranks, run_stage, "ppo", arguments, timeout=400), read_metrics(recipe.root / name)


def without_report(rows):
    return [{name: value for name, value in row.items() if name not in REPORT} for row in rows]


PLACEMENTS = {
    "one": (1, []),
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "disaggregated": (2, ["placement=disaggregated", "placement.critic_ranks=1"]),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_run_is_the_same_with_and_without_the_report(placement, recipe):
    ranks, overrides = PLACEMENTS[placement]
    runs = {
        every: run(recipe, f"report_{placement}_{every}", f"ppo.gradient_report_every={every}", *overrides, ranks=ranks)
        for every in (0, 2)
    }
    (plain, plain_rows), (told, rows) = runs[0], runs[2]
    assert without_report(rows) == plain_rows
    assert [set(REPORT) <= row.keys() for row in rows] == [False, True, False]
    for role, arrays in whole_weights(told).items():
        assert_close(arrays, whole_weights(plain)[role], relative=0)


# --- gamma found by the run ------------------------------------------------------------------------------------------

AUTO = ("ppo.ptx_coef=auto", "ppo.ptx_gradient_ratio=0.5", "ppo.iterations=4", "policy.optimizer.lr=1e-3")


@pytest.fixture(scope="module")
def steered(recipe):
    return run(recipe, "auto", *AUTO)[1]


def test_auto_follows_the_averages_of_both_norms(steered):
    coef, ppo, text = 1.0, 0.0, 0.0
    for row in steered:
        assert row["ptx/coef"] == pytest.approx(coef, rel=1e-12)
        ppo = 0.9 * ppo + 0.1 * row["policy/ppo_grad_norm"]
        text = 0.9 * text + 0.1 * row["policy/ptx_grad_norm"] / coef
        coef = 0.5 * ppo / text
    assert len({row["ptx/coef"] for row in steered}) == 4


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_auto_resumes_to_the_last_bit(placement, recipe):
    ranks, overrides = PLACEMENTS[placement]
    name = f"auto_{placement}"
    whole, expected = run(recipe, f"{name}_whole", *AUTO, *overrides, ranks=ranks)
    run(recipe, f"{name}_halves", *AUTO, *overrides, "run.stop_at_step=2", ranks=ranks)
    resumed, rows = run(recipe, f"{name}_halves", *AUTO, *overrides, "run.resume=true", ranks=ranks)
    assert rows == expected
    for role, arrays in whole_weights(resumed).items():
        assert_close(arrays, whole_weights(whole)[role], relative=0)


# --- the warning -----------------------------------------------------------------------------------------------------


def warnings_after(caplog, *reports):
    watch = DominanceWatch()
    with caplog.at_level(logging.WARNING, "megatron_rlhf"):
        for ppo_norm, text_norm in reports:
            watch.update(ppo_norm, text_norm, coef=27.8)
    return [record.getMessage() for record in caplog.records]


def test_a_warning_when_the_text_leaves_nothing_of_ppo(caplog):
    (message,) = warnings_after(caplog, (1.0, 41.0), (1.0, 12.0), (2.0, 40.0), (1.0, 30.0))
    assert "40 against 2" in message
    assert "27.8 now, 1.4 would make both alike" in message
    assert "ppo.ptx_coef=auto" in message and "docs/gamma.md" in message


def test_no_warning_for_a_spike(caplog):
    assert warnings_after(caplog, (1.0, 41.0), (1.0, 41.0), (1.0, 9.9), (1.0, 41.0), (1.0, 41.0)) == []


def test_the_run_says_so_once(recipe):
    run(recipe, "dominated", "ppo.ptx_coef=1000", "ppo.gradient_report_every=1", "ppo.iterations=4")
    log = (recipe.root / "dominated" / "log.txt").read_text()
    assert log.count("the text's gradient was more than 10 times PPO's in the last 3 reports") == 1


def test_zero_gradients_have_no_angle(world):
    trained = train(make_role(GPT2_LIKE))
    text, _ = parts(trained)
    nothing = language_model_microbatches(texts(TEXT_ROWS), trained.role, 1, "other/loss", weight=0.0)
    found = trained.update(nothing, 1e-3, trained.accumulate(text, keep=True)).gradients
    assert found.first_norm > 0
    assert (found.rest_norm, found.cosine) == (0.0, 0.0)
