"""The share of unit tests that a program passes, run in a sandbox: code with tests, such as MBPP."""

import re
from typing import Any

from megatron_rlhf.rewards.sandbox import pass_share

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
COLUMNS = ("tests", "test_list")


def score(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The program is the response's last fenced block, or all of it; the tests are the record's `tests` (MBPP: `test_list`),
    a list of Python texts or one text."""
    return [pass_share(program_of(r), _tests_of(record)) for r, record in zip(responses, records, strict=True)]


def program_of(response: str) -> str:
    """The last block between ``` marks; without one, the whole response."""
    blocks = FENCED.findall(response)
    return blocks[-1] if blocks else response


def _tests_of(record: dict[str, Any]) -> list[str]:
    tests = next((record[name] for name in COLUMNS if record.get(name)), None)
    if tests is None:
        raise ValueError(f"the record has no column 'tests' with tests; there are: {', '.join(record) or 'none'}")
    return [tests] if isinstance(tests, str) else list(tests)
