"""Gradients summed during the backward pass, weights gathered during the next forward pass: the same numbers."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, assemble, assert_close, make_role, weight_blocks

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs
from megatron_rlhf.trainers import optimizer
from megatron_rlhf.trainers.step import TrainedRole

LAYOUTS = {
    "dp2": (2, {}),
    "cp2": (2, {"context": 2}),
    "pp2_dp2": (4, {"pipeline": 2}),
    "pp2_virtual2_dp2": (4, {"pipeline": 2, "virtual_stages": 2}),
    "tp2_dp2": (4, {"tensor": 2, "sequence": True}),
}
BUCKET = 3000
"""Numbers in a bucket: each chunk has several."""


def microbatches(trained: TrainedRole, seed: int, spoilt: bool = False) -> list[Microbatch]:
    """Two or more on each data-parallel rank, of several lengths."""
    layout = trained.role.layout

    def microbatch(row: int) -> Microbatch:
        random = torch.Generator().manual_seed(100 * seed + row)
        tokens = torch.randint(0, 67, (1, 8 + 4 * row), generator=random)

        def loss_of(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = -token_logprobs(logits[:, :-1], tokens[:, 1:], layout.groups.tp).sum() / 60
            loss = loss * (float("nan") if spoilt else 1.0)
            return loss, {"loss": loss.detach()}

        return Microbatch(tokens, loss_of)

    return [microbatch(row) for row in range(layout.dp_rank, 5, layout.dp_size)]


def train(model: Any, parallel: dict[str, Any], precision: Precision, overlap: bool, folder: Any = None) -> Any:
    config = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = functools.partial(config, bucket_size=BUCKET)  # type: ignore
    began: list[bool] = []
    finalize = optimizer.finalize_model_grads

    def watched(chunks: Any, *args: Any, **kwargs: Any) -> None:
        began.append(all(group.grad_reduce_handle is not None for chunk in chunks for group in chunk.bucket_groups))
        finalize(chunks, *args, **kwargs)

    optimizer.finalize_model_grads = watched  # type: ignore[assignment]
    layout = ParallelConfig(
        **parallel, distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    role = make_role(model, layout, precision=precision)
    trained = TrainedRole.create(role, OptimizerConfig(lr=1e-2, epsilon=1e-4), precision, ema_decay=0.5)
    figures = []
    for step in range(6):
        after = None
        if step in (2, 3):
            after = trained.accumulate(microbatches(trained, 50 + step), keep=step == 3)
        if step == 3:  # a pass that not all ranks have a part in
            figures.append(float(role.logprobs(torch.arange(8).view(1, 8), 1).sum()))
        done = trained.update(microbatches(trained, step, spoilt=step == 4), 1e-2, after)
        assert done.skipped == (step == 4)
        figures += [done.grad_norm, *done.statistics.values()] if step != 4 else []
        figures.append(float(role.logprobs(torch.arange(8).view(1, 8), 1).sum()))
    if folder is not None:  # what is saved right after an update
        trained.update(microbatches(trained, 9), 1e-2)
        with sharded.writing(folder) as aside:
            sharded.save_role(aside, SavedRole(role, trained.optimizer))
            sharded.write_meta(aside, {"policy": role}, {})
    with trained.average.as_weights() as averaged:
        average = weight_blocks(averaged)
    several = dist.get_world_size() > 2 or max(len(chunk.bucket_groups) for chunk in role.chunks) > 2
    return figures, weight_blocks(role), average, began, several


@pytest.mark.parametrize("precision", [Precision.fp32, pytest.param(Precision.bf16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["dp2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:])])
def test_overlap_changes_no_number(layout, precision):
    ranks, parallel = LAYOUTS[layout]
    model = LLAMA_LIKE if "tensor" in parallel else GPT2_LIKE
    on = run_ranks(ranks, train, model, parallel, precision, True, timeout=200)
    off = run_ranks(ranks, train, model, parallel, precision, False, timeout=200)
    for (figures, _, _, began, several), (expected, *_, none_began, _) in zip(on, off, strict=True):
        assert figures == pytest.approx(expected, rel=2e-6 if precision is Precision.fp32 else 2e-2)
        assert several
        # Megatron-Core counts gradients in the first update, and overlaps from the second.
        assert began == [False, *[True] * 6] and not any(none_began)
    tolerance = 2e-6 if precision is Precision.fp32 else 2**-6  # two units in the last place
    for index in (1, 2):
        assert_close(*(assemble([rank[index] for rank in run], 67) for run in (on, off)), relative=tolerance)


def load(folder: Any, parallel: dict[str, Any]) -> Any:
    parallel = ParallelConfig(**parallel, distributed_optimizer=True)
    role = make_role(GPT2_LIKE, parallel, seed=7, precision=Precision.bf16)
    trained = TrainedRole.create(role, OptimizerConfig(), Precision.bf16)
    sharded.load_role(folder, SavedRole(role, trained.optimizer))
    return weight_blocks(role)


def test_a_checkpoint_right_after_an_update_has_the_updated_weights(tmp_path):
    saved = run_ranks(2, train, GPT2_LIKE, {}, Precision.bf16, True, tmp_path / "step_1", timeout=200)
    again = run_ranks(1, load, tmp_path / "step_1", {}, timeout=200)
    assert_close(*(assemble(blocks, 67) for blocks in (again, [rank[1] for rank in saved])), relative=0)
