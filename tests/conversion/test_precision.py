"""Every architecture sampled in bf16 and fp16: what the cache gives is what a pass over the whole text gives."""

import hf_models
import pytest
import torch
from toys import make_role

from megatron_rlhf.config.model import Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.conversion.hf import config as hf_config
from megatron_rlhf.rollout.generate import generate

# Of unlike length: padded on the left.
PROMPTS = [[5, 9, 40, 7, 7, 81], [3], [12, 60, 2, 33, 8, 1, 19, 4, 77], [50, 51]]


def shape_of(case):
    content = hf_models.build(case).config.to_dict()
    return hf_config.to_model_config(content, hf_config.find_architecture(content, case), case)


def sampled_and_scored(role):
    config = SamplingConfig(max_response_tokens=24, batch_size=4)
    completions = generate(role, PROMPTS, torch.arange(len(PROMPTS)), config, stop_ids=())
    texts = [prompt + completion.tokens for prompt, completion in zip(PROMPTS, completions, strict=True)]
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    return texts, sampled, logprobs_of(role, texts)


def logprobs_of(role, texts):
    rows = [role.logprobs(torch.tensor([text]), 1)[0] for text in texts]
    return torch.cat([row[len(prompt) - 1 :] for row, prompt in zip(rows, PROMPTS, strict=True)])


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
@pytest.mark.parametrize("case", [*hf_models.ARCHITECTURES, "llama_linear_rope", "gpt_neox_serial"])
def test_sampled_and_scored_logprobs_differ_by_rounding(world, case, precision):
    """Rounding is measured, not guessed: by how much the scores of these very texts differ from those of fp32."""
    model = shape_of(case)
    texts, sampled, scored = sampled_and_scored(make_role(model, precision=precision))
    exact = logprobs_of(make_role(model), texts)
    rounding = (scored - exact).abs().max()
    assert 0 < rounding < (0.5 if precision is Precision.bf16 else 0.1)
    assert (sampled - scored).abs().max() <= 2 * rounding
