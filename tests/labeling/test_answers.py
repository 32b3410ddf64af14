"""Forms to answers, letters to outputs."""

from collections import Counter

import pytest
from starlette.datastructures import FormData

from megatron_rlhf.labeling.answers import cards, dense, missing, read_ranking, read_skip
from megatron_rlhf.labeling.questions import LETTERS, QUESTIONS
from megatron_rlhf.labeling.types import Refused


def test_outputs_are_shuffled_evenly_and_the_same_for_the_same_labeler():
    outputs = ("a", "b", "c", "d")
    assert cards(outputs, "1 ann") == cards(outputs, "1 ann")
    first = Counter(cards(outputs, f"{i} ann")[0].text for i in range(400))
    assert all(70 <= count <= 130 for count in first.values()), first  # 100 +- 3.5 standard deviations


def test_the_same_text_is_shown_once_and_ranked_for_all():
    shown = cards(("x", "y", "x"), "seed")
    assert sorted(card.text for card in shown) == ["x", "y"]
    (x,) = [card.letter for card in shown if card.text == "x"]
    (y,) = [card.letter for card in shown if card.text == "y"]
    form = FormData(
        [(f"rank_{x}", "2"), (f"rank_{y}", "1"), (f"rating_{y}", "7"), (f"is_{x}", "opinion"), ("note", "a\r\nb")]
    )
    assert read_ranking(form, shown) == {
        "ranks": [2, 1, 2],
        "ratings": [None, 7, None],
        "metadata": [["opinion"], [], ["opinion"]],
        "note": "a\nb",
    }


@pytest.mark.parametrize(
    "field",
    [("rank_A", "5"), ("rank_A", "0"), ("rank_B", "first"), ("rank_A", "1.0"), ("rating_A", "8"), ("is_A", "x")],
)
def test_what_the_page_does_not_offer_is_refused(field):
    with pytest.raises(Refused):
        read_ranking(FormData([field]), cards(("a", "b", "c", "d"), "seed"))


def test_a_reason_is_needed_to_skip():
    with pytest.raises(Refused, match="reason"):
        read_skip(FormData([("reason", "bored")]))


def test_what_is_missing_is_named():
    shown = cards(("a", "b", "c"), "seed")
    content = read_ranking(FormData([("rank_B", "1")]), shown)
    assert missing(content, shown, False) == "Not ranked yet: A, C."
    content = read_ranking(FormData([(f"rank_{letter}", "1") for letter in "ABC"] + [("rating_C", "2")]), shown)
    assert missing(content, shown, False) == ""
    assert missing(content, shown, True) == "Not rated yet: A, B."


def test_ranks_lose_their_gaps():
    assert dense([3, 1, 3, 7]) == [1, 0, 1, 2]


def test_no_key_means_two_things():
    keys = [question.key.upper() for question in QUESTIONS]
    assert len({*keys, *LETTERS, "U", "S"}) == len(QUESTIONS) + len(LETTERS) + 2
