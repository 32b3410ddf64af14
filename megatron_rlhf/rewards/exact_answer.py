"""1 for the right final answer, else 0: mathematics with one number as its answer, such as GSM8K."""

import re
from decimal import Decimal
from typing import Any

# A sign belongs to a number only where it is not a minus or plus between two.
NUMBER = re.compile(r"(?:(?<![\w)])[-+])?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
MARKS = (r"\\boxed\{([^{}]*)\}", r"####([^\n]*)", r"<answer>(.*?)</answer>", r"[Aa]nswer is:?([^\n]*)")
"""How a final answer is marked, the most explicit first; where there is no mark, it is the last number."""


def score(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """Compares the response's final number with that of the record's `answer` (a text in GSM8K's form, or a number).

    Numbers are compared by value: 1,000 equals 1000.0, and $5 equals 5.
    """
    return [float(_is_right(response, record)) for response, record in zip(responses, records, strict=True)]


def _is_right(response: str, record: dict[str, Any]) -> bool:
    if "answer" not in record:
        raise ValueError(f"the record has no column 'answer' to compare with; there are: {', '.join(record) or 'none'}")
    wanted, given = final_number(str(record["answer"])), final_number(response)
    if wanted is None:
        raise ValueError(f"the record's answer {record['answer']!r:.60} has no number in it")
    return given == wanted


def final_number(text: str) -> Decimal | None:
    """The number in the last of the marks that the text has, else its last number; None without a number."""
    for mark in MARKS:
        if marked := re.findall(mark, text, re.DOTALL):
            text = marked[-1]
            break
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None
