"""The page of an evaluation: its figures, and what a user can get wrong."""

import re

import datasets
import pytest
from evaluation.evaluations import policy_run, ppo_run, reward_run, rule, write_lines

from megatron_rlhf.commands.compare import main

GOOD_RULE = "return [float(response.split()[0]) for response in responses]"


def test_everything_is_on_one_page(tmp_path, capsys):
    runs = {
        name: policy_run(tmp_path / name, mean, seed) for seed, (name, mean) in enumerate({"sft": 0, "ppo": 2}.items())
    }
    people = [{"prompt": i, "ranks": [1, 0], "sources": ["sft", "ppo"]} for i in range(9)]
    write_lines(tmp_path / "people.jsonl", [*people, {"prompt": 9, "ranks": [0, 0], "sources": ["sft", "ppo"]}])
    arguments = ["--output", tmp_path / "page.html", "--policy", *(f"{name}={run}" for name, run in runs.items())]
    arguments += [
        "--reward-model",
        f"rm={reward_run(tmp_path / 'rm')}",
        "--training",
        f"ppo={ppo_run(tmp_path / 'train')}",
    ]
    arguments += ["--people", tmp_path / "people.jsonl", "--rule", rule(tmp_path / "rules.py", GOOD_RULE)]
    assert main(list(map(str, arguments))) == 0
    page = (tmp_path / "page.html").read_text()
    cells = re.sub(r"<[^>]+>", "|", page)
    for expected in (
        r"ppo\|+\s*\|*95\.0 \(85\.0 to 100\.0\)",  # people: 9 wins and a tie of 10
        r"K = 4",
        r"held-out",
        r"hellaswag acc",
        r"python examples/evaluate\.py run\.dir=x",
        r"--people",
    ):
        assert re.search(expected, cells), expected
    for title in ("Calibration", "Accuracy by length", "Frontier by the reward model", "Gold against proxy"):
        assert f'aria-label="{title}: ' in page
    assert (
        'class="error"' in page
        and "<script>document.title" not in page
        and "http" not in page.replace("http-equiv", "")
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('no')", "raised RuntimeError: no"),
        ("return 'text'", "returned str 'text'"),
        ("return [float('nan')] * len(responses)", "returned nan for answer 1"),
        ("return [1.0]", "returned 1 numbers for 120 responses"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("return ['high'] * len(responses)", "returned str 'high' for answer 1"),
    ],
)
def test_a_rule_that_does_not_judge(tmp_path, capsys, body, says):
    run = policy_run(tmp_path / "run", 0, 0)
    arguments = ["--output", str(tmp_path / "p.html"), "--policy", f"a={run}", "--rule", rule(tmp_path / "r.py", body)]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "p.html").exists()


def test_wrong_runs_and_files(tmp_path, capsys):
    run = policy_run(tmp_path / "run", 0, 0)
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "half" / "evaluation.jsonl", [{"prompt": "p", "response": "r"}])
    with (tmp_path / "half" / "evaluation.jsonl").open("a") as file:
        file.write('{"prompt": "p", "resp')
    write_lines(
        tmp_path / "wrong" / "comparisons.jsonl", [{"prompt": "p", "ranks": [0, 1], "scores": [1.0], "lengths": [1, 2]}]
    )
    write_lines(
        tmp_path / "tied" / "comparisons.jsonl", [{"prompt": "p", "ranks": [0, 0], "scores": [1, 2], "lengths": [1, 2]}]
    )
    (tmp_path / "none.jsonl").write_text("")
    for arguments, says in (
        (["--policy", "sft"], "write NAME=RUN_DIR"),
        (["--policy", f"a={run}", f"a={run}"], "two runs of the name a"),
        (["--policy", f"a={tmp_path / 'missing'}"], "no such folder"),
        (["--policy", f"a={tmp_path / 'empty'}"], "nothing was measured there"),
        (["--policy", f"a={tmp_path / 'half'}"], "evaluation.jsonl, line 2: "),
        (["--reward-model", f"a={run}"], "has no comparisons (evaluate.comparisons)"),
        (["--reward-model", f"a={tmp_path / 'wrong'}"], "lists of the same length"),
        (["--reward-model", f"a={tmp_path / 'tied'}"], "nothing to measure a reward model on"),
        (["--people", str(tmp_path / "none.jsonl")], "none.jsonl: empty"),
        (["--people", str(tmp_path / "missing.jsonl")], "no such file"),
        (["--policy", f"a={run}", "--rule", "nowhere.py:score"], "there is no file nowhere.py"),
    ):
        assert main(["--output", str(tmp_path / "p.html"), *arguments]) == 2, arguments
        assert says in capsys.readouterr().err, says
    assert not (tmp_path / "p.html").exists()


ANSWER = {"prompt": "p", "response": "r"}
SCORED = {"prompt": 0, "ranks": [0, 1], "scores": [1.0, 0.5], "lengths": [1, 2]}
RANKED = {"prompt": "p", "ranks": [0, 1], "sources": ["a", "b"]}


@pytest.mark.parametrize(
    ("option", "row", "says"),
    [
        ("--policy", {**ANSWER, "score": float("nan")}, "'score' must be a finite number or null, not NaN"),
        ("--policy", {**ANSWER, "score": 10**400}, "'score' must be a finite number"),
        ("--policy", {**ANSWER, "score": "1"}, "'score' must be a finite number"),
        ("--policy", {**ANSWER, "prompt": ["p"]}, "'prompt' must be a text, not [\"p\"]"),
        ("--policy", {**ANSWER, "response": None}, "'response' must be a text, not null"),
        ("--policy", {**ANSWER, "record": 5}, "'record' must be an object, not 5"),
        ("--reward-model", {**SCORED, "scores": [1.0, float("inf")]}, "of finite numbers"),
        ("--reward-model", {**SCORED, "scores": ["a", "b"]}, "of finite numbers"),
        ("--reward-model", {**SCORED, "ranks": [0, None]}, "of finite numbers"),
        ("--reward-model", {**SCORED, "prompt": ["p"]}, "'prompt' must be a text or a number"),
        ("--training", {"step": 0, "kl/mean": "0.1"}, "kl/mean must be a number, not '0.1'"),
        ("--people", {**RANKED, "ranks": ["0", "10"]}, "'ranks' must be a list of numbers"),
        ("--people", {**RANKED, "ranks": [0, None]}, "'ranks' must be a list of numbers"),
        ("--people", {**RANKED, "sources": ["a", 5]}, "'sources' one of as many names"),
        ("--people", {**RANKED, "sources": ["a"]}, "'sources' one of as many names"),
        ("--people", {"prompt": "p", "response": "r"}, "no 'ranks'; expected rankings"),
    ],
)
def test_what_is_in_the_files_is_checked(tmp_path, capsys, option, row, says):
    good = {"--policy": ANSWER, "--reward-model": SCORED, "--training": {"step": 0}, "--people": RANKED}[option]
    names = {"--policy": "evaluation", "--reward-model": "comparisons", "--training": "metrics", "--people": "people"}
    file = tmp_path / f"{names[option]}.jsonl"
    write_lines(file, [good, row])
    given = str(file) if option == "--people" else f"a={tmp_path}"
    assert main(["--output", str(tmp_path / "p.html"), option, given]) == 2
    printed = capsys.readouterr().err
    assert f"{file}, line 2: " in printed and says in printed
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("suffix", ["", ".ndjson", ".parquet"])
def test_rankings_of_people_in_other_files(tmp_path, capsys, suffix):
    file = tmp_path / f"people{suffix}"
    file.write_text("no table")
    assert main(["--output", str(tmp_path / "p.html"), "--people", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
    prompt = [{"role": "user", "content": "p"}]
    datasets.Dataset.from_list([{**RANKED, "prompt": prompt}] * 2).to_parquet(str(tmp_path / "people.parquet"))
    assert main(["--output", str(tmp_path / "p.html"), "--people", str(tmp_path / "people.parquet")]) == 0


def test_a_model_on_responses_of_one_length(tmp_path):
    write_lines(tmp_path / "comparisons.jsonl", [{**SCORED, "lengths": [3, 3]}])
    assert main(["--output", str(tmp_path / "p.html"), "--reward-model", f"a={tmp_path}"]) == 0
    assert "No comparison has responses of different lengths." in (tmp_path / "p.html").read_text()
