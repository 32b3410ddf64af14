"""The order of batches: complete, shuffled by epoch, exact after a resume; and the shares of data-parallel ranks."""

import itertools
import json

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.batches import ShuffledBatches


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


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 3), (3, 4), (2, 9), (8, 4)])
def test_whole_batches_flow_from_epoch_to_epoch_and_leave_nothing_out(size, batch):
    drawn = flat(take(ShuffledBatches(size, batch, seed=1, whole=True), 5 * size))
    assert len(drawn) == 5 * size * batch, "every batch is whole"
    assert drawn == flat(take(ShuffledBatches(size, 1, seed=1), len(drawn))), "the order of each epoch"
    for start in range(0, len(drawn), size):
        assert sorted(drawn[start : start + size]) == list(range(size)), "each epoch has everything once"


@pytest.mark.parametrize(
    ("size", "whole", "expected"), [(8, False, [0, 1, 1, 2]), (9, False, [0, 0, 1, 1]), (9, True, [0, 0, 1, 1])]
)
def test_epoch_counts_the_epochs_done(size, whole, expected):
    batches = ShuffledBatches(size, 4, seed=1, whole=whole)
    epochs = []
    for _ in range(4):
        next(batches)
        epochs.append(batches.epoch)
    assert epochs == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("done", range(8))
def test_resume_is_exact(done, whole):
    batches = ShuffledBatches(10, 4, seed=1, whole=whole)
    take(batches, done)
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = ShuffledBatches(10, 4, seed=1, whole=whole)
    resumed.load_state_dict(state)
    assert resumed.epoch == batches.epoch
    assert take(resumed, 7) == take(batches, 7)


def test_resume_with_another_batch_size_repeats_and_skips_nothing():
    batches = ShuffledBatches(10, 4, seed=1)
    seen = next(batches)
    resumed = ShuffledBatches(10, 3, seed=1)
    resumed.load_state_dict(batches.state_dict())
    assert sorted(seen + flat(take(resumed, 2))) == list(range(10))
    larger = ShuffledBatches(10, 8, seed=1, whole=True)
    larger.load_state_dict(batches.state_dict())
    assert sorted(seen + next(larger)[:6]) == list(range(10))
    assert larger.epoch == 1


def test_resume_with_other_data_or_seed_is_refused():
    state = ShuffledBatches(10, 4, seed=1).state_dict()
    with pytest.raises(UserError, match="size 10, this run 11"):
        ShuffledBatches(11, 4, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="seed 1, this run 2"):
        ShuffledBatches(10, 4, seed=2).load_state_dict(state)
