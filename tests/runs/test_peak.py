"""Rates of a step, worked by hand, and the peak that its share is of."""

import pytest
import torch

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import Precision
from megatron_rlhf.runs.peak import peak_flops_per_s, with_rates


def test_rates_are_by_the_seconds_of_the_step():
    step = {"loss": 1.0, "time/step_s": 2.0, "time/resharding_s": 0.5, "step_tokens": 100.0, "step_flops": 8e9}
    assert with_rates(step, peak=1e9, ranks=4) == {
        "loss": 1.0,
        "time/step_s": 2.0,
        "time/resharding_s": 0.5,
        "time/resharding_share": 0.25,
        "throughput/tokens_per_s": 50.0,
        "throughput/model_flops_per_s": 4e9,
        "throughput/mfu": 1.0,
    }


def test_what_is_not_known_has_no_figure():
    assert "throughput/mfu" not in with_rates({"time/step_s": 2.0, "step_flops": 8e9}, peak=None, ranks=1)
    assert with_rates({"loss": 1.0}, peak=1e9, ranks=1) == {"loss": 1.0}, "no step"


def test_the_peak_is_the_gpus_or_a_chosen_files(monkeypatch):
    assert peak_flops_per_s("h100_80gb", Precision.bf16) == pytest.approx(989e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops_per_s(None, Precision.fp32) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert peak_flops_per_s(None, Precision.bf16) == pytest.approx(312e12)
    with pytest.raises(UserError, match=r"run\.cluster=h200: there is no conf/cluster/h200\.yaml; there are a100"):
        peak_flops_per_s("h200", Precision.bf16)
