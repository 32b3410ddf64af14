"""Choosing a token: filters against hand-worked literals, the distribution by chi-square, keys that depend on nothing else."""

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_rlhf.rollout.sampling import Sampler, filter_top_k, filter_top_p, mix, row_keys, uniform_numbers

INF = torch.inf


def log(*probabilities):
    return torch.tensor(probabilities).log()


def draws(sampler, logits, count):
    """Tokens of `count` rows that differ only in their key."""
    keys = row_keys(7, 0, torch.arange(count), torch.zeros(count, dtype=torch.long))
    tokens, _ = sampler(logits.expand(count, -1), keys)
    return tokens


def chi_square(tokens, probabilities):
    expected = torch.tensor(probabilities, dtype=torch.float64) * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    used = expected > 0
    assert observed[~used].sum() == 0
    return float(((observed - expected)[used] ** 2 / expected[used]).sum())


def test_top_k_literals():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, -1.0, 4.0, 6.0]])
    assert_close(filter_top_k(logits, 2), torch.tensor([[-INF, 3.0, 2.0, -INF], [5.0, -INF, -INF, 6.0]]))
    assert_close(filter_top_k(logits, 1), torch.tensor([[-INF, 3.0, -INF, -INF], [-INF, -INF, -INF, 6.0]]))
    for k in (0, 4, 9):
        assert_close(filter_top_k(logits, k), logits)


def test_top_p_literals():
    logits = log(0.1, 0.5, 0.15, 0.25)
    kept = {0.3: [1], 0.5: [1], 0.6: [1, 3], 0.76: [1, 2, 3], 0.89: [1, 2, 3], 0.95: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}
    for p, tokens in kept.items():
        filtered = filter_top_p(logits, p)
        assert filtered.isfinite().nonzero().flatten().tolist() == tokens, p
        assert_close(filtered[tokens], logits[tokens])


def test_top_p_always_keeps_the_likeliest_token():
    assert filter_top_p(log(0.2, 0.8), 1e-6).isfinite().tolist() == [False, True]


def test_top_p_counts_probability_after_top_k():
    logits = filter_top_k(log(0.4, 0.3, 0.2, 0.1), 2)  # 4/7 and 3/7 are left
    assert filter_top_p(logits, 0.5).isfinite().tolist() == [True, False, False, False]
    assert filter_top_p(logits, 0.6).isfinite().tolist() == [True, True, False, False]


def test_tokens_follow_the_distribution():
    probabilities = [0.5, 0.2, 0.15, 0.1, 0.04, 0.01]
    # 5 degrees of freedom: 20.5 is the 99.9% point.
    assert chi_square(draws(Sampler(), log(*probabilities), 50_000), probabilities) < 20.5


def test_temperature_sharpens_the_distribution():
    weights = [p**2 for p in (0.5, 0.3, 0.2)]
    tokens = draws(Sampler(temperature=0.5), log(0.5, 0.3, 0.2), 50_000)
    assert chi_square(tokens, [w / sum(weights) for w in weights]) < 13.8


def test_top_k_and_top_p_renormalise_what_is_left():
    logits = log(0.4, 0.3, 0.2, 0.1)
    assert chi_square(draws(Sampler(top_k=2), logits, 50_000), [4 / 7, 3 / 7, 0, 0]) < 10.8
    assert chi_square(draws(Sampler(top_p=0.85), logits, 50_000), [4 / 9, 3 / 9, 2 / 9, 0]) < 13.8


def test_positions_draw_independently():
    keys = row_keys(1, 0, torch.zeros(40_000, dtype=torch.long), torch.zeros(40_000, dtype=torch.long))
    tokens, _ = Sampler()(torch.zeros(40_000, 2), mix(keys, torch.arange(40_000)))
    pairs = tokens[:-1] * 2 + tokens[1:]
    assert chi_square(tokens, [0.5, 0.5]) < 10.8
    assert chi_square(pairs[::2], [0.25] * 4) < 16.3


def test_logprobs_are_of_the_whole_distribution_at_the_temperature():
    logits = torch.tensor([[0.0, math.log(9.0), -1.0]])
    keys = torch.tensor([5])
    whole = torch.log_softmax(logits / 2, -1)
    for sampler in (Sampler(temperature=2.0), Sampler(temperature=2.0, top_k=1), Sampler(temperature=2.0, top_p=0.1)):
        tokens, logprobs = sampler(logits, keys)
        assert_close(logprobs, whole[0, tokens])


def test_temperature_zero_is_greedy():
    logits = torch.randn(8, 11)
    tokens, logprobs = Sampler(temperature=0)(logits, torch.arange(8))
    assert_close(tokens, logits.argmax(-1))
    assert_close(logprobs, torch.log_softmax(logits, -1).amax(-1))


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(16, 33)
    keys = row_keys(3, 2, torch.arange(16), torch.arange(16) % 3)
    positions = torch.arange(16)
    tokens, logprobs = Sampler()(logits, mix(keys, positions))
    order = torch.randperm(16)[:5]
    again, logprobs_again = Sampler()(logits[order], mix(keys[order], positions[order]))
    assert_close(again, tokens[order])
    assert_close(logprobs_again, logprobs[order])


def test_every_part_of_the_key_matters():
    def key(seed=1, iteration=2, prompt=3, sample=4):
        return int(row_keys(seed, iteration, torch.tensor([prompt]), torch.tensor([sample])))

    others = {key(seed=2), key(iteration=3), key(prompt=4), key(sample=5), key(iteration=3, prompt=2), key(0, 2, 3, 5)}
    assert len(others | {key()}) == 7
    assert key() == key()


def test_keys_of_a_large_run_do_not_collide_more_than_chance():
    iterations, prompts = torch.meshgrid(torch.arange(100), torch.arange(1000), indexing="ij")
    keys = torch.cat(
        [row_keys(1234, int(i[0]), p, torch.zeros_like(p)) for i, p in zip(iterations, prompts, strict=True)]
    )
    collisions = len(keys) - len(keys.unique())
    assert collisions < 10, "10^5 keys of 32 bits: 1.2 collisions are expected"
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 2**32


def test_uniform_numbers_are_uniform_and_inside_the_open_interval():
    numbers = uniform_numbers(torch.arange(200), 1000)
    assert numbers.dtype is torch.float32
    assert 0 < float(numbers.min()) < 1e-4
    assert 0.9999 < float(numbers.max()) < 1
    assert chi_square((numbers.flatten() * 16).long(), [1 / 16] * 16) < 37.7
    neighbours = (numbers[:, :-1] * 4).long() * 4 + (numbers[:, 1:] * 4).long()
    assert chi_square(neighbours[:, ::2].flatten(), [1 / 16] * 16) < 37.7


@pytest.mark.parametrize("bits", [0, 1, 2**32 - 1, 2**32 - 2, 2**32 - 256, 2**31])
def test_the_ends_of_the_interval_are_never_reached(bits, monkeypatch):
    """A number that rounds to 0 or 1 would make its token win, or lose, regardless of its probability."""
    import megatron_rlhf.rollout.sampling as sampling

    monkeypatch.setattr(sampling, "_scramble", lambda x: torch.full_like(x, bits, dtype=torch.long).int())
    numbers = uniform_numbers(torch.tensor([0]), 3)
    assert (numbers > 0).all()
    assert (numbers < 1).all()
    tokens, _ = Sampler()(torch.tensor([[0.0, -50.0, 1.0]]), torch.tensor([0]))
    assert tokens.tolist() == [2], "equal random numbers leave the likeliest token"
    tokens, _ = Sampler(top_k=1)(torch.tensor([[0.0, -50.0, 1.0]]), torch.tensor([0]))
    assert tokens.tolist() == [2]


def test_an_impossible_token_is_never_drawn_in_a_large_vocabulary():
    """2 x 10^7 random numbers: a single one that rounds to 1 would show."""
    logits = torch.full((1, 50_000), -40.0)
    logits[0, 7] = 0.0
    assert (draws(Sampler(), logits, 100) == 7).all()
    for start in range(4):
        keys = mix(torch.arange(100), torch.full((100,), start))
        tokens, _ = Sampler()(logits.expand(100, -1), keys)
        assert (tokens == 7).all()


def test_a_banned_token_is_not_drawn_but_keeps_its_share_of_the_logprobs():
    logits = log(0.7, 0.2, 0.1).unsqueeze(0)
    banned = torch.tensor([0])
    for sampler in (Sampler(), Sampler(temperature=0), Sampler(top_k=1), Sampler(top_p=0.5)):
        token, logprob = sampler(logits, torch.tensor([3]), banned, torch.tensor([True]))
        assert int(token) in (1, 2)
        assert_close(logprob, logits[0, token])
    keys = row_keys(7, 0, torch.arange(20_000), torch.zeros(20_000, dtype=torch.long))
    too_early = torch.arange(20_000) < 10_000
    tokens, _ = Sampler()(logits.expand(20_000, -1), keys, banned, too_early)
    assert chi_square(tokens[:10_000], [0, 2 / 3, 1 / 3]) < 10.8
    assert chi_square(tokens[10_000:], [0.7, 0.2, 0.1]) < 13.8


def test_the_repetition_penalty_is_that_of_transformers():
    """On what is drawn; the log-probability is the model's own."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(3)) * 3
    held = torch.cat([logits.topk(2).indices, logits.topk(2, largest=False).indices], dim=1)
    seen = torch.zeros(6, 30, dtype=torch.bool).scatter(1, held, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(held, logits.clone())
    zeros = torch.zeros(6, dtype=torch.long)
    tokens, logprobs = Sampler(0.0, repetition_penalty=1.7)(logits, zeros, seen_bv=seen)
    assert tokens.tolist() == expected.argmax(dim=-1).tolist()
    assert tokens.tolist() != logits.argmax(dim=-1).tolist()
    own = logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs, own)
