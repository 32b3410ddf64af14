"""A checkpoint from before a role's first update, as in a critic's warmup, or after steps that were all skipped."""

import pytest
from test_sharded import LAYOUTS, trained_role, update
from toys import GPT2_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.trainers.step import TrainedRole


def create(layout: str, precision: Precision, seed: int) -> TrainedRole:
    parallel = LAYOUTS[layout][1]
    if precision is Precision.fp32:
        return trained_role("gpt2", parallel, seed)
    role = make_role(GPT2_LIKE, parallel, seed=seed, precision=precision)
    return TrainedRole.create(role, OptimizerConfig(lr=1e-2, epsilon=1e-4), precision)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("layout", ["one_rank", "one_distributed"])
def test_training_begins_as_if_nothing_had_been_saved(tmp_path, world, layout, precision):
    untouched, saved = create(layout, precision, seed=0), create(layout, precision, seed=0)
    with sharded.writing(tmp_path / "step_1") as aside:
        sharded.save_role(aside, SavedRole(saved.role, saved.optimizer))
        sharded.write_meta(aside, {"policy": saved.role}, {"step": 1})
    fresh, used = create(layout, precision, seed=1), create(layout, precision, seed=1)
    update(used, 9)  # its moments must go
    for loaded in (fresh, used):
        sharded.load_role(tmp_path / "step_1", SavedRole(loaded.role, loaded.optimizer))
    roles = [untouched, saved, fresh, used]
    figures = [[update(trained, seed) for seed in (2, 3)] for trained in roles]
    assert figures[1:] == figures[:1] * 3
