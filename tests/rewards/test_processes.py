"""A user's function in its own processes: what it may return, and everything that it can do wrong."""

import os
import re
import time
from pathlib import Path

import pytest

from megatron_rlhf.rewards.processes import Answers, FunctionFailed, RewardFunction

PROMPTS = ["a", "b", "c", "d", "e"]
RESPONSES = ["1", "22", "", "4444", "55555"]


def answers(count=5):
    records = [{"number": i} for i in range(count)]
    return Answers(PROMPTS[:count], RESPONSES[:count], records, [10 * i for i in range(count)])


@pytest.fixture
def launch(tmp_path):
    """Starts the function `score` of a file with this body; ended after the test."""
    started = []

    def start(body, processes=1, timeout_s=20.0, signature="prompts, responses, records"):
        path = tmp_path / "mine.py"
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        path.write_text(f"import os, time, sys, multiprocessing\n\ndef score({signature}):\n{lines}")
        started.append(RewardFunction(f"{path}:score", processes, timeout_s, "reward"))
        return started[-1]

    yield start
    for function in started:
        function.close()


def scored(function, batch=None):
    function.start(batch or answers())
    return function.scores()


def test_a_batch_is_one_call_with_prompts_responses_and_records(launch):
    check = "assert prompts == ['a', 'b', 'c', 'd', 'e'], prompts\n"
    function = launch(f"{check}return [len(r) + 100 * d['number'] for r, d in zip(responses, records)]")
    assert scored(function) == [1.0, 102.0, 200.0, 304.0, 405.0]
    assert scored(function) == scored(function), "the same process answers again"


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_a_batch_in_order(launch, processes):
    """With seven for five responses some have nothing to do."""
    function = launch("return [len(r) + 100 * d['number'] for r, d in zip(responses, records)]", processes)
    assert scored(function) == [1.0, 102.0, 200.0, 304.0, 405.0]
    pids = launch("return [os.getpid() for _ in responses]", processes)
    assert len(set(scored(pids))) == min(processes, 5)


@pytest.mark.parametrize(
    "returned",
    ["[True, 2, 3.5, 0, -1]", "(x for x in [1, 2, 3.5, 0, -1])", "np.array([1, 2, 3.5, 0, -1], dtype='float32')"],
)
def test_any_numbers_will_do(launch, returned):
    assert scored(launch(f"import numpy as np\nreturn {returned}")) == [1.0, 2.0, 3.5, 0.0, -1.0]


MISTAKES = {
    "raises": ("return [d['nmber'] for d in records]", r"raised KeyError: 'nmber' \(\S+mine\.py, line 4\)"),
    "exits": ("sys.exit(3)", "raised SystemExit: 3"),
    "too_few": ("return [1.0]", "returned 1 numbers for 5 responses"),
    "too_many": ("return [1.0] * 6", "returned 6 numbers for 5 responses"),
    "nothing": ("pass", "returned NoneType None, not a list of 5 numbers"),
    "one_number": ("return 1.0", "returned float 1.0, not a list"),
    "a_text": ("return 'hallo'", "returned str 'hallo', not a list"),
    "a_dictionary": ("return {i: 1.0 for i in range(5)}", "returned dict .*, not a list"),
    "texts": ("return ['1.0'] * 5", "returned str '1.0' for the response to prompt 0, not a number"),
    "null": ("return [1, 2, None, 4, 5]", "returned NoneType None for the response to prompt 20, not a number"),
    "nan": ("return [1, 2, 3, float('nan'), 5]", "returned nan for the response to prompt 30; a score must be finite"),
    "infinite": ("return [1, 2, 3, 4, float('-inf')]", "returned -inf for the response to prompt 40"),
    "huge": (
        "return [1, 2, 10**400, 4, 5]",
        "returned 1000.* for the response to prompt 20; a score must be .* at most 1e",
    ),
    "complex": ("return [1j] * 5", "returned complex 1j"),
    "crashes": ("os.kill(os.getpid(), 11)", r"ended its process \(SIGSEGV\) for 5 responses to prompts 0, 10, 20"),
    "vanishes": ("os._exit(7)", r"ended its process \(exit code 7\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(launch, name):
    body, message = MISTAKES[name]
    function = launch(body)
    with pytest.raises(FunctionFailed, match=rf"^reward\.function=\S+mine\.py:score {message}"):
        scored(function)


def test_hanging_ends_in_time(launch):
    function = launch("time.sleep(100)\nreturn [0.0] * 5", timeout_s=1.0)
    began = time.monotonic()
    with pytest.raises(
        FunctionFailed, match=r"did not return within reward\.timeout_s=1 for 5 responses to prompts 0, 10"
    ):
        scored(function)
    assert time.monotonic() - began < 60


def test_the_time_limit_is_for_each_batch(launch):
    function = launch("time.sleep(1.5)\nreturn [0.0] * 5", timeout_s=5.0)
    for _ in range(4):
        assert scored(function) == [0.0] * 5


def test_only_the_process_that_hangs_is_named(launch):
    function = launch("while '4444' in responses: pass\nreturn [0.0] * len(responses)", 5, 1.0)
    with pytest.raises(FunctionFailed, match=r"for 1 responses to prompts 30$"):
        scored(function)


def test_a_fork_that_comes_back_is_not_a_second_answer(launch):
    function = launch("os.fork()\nreturn [len(r) for r in responses]")
    for _ in range(3):
        assert scored(function) == [1.0, 2.0, 0.0, 4.0, 5.0]
    assert scored(function, answers(2)) == [1.0, 2.0]


def test_a_fork_that_raises_is_not_either(launch):
    function = launch("if os.fork() == 0: raise ValueError('child')\nreturn [1.0] * 5")
    assert scored(function) == scored(function) == [1.0] * 5


def test_functions_may_use_processes_of_their_own(launch):
    function = launch("with multiprocessing.get_context('fork').Pool(2) as pool: return pool.map(len, responses)")
    assert scored(function) == [1.0, 2.0, 0.0, 4.0, 5.0]


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def until_gone(pids):
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


LEAVES_A_CHILD = "child = os.fork()\nif child == 0: time.sleep(300)\nreturn [os.getpid(), child, 0, 0, 0]"


LEAVES_A_DAEMON = """
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if (daemon := os.fork()) == 0: time.sleep(300)
    os.write(write, str(daemon).encode())
    os._exit(0)
os.wait()
return [os.getpid(), int(os.read(read, 100)), 0, 0, 0]"""
LEFT = pytest.mark.parametrize("body", [LEAVES_A_CHILD, LEAVES_A_DAEMON], ids=["child", "daemon"])


@LEFT
def test_what_a_function_starts_ends_with_it(launch, body):
    function = launch(body)
    own, child = map(int, scored(function)[:2])
    assert alive(own) and alive(child)
    function.close()
    assert not alive(own) and not alive(child)


HOW = {
    "raises": ("raise ValueError('x')", "raised ValueError: x"),
    "hangs": ("while True: pass", "did not return within"),
    "crashes": ("os.kill(os.getpid(), 11)", "ended its process .SIGSEGV."),
    "too_few": ("return [1.0]", "returned 1 numbers for 5 responses"),
    "text": ("return ['1'] * 5", "returned str '1' for the response to prompt 0, not a number"),
    "nan": ("return [float('nan')] * 5", "returned nan for the response to prompt 0"),
}


@pytest.mark.parametrize("how", HOW)
def test_whatever_it_does_after_leaving_a_daemon_nothing_is_left(launch, tmp_path, how):
    body, message = HOW[how]
    told = tmp_path / "daemon"
    leave = LEAVES_A_DAEMON.replace("return [", f"open({str(told)!r}, 'w').write(os.read(read, 100).decode()) #")
    function = launch(f"{leave}\n{body}", timeout_s=2.0)
    with pytest.raises(FunctionFailed, match=message):
        scored(function)
    assert not alive(int(told.read_text()))


@LEFT
def test_all_ends_when_the_rank_is_killed(launch, body):
    """Nobody is there to call close."""
    function = launch(body)
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            from megatron_rlhf.rewards.processes import RewardFunction as Other

            other = Other(function.name.partition("=")[2], 1, 20.0, "reward")
            os.write(write, " ".join(str(int(pid)) for pid in scored(other)[:2]).encode())
            os.kill(os.getpid(), 9)
        finally:
            os._exit(1)
    pids = list(map(int, os.read(read, 100).split()))
    os.wait()
    assert len(pids) == 2
    assert until_gone(pids)


def test_what_it_prints_harms_nothing(launch, capfd):
    function = launch("print('seen', len(responses))\nprint(os.read(0, 10), file=sys.stderr)\nreturn [1.0] * 5")
    assert scored(function) == [1.0] * 5
    assert capfd.readouterr().out == "seen 5\n"


def test_a_rank_is_not_what_it_takes_itself_for(launch, monkeypatch):
    for name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "3")
    counted = "sum(name in os.environ for name in ('RANK', 'TORCHELASTIC_USE_AGENT_STORE'))"
    assert scored(launch(f"return [float({counted})] * 5")) == [0.0] * 5


BROKEN = {
    "no_name": ("{folder}/mine.py", "", "is not PATH/TO/FILE.py:NAME or MODULE:NAME"),
    "no_file": ("{folder}/other.py:score", "", "there is no file .*other.py"),
    "no_module": ("nowhere_at_all:score", "", "there is no module nowhere_at_all on Python's path"),
    "no_function": ("{folder}/mine.py:scores", "def score(p, r, c): ...", "has no function scores; it has score"),
    "not_a_function": ("{folder}/mine.py:score", "score = 3", "has no function score"),
    "arguments": ("{folder}/mine.py:score", "def score(text): ...", r"does not take \(prompts, responses, records\)"),
    "syntax": ("{folder}/mine.py:score", "def score(:", r"cannot be imported: SyntaxError: .*mine\.py, line 1"),
    "import": ("{folder}/mine.py:score", "import nonsense_x", "cannot be imported: ModuleNotFoundError: .*nonsense_x"),
    "exits": ("{folder}/mine.py:score", "raise SystemExit(2)", "cannot be imported: SystemExit: 2"),
    "hangs": ("{folder}/mine.py:score", "while True: pass", r"was not imported within rewards\.x\.timeout_s=2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_loaded_is_named(tmp_path, name):
    spec, source, message = BROKEN[name]
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(FunctionFailed, match=message) as caught:
        RewardFunction(spec.format(folder=tmp_path), 1, 2.0, "rewards.x")
    assert re.match(r"rewards\.x\.function=", str(caught.value))


def test_a_module_is_found_from_the_current_folder_and_files_import_their_neighbours(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("BONUS = 5")
    (tmp_path / "my_rewards.py").write_text(
        "from neighbour_of_mine import BONUS\ndef score(p, r, c): return [BONUS] * len(p)"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder, spec in ((tmp_path, "my_rewards:score"), (elsewhere, f"{tmp_path}/my_rewards.py:score")):
        monkeypatch.chdir(folder)
        function = RewardFunction(spec, 1, 20.0, "reward")
        assert scored(function) == [5.0] * 5
        function.close()
