"""Slots of the key/value cache, worked by hand: one layer, one group, heads of size 1."""

import pytest
import torch

from megatron_rlhf.models.layers.cache import KeyValueCache


def keys(*rows):
    """[b][s] -> [s, b, 1, 1]"""
    return torch.tensor(rows, dtype=torch.float32).T.view(len(rows[0]), len(rows), 1, 1)


def filled() -> KeyValueCache:
    """Prompts 1 2 and 3 (padded), the second of them in two slots."""
    cache = KeyValueCache(slots=4, capacity=4)
    prompts = keys([1, 2], [3, 0])
    cache.prefill(torch.tensor([[0, 1], [0, 1]]), torch.tensor([1, 0]), torch.tensor([0, 1, 1]))
    assert cache.append(1, prompts, 10 * prompts)[0] is prompts, "prompts attend to themselves"
    return cache


def test_a_prompt_may_fill_several_slots_and_each_goes_on_by_itself():
    cache = filled()
    cache.decode(torch.tensor([2, 1, 1]), longest=2, aligned=False)
    new = keys([4], [5], [6])
    attended, values = cache.append(1, new, 10 * new)
    assert attended.squeeze().T.tolist() == [[1, 2, 4], [3, 5, 0], [3, 6, 0]]
    assert values.squeeze().T.tolist() == [[10, 20, 40], [30, 50, 0], [30, 60, 0]]


def test_later_prompts_take_free_slots():
    cache = filled()
    cache.move([2], [0])
    new = keys([7])
    cache.prefill(torch.tensor([[0]]), torch.tensor([0]), torch.tensor([0]), first=2)
    cache.append(1, new, new)
    cache.decode(torch.tensor([1, 1, 1]), longest=1, aligned=True)
    attended, _ = cache.append(1, keys([8], [9], [5]), keys([8], [9], [5]))
    assert attended.squeeze().T.tolist() == [[3, 8], [3, 9], [7, 5]]


def test_logits_are_wanted_at_the_last_real_token():
    cache = filled()
    hidden_sb = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    assert cache.wanted_n is not None
    assert hidden_sb.flatten()[cache.wanted_n].tolist() == [2, 3]
    cache.decode(torch.tensor([2, 1, 1]), longest=2, aligned=False)
    assert cache.wanted_n is None, "there are no others"


def test_a_full_cache_says_so():
    cache = KeyValueCache(slots=2, capacity=3)
    with pytest.raises(AssertionError, match="cache of 3 tokens asked to hold 4"):
        cache.decode(torch.tensor([3]), longest=3, aligned=True)
    with pytest.raises(AssertionError, match="cache of 2 slots asked to fill slot 2"):
        cache.prefill(torch.zeros(1, 1), torch.zeros(1), torch.zeros(2), first=1)
