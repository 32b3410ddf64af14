"""Programs of models with tests: what passes, what every kind of bad program ends as, and that nothing is left of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlhf.rewards import unit_tests
from megatron_rlhf.rewards.processes import Answers, RewardFunction
from megatron_rlhf.rewards.sandbox import pass_share, run_tests

ADD = "def add(a, b):\n    return a + b\n"
MARK = "27182"
"""Seconds that only processes of these tests sleep."""


@pytest.fixture(params=[True, False], ids=["namespaces", "plain"])
def run(request):
    """With and without namespaces, which not every system allows; nothing may be left after the test."""

    def run(program, *tests, **limits):
        return run_tests(program, tests, namespaces=request.param, **{"seconds": 1.5, **limits})

    yield run
    assert not sleeping()


def sleeping() -> list[str]:
    """Processes of these tests, found by their command line or what they were forked from."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode()
            status = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if status != "Z" and ("rewards.cell" in command or MARK in command):
            found.append(f"{process.name} {command}")
    return found


def test_the_share_of_tests_that_pass():
    assert pass_share(ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "add('a', 'b')", "add(1, 'b')"]) == 0.5
    assert pass_share("", ["assert True"]) == 1.0
    with pytest.raises(ValueError, match="a list of one or more texts of Python"):
        pass_share(ADD, [])
    with pytest.raises(ValueError, match="not str"):
        pass_share(ADD, "assert True")


FORKS = f"import os, time\nif os.fork() == 0:\n    time.sleep({MARK})\n"
DAEMON = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "{MARK}"])
    os._exit(0)
os.wait()
"""
TESTS = {
    "passes": ("assert add(1, 2) == 3", "passed"),
    "fails": ("assert add(1, 2) == 4, 'no'", "AssertionError: no"),
    "raises": ("add(1)", "TypeError: add() missing 1 required positional argument: 'b'"),
    "syntax": ("add(", "SyntaxError: '(' was never closed (test.py, line 1)"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "exits_at_once": ("import os; os._exit(0)", "ended its process (exit code 0)"),
    "crashes": ("import os; os.abort()", "ended its process (exit code 134)"),
    "hangs": ("while True: pass", "not done within 1.5 seconds"),
    "sleeps": (f"import time; time.sleep({MARK})", "not done within 1.5 seconds"),
    "eats_memory": ("bytearray(2**31)", "MemoryError: "),
    "writes_much": ("open('x', 'wb').write(b'0' * 2**25)", "OSError: [Errno 27] File too large"),
    "raises_oddly": (
        "class E(Exception):\n    def __str__(self): raise ValueError('x')\nraise E",
        "ended its process (exit code 1)",
    ),
    "forks": (FORKS, "passed"),
    "leaves_a_daemon": (DAEMON, "passed"),
    "hangs_with_a_daemon": (DAEMON + "while True: pass", "not done within 1.5 seconds"),
    "says_that_it_passed": (
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[\"passed\"]\\n')\n    except OSError: pass\nos._exit(0)",
        "ended its process (exit code 0)",
    ),
}


def test_what_becomes_of_a_test(run):
    """All after one another, so that none disturbs the next."""
    found = run(ADD, *(test for test, _ in TESTS.values()))
    assert dict(zip(TESTS, found, strict=True)) == {name: outcome for name, (_, outcome) in TESTS.items()}


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("def add(", "SyntaxError: '(' was never closed (solution.py, line 1)"),
        ("import nothing_of_the_kind", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("while True: pass", "not done within 1.5 seconds"),
        ("import os; os._exit(3)", "ended its process (exit code 3)"),
        ("\0", "source code string cannot contain null bytes"),
    ],
)
def test_a_program_that_fails_itself_is_run_once(run, program, outcome):
    began = time.monotonic()
    found = run(program, *["assert True"] * 20)
    assert len(found) == 20 and set(found) == {found[0]}
    assert outcome in found[0]
    assert time.monotonic() - began < 25, "not twenty times the time limit"


def test_each_test_has_an_empty_folder_and_nothing_of_the_users(run, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    here = "import os\nassert os.listdir('.') == [] and os.environ['HOME'] == os.getcwd()\nopen('x', 'w').write('1')"
    clean = "import os, sys\nassert 'A_KEY' not in os.environ and '/somewhere' not in sys.path and '' not in sys.path"
    alone = f"import sys\nassert {os.getcwd()!r} not in sys.path and 'torch' not in sys.modules"
    script = "try: input()\nexcept EOFError: pass\nprint('x' * 10**6)"
    assert run("seen = []", here, here, clean, alone, script, "seen.append(1)", "assert not seen") == ["passed"] * 7
    assert run("if __name__ == '__main__': raise SystemExit", "pass") == ["passed"]


def test_no_network_and_no_other_processes_where_namespaces_are_allowed():
    allowed = subprocess.run(["unshare", "-Urnp", "--fork", "true"], check=False, capture_output=True).returncode == 0
    if not allowed:
        pytest.skip("this system does not allow unshare(2) to its users")
    connect = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    alone = "import os\nassert os.getpid() < 10 and os.getppid() == 1, (os.getpid(), os.getppid())"
    assert run_tests("", [connect, alone]) == ["OSError: [Errno 101] Network is unreachable", "passed"]


def test_three_lines_are_a_reward_function(tmp_path):
    """As docs/rewards.md has it, in a process of the function's own."""
    (tmp_path / "mine.py").write_text(
        "from megatron_rlhf.rewards.sandbox import pass_share\n\ndef score(prompts, responses, records):\n"
        "    return [pass_share(response, record['tests']) for response, record in zip(responses, records)]\n"
    )
    records = [{"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}] * 3
    answers = Answers(["?"] * 3, [ADD, "def add(a, b): return 3", "nonsense"], records, [0, 1, 2])
    function = RewardFunction(f"{tmp_path}/mine.py:score", 2, 60.0, "reward")
    function.start(answers)
    assert function.scores() == [1.0, 0.5, 0.0]
    function.close()


def test_ready_made():
    response = f"First:\n```\nx = 1\n```\nThen\n```python\n{ADD}```\nDone."
    assert unit_tests.program_of(response) == ADD
    records = [{"tests": "assert add(1, 2) == 3"}, {"test_list": ["assert add(1, 2) == 3", "assert add(1, 2) == 5"]}]
    assert unit_tests.score(["?"] * 2, [response, ADD], records) == [1.0, 0.5]
    with pytest.raises(ValueError, match="no column 'tests' with tests; there are: answer"):
        unit_tests.score(["?"], [ADD], [{"answer": 3}])


@pytest.mark.parametrize(
    "response",
    [
        "```python3\nx = 1\n```",
        "```Python\r\nx = 1\r\n```\r\n",
        "1. So:\n   ``` py\n   x = 1\n   ```",
        "```text\n1\n```\n```\nx = 1\n```",
        "```python\nx = 1\n```\nIt prints\n```\n1\n```",
        "x = 1\n",
    ],
)
def test_the_program_of_a_response(response):
    assert unit_tests.program_of(response) == "x = 1\n"


@pytest.mark.parametrize("tests", [5, [1, 2], {"a": 1}, [["assert True"]], " ", ["assert True", ""]])
def test_tests_that_are_no_texts_are_an_error(tests):
    with pytest.raises(ValueError, match="the prompt 'add': column 'tests' must be a Python text or a list of them"):
        unit_tests.score(["add"], [ADD], [{"tests": tests}])


def test_nothing_is_left_when_the_caller_is_killed_in_a_reward_function(tmp_path):
    """The function's keeper ends the sandbox too."""
    (tmp_path / "mine.py").write_text(
        "from megatron_rlhf.rewards.sandbox import run_tests\n\ndef score(prompts, responses, records):\n"
        f"    run_tests('', ['import time; time.sleep({MARK})'], seconds={MARK})\n    return [0.0]\n"
    )
    program = (
        "import sys, time\nfrom megatron_rlhf.rewards.processes import Answers, RewardFunction\n"
        f"function = RewardFunction({str(tmp_path / 'mine.py:score')!r}, 1, 60.0, 'reward')\n"
        "function.start(Answers(['?'], ['!'], [{}], [0]))\nprint('asked', flush=True)\ntime.sleep(1000)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None and caller.stdout.readline() == "asked\n"
    wait_until(lambda: sleeping())
    caller.kill()
    caller.wait()
    wait_until(lambda: not sleeping())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
