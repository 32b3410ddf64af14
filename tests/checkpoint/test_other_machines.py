"""Checkpoints from another kind of machine: a CPU's on a GPU, or one without Transformer Engine on one with it."""

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from test_sharded import LAYOUTS, load, save, trained_role, update

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel.adam import AdamWithGroupStep


@pytest.mark.parametrize(("device", "same"), [(" x device cpu", True), (" x device cuda", False), ("", True)])
def test_random_state_of_another_device_is_left_alone(tmp_path, world, device, same):
    """Checkpoints of the first versions do not name a device: all were written on CPUs."""
    trained = trained_role("gpt2", ParallelConfig())
    update(trained, 0)
    folder = tmp_path / "step_1"
    with sharded.writing(folder) as aside:
        sharded.save_role(aside, SavedRole(trained.role, trained.optimizer))
        sharded.write_meta(aside, {"policy": trained.role}, {})
    saved = torch.get_rng_state()
    meta = (folder / sharded.META).read_text()
    assert " x device cpu" in meta
    (folder / sharded.META).write_text(meta.replace(" x device cpu", device))
    torch.manual_seed(1)
    now = torch.get_rng_state()
    sharded.load_role(folder, SavedRole(trained.role, trained.optimizer))
    assert torch.equal(torch.get_rng_state(), saved if same else now)


class OtherAdam(AdamWithGroupStep):
    """Like Transformer Engine's Adam against torch's: one more setting in its groups, needed by its step, and one less."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group["bias_correction"] = True
            del group["maximize"]

    def step(self, closure=None):
        assert all(group["bias_correction"] for group in self.param_groups)
        for group in self.param_groups:
            group["maximize"] = False
        super().step(closure)
        for group in self.param_groups:
            del group["maximize"]


@pytest.mark.parametrize("layout", ["one_rank", "one_distributed"])
@pytest.mark.parametrize("first", [AdamWithGroupStep, OtherAdam])
def test_an_optimizer_of_another_kind_goes_on(tmp_path, world, monkeypatch, layout, first):
    """A run without Transformer Engine continues with it, and the other way round."""
    figures = []
    second = OtherAdam if first is AdamWithGroupStep else AdamWithGroupStep
    for kind, step in ((first, save), (second, load)):
        monkeypatch.setattr(megatron_optimizer, "Adam", kind)
        _, again, _ = step(tmp_path / "step_2", "gpt2", LAYOUTS[layout][1])
        figures.append(again)
    assert figures[0] == figures[1]
