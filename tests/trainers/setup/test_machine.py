"""What a configuration asks of the machine before CUDA starts."""

import os

import pytest

from megatron_rlhf.config.data import DemonstrationDataConfig
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.stages import SFTConfig
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.trainers.setup.machine import check_machine

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("parallel", "given", "expected"),
    [
        (ParallelConfig(tensor=2, sequence=True), None, "1"),
        (ParallelConfig(tensor=2, sequence=True), "8", "8"),
        (ParallelConfig(tensor=2), None, None),
    ],
)
def test_sequence_parallelism_has_one_queue_to_the_gpu(monkeypatch, parallel, given, expected):
    monkeypatch.setenv(NAME, given or "")
    if given is None:
        monkeypatch.delenv(NAME)
    data = DemonstrationDataConfig(demonstrations="demonstrations.jsonl")
    check_machine(SFTConfig(run=RunConfig(dir="run"), data=data, parallel=parallel), 2)
    assert os.environ.get(NAME) == expected
