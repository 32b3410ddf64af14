"""1 for the right final answer, else 0: mathematics with one number as its answer, such as GSM8K."""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

MINUS = "\N{MINUS SIGN}"
# A sign belongs to a number only where it is not a minus or plus between two.
_NUMBER = rf"(?:(?<![\w)])[-+{MINUS}])?\$?(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+{MINUS}]?\d+)?"
_GROUP = r"\s*\{(?:[^{}]|\{[^{}]*\})*\}"
TERM = re.compile(
    rf"\\(?:[dtc]?frac|sqrt|[dt]?binom)(?:\[[^]]*\])?(?:(?:{_GROUP})+|\s*\d+)"
    rf"|(?<![\d^]){_NUMBER}(?:\s*[/^]\s*\{{?{_NUMBER}\}}?)*",
    re.ASCII,
)
"""A number, or what is computed of numbers: a fraction, a power, a root. Its last number alone is not its value."""
NUMBER = re.compile(_NUMBER, re.ASCII)
BOXED = re.compile(r"\\boxed\s*\{")
MARKS = (r"####([^\n]*)", r"<answer>(.*?)</answer>", r"[Aa]nswer is:?([^\n]*)")
"""How a final answer is marked, the most explicit first; before them is a box. Without a mark it is the last number."""
NOTATIONS = (
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{,\}", ","),
    (r"\\[,!;:]", ""),
    (r"\\([$% ])", r"\1"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", ""),
)
"""LaTeX that surrounds a number, or is inside of it, and the same without."""


def score(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """Compares the response's final number with that of the record's `answer` (a text in GSM8K's form, or a number).

    Numbers are compared by value: 1,000 equals 1000.0 and 1e3, and $5 equals 5. A fraction, a root or a power is no number.
    """
    return [float(_is_right(response, record)) for response, record in zip(responses, records, strict=True)]


def _is_right(response: str, record: dict[str, Any]) -> bool:
    if "answer" not in record:
        raise ValueError(f"the record has no column 'answer' to compare with; there are: {', '.join(record) or 'none'}")
    wanted = wanted_number(str(record["answer"]))
    if wanted is None:
        raise ValueError(
            f"the record's answer {record['answer']!r:.60} has no number in it, or more than one, or one that is only a part "
            "of it (a fraction, a power); give one number, or mark it, as in '#### 72'"
        )
    return final_number(response) == wanted


def wanted_number(answer: str) -> Decimal | None:
    """The one number of what a record's answer marks, or of all of it: of several, none can be known to be meant."""
    return _only_number(_marked(answer)[0])


def final_number(text: str) -> Decimal | None:
    """The number in the last of the marks that the text has, else its last number; None if that is no number."""
    content, boxed = _marked(text)
    if boxed:
        return _only_number(content)
    terms = TERM.findall(content)
    return _value(terms[-1]) if terms else None


def _marked(text: str) -> tuple[str, bool]:
    """What is marked as the answer, or all of the text; and whether it is in a box, where there is nothing else."""
    for notation, plain in NOTATIONS:
        text = re.sub(notation, plain, text)
    if boxes := list(BOXED.finditer(text)):
        return _until_closed(text[boxes[-1].end() :]), True
    for mark in MARKS:
        if marked := re.findall(mark, text, re.DOTALL):
            return marked[-1], False
    return text, False


def _until_closed(text: str) -> str:
    """Up to the brace that closes the one before the text; empty if there is none."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:place]
    return ""


def _only_number(text: str) -> Decimal | None:
    """The text's number, or what it says that something equals: `x = 5`. None if there is more than a number."""
    text = text.rpartition("=")[2]
    terms = TERM.findall(text)
    return _value(terms[0]) if len(terms) == 1 and not re.search(r"[\\{}]", text) else None


def _value(term: str) -> Decimal | None:
    if not NUMBER.fullmatch(term):
        return None
    try:
        return Decimal(term.replace(MINUS, "-").replace(",", "").replace("$", ""))
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return None
