"""The functions that are ready to use, on real records and on cases worked by hand."""

import json
from decimal import Decimal

import pytest

from megatron_rlhf.rewards import exact_answer, format_rule


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### $5.50", "5.50"),
        ("#### -3", "-3"),
        ("so it costs -$4", "-4"),
        ("10-5", "5"),
        ("x = -5.", "-5"),
        (r"thus \boxed{42} of 50", "42"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        ("<think>7</think><answer>8</answer> 9", "8"),
        ("The answer is 12 apples.", "12"),
        ("first 3, then .5", "0.5"),
        ("at 3 o'clock, 20 of them left 1,5", "5"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{x = -5\text{ cm}^2}", "-5"),
        (r"\boxed{50^\circ} or \boxed{50\%}", "50"),
        (r"as \frac{1}{2} of 10 is \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", None),
        (r"so 3, \boxed{\frac{\sqrt{3}}{2}}", None),
        (r"\boxed{1, 2}", None),
        (r"\boxed{2\pi}", None),
        (r"the end is cut off: 7 \boxed{42", None),
        (r"The answer is $\frac12$.", None),
        ("#### 1/2", None),
        ("10^5", None),
        ("The answer is 72 m^2.", "72"),
        ("60 km/h", "60"),
        ("x = \u22125", "-5"),
        ("10\u22125", "5"),
        ("1e5", "100000"),
        ("2.5e\u22123", "0.0025"),
        ("1e99999999999999999999", None),
        ("nothing", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert exact_answer.final_number(text) == (None if number is None else Decimal(number))


def test_a_right_answer_scores_one_however_it_is_written():
    record = {"question": "?", "answer": "Work.\n#### 1,000"}
    responses = ["1000", "It is $1,000.00", "#### 1000", "100", "1000 or 1001", "", "one thousand"]
    assert exact_answer.score(["?"] * 7, responses, [record] * 7) == [1, 1, 1, 0, 0, 0, 0]
    assert exact_answer.score(["?"], ["so 7"], [{"answer": 7}]) == [1.0]
    assert exact_answer.score(["?"] * 2, ["it is 5", "0.00001"], [{"answer": 1e-05}] * 2) == [0.0, 1.0]
    assert exact_answer.score(["?"] * 2, ["20", "1" + "0" * 20], [{"answer": 1e20}] * 2) == [0.0, 1.0]


def test_a_record_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="no column 'answer' to compare with; there are: solution"):
        exact_answer.score(["?"], ["1"], [{"solution": "1"}])
    for answer in ("yes", r"\frac{1}{2}", "1/2", "3 of 5", "(1, 2)", float("nan"), True):
        with pytest.raises(ValueError, match="has no number"):
            exact_answer.score(["?"], ["1"], [{"answer": answer}])


def test_every_answer_of_gsm8k_is_read(shared_data):
    records = [json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").read_text().splitlines()]
    assert len(records) > 1000
    own = [record["answer"] for record in records]
    assert exact_answer.score([""] * len(own), own, records) == [1.0] * len(own)
    marked = [f"The answer is {answer.rpartition('####')[2].strip()}." for answer in own]
    assert exact_answer.score([""] * len(own), marked, records) == [1.0] * len(own)
    others = own[1:] + own[:1]
    assert sum(exact_answer.score([""] * len(own), others, records)) < 0.1 * len(own)


@pytest.mark.parametrize(
    ("response", "fits"),
    [
        ("<think>a\nb</think>\n<answer>1</answer>", True),
        (" <think>a</think><answer>1</answer>\n", True),
        ("<think>a</think>", False),
        ("<answer>1</answer>", False),
        ("<think></think><answer>1</answer>", False),
        ("so <think>a</think><answer>1</answer>", False),
        ("<think>a</think><answer>1</answer><answer>2</answer>", False),
        ("<think>a<think>b</think></think><answer>1</answer>", False),
        ("", False),
    ],
)
def test_the_form_of_reasoning_and_answer(response, fits):
    assert format_rule.score(["?"], [response], [{}]) == [float(fits)]


def test_a_record_may_ask_for_another_form():
    records = [{"format": r" *\d+ *"}, {"format": r"\d+"}, {"format": None}]
    assert format_rule.score(["?"] * 3, [" 12 ", " 12 ", " 12 "], records) == [1.0, 0.0, 0.0]
