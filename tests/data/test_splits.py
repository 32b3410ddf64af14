"""What is held out: a seeded share, with no overlap with the training data."""

import numpy as np
import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.files.item_store import choose
from megatron_rlhf.data.prompts import load_prompts
from megatron_rlhf.data.splits import held_out, split_by_user


def hold_out(items, *arguments):
    """(training, validation)."""
    held = held_out(items, *arguments)
    return choose(items, np.setdiff1d(np.arange(len(items)), held)), choose(items, held)


def test_hold_out():
    items = list(range(20))
    training, validation = hold_out(items, 0.2, 1)
    assert len(validation) == 4
    assert sorted(training + validation) == items
    assert training == sorted(training)
    assert hold_out(items, 0.2, 1) == (training, validation)
    assert hold_out(items, 0.2, 2)[1] != validation
    assert hold_out(items, 0.0, 1) == (items, [])
    assert len(hold_out(items, 0.001, 1)[1]) == 1
    assert len(hold_out([1, 2], 0.99, 1)[0]) == 1


def test_what_an_owner_has_stays_together():
    """40 items of 10 owners and 10 without an owner; two owners are linked by an item of both."""
    owners = {i: {i % 10} for i in range(40)} | {i: set() for i in range(40, 50)}
    owners[0] = {0, 5}
    for seed in range(20):
        training, validation = hold_out(range(50), 0.2, seed, owners.__getitem__)
        assert sorted(training + validation) == list(range(50))
        assert 1 <= len(validation) <= 10
        shared = set().union(*map(owners.get, training)) & set().union(*map(owners.get, validation))
        assert not shared
        assert {i in validation for i in owners if owners[i] & {0, 5}} in ({True}, {False})


def test_owners_of_more_than_the_share():
    training, validation = hold_out(range(10), 0.1, 0, lambda item: [item < 6])
    assert (training, validation) == (list(range(6)), list(range(6, 10))), "the smaller of two"
    with pytest.raises(UserError, match=r"nothing can be held out of 10 prompts of one user; give data\.validation"):
        hold_out(range(10), 0.1, 0, lambda item: ["eva"])
    assert hold_out(range(3), 0.0, 0, lambda item: ["eva"]) == ([0, 1, 2], [])


def test_split_by_user_is_disjoint_complete_and_stable(tokenizer, write_records):
    records = [{"prompt": f"p{i}", "user": f"u{i % 200}"} for i in range(400)] + [
        {"prompt": f"q{i}"} for i in range(50)
    ]
    prompts = load_prompts(write_records(*records), tokenizer, 10)
    parts = split_by_user(prompts, (0.8, 0.1, 0.1), seed=3)
    assert sorted(prompt.id for part in parts for prompt in part) == list(range(450))
    users = [{prompt.user for prompt in part} - {None} for part in parts]
    assert not users[0] & users[1]
    assert not users[0] & users[2]
    assert not users[1] & users[2]
    assert 0.7 < len(parts[0]) / 450 < 0.9
    assert min(len(parts[1]), len(parts[2])) > 10

    def ids(split):
        return [[prompt.id for prompt in part] for part in split]

    few = split_by_user(list(prompts)[:100], (0.8, 0.1, 0.1), seed=3)
    assert ids(few) == [[id for id in part if id < 100] for part in ids(parts)]
    assert ids(split_by_user(prompts, (0.8, 0.1, 0.1), seed=4)) != ids(parts)
