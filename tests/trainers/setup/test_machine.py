"""What a configuration asks of the machine before CUDA starts."""

import os

import pytest

from megatron_rlhf.config.data import DemonstrationDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Precision
from megatron_rlhf.config.stages import SFTConfig
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.trainers.setup.machine import check_machine, check_memory

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


def test_weights_that_are_more_than_the_memory():
    """12 h^2 + 13 h numbers a layer, the final norm, embeddings of tokens and positions."""
    model = ModelConfig(num_layers=3, hidden_size=8, num_attention_heads=2, vocab_size=50, max_sequence_length=20)
    parameters = 3 * (12 * 64 + 13 * 8) + 16 + 70 * 8
    for precision, layout, a_rank in (
        (Precision.fp32, ParallelConfig(), 4 * parameters),
        (Precision.bf16, ParallelConfig(), 2 * parameters),
        (Precision.bf16, ParallelConfig(tensor=2, pipeline=3), parameters / 3),
    ):
        check_memory("policy", model, layout, precision, int(a_rank) + 1)
        with pytest.raises(UserError, match=r"num_layers=3, hidden_size=8, vocab_size=50: the policy has 3\.19e\+03"):
            check_memory("policy", model, layout, precision, int(a_rank) - 1)
