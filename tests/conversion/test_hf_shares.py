"""Data-parallel ranks read a Hugging Face folder together: each a part of it."""

import hf_models
import pytest
import torch
from ranks import run_ranks
from toys import make_role

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.conversion.hf import load as hf_load
from megatron_rlhf.conversion.hf.folder import TensorFiles


def load(folder, parallel):
    """Bytes of tensors that this rank read, and its weights."""
    read, nbytes = TensorFiles.read, []

    def counted(self, *place):
        tensor = read(self, *place)
        nbytes.append(tensor.nbytes)
        return tensor

    model, _ = hf_load.read_model_config(folder)
    role = make_role(model, parallel)
    TensorFiles.read = counted
    hf_load.load_into(role, folder)
    return sum(nbytes), [weight.detach().clone() for chunk in role.modules for weight in chunk.parameters()]


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_what_a_rank_reads_falls_as_their_number_grows(tmp_path, case):
    folder = hf_models.save(tmp_path, case)
    ((whole, expected),) = run_ranks(1, load, folder, ParallelConfig())
    for size in (2, 4):
        ranks = run_ranks(size, load, folder, ParallelConfig())
        assert sum(read for read, _ in ranks) == whole
        print(f"{case}, data parallel {size}: {[read for read, _ in ranks]} of {whole} bytes")
        for read, weights in ranks:
            assert read < 1.15 * whole / size
            assert all(map(torch.equal, weights, expected))


def test_ranks_of_one_stage_and_part_share(tmp_path):
    folder = hf_models.save(tmp_path, "llama")
    alone = run_ranks(2, load, folder, ParallelConfig(tensor=2))
    shared = run_ranks(4, load, folder, ParallelConfig(tensor=2))
    for rank, (read, weights) in enumerate(shared):
        whole, expected = alone[rank % 2]
        assert read < 0.6 * whole
        assert all(map(torch.equal, weights, expected))
