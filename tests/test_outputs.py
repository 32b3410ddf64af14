"""Commands replace what they made themselves, and nothing else: their inputs, runs, other people's files."""

import json

import pytest

from megatron_rlhf.commands import compare, iterate, label, plan, prepare, report

VOTES = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
RANKED = [{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}]
METRICS = [{"step": 1, "reward/score_mean": 0.5}]
ANSWERS = [{"prompt": "p", "response": "a", "prompt_id": 0, "source": "sft", "step": 0}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data, a tokenizer, a corpus, a run, an evaluation and a labeling project."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "votes.jsonl", VOTES)
    write(tmp_path / "ranked.jsonl", RANKED)
    write(tmp_path / "prompts.jsonl", [{"prompt": "p", "user": "u"}])
    (tmp_path / "text.txt").write_text("a few words of text " * 20)
    write(tmp_path / "run" / "metrics.jsonl", METRICS)
    (tmp_path / "run" / "config.yaml").write_text("ppo: {}\n")
    (tmp_path / "run" / "stage").write_text("ppo\n")
    (tmp_path / "run" / "report.html").write_text("<!doctype html>\n<p>the run's</p>\n")
    write(tmp_path / "evaluation" / "evaluation.jsonl", ANSWERS)
    write(tmp_path / "evaluation" / "metrics.jsonl", METRICS)
    write(tmp_path / "answers.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    assert label.main(["create", "labels.sqlite", "--tasks", "answers.jsonl", "--labelers", "ann"]) == 0
    assert prepare.main("tokenizer --input text.txt --vocab-size 262 --output tokenizer".split()) == 0
    assert prepare.main("pretraining --input text.txt --tokenizer tokenizer --output corpus".split()) == 0
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = {
    "tokenizer_over_a_tokenizer": (prepare, "tokenizer --input text.txt --vocab-size 263 --output tokenizer"),
    "tokenizer_into_a_run": (prepare, "tokenizer --input text.txt --vocab-size 263 --output run"),
    "corpus_over_a_corpus": (prepare, "pretraining --input votes.jsonl --tokenizer tokenizer --output corpus"),
    "blend_over_a_corpus": (prepare, "blend --input text.txt=1 --tokenizer tokenizer --output corpus"),
    "corpus_below_a_file": (prepare, "pretraining --input text.txt --tokenizer tokenizer --output text.txt/corpus"),
    "pairs_over_their_input": (prepare, "pairs --input ranked.jsonl --output ranked.jsonl"),
    "rankings_over_their_input": (prepare, "rankings --input votes.jsonl --output votes.jsonl"),
    "rankings_over_prompts": (prepare, "rankings --input votes.jsonl --output prompts.jsonl"),
    "pairs_in_no_folder": (prepare, "pairs --input ranked.jsonl --output nowhere/pairs.jsonl"),
    "cleaning_into_a_run": (prepare, "clean --input prompts.jsonl --output run"),
    "report_over_metrics": (report, "run --output run/metrics.jsonl"),
    "comparison_over_settings": (report, "run evaluation --output run/config.yaml"),
    "report_over_a_folder": (report, "run --output evaluation"),
    "page_over_answers": (compare, "--policy sft=evaluation --output evaluation/evaluation.jsonl"),
    "page_over_a_project": (compare, "--policy sft=evaluation --output labels.sqlite"),
    "plan_over_prompts": (plan, "recipe=instructgpt_1_3b --stage sft --html prompts.jsonl"),
    "labels_over_their_project": (label, "export labels.sqlite --output labels.sqlite"),
    "labels_over_rankings": (label, "export labels.sqlite --output ranked.jsonl"),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_replaced(name, folder, capsys):
    command, arguments = CASES[name]
    before = contents(folder)
    assert command.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert "--output" in printed.err or "--html" in printed.err or "from elsewhere" in printed.err, printed.err
    assert {path: content for path, content in contents(folder).items() if path in before} == before


def test_what_a_command_made_it_makes_again(folder):
    for arguments in ("run --output page.html", "run evaluation --output page.html"):
        for _ in range(2):
            assert report.main(arguments.split()) == 0
    write(folder / "out.jsonl", [{"prompt": "p", "responses": [], "labeler": "ann", "team": "training", "task": 1}])
    assert label.main("export labels.sqlite --output out.jsonl".split()) == 2, "no answer is given yet"
    (folder / "empty").mkdir()
    assert prepare.main("tokenizer --input text.txt --vocab-size 263 --output empty".split()) == 0


LOOP = "--rounds 1 --policy sft --prompts prompts.jsonl"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (f"run {LOOP} --rule rules.py:score", "run holds PPO: name a folder of its own"),
        (f"loop {LOOP} --rule nothing.py:score", "--rule nothing.py:score there is no file nothing.py"),
        (f"loop {LOOP} --rule broken.py:score", "--rule broken.py:score cannot be imported: ZeroDivisionError"),
        (f"loop {LOOP} --rule rules.py:score --comparisons none.jsonl", "none.jsonl: no such file"),
        (f"loop {LOOP} --rule rules.py:score --comparisons cut.jsonl", "cut.jsonl, line 2: "),
        (f"loop {LOOP} --rule rules.py:score --comparisons one.jsonl", "one.jsonl, line 2: column 'responses' must be"),
        (f"loop {LOOP} --rule rules.py:score --samples 1", "--samples 1: at least 2"),
        (f"loop {LOOP} --rule rules.py:score --rounds 0", "--rounds 0: at least 1"),
        (f"loop {LOOP} --people ann --labels-per-prompt 0", "--labels-per-prompt 0: at least 1"),
        (f"other {LOOP} --rule rules.py:score", "other/state.json is not the state of a loop"),
    ],
)
def test_a_loop_begins_with_what_it_needs_at_its_end(folder, capsys, arguments, says):
    (folder / "rules.py").write_text("def score(prompts, responses, records):\n    return [0.0] * len(prompts)\n")
    (folder / "broken.py").write_text("1 / 0\n")
    good = '{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}\n'
    (folder / "cut.jsonl").write_text(good + '{"prompt": "p", "resp\n')
    (folder / "one.jsonl").write_text(good + '{"prompt": "p", "responses": ["a"], "ranks": [0]}\n')
    write(folder / "other" / "state.json", [{"a": 1}])
    before = contents(folder)
    options, overrides = iterate._parser().parse_known_args(arguments.split())
    with pytest.raises(iterate.UserError, match=says.replace(".", r"\.")):
        iterate.Loop(options, overrides)
    assert contents(folder).items() >= before.items()
