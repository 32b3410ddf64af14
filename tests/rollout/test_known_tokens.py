"""Embedding rows without a token in the tokenizer: never sampled, and left out of what is compared with sampling."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage
from torch.testing import assert_close
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.microbatches import TokenBatch, language_model_nll
from megatron_rlhf.rollout.generate import generate

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
KNOWN = [i for i in range(40) if i not in (7, 8, 21)]  # the tokenizer is smaller than the model, and has holes
PROMPTS = [[1, 2, 3], [4], [5, 6, 9, 10, 11]]
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "greedy": {"temperature": 0.0},
    "wide": {"top_k": 60, "top_p": 0.9},
}


def sampled(model, parallel, settings):
    """Texts, sampled log-probabilities, and those of a pass over the whole texts, by the same role."""
    role = make_role(MODELS[model], parallel)
    role.know_only(KNOWN)
    config = SamplingConfig(max_response_tokens=30, batch_size=4, **settings)
    done = generate(role, PROMPTS, torch.arange(len(PROMPTS)), config, stop_ids=())
    texts = torch.tensor([prompt[-1:] + completion.tokens for prompt, completion in zip(PROMPTS, done, strict=True)])
    scored = role.logprobs(texts, 2, config.temperature or 1.0, as_response=True)
    batch = TokenBatch.pack(list(texts), [1] * len(texts))
    return done, scored, language_model_nll(role, batch, 2)[0]


def logits_of(model, tokens):
    role = make_role(MODELS[model])
    with role.layout, role.evaluating():
        return role.modules[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)[..., :67]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", SETTINGS)
def test_the_distribution_is_over_the_tokens_that_there_are(model, case, world):
    """By hand, from the logits of the model as it is: a softmax over the known columns alone."""
    done, scored, nll = sampled(model, ParallelConfig(), SETTINGS[case])
    temperature = SETTINGS[case].get("temperature") or 1.0
    columns = torch.tensor(KNOWN)
    total = 0.0
    for prompt, completion, row in zip(PROMPTS, done, scored, strict=True):
        assert set(completion.tokens) <= set(KNOWN)
        logits = logits_of(model, torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        places = torch.searchsorted(columns, torch.tensor(completion.tokens)).unsqueeze(-1)
        expected = (logits[:, columns] / temperature).log_softmax(-1).gather(-1, places).squeeze(-1)
        assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=5e-5)
        text = torch.tensor([prompt[-1:] + completion.tokens])
        logits = logits_of(model, text)[0, :-1]
        expected = (logits[:, columns] / temperature).log_softmax(-1).gather(-1, places).squeeze(-1)
        assert_close(row, expected, rtol=0, atol=5e-5)
        total -= float(logits.log_softmax(-1).gather(-1, text[0, 1:].unsqueeze(-1)).sum())
    assert nll == pytest.approx(total, rel=1e-5), "the loss of text is over all rows"


def test_some_would_be_sampled_otherwise(world):
    role = make_role(GPT2_LIKE)
    done = generate(role, PROMPTS, torch.arange(3), SamplingConfig(max_response_tokens=30, batch_size=4), stop_ids=())
    assert all(set(completion.tokens) - set(KNOWN) for completion in done)


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)], ids=str)
def test_at_a_layout(parallel, world):
    expected, scored, nll = sampled("llama", ParallelConfig(), {})
    for done, rescored, renll in run_ranks(2, sampled, "llama", parallel, {}):
        assert [c.tokens for c in done] == [c.tokens for c in expected]
        assert_close(rescored, scored, rtol=0, atol=5e-5)
        assert renll == pytest.approx(nll, rel=1e-5)


def test_a_tokenizer_with_all_rows_changes_nothing(world):
    role = make_role(replace(GPT2_LIKE, vocab_size=40))
    role.know_only(range(40))
    assert role.unknown_v is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_ppo_with_half_of_the_rows_unknown(recipe, tmp_path, ranks):
    """Samples, the policy's and the reference's passes and the first update agree: a ratio of 1, a KL of 0."""
    run_ranks(1, run_stage, "sft", recipe.sft(str(tmp_path / "wide"), "model.vocab_size=600", "sft.max_steps=1"))
    settings = ["ppo.iterations=1", "ppo.warmup_iterations=0", "ppo.max_logprob_gap=1e-3", f"parallel.tensor={ranks}"]
    ppo = recipe.ppo(str(tmp_path / "ppo"), tmp_path / "wide", recipe.root / "reward_model", *settings)
    run_ranks(ranks, run_stage, "ppo", ppo)
    (metrics,) = read_metrics(tmp_path / "ppo")
    assert metrics["rollout/logprob_gap_max"] < 1e-4
    assert metrics["policy/first_ratio_max_gap"] < 1e-4
    assert abs(metrics["kl/mean"]) < 1e-4
    known = 300
    assert metrics["policy/entropy"] < torch.tensor(float(known)).log() + 1e-4
