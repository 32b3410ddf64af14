"""Cleaning, rankings and blends, by hand; and a preparation that is killed anywhere ends as an undisturbed one."""

import itertools
import json
import random
import sqlite3

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.preparation import cleaning
from megatron_rlhf.data.preparation.blending import blend, parse_weights
from megatron_rlhf.data.preparation.cleaning import Cleaning, Rules
from megatron_rlhf.data.preparation.rankings import RankingCounts, pairs_from_ranking, rankings_from_pairs
from megatron_rlhf.data.preparation.report import write_report
from megatron_rlhf.data.splits import place_of


def clean(folder, *sources, kind="prompts", **rules):
    made = Cleaning(folder, [str(source) for source in sources], Rules(**rules), Shape.of(), kind, {})
    counts = made.run()
    write_report(folder, counts, made.settings)
    return counts


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_filter(tmp_path, write_records):
    path = write_records(
        {"prompt": "How do I bake a cake?", "user": "ann"},
        {"prompt": "How do I bake a loaf?", "user": "bob"},  # as the first, in 13 characters
        {"prompt": "Name a colour, please.", "user": "ann"},
        {"prompt": "Another one of hers", "user": "ann"},
        {"prompt": "much longer than the limit of characters allows"},
        {"prompt": "Mail me: x@y.org", "user": "eva", "id": 7},
        {"prompt": "Count to four.", "user": "x@y.org"},
    )
    counts = clean(tmp_path / "out", path, prefix_characters=13, max_per_user=2, max_characters=30)
    assert counts.dropped == {"duplicate": 1, "over_user_limit": 1, "prompt_too_long": 1, "personal_data": 1}
    kept = lines(tmp_path / "out" / "all.jsonl")
    assert [row["prompt"][:7] for row in kept] == ["How do ", "Name a ", "Count t"]
    assert kept[2]["user"].startswith("user_") and "@" not in kept[2]["user"]
    gone = lines(tmp_path / "out" / "dropped.jsonl")
    assert gone[0] == {"where": f"{path}, line 2", "reason": "duplicate", "of": f"{path}, line 1"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["kept"]) == (7, 3)
    assert report["personal"] == {
        "email": {"count": 1, "records": 1, "samples": [{"where": f"{path}, line 6", "form": "x@x.xxx"}]}
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 of 7 records kept" in page
    for written in (page, json.dumps(report), (tmp_path / "out" / "dropped.jsonl").read_text()):
        assert "y.org" not in written and "cake" not in written
    with pytest.raises(UserError, match="a finished preparation is there"):
        clean(tmp_path / "out", path)


def test_personal_data_masked_everywhere(tmp_path, write_records):
    record = {"messages": [{"role": "user", "content": "I am a@b.org"}], "notes": ["call +1 650 253 0000"], "k": 3}
    clean(tmp_path / "out", write_records(record), personal="mask")
    assert lines(tmp_path / "out" / "all.jsonl") == [
        {"messages": [{"role": "user", "content": "I am <email>"}], "notes": ["call <phone>"], "k": 3}
    ]


def test_masked_names_of_fields_stay_apart(tmp_path, write_records):
    clean(tmp_path / "out", write_records({"prompt": "p", "votes": {"a@b.org": 1, "c@d.org": 2}}), personal="mask")
    assert lines(tmp_path / "out" / "all.jsonl") == [{"prompt": "p", "votes": {"<email>": 1, "<email> 2": 2}}]


def test_users_are_those_of_training(tmp_path, write_records):
    """Numbers are users, spaces around a name are not part of it, a blank is nobody, and all stay as they are written."""
    users = [5, "5", 5.0, " ann", "ann ", " ", " ", " ", None, "", 6502530000 + 10**10]
    rows = [{"prompt": f"prompt {i}", "user": user} for i, user in enumerate(users)]
    counts = clean(tmp_path / "out", write_records(*rows), max_per_user=1, region="US")
    assert counts.dropped == {"over_user_limit": 3}
    kept = [row["user"] for row in lines(tmp_path / "out" / "all.jsonl")]
    assert kept[:-1] == [5, " ann", " ", " ", " ", None, ""] and kept[-1].startswith("user_")
    parts = ("train", "validation", "test")
    clean(tmp_path / "split", tmp_path / "records.jsonl", max_per_user=None, shares=(1, 1, 1))
    of_five = {part for part in parts for row in lines(tmp_path / "split" / f"{part}.jsonl") if row["user"] in (5, "5")}
    assert of_five == {parts[place_of("5", "", (1, 1, 1), 0)]}


@pytest.mark.parametrize("user", [["ann"], {"name": "ann"}, True, 1.5])
def test_a_user_that_is_none_is_a_mistake_in_its_line(tmp_path, write_records, user):
    path = write_records({"prompt": "a", "user": "ann"}, {"prompt": "b", "user": user})
    with pytest.raises(UserError, match="line 2: column 'user' must hold a text or a whole number, not"):
        clean(tmp_path / "out", path)


def test_near_duplicates(tmp_path, write_records):
    text = "Explain in simple words how a steam engine turns heat into motion, and why it needs a condenser."
    path = write_records({"prompt": text}, {"prompt": text.replace("simple", "plain").upper()}, {"prompt": text[::-1]})
    counts = clean(tmp_path / "out", path, near_duplicates=0.7)
    assert counts.dropped == {"near_duplicate": 1}
    assert lines(tmp_path / "out" / "dropped.jsonl")[0]["of"] == f"{path}, line 1"


def test_users_stay_where_they_are_when_data_is_added(tmp_path, write_records):
    rows = [{"prompt": f"prompt {i}", "user": f"u{i % 40}"} for i in range(200)]
    few, more = write_records(*rows[:100], name="few.jsonl"), write_records(*rows, name="more.jsonl")
    shares = (0.6, 0.2, 0.2)
    found = {}
    for path in (few, more):
        clean(tmp_path / path.stem, path, shares=shares, seed=3, prefix_characters=None)
        for part in ("train", "validation", "test"):
            for row in lines(tmp_path / path.stem / f"{part}.jsonl"):
                assert found.setdefault(row["user"], part) == part
    assert set(found.values()) == {"train", "validation", "test"}
    assert all(["train", "validation", "test"][place_of(user, "", shares, 3)] == part for user, part in found.items())


class Killed(Exception):
    pass


def test_killed_anywhere_it_ends_as_if_undisturbed(tmp_path, write_records, monkeypatch):
    noise = random.Random(1)
    words = "red green blue one two three".split()

    def rows(count):
        return [
            {
                "prompt": " ".join(noise.choices(words, k=4)) + (" a@b.org" if noise.random() < 0.1 else ""),
                "user": noise.choice("xyz"),
            }
            for _ in range(count)
        ]

    sources = [write_records(*rows(60), name="a.jsonl"), write_records(*rows(50), name="b.jsonl")]
    rules = {"near_duplicates": 0.8, "max_per_user": 20, "shares": (0.5, 0.3, 0.2), "personal": "mask"}
    monkeypatch.setattr(cleaning, "AT_ONCE", 7)
    clean(tmp_path / "whole", *sources, **rules)

    def until(limit):
        made = Cleaning(tmp_path / "killed", [str(s) for s in sources], Rules(**rules), Shape.of(), "prompts", {})
        sort, done = made._sort, itertools.count(1)

        def step(*arguments):
            sort(*arguments)
            if next(done) == limit:
                for file in made.files.values():
                    file.flush()  # more than the last transaction knows of
                raise Killed

        made._sort = step
        try:
            counts = made.run()
        finally:
            made.state.close()
        write_report(tmp_path / "killed", counts, made.settings)

    for limit in (3, 20, 9, 33, 14):
        with pytest.raises(Killed):
            until(limit)
    with pytest.raises(UserError, match="unfinished preparation with other rules"):
        clean(tmp_path / "killed", *sources, **{**rules, "max_per_user": 9})
    until(None)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def votes(*triples):
    return [
        Record(f"line {i}", {"prompt": p, "chosen": a, "rejected": b}) for i, (p, a, b) in enumerate(triples, start=1)
    ]


def ranked(records):
    counts = RankingCounts()
    return list(rankings_from_pairs(records, sqlite3.connect(":memory:"), counts)), counts


def test_rankings_from_votes():
    made, counts = ranked(votes(("p", "a", "b"), ("q", "x", "y"), ("p", "b", "c"), ("p", "a", "c"), ("q", "x", "y")))
    assert made == [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 1, 2]},
        {"prompt": "q", "responses": ["x", "y"], "ranks": [0, 1]},
    ]
    assert (counts.votes, counts.rankings, counts.pairs, counts.cycles) == (5, 1, 1, [])


def test_votes_say_no_more_than_they_say():
    """b and c were not compared, and a > d says nothing of b > d."""
    made, _ = ranked(votes(("p", "a", "b"), ("p", "a", "c")))
    assert made == [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]}]
    made, counts = ranked(votes(("p", "a", "b"), ("p", "b", "c"), ("p", "a", "d")))
    assert [row["responses"] for row in made] == [["a", "b"], ["b", "c"], ["a", "d"]]
    assert counts.pairs == 3


def test_circles_are_reported_and_nothing_is_made_of_them():
    made, counts = ranked(votes(("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a"), ("q", "x", "y")))
    assert [row["prompt"] for row in made] == ["q"]
    assert counts.cycles == ["line 1: 0 > 1 > 2 > 0, of 3 responses"]


def test_back_to_pairs():
    counts = RankingCounts()
    ranking = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 1]}
    made = list(pairs_from_ranking(Record("line 1", ranking), counts))
    assert [(row["chosen"], row["rejected"]) for row in made] == [("b", "a"), ("b", "c")]
    assert (counts.pairs, counts.ties) == (2, 1)
    again, _ = ranked([Record("x", row) for row in made])
    assert again == [{"prompt": "p", "responses": ["b", "a", "c"], "ranks": [0, 1, 1]}]


@pytest.mark.parametrize("ranks", [["0", "10", "2"], [float("nan"), 1, 2], ["0", 1, 2], [0, None, 1], [0.5, 1, 2]])
def test_ranks_that_are_none_make_no_pairs(ranks):
    record = Record("x.jsonl, line 3", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": ranks})
    with pytest.raises(UserError, match=r"x.jsonl, line 3: column 'ranks' must be a list of whole numbers"):
        list(pairs_from_ranking(record, RankingCounts()))


def test_a_blend_has_its_shares_at_every_point():
    taken: list[int] = []
    short, long = [[1] * 2] * 500, [[2] * 7] * 500
    seen = [0, 0, 0]
    for document in blend([lambda: short, lambda: long], [3, 1], 1000, taken):
        seen[document[0]] += len(document)
        assert abs(seen[1] - 0.75 * sum(seen)) <= 7
    assert taken == seen[1:] and 1000 <= sum(taken) < 1007
    list(blend([lambda: short[:5], lambda: long], [1, 1], None, taken))
    assert taken == [10, 14]  # until the first of them ends
    list(blend([lambda: short[:5], lambda: long], [1, 1], 100, taken))
    assert abs(taken[0] - 50) <= 7  # read again from its beginning
    with pytest.raises(UserError, match="corpus 2 of the blend has no text"):
        list(blend([lambda: short, lambda: []], [1, 1], 10, taken))


def test_weights(tmp_path):
    assert parse_weights(["a.jsonl=0.7", "b=2", "c"]) == [("a.jsonl", 0.7), ("b", 2.0), ("c", 1.0)]
    (tmp_path / "run=3").mkdir()
    assert parse_weights([f"{tmp_path}/run=3"]) == [(f"{tmp_path}/run=3", 1.0)]
    for wrong in (["a=0"], ["a=-1"], ["a=nan"], ["a=1", "a=2"], ["a=abc"], ["=1"]):
        with pytest.raises(UserError, match=r"weight of more than 0|named twice"):
            parse_weights(wrong)
