"""`megatron-rlhf report`: of a run that goes on, of a killed one, of several."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlhf.commands import report


def run_of(folder: Path, scores: list[float], half: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": i + 1, "reward/score_mean": score, "kl/mean": 0.1} for i, score in enumerate(scores)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + half)
    return folder


def test_a_killed_run_has_a_report_of_its_whole_lines(tmp_path, capsys):
    run = run_of(tmp_path / "run", [1.0, 2.5], half='{"step": 3, "reward/sc')
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "step 2" in page
    assert "http-equiv" not in page


def test_several_runs_are_compared_in_one_page(tmp_path, capsys):
    runs = [run_of(tmp_path / name, scores) for name, scores in (("ppo", [1.0, 1.5]), ("rloo", [1.0, 2.25, 2.75]))]
    output = tmp_path / "pages" / "both.html"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    page = output.read_text()
    assert "ppo · rloo" in page
    for cell in ("1.5", "2.75", "<td>2</td>", "<td>3</td>"):
        assert cell in page, cell


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [run_of(tmp_path / seed / "ppo", [1.0]) for seed in ("seed_1", "seed_2")]
    output = tmp_path / "both.html"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    assert all(str(run) in output.read_text() for run in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nothing"], "nothing holds no metrics.jsonl: give the folder of a run"),
        (["{folder}/run", "{folder}"], "holds no metrics.jsonl"),
        (["{folder}/run", "--watch", "0"], "0: must be a whole number of seconds"),
        (["{folder}/run", "--output", "{folder}/run"], "error: "),
    ],
)
def test_a_mistake_is_named(tmp_path, capsys, arguments, message):
    run_of(tmp_path / "run", [1.0])
    try:
        code = report.main([argument.format(folder=tmp_path) for argument in arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (
            "metrics.jsonl",
            '{"step": "1", "reward/score_mean": 1}',
            "metrics.jsonl, line 3: expected a JSON object with the key 'step', a number",
        ),
        ("metrics.jsonl", '{"step": 1e400, "reward/score_mean": 1}', "metrics.jsonl, line 3: step must be a number"),
        ("metrics.jsonl", '{"step": null}', "metrics.jsonl, line 3: expected a JSON object"),
        ("metrics.jsonl", '{"step": 3, "reward/score_mean": "abc"}', "reward/score_mean must be a number, not 'abc'"),
        ("timeline.jsonl", '{"step": 3, "sides": {"a": [["wait", "b"]]}}', "timeline.jsonl: the last line is not what"),
        ("samples.jsonl", '{"step": [1], "prompt": "p"}', "samples.jsonl, line 1: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path, capsys, file, content, says):
    run = run_of(tmp_path / "run", [1.0, 2.0])
    with (run / file).open("a") as damaged:
        damaged.write(content + "\n")
    assert report.main([str(run)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e308", "1" + "0" * 400, "null"])
def test_what_cannot_be_drawn_is_shown_as_not_finite(tmp_path, value):
    run = run_of(
        tmp_path / "run", [-1e299, 2.0], f'{{"step": 3, "reward/score_mean": {value}, "time/step_s": {value}}}\n'
    )
    (run / "samples.jsonl").write_text(f'{{"step": 3, "prompt": "p", "response": "r", "score": {value}}}\n')
    (run / "config.yaml").write_bytes(b"name: caf\xe9\n")
    assert report.main([str(run)]) == 0
    assert "name: caf\N{REPLACEMENT CHARACTER}" in (run / "report.html").read_text()


def test_watching_follows_a_run_until_it_is_interrupted(tmp_path):
    run = run_of(tmp_path / "run", [1.0])
    # A shell that starts the tests in the background has them ignore SIGINT, and their children with them.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{interruptible}; import sys; from megatron_rlhf.commands.report import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, str(run), "--watch", "1"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    try:
        assert watching.stdout is not None
        watching.stdout.readline()
        assert '<meta http-equiv="refresh" content="1">' in (run / "report.html").read_text()
        run_of(run, [1.0, 7.125])
        deadline = time.monotonic() + 30
        while "step 2" not in (run / "report.html").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "step 2" in (run / "report.html").read_text()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
    finally:
        watching.kill()
