"""fp16's dynamic loss scale: it backs off, the numbers do not depend on it, and a checkpoint brings it back."""

import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs
from megatron_rlhf.trainers.step import TrainedRole, Update

LR = 1e-3


def trained_role(parallel: ParallelConfig | None = None, precision: Precision = Precision.fp16) -> TrainedRole:
    role = make_role(GPT2_LIKE, parallel, precision=precision)
    return TrainedRole.create(role, OptimizerConfig(lr=LR, clip_norm=0.0), precision)


def update(trained: TrainedRole, weight: float = 1.0, seed: int = 0) -> Update:
    """Every data-parallel rank sees the same two sequences, and counts them for its share."""
    layout = trained.role.layout
    tokens = torch.randint(0, 67, (2, 16), generator=torch.Generator().manual_seed(seed))

    def loss_of(logits):
        loss = -weight / layout.dp_size * token_logprobs(logits[:, :-1], tokens[:, 1:], layout.groups.tp).mean()
        return loss, {"loss": loss.detach()}

    return trained.update([Microbatch(tokens, loss_of)], LR)


def scaler_state(trained: TrainedRole) -> tuple[float, int, int]:
    """Scale, updates since it last grew or failed, failures that are still allowed at this scale."""
    (part,) = trained.optimizer.chained_optimizers
    state = part.grad_scaler.state_dict()
    return float(state["scale"]), state["growth_tracker"], state["hysteresis_tracker"]


def test_gradients_that_overflow_are_skipped_and_lower_the_scale(world) -> None:
    trained = trained_role()
    assert not update(trained).skipped
    assert scaler_state(trained) == (2.0**16, 1, 2)
    assert update(trained, 1e9).skipped
    assert scaler_state(trained) == (2.0**16, 0, 1)
    assert update(trained, 1e9).skipped
    assert scaler_state(trained) == (2.0**15, 0, 0)
    assert not update(trained).skipped


def test_the_scale_is_taken_out_of_losses_and_gradients(world) -> None:
    ours, reference = update(trained_role()), update(trained_role(precision=Precision.fp32))
    assert ours.statistics["loss"] == pytest.approx(reference.statistics["loss"], rel=5e-3)
    assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=5e-3)


def save(folder, parallel: ParallelConfig):
    trained = trained_role(parallel)
    for weight in (1e9, 1e9, 1.0):
        update(trained, weight)
    with sharded.writing(folder) as aside:
        sharded.save_role(aside, SavedRole(trained.role, trained.optimizer))
        sharded.write_meta(aside, {"policy": trained.role}, {})
    return scaler_state(trained), update(trained, seed=1)


def load(folder, parallel: ParallelConfig):
    trained = trained_role(parallel)
    before = scaler_state(trained)
    sharded.load_role(folder, SavedRole(trained.role, trained.optimizer))
    return before, scaler_state(trained), update(trained, seed=1)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (ParallelConfig(tensor=2), ParallelConfig(tensor=2)),
        (ParallelConfig(distributed_optimizer=True), ParallelConfig(distributed_optimizer=True)),
        (ParallelConfig(distributed_optimizer=True), ParallelConfig(tensor=2, distributed_optimizer=True)),
    ],
    ids=["optimizer", "distributed_optimizer", "another_layout"],
)
def test_a_checkpoint_brings_the_scale_back(source: ParallelConfig, target: ParallelConfig, tmp_path) -> None:
    folder = tmp_path / "step_3"
    saved, expected = run_ranks(2, save, folder, source, timeout=120)[0]
    assert saved == (2.0**15, 1, 0)
    for fresh, loaded, after in run_ranks(2, load, folder, target, timeout=120):
        assert fresh == (2.0**16, 0, 2)
        assert loaded == saved
        assert after.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2 if source != target else 0)
