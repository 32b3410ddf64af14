"""Slots: none idle while prompts wait, none skipped, every sequence once."""

import random
from collections import deque

from megatron_rlhf.rollout.scheduler import REFILL_SHARE, Scheduler
from megatron_rlhf.rollout.sequences import SampledSequence


def sequences(count, prompt_tokens=None):
    return [SampledSequence(i, [1] * n, key=i) for i, n in enumerate(prompt_tokens or [1] * count)]


def run(scheduler, lengths, limit=64):
    """Each sequence stops after `lengths` tokens. Yields each step's kind and how many sequences it works on."""
    places: list[int | None] = [None] * scheduler.slots
    """What is in each slot, as a cache would have it."""
    while (step := scheduler.next()) is not None:
        for slot, sequence in enumerate(step.sequences, step.first_slot):
            if step.prefill:
                places[slot] = sequence.index
            assert places[slot] == sequence.index, "a sequence's keys are in its slot"
            done = len(sequence.tokens) + 1 == lengths[sequence.index]
            sequence.append(2 if done else 5, -1.0, frozenset([2]), minimum=1, limit=limit)
        for source, target in zip(*scheduler.drop_finished(), strict=True):
            places[target] = places[source]
        yield step.prefill, len(step.sequences)


def test_by_hand():
    """Two slots; lengths 1, 3, 2: the first leaves at once, the third takes its slot."""
    scheduler = Scheduler(deque(sequences(3)), slots=2)
    assert list(run(scheduler, [1, 3, 2])) == [(True, 2), (True, 1), (False, 2), (False, 1)]


def test_prompts_of_other_lengths_are_read_in_passes_of_their_own():
    """600 + 700 + 800 of 3 x 800 tokens, with 1200 only 3300 of 4 x 1200: more than a fifth, and 256, would be padding."""
    scheduler = Scheduler(deque(sequences(5, [600, 700, 800, 1200, 2500])), slots=5)
    assert list(run(scheduler, [2] * 5)) == [(True, 3), (True, 1), (True, 1), (False, 5)]


def test_a_little_padding_is_not_worth_a_pass():
    scheduler = Scheduler(deque(sequences(3, [1, 9, 130])), slots=3)
    assert list(run(scheduler, [2] * 3)) == [(True, 3), (False, 3)]


def test_samples_of_one_prompt_are_padded_once():
    """100 + 300 tokens in two rows, 200 of them padding, however often the shorter prompt is sampled."""
    scheduler = Scheduler(deque(sequences(9, [100] * 8 + [300])), slots=9)
    assert list(run(scheduler, [2] * 9)) == [(True, 9), (False, 9)]


def test_the_limit_ends_a_sequence():
    scheduler = Scheduler(deque(sequences(1)), slots=1)
    assert len(list(run(scheduler, [99], limit=3))) == 3


def test_every_sequence_is_sampled_to_its_end_and_few_slots_are_idle():
    generator = random.Random(0)
    lengths = [min(int(generator.expovariate(1 / 20)) + 1, 64) for _ in range(300)]
    everything = sequences(300)
    scheduler = Scheduler(deque(everything), slots=32)
    steps = list(run(scheduler, lengths))
    assert [len(sequence.tokens) for sequence in everything] == lengths
    while_prompts_wait = [count for prefill, count in steps if not prefill][: len(steps) // 2]
    assert min(while_prompts_wait) > 32 - 32 // REFILL_SHARE


def test_batches_share_the_waiting_prompts():
    waiting = deque(sequences(3))
    first, second = (Scheduler(waiting, slots=2) for _ in range(2))
    assert [len(scheduler.next().sequences) for scheduler in (first, second)] == [2, 1]
