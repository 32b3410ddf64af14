"""The moving average follows the master weights in every precision and at every layout."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, assemble, assert_close, make_role, weight_blocks

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs
from megatron_rlhf.trainers.step import TrainedRole

LR, DECAY, STEPS = 2e-5, 0.9, 8
LAYOUTS = {
    "one": (1, {}),
    "one_sharded": (1, {"distributed_optimizer": True}),
    "dp2": (2, {}),
    "dp2_sharded": (2, {"distributed_optimizer": True}),
    "cp2_sharded": (2, {"context": 2, "distributed_optimizer": True}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "pp2_sharded": (2, {"pipeline": 2, "distributed_optimizer": True}),
}


def make(parallel: dict, precision: Precision, epsilon: float = 1e-8) -> TrainedRole:
    role = make_role(GPT2_LIKE, ParallelConfig(**parallel), precision=precision)
    optimizer = OptimizerConfig(lr=LR, clip_norm=0.0, betas=(0.9, 0.95), weight_decay=0.1, epsilon=epsilon)
    return TrainedRole.create(role, optimizer, precision, ema_decay=DECAY)


def update(trained: TrainedRole, seed: int) -> None:
    """Every data-parallel rank sees the same two sequences, and counts them for its share."""
    layout = trained.role.layout
    tokens = torch.randint(0, 67, (2, 16), generator=torch.Generator().manual_seed(seed))

    def loss_of(logits):
        loss = -token_logprobs(logits[:, :-1], tokens[:, 1:], layout.groups.tp).mean() / layout.dp_size
        return loss, {"loss": loss.detach()}

    trained.update([Microbatch(tokens, loss_of)], LR)


def average_of(trained: TrainedRole) -> list:
    with trained.average.as_weights() as averaged:
        return weight_blocks(averaged)


@pytest.mark.parametrize("sharded_masters", [False, True])
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
def test_small_updates_move_it_as_they_move_fp32(world, precision, sharded_masters):
    """torch's own Adam on fp32 copies with the same gradients, and the average of those in fp64."""
    trained = make({"distributed_optimizer": sharded_masters}, precision)
    (chunk,) = trained.role.modules
    named = dict(chunk.named_parameters())
    reference = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in named.items()}
    matrices = [p for p in reference.values() if p.dim() > 1]
    rest = [p for p in reference.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    start = {name: p.detach().double().clone() for name, p in reference.items()}
    expected = {name: value.clone() for name, value in start.items()}
    for step in range(STEPS):
        update(trained, step)
        for name, parameter in named.items():
            reference[name].grad = parameter.main_grad.float().clone()
        adam.step()
        for name, value in expected.items():
            value.mul_(DECAY).add_(reference[name].detach().double(), alpha=1 - DECAY)
    with trained.average.as_weights():
        found = {name: p.detach().double() for name, p in chunk.named_parameters()}
    for name, value in expected.items():
        moved = (value - start[name]).abs()
        assert moved.max() > LR, name
        torch.testing.assert_close(found[name] - start[name], value - start[name], rtol=2e-3, atol=3e-7)
        large = moved > 1e-6
        assert (found[name] != start[name])[large].all(), "none stays where it was"


def trained_average(parallel: dict, precision: Precision, steps: int = STEPS) -> list:
    trained = make(parallel, precision, epsilon=1e-3)  # far above gradients that are 0 except for rounding
    for step in range(steps):
        update(trained, step)
    before = weight_blocks(trained.role)
    blocks = average_of(trained)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(before, weight_blocks(trained.role), strict=True))
    return blocks


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_it_does_not_depend_on_the_layout(layout):
    ranks, parallel = LAYOUTS[layout]
    found = assemble(run_ranks(ranks, trained_average, parallel, Precision.fp32), 67)
    assert_close(found, assemble(run_ranks(1, trained_average, {}, Precision.fp32), 67), relative=1e-6)


def test_shards_of_half_precision_add_up_to_the_whole():
    whole, shards = (
        assemble(run_ranks(2, trained_average, LAYOUTS[layout][1], Precision.bf16), 67)
        for layout in ("dp2", "dp2_sharded")
    )
    assert_close(shards, whole, relative=0)


def save_average(folder, parallel: dict) -> list:
    trained = make(parallel, Precision.bf16)
    for step in range(3):
        update(trained, step)
    with sharded.writing(folder) as aside:
        saved = trained.average.saved()
        sharded.save_role(aside, saved)
        sharded.write_meta(aside, {saved.role.name: saved.role}, {})
    return average_of(trained)


def load_average(folder, parallel: dict) -> list:
    """Loads into an average that continues from there."""
    trained = make(parallel, Precision.bf16)
    weights = weight_blocks(trained.role)
    sharded.load_role(folder, trained.average.saved())
    assert all(np.array_equal(a.values, b.values) for a, b in zip(weights, weight_blocks(trained.role), strict=True))
    return average_of(trained)


@pytest.mark.parametrize(("saved", "loaded"), [("dp2_sharded", "one"), ("tp2", "dp2_sharded"), ("one", "pp2_sharded")])
def test_a_saved_one_is_loaded_at_any_layout(tmp_path, saved, loaded):
    blocks = run_ranks(LAYOUTS[saved][0], save_average, tmp_path / "step_1", LAYOUTS[saved][1])
    again = run_ranks(LAYOUTS[loaded][0], load_average, tmp_path / "step_1", LAYOUTS[loaded][1])
    assert_close(assemble(again, 67), assemble(blocks, 67), relative=0)


@pytest.mark.parametrize("sharded_masters", [False, True])
def test_a_correction_of_one_weight_leaves_the_masters_of_the_others_alone(world, sharded_masters):
    """Rounding them to the model's copies would undo what small updates have added up to."""
    trained = make({"distributed_optimizer": sharded_masters}, Precision.bf16)
    update(trained, 0)
    before = average_source(trained)
    trained.add_to("decoder.final_layernorm.bias", 0.25)
    after = average_source(trained)
    for name, value in after.items():
        assert torch.equal(value, before[name] + (0.25 if name == "decoder.final_layernorm.bias" else 0.0)), name
    (chunk,) = trained.role.modules
    bias = after["decoder.final_layernorm.bias"].view_as(chunk.decoder.final_layernorm.bias)
    torch.testing.assert_close(chunk.decoder.final_layernorm.bias.float(), bias, rtol=2**-7, atol=0)


def average_source(trained: TrainedRole) -> dict[str, torch.Tensor]:
    """Masters as the optimizer itself lists them, by the model's names."""
    (part,) = trained.optimizer.chained_optimizers
    masters = [p for group in part.param_groups for p in group["params"]]
    (chunk,) = trained.role.modules
    return {
        name: next(m for m in masters if m.data_ptr() == p.main_param.data_ptr()).detach().clone()
        for name, p in chunk.named_parameters()
    }
