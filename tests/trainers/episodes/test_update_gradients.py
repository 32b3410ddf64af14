"""The accumulated gradient of an update, for every parameter, against formulas and plain autograd; PPO plus text."""

import dataclasses

import numpy as np
import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, assemble, assert_close, gradient_blocks, make_role, train
from update_losses import (
    BATCHES,
    EPISODES,
    GAMMA,
    LAYOUTS,
    PLAIN,
    TEMPERATURE,
    TEXTS,
    VOCAB,
    check,
    comparisons,
    config,
    experience,
    is_scalar,
    microbatches,
    summed_gradients,
    trained_gradients,
)

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import forward_backward
from megatron_rlhf.trainers.episodes.microbatches import policy_microbatches
from megatron_rlhf.trainers.reward_model import ranking_microbatches


@pytest.mark.parametrize("kind", PLAIN)
def test_each_loss_has_the_gradient_of_its_formula(kind, plain):
    rows = len(BATCHES[kind]()) if kind != "text" else len(TEXTS)
    check([trained_gradients(kind, ParallelConfig(), rows, 2)], *plain(kind, rows))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_loss_at_every_layout_with_uneven_batches(layout, kind, plain):
    rows = 3
    ranks, parallel = LAYOUTS[layout]
    check(run_ranks(ranks, trained_gradients, kind, parallel, rows, 2), *plain(kind, rows))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_rank_with_nothing_to_do(kind, plain):
    """One row for two data-parallel ranks: the other adds nothing, and no rank waits forever."""
    check(run_ranks(2, trained_gradients, kind, ParallelConfig(), 1, 2, timeout=30), *plain(kind, 1))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_the_micro_batch_size_changes_nothing(micro_batch_size, kind, plain):
    rows = 3
    check([trained_gradients(kind, ParallelConfig(), rows, micro_batch_size)], *plain(kind, rows))


def test_clipped_ratios_and_values_are_part_of_the_test(world):
    for kind, name in (("policy", "policy/clip_fraction"), ("value", "value/clip_fraction")):
        trained = train(make_role(GPT2_LIKE, scalar=is_scalar(kind)))
        with trained.role.evaluating():
            batches = microbatches(kind, trained, len(EPISODES), 2)
            statistics = forward_backward(trained.role.chunks, batches, trained.role.layout, forward_only=True)
        share = collectives.reduce_statistics(statistics, trained.role.layout)[name]
        assert 0.1 < share < 0.9


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_prompt_passes_once_with_all_its_completions_and_is_not_split(part, world):
    trained = train(make_role(GPT2_LIKE, scalar=True))
    read = []
    trained.role.modules[0].register_forward_hook(lambda module, args, output: read.append(args[0].flatten().tolist()))
    gradient_blocks(trained, ranking_microbatches(comparisons(), trained, part, 4))
    texts = [[*one.prompt_tokens, *np.concatenate(one.responses_tokens)] for one in comparisons()]
    longest_first = sorted(texts, key=len, reverse=True)
    parts = [longest_first[i : i + part] for i in range(0, len(texts), part)]
    assert read == [[token for text in texts for token in text] for texts in parts]


def test_a_prompt_with_many_completions_never_passes_whole(world):
    """Of 2, 4 and 3 completions, those of the second and third prompt are scored first, then trained on in parts."""
    trained = train(make_role(GPT2_LIKE, scalar=True))
    passes = []
    trained.role.modules[0].register_forward_hook(lambda module, args, output: passes.append(torch.is_grad_enabled()))
    microbatches = ranking_microbatches(comparisons(), trained, 3, 2)
    assert passes == [False] * 4, "scored: 2, 2, 2 and 1"
    assert sorted(len(microbatch.sequences()) for microbatch in microbatches) == [1, 2, 2, 2, 2]


def test_an_episode_counts_by_its_tokens_not_by_its_microbatch(world):
    """Means of microbatch means would give every microbatch one vote."""
    trained = train(make_role(GPT2_LIKE))
    whole = experience()
    parts = policy_microbatches(whole, trained, config(1))
    assert len(parts) == len(EPISODES)
    flat = dataclasses.replace(whole, advantages_bt=torch.where(whole.mask_bt, 1.0, 0.0))
    with trained.role.evaluating():
        old = trained.role.logprobs(whole.tokens_bs, 2, TEMPERATURE).gather(1, whole.positions_bt)
        flat = dataclasses.replace(flat, logprobs_bt=torch.where(whole.mask_bt, old, 0.0))
        statistics = forward_backward(
            trained.role.chunks, policy_microbatches(flat, trained, config(1)), trained.role.layout, forward_only=True
        )
    tokens = [n for _, n in sorted(EPISODES, key=sum, reverse=True)]  # the longest passes first
    shares = [float(s["policy/loss"]) for s in statistics]
    assert shares == pytest.approx([-n / sum(tokens) for n in tokens], rel=1e-5)
    assert sum(float(s["policy/ratio_mean"]) for s in statistics) == pytest.approx(1.0, rel=1e-5)


def sum_of(plain, rows, text_rows):
    _, ppo = plain("policy", rows)
    _, text = plain("text", text_rows)
    return {name: ppo[name] + GAMMA * text[name] for name in ppo}


def test_the_sum_is_ppo_plus_gamma_times_pretraining(plain):
    blocks = summed_gradients(ParallelConfig(), len(EPISODES), len(TEXTS))
    assert_close(assemble([blocks], VOCAB), sum_of(plain, len(EPISODES), len(TEXTS)), relative=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_at_every_layout(layout, plain):
    ranks, parallel = LAYOUTS[layout]
    results = run_ranks(ranks, summed_gradients, parallel, len(EPISODES), 3)
    assert_close(assemble(results, VOCAB), sum_of(plain, len(EPISODES), 3), relative=1e-5)


def test_neither_part_of_the_sum_is_lost_in_the_other(plain):
    """If PPO's part were smaller than the tolerance, the tests above would not detect its loss."""
    _, ppo = plain("policy", len(EPISODES))
    _, text = plain("text", len(TEXTS))
    for name in ppo:
        assert abs(ppo[name]).max() > 1e-3 * GAMMA * abs(text[name]).max(), name
