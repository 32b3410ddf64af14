"""The share of unit tests that a program passes, run in a sandbox: code with tests, such as MBPP."""

import re
import textwrap
from typing import Any

from megatron_rlhf.rewards.sandbox import pass_share

FENCED = re.compile(r"```([^`\n]*)\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"(?:python|py)[\d.]*", re.IGNORECASE)
COLUMNS = ("tests", "test_list")


def score(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The program is the response's last fenced block of Python, or all of it; the tests are the record's `tests` (MBPP:
    `test_list`), a list of Python texts or one text."""
    tests = [_tests_of(prompt, record) for prompt, record in zip(prompts, records, strict=True)]
    return [pass_share(program_of(response), each) for response, each in zip(responses, tests, strict=True)]


def program_of(response: str) -> str:
    """The last block between ``` marks that names Python, else the last that names no language, else the whole response."""
    blocks = [(language.strip(), text) for language, text in FENCED.findall(response.replace("\r\n", "\n"))]
    named = [text for language, text in blocks if PYTHON.fullmatch(language)]
    programs = named or [text for language, text in blocks if not language]
    return textwrap.dedent(programs[-1]) if programs else response


def _tests_of(prompt: str, record: dict[str, Any]) -> list[str]:
    column = next((name for name in COLUMNS if record.get(name) not in (None, "", [])), None)
    if column is None:
        raise ValueError(f"the record has no column 'tests' with tests; there are: {', '.join(record) or 'none'}")
    tests = record[column]
    texts = [tests] if isinstance(tests, str) else tests
    if not isinstance(texts, list) or not all(isinstance(test, str) and test.strip() for test in texts):
        raise ValueError(
            f"the record of the prompt {prompt!r:.60}: column {column!r} must be a Python text or a list of them, "
            f"not {tests!r:.60}"
        )
    return texts
