"""`reward.timeout_score`: one response takes too long, and only it scores the given value."""

import time

import pytest
from test_processes import alive, answers

from megatron_rlhf.rewards.patient import PatientFunction
from megatron_rlhf.rewards.processes import FunctionFailed

HANGS = "import os, time\ndef score(prompts, responses, records):\n    assert len(responses) == 1\n"


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(body, processes=1, timeout_s=3.0):
        (tmp_path / "mine.py").write_text(HANGS + "".join(f"    {line}\n" for line in body.splitlines()))
        started.append(PatientFunction(f"{tmp_path}/mine.py:score", processes, timeout_s, "rewards.code", -2.5))
        return started[-1]

    yield start
    for function in started:
        function.close()


def scored(function, batch=None):
    function.start(batch or answers())
    return function.scores()


@pytest.mark.parametrize("processes", [1, 7])
def test_only_what_takes_too_long_scores_the_given_value(launch, processes):
    function = launch("if responses == ['4444']: time.sleep(100)\nreturn [len(responses[0])]", processes)
    for _ in range(2):  # a process that was started anew works on
        assert scored(function) == [1.0, 2.0, 0.0, -2.5, 5.0]
        assert function.timeouts == 1
    says = "did not return within rewards.code.timeout_s=3 for 1 of 5 responses, which score -2.5: to prompts 30"
    assert function.warning == f"{function.name} {says}"
    assert scored(function, answers(3)) == [1.0, 2.0, 0.0]
    assert function.timeouts == 0 and function.warning is None


def test_the_limit_is_of_each_response_and_holds_while_the_rank_is_busy(launch):
    function = launch("time.sleep(0.8)\nreturn [1.0]")
    assert scored(function) == [1.0] * 5, "all of them together take longer"
    function = launch("time.sleep(0 if responses[0] else 100)\nreturn [1.0]")
    function.start(answers())
    time.sleep(8)  # the rank's models read
    assert not function._thread.is_alive(), "it did not wait for the rank"
    assert function.scores() == [1.0, 1.0, -2.5, 1.0, 1.0]


def test_every_response_may_be_late(launch):
    assert scored(launch("while True: pass", 5)) == [-2.5] * 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / len(responses[0])]", r"raised ZeroDivisionError: division by zero \(\S+mine\.py, line 4\)"),
        ("return 'x'", "returned str 'x', not a list of 1 numbers"),
        ("return [float('nan')]", "returned nan for the response to prompt 0"),
        ("os._exit(3)", r"ended its process \(exit code 3\) for 1 responses to prompts 0"),
    ],
)
def test_other_mistakes_end_the_run_as_ever(launch, body, message):
    with pytest.raises(FunctionFailed, match=rf"^rewards\.code\.function=\S+mine\.py:score {message}"):
        scored(launch(body))


def test_an_import_that_hangs_the_second_time_is_an_error(launch, tmp_path):
    function = launch("time.sleep(100)")
    (tmp_path / "mine.py").write_text("while True: pass")
    with pytest.raises(FunctionFailed, match=r"was not imported within rewards\.code\.timeout_s=3$"):
        scored(function)


def test_nothing_is_left_of_what_took_too_long(launch, tmp_path):
    told = tmp_path / "pids"
    function = launch(
        f"child = os.fork()\nif child == 0:\n    os.setsid()\n    time.sleep(100)\n"
        f"open({str(told)!r}, 'a').write(f'{{os.getpid()}} {{child}} ')\ntime.sleep(100)"
    )
    assert scored(function, answers(2)) == [-2.5] * 2
    pids = list(map(int, told.read_text().split()))
    assert len(pids) == 4 and not any(map(alive, pids))


def test_it_can_be_closed_while_it_waits(launch):
    function = launch("time.sleep(100)", timeout_s=60.0)
    function.start(answers())
    time.sleep(0.3)
    began = time.monotonic()
    function.close()
    assert time.monotonic() - began < 50
