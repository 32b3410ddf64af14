"""The order of batches: complete, shuffled by epoch, exact after a resume; and the parts of data-parallel ranks."""

import itertools
import json

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.batches import ShuffledBatches, shard


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_each_epoch_is_another_permutation_of_everything():
    batches = ShuffledBatches(10, 4, seed=1)
    assert batches.batches_per_epoch == 3
    first, second = take(batches, 3), take(batches, 3)
    assert [len(batch) for batch in first] == [4, 4, 2]
    for epoch in (first, second):
        assert sorted(flat(epoch)) == list(range(10))
    assert first != second
    assert all(type(index) is int for index in first[0])


def test_order_depends_on_the_seed_alone():
    assert take(ShuffledBatches(10, 4, seed=1), 9) == take(ShuffledBatches(10, 4, seed=1), 9)
    assert take(ShuffledBatches(10, 4, seed=1), 3) != take(ShuffledBatches(10, 4, seed=2), 3)


def test_unshuffled():
    batches = ShuffledBatches(5, 2, seed=0, shuffle=False)
    assert take(batches, 4) == [[0, 1], [2, 3], [4], [0, 1]]


def test_drop_last_keeps_full_batches_only():
    batches = ShuffledBatches(10, 4, seed=1, drop_last=True)
    assert batches.batches_per_epoch == 2
    assert {len(batch) for batch in take(batches, 20)} == {4}
    with pytest.raises(UserError, match="batch size 4: there are only 3 examples"):
        ShuffledBatches(3, 4, seed=1, drop_last=True)
    assert len(next(ShuffledBatches(3, 4, seed=1))) == 3


@pytest.mark.parametrize(
    ("size", "drop_last", "expected"), [(8, False, [0, 1, 1, 2]), (9, False, [0, 0, 1, 1]), (9, True, [0, 1, 1, 2])]
)
def test_epoch_counts_the_epochs_done(size, drop_last, expected):
    batches = ShuffledBatches(size, 4, seed=1, drop_last=drop_last)
    epochs = []
    for _ in range(4):
        next(batches)
        epochs.append(batches.epoch)
    assert epochs == expected


@pytest.mark.parametrize("done", range(8))
def test_resume_is_exact(done):
    batches = ShuffledBatches(10, 4, seed=1)
    take(batches, done)
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = ShuffledBatches(10, 4, seed=1)
    resumed.load_state_dict(state)
    assert resumed.epoch == batches.epoch
    assert take(resumed, 7) == take(batches, 7)


def test_resume_with_another_batch_size_repeats_and_skips_nothing():
    batches = ShuffledBatches(10, 4, seed=1)
    seen = next(batches)
    resumed = ShuffledBatches(10, 3, seed=1)
    resumed.load_state_dict(batches.state_dict())
    assert sorted(seen + flat(take(resumed, 2))) == list(range(10))
    larger = ShuffledBatches(10, 8, seed=1, drop_last=True)
    larger.load_state_dict(batches.state_dict())
    assert larger.epoch == 1
    assert len(next(larger)) == 8


def test_resume_with_other_data_or_seed_is_refused():
    state = ShuffledBatches(10, 4, seed=1).state_dict()
    with pytest.raises(UserError, match="size 10, this run 11"):
        ShuffledBatches(11, 4, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="seed 1, this run 2"):
        ShuffledBatches(10, 4, seed=2).load_state_dict(state)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_shards_are_disjoint_and_complete(dp_size):
    batch = [7, 3, 9, 1, 4]
    parts = [shard(batch, rank, dp_size) for rank in range(dp_size)]
    assert sorted(flat(parts)) == sorted(batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard(batch, 1, 2) == [3, 1]
