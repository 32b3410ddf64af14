"""Stored items are what was stored; nothing else is held; a store is whole or is not there."""

import json
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.comparisons import Comparison, load_comparisons
from megatron_rlhf.data.demonstrations import Demonstration, load_demonstrations
from megatron_rlhf.data.files.item_store import ABOUT, Chosen, ItemWriter, StoredItems, read_about
from megatron_rlhf.data.prompts import Prompt, load_prompts


@dataclass(frozen=True)
class Odd:
    numbers: tuple[Any, ...]
    record: dict[Any, Any] = field(default_factory=dict)
    users: frozenset[str] = frozenset()


ITEMS = [
    Demonstration(np.arange(5, dtype=np.int32), 2),
    Demonstration(np.arange(3, dtype=np.int32), 1, np.array([False, True, False])),
    Prompt(7, "a \ud800 \u2028\n", None, np.array([], np.int32), {"x": [1, 2.5, None, {"y": "z"}], "b": True}),
    Prompt(8, "", "ana", np.array([2**31 - 1], np.int32), {}, ({"role": "user", "content": "hi"},)),
    Comparison.of(
        np.array([1, 2], np.int32),
        [([np.array([3], np.int32), np.array([4, 5], np.int32)], [0, 1])],
        ["bo", "al"],
    ),
    Odd(
        (1, (2, "3"), 1e300),
        {1: "number", "1": "text"},
    ),
    Odd((), {"array": [1], "nested": {"tuple": [2]}}, frozenset({"b", "a"})),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, tuple) and any(isinstance(each, np.ndarray) for each in a):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: type(item).__name__)
def test_what_is_stored_comes_back(item, tmp_path):
    writer = ItemWriter(tmp_path / "store", type(item))
    again = writer([item, item])
    assert len(again) == 2
    for name, value in vars(item).items():
        assert same(value, getattr(again[1], name)), name
    writer.publish({"n": 2})
    assert read_about(tmp_path / "store") == {"n": 2}
    (first, _) = StoredItems(tmp_path / "store", type(item))
    assert all(same(value, getattr(first, name)) for name, value in vars(item).items())


def test_indices_slices_and_choices(tmp_path):
    writer = ItemWriter(tmp_path / "store", Odd)
    items = writer(Odd((i,)) for i in range(10))
    assert [items[i].numbers[0] for i in (0, 9, -1)] == [0, 9, 9]
    assert [item.numbers[0] for item in items[2:5]] == [2, 3, 4]
    chosen = Chosen(items, [7, 0, 3])
    assert [item.numbers[0] for item in chosen] == [7, 0, 3]
    assert chosen[1:] == [Odd((0,)), Odd((3,))] and chosen != [Odd((0,))]
    with pytest.raises(IndexError):
        items[10]
    with pytest.raises(IndexError):
        chosen[3]


def test_a_store_is_whole_or_not_there(tmp_path):
    def items():
        yield Odd((1,))
        raise UserError("line 2 is wrong")

    with pytest.raises(UserError, match="line 2"):
        ItemWriter(tmp_path / "store", Odd)(items())
    assert list(tmp_path.iterdir()) == []
    ItemWriter(tmp_path / "store", Odd)([Odd((1,))])  # and killed before it is published
    assert read_about(tmp_path / "store") is None
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ABOUT).write_text('{"half')
    assert read_about(tmp_path / "store") is None
    with pytest.raises(TypeError, match="a record holds complex"):
        ItemWriter(tmp_path / "other", Odd)([Odd((1j,))])


def test_memory_does_not_grow_with_the_items(tmp_path):
    def peak(count: int) -> int:
        tracemalloc.start()
        writer = ItemWriter(tmp_path / f"store_{count}", Demonstration)
        items = writer(Demonstration(np.full(200, i, np.int32), 5) for i in range(count))
        assert sum(int(item.tokens[0]) for item in items) == count * (count - 1) // 2
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(10_000) < 1_000_000, "10,000 of these are 8 MB"


@pytest.mark.parametrize(
    ("load", "limits", "kind", "record", "passes"),
    [
        (load_prompts, (10,), Prompt, {"prompt": "ab"}, 1),
        (load_demonstrations, (10, 10, 20), Demonstration, {"prompt": "ab", "response": "c"}, 1),
        # Rankings of all prompts first, then those of each together.
        (load_comparisons, (10, 10, 20), Comparison, {"prompt": "ab", "chosen": "c", "rejected": "d"}, 2),
    ],
    ids=["prompts", "demonstrations", "comparisons"],
)
def test_it_is_known_how_far_the_source_is_read(load, limits, kind, record, passes, tokenizer, write_records, tmp_path):
    path = write_records(*[{**record, "prompt": f"ab{i}"} for i in range(3)])
    read: list[int] = []
    made: list[int] = []
    writer = ItemWriter(tmp_path / "store", kind, read.append, lambda: made.append(sum(read)))
    assert len(load(path, tokenizer, *limits, into=writer)) == 3
    assert sum(read) == path.stat().st_size
    assert len(made) == 3 * passes and made[-1] == path.stat().st_size
    writer.discard()


def test_what_was_found_out_about_all_items_is_kept_with_them(tmp_path):
    found: list[int] = []

    def longest() -> int:
        found.append(max(len(item.tokens) for item in stored))
        return found[-1]

    for _ in range(2):
        writer = ItemWriter(tmp_path / "store", Demonstration)
        writer([ITEMS[0]])
        writer.publish({})
        stored = StoredItems(tmp_path / "store", Demonstration)
        assert [stored.remember("longest", longest) for _ in range(2)] == [5, 5]
        assert StoredItems(tmp_path / "store", Demonstration).remember("longest", longest) == 5
    assert len(found) == 2, "once for each time that the store is written"
    (tmp_path / "store" / "facts.json").write_text("[1")
    assert stored.remember("longest", longest) == 5 and len(found) == 3, "a damaged one is found out again"
    assert stored.remember("count", lambda: 1) == 1


def test_about_is_plain(tmp_path):
    writer = ItemWriter(tmp_path / "store", Odd)
    writer([Odd(())])
    writer.publish({"dropped": {"x": 1}})
    assert json.loads((tmp_path / "store" / ABOUT).read_text()) == {"dropped": {"x": 1}}
