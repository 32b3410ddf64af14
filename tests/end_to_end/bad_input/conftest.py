"""Runs a command with a mistake."""

import json
import re
from collections.abc import Callable

import pytest
from bad_cases import SCRIPTS, Case, contents, good_arguments
from commands import run_example


@pytest.fixture
def files(recipe, tmp_path) -> Callable[[Case], list[str]]:
    """Makes a case's arguments, and the file that is wrong."""

    def make(case: Case) -> list[str]:
        (tmp_path / "folder").mkdir()
        bad = tmp_path / "bad.jsonl"
        if case.lines is not None:
            bad.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in case.lines))
        names = {"file": bad, "folder": tmp_path / "folder", "recipe": recipe.root}
        good = [
            argument
            for argument in good_arguments(recipe, case.stage, tmp_path / "run")
            if not argument.startswith(tuple(f"{key}=" for key in case.without))
            and not ("model" in case.without and argument.startswith("model."))
        ]
        return good + [argument.format(**names) for argument in case.wrong]

    return make


@pytest.fixture
def mistake(files, recipe, tmp_path) -> Callable[[Case], None]:
    """Runs a case: exit code 2, one message that says what it must, and no file of the recipe is another."""

    def run(case: Case) -> None:
        arguments = files(case)
        before = contents(recipe.root)
        finished = run_example(SCRIPTS[case.stage], *arguments, ranks=case.ranks, timeout=200)
        assert finished.codes == [2] * case.ranks, finished.output
        messages = [line for line in finished.output.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, finished.output
        for expected in case.says:
            assert re.search(expected, messages[0]), messages[0]
        assert "Traceback" not in finished.output
        assert not list(tmp_path.rglob("checkpoints"))
        assert contents(recipe.root) == before

    return run
