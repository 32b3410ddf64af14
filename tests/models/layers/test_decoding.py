"""A decoded token's pass through the layers, written out: log-probabilities of the whole model, whatever a layer consists of."""

import dataclasses

import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.lora import Adapter, projections
from megatron_rlhf.config.model import Activation, FusedKernels, ParallelConfig, Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.layers.decoding import DecodingLayer
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import row_keys

PROMPTS = [[5, 9, 60, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
MODELS = {
    "gpt2": GPT2_LIKE,
    "relu": dataclasses.replace(GPT2_LIKE, activation=Activation.relu),
    "llama": LLAMA_LIKE,
    "one key for all queries": dataclasses.replace(LLAMA_LIKE, num_query_groups=1),
    "norms of queries and keys": dataclasses.replace(LLAMA_LIKE, qk_norm=True, head_dim=12),
    "parallel residual": dataclasses.replace(
        GPT2_LIKE, positions=LLAMA_LIKE.positions, rope_fraction=0.5, parallel_residual=True
    ),
    "bias of queries and keys": dataclasses.replace(LLAMA_LIKE, qkv_bias=True),
}


def gap(
    model: str, parallel: ParallelConfig, precision: Precision = Precision.fp32, adapter: Adapter | None = None
) -> float:
    """The largest difference between log-probabilities of the sampler and of a pass over the whole text."""
    role = make_role(MODELS[model], parallel, precision=precision, adapter=adapter)
    ids = torch.arange(len(PROMPTS))
    config = SamplingConfig(max_response_tokens=12, batch_size=2)
    done = generate(role, PROMPTS, row_keys(5, 0, ids, torch.zeros_like(ids)), config, ())
    differences = []
    for prompt, completion in zip(PROMPTS, done, strict=True):
        whole = role.logprobs(torch.tensor([prompt + completion.tokens]), 1)[0, len(prompt) - 1 :]
        differences.append((torch.tensor(completion.logprobs) - whole).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("kernels", [FusedKernels.off, FusedKernels.on])
@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_are_those_of_the_whole_text(model, kernels, world, monkeypatch):
    written_out = []
    whole = DecodingLayer._attend
    monkeypatch.setattr(DecodingLayer, "_attend", lambda self, *args: written_out.append(1) or whole(self, *args))
    assert gap(model, ParallelConfig(fused_kernels=kernels)) < 2e-5
    assert written_out


@pytest.mark.parametrize("model", ["gpt2", "norms of queries and keys"])
def test_adapters_are_decoded_with(model, world):
    targets = tuple(name for parts in projections(MODELS[model]).values() for name in parts)
    assert gap(model, ParallelConfig(), adapter=Adapter(4, 8.0, targets)) < 2e-5


@pytest.mark.parametrize("model", ["llama", "one key for all queries", "parallel residual"])
def test_on_two_tensor_parallel_ranks(model):
    assert max(run_ranks(2, gap, model, ParallelConfig(tensor=2))) < 2e-5


def test_in_half_precision(world):
    assert gap("llama", ParallelConfig(), Precision.bf16) < 0.1
