"""Keys that were seen, more of them than are held in memory."""

from megatron_rlhf.data import seen


def test_counts():
    keys = seen.Seen()
    for key in (b"a", b"b", b"a", b""):
        keys.add(key)
    assert [keys.count(key) for key in (b"a", b"b", b"", b"c")] == [2, 1, 1, 0]
    assert seen.Seen().count(b"a") == 0


def test_more_than_memory_holds(monkeypatch):
    monkeypatch.setattr(seen, "MEMORY_KB", 64)
    keys, many = seen.Seen(), [str(number).encode() for number in range(20_000)]  # 500 kB
    for key in many:
        keys.add(key)
    assert all(keys.count(key) == 1 for key in many)
    assert not any(keys.count(b"no " + key) for key in many)
