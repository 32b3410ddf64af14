"""Log-probabilities of GPT-2-style and Llama-style roles against `transformers`, the weights carried over by hand."""

import dataclasses

import pytest
import torch
from ranks import run_ranks
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, make_role
from transformers_twins import twin

from megatron_rlhf.config.model import ParallelConfig

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
LAYOUTS = {
    "one_rank": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "pp2_virtual2": (2, ParallelConfig(pipeline=2, virtual_stages=2)),
    "dp2": (2, ParallelConfig()),
}


def tokens():
    return torch.randint(0, 67, (5, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(world):
    """Logits of `transformers` for both models."""
    result = {}
    for name in MODELS:
        role = make_role(MODELS[name])
        hf = twin(role.modules[0].state_dict(), MODELS[name])
        with torch.no_grad():
            result[name] = hf(tokens()).logits
    return result


def test_logits(expected):
    for name, model in MODELS.items():
        role = make_role(model)
        positions = torch.arange(17).expand(5, -1)
        with role.layout, role.evaluating():
            logits = role.modules[0](tokens(), positions, None)
        assert_close(logits, expected[name], rtol=1e-5, atol=1e-5)


def logprobs_at(model, parallel):
    padded = dataclasses.replace(MODELS[model], vocab_multiple=16)  # 67 -> 80 on one rank, 96 on two
    return make_role(padded, parallel).logprobs(tokens(), micro_batch_size=2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_at_every_layout_on_every_rank_and_padding_takes_no_probability(layout, model, expected):
    logprobs = expected[model][:, :-1].log_softmax(-1).gather(-1, tokens()[:, 1:].unsqueeze(-1)).squeeze(-1)
    ranks, parallel = LAYOUTS[layout]
    for result in run_ranks(ranks, logprobs_at, model, parallel):
        assert_close(result, logprobs, rtol=1e-5, atol=1e-5)
