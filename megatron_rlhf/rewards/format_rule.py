"""1 where a response as a whole has the wanted form, else 0: a regular expression."""

import re
from typing import Any

THINK_THEN_ANSWER = r"\s*<think>((?!</?think>).)+</think>\s*<answer>((?!</?answer>).)+</answer>\s*"
"""The form of responses that reason first (DeepSeek-AI 2025, arXiv 2501.12948, table 1)."""


def score(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The form is the record's `format`, a regular expression for the whole response, else `THINK_THEN_ANSWER`."""
    return [
        float(re.fullmatch(record.get("format") or THINK_THEN_ANSWER, response, re.DOTALL) is not None)
        for response, record in zip(responses, records, strict=True)
    ]
