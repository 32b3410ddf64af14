"""One update: clipping, Adam's step, the moving average, and what happens to gradients that are not finite."""

import logging

import numpy as np
import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, assemble, assert_close, make_role, weight_blocks

from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs
from megatron_rlhf.trainers.step import TrainedRole, TrainingDiverged

LR = 0.01


def microbatch(role, seed=0, scale=1.0):
    tokens = torch.randint(0, 67, (2, 8), generator=torch.Generator().manual_seed(seed))

    def loss_of(logits):
        loss = -scale * token_logprobs(logits[:, :-1], tokens[:, 1:], role.layout.groups.tp).mean()
        return loss, {"loss": loss.detach()}

    return Microbatch(tokens, loss_of)


def trained_role(parallel=None, precision=Precision.fp32, max_skipped=3, ema_decay=0.0, **optimizer):
    settings = {"lr": LR, "clip_norm": 0.0, **optimizer}
    role = make_role(GPT2_LIKE, parallel, precision=precision)
    return TrainedRole.create(role, OptimizerConfig(**settings), precision, max_skipped, ema_decay)


def weights(trained):
    return assemble([weight_blocks(trained.role)], 67)


def moved(before, after):
    return {name: after[name] - before[name] for name in before}


def test_first_step_of_adam_moves_every_weight_by_the_learning_rate(world):
    """m / sqrt(v) is the gradient's sign at the first step, regardless of its size."""
    trained = trained_role(epsilon=1e-12)
    before = weights(trained)
    update = trained.update([microbatch(trained.role)], LR)
    steps = moved(before, weights(trained))
    touched = steps["decoder.layers.mlp.linear_fc1.weight"]
    # Weights near 0.15 represent a step of 0.01 to six digits.
    assert np.abs(np.abs(touched) - LR).max() < 1e-6
    assert update.grad_norm > 0
    assert not update.skipped


def test_the_given_learning_rate_is_used(world):
    trained = trained_role(epsilon=1e-12)
    before = weights(trained)
    trained.update([microbatch(trained.role)], LR / 4)
    steps = moved(before, weights(trained))
    assert np.abs(np.abs(steps["decoder.layers.mlp.linear_fc1.weight"]) - LR / 4).max() < 1e-6
    assert all((step == 0).all() for step in moved(weights(trained), weights(trained)).values())


def test_weight_decay_spares_biases_and_norms(world):
    plain, decayed = trained_role(epsilon=1e-12), trained_role(epsilon=1e-12, weight_decay=0.5)
    before = weights(plain)
    for trained in (plain, decayed):
        trained.update([microbatch(trained.role)], LR)
    difference = moved(weights(plain), weights(decayed))
    for name, change in difference.items():
        matrix = name.endswith(".weight") and "norm" not in name
        expected = -LR * 0.5 * before[name] if matrix else np.zeros_like(change)
        assert np.abs(change - expected).max() < 1e-6, name


def gradient_norm_and_step(scale, clip, parallel=None):
    """Adam hides the length of its first gradient, but not relative to the second. Epsilon suppresses gradients of 0."""
    trained = trained_role(parallel, clip_norm=clip, betas=(0.0, 0.999), epsilon=1e-4)
    first = trained.update([microbatch(trained.role, 0, scale)], LR)
    trained.update([microbatch(trained.role, 1, 1.0)], LR)
    return first.grad_norm, weight_blocks(trained.role)


def test_clipping_scales_to_the_norm(world):
    norm, expected = gradient_norm_and_step(1.0, 0.0)
    # A gradient 100 times as long, clipped to the length it had.
    long_norm, clipped = gradient_norm_and_step(100.0, norm)
    assert long_norm == pytest.approx(100 * norm, rel=1e-4), "the norm is reported as it was"
    assert_close(assemble([clipped], 67), assemble([expected], 67), relative=1e-4)
    _, unclipped = gradient_norm_and_step(100.0, 0.0)
    with pytest.raises(AssertionError):
        assert_close(assemble([unclipped], 67), assemble([expected], 67), relative=1e-2)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, ParallelConfig(tensor=2, sequence=True)),
        (2, ParallelConfig(pipeline=2)),
        (2, ParallelConfig(distributed_optimizer=True)),
        (4, ParallelConfig(tensor=2, pipeline=2, distributed_optimizer=True)),
    ],
)
def test_clipped_steps_at_every_layout(ranks, parallel, world):
    norm, expected = gradient_norm_and_step(1.0, 0.05)
    copies = ranks // parallel.model_ranks
    results = run_ranks(ranks, gradient_norm_and_step, 1.0 / copies, 0.05, parallel)
    assert [norm for norm, _ in results] == pytest.approx([norm] * ranks, rel=1e-5)
    assert_close(assemble([blocks for _, blocks in results], 67), assemble([expected], 67), relative=1e-4)


def test_moving_average(world):
    trained = trained_role(ema_decay=0.75)
    average = weights(trained)
    for step in range(3):
        trained.update([microbatch(trained.role, step)], LR)
        now = weights(trained)
        average = {name: 0.75 * average[name] + 0.25 * now[name] for name in now}
    with trained.average.as_weights() as role:
        assert role.name == "policy_ema"
        assert_close(assemble([weight_blocks(role)], 67), average, relative=1e-6)
    assert_close(weights(trained), now, relative=0)
    trained.update([microbatch(trained.role, 3)], LR)
    assert any((moved(now, weights(trained))[name] != 0).any() for name in now), "the weights are the optimizer's again"


def test_moving_average_in_bf16_is_kept_in_fp32(world):
    """With decay 0.992 a step of the average is far below the 8 bits of a bf16 weight."""
    trained = trained_role(ema_decay=0.992, precision=Precision.bf16)
    start = weights(trained)
    for step in range(5):
        trained.update([microbatch(trained.role, step)], LR)
    with trained.average.as_weights() as role:
        averaged = assemble([weight_blocks(role)], 67)
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert (averaged[name] != start[name]).mean() > 0.99


def poisoned(role, value):
    batch = microbatch(role)
    return Microbatch(batch.tokens_bs, lambda logits: (batch.loss(logits)[0] * value, {"loss": torch.tensor(value)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(value, world, caplog):
    trained = trained_role(ema_decay=0.5)
    trained.update([microbatch(trained.role)], LR)
    before = weights(trained)
    with trained.average.as_weights() as role:
        average = assemble([weight_blocks(role)], 67)
    with caplog.at_level(logging.WARNING, "megatron_rlhf"):
        update = trained.update([microbatch(trained.role), poisoned(trained.role, value)], LR)
    assert update.skipped
    assert trained.skipped_in_a_row == 1
    assert "update skipped, policy: gradient norm" in caplog.text
    assert f"loss = {value}" in caplog.text
    assert_close(weights(trained), before, relative=0)
    with trained.average.as_weights() as role:
        assert_close(assemble([weight_blocks(role)], 67), average, relative=0)
    after = trained.update([microbatch(trained.role)], LR)
    assert not after.skipped
    assert trained.skipped_in_a_row == 0
    assert all(np.isfinite(array).all() for array in weights(trained).values()), "moments are not poisoned"


def test_the_skipped_step_does_not_count_for_adam(world):
    straight, interrupted = trained_role(), trained_role()
    straight.update([microbatch(straight.role)], LR)
    interrupted.update([microbatch(interrupted.role)], LR)
    interrupted.update([poisoned(interrupted.role, float("nan"))], LR)
    for trained in (straight, interrupted):
        trained.update([microbatch(trained.role, 1)], LR)
    assert_close(weights(interrupted), weights(straight), relative=0)


def test_too_many_in_a_row_stop_training_with_the_cause(world):
    trained = trained_role(max_skipped=3)
    for _ in range(2):
        trained.update([poisoned(trained.role, float("nan"))], LR)
    trained.update([microbatch(trained.role)], LR)
    for _ in range(2):
        trained.update([poisoned(trained.role, float("nan"))], LR)
    with pytest.raises(TrainingDiverged, match=r"3 updates in a row.*run\.max_skipped_steps=3.*policy.*loss = nan"):
        trained.update([poisoned(trained.role, float("nan"))], LR)


def skip_on_one_rank(parallel):
    """Only the last data-parallel rank's microbatch is bad."""
    trained = trained_role(parallel)
    layout = trained.role.layout
    bad = layout.dp_rank == layout.dp_size - 1
    update = trained.update([poisoned(trained.role, float("nan")) if bad else microbatch(trained.role)], LR)
    return update.skipped, trained.skipped_in_a_row


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(distributed_optimizer=True),
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2),
    ],
)
def test_all_ranks_skip_together(parallel):
    assert run_ranks(2, skip_on_one_rank, parallel) == [(True, 1)] * 2
