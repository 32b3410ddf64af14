"""The command line of tools/prepare_data.py: what it writes, what it prints, and how it reports mistakes."""

import importlib.util

import pytest
from commands import ROOT
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_rlhf.data.tokenizer import load_tokenizer

TOOL = ROOT / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_tokenizer_then_pretraining(run, tmp_path, write_records, capsys):
    records = write_records({"text": "the cat sat"}, {"text": "the cat ran"})
    (tmp_path / "b.txt").write_text("the dog sat")
    assert run("tokenizer", "--input", records, "--vocab-size", 265, "--output", tmp_path / "tok") == 0
    assert load_tokenizer(tmp_path / "tok").vocab_size == 265
    files = ("--input", records, tmp_path / "b.txt")
    assert run("pretraining", *files, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "corpus") == 0
    assert len(IndexedDataset(str(tmp_path / "corpus"))) == 3
    printed = capsys.readouterr()
    assert "265 tokens, end of text 1, padding 0" in printed.out
    assert "3 documents" in printed.out
    assert "100%" in printed.err


@pytest.mark.parametrize(
    ("kind", "record", "options", "expected"),
    [
        ("demonstrations", {"q": "ab", "a": "cd"}, ("--column", "prompt={q}\\n", "--column", "response={a}"), "most 3"),
        ("comparisons", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]}, (), "no tie: 2"),
        ("prompts", {"prompt": "abcd", "user": "u"}, ("--max-prompt-tokens", 4), "users: 1"),
    ],
)
def test_check(run, tokenizer, tmp_path, write_records, capsys, kind, record, options, expected):
    tokenizer.save(tmp_path / "tok")
    path = write_records(record)
    assert run("check", kind, "--input", path, "--tokenizer", tmp_path / "tok", *options) == 0
    printed = capsys.readouterr().out
    assert f"{path}: 1 of 1 records kept; dropped: none" in printed
    assert expected in printed


def test_mistake_is_one_message_and_exit_code_2(run, tokenizer, tmp_path, write_records, capsys):
    tokenizer.save(tmp_path / "tok")
    path = write_records({"prompt": "a", "response": ""})
    assert run("check", "demonstrations", "--input", path, "--tokenizer", tmp_path / "tok") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {path}, line 1: column 'response' has an empty response")
    assert printed.err.count("\n") == 1
    assert run("check", "prompts", "--input", path, "--tokenizer", tmp_path / "tok", "--column", "x") == 2
    assert "--column 'x': write NAME=TEMPLATE" in capsys.readouterr().err
    for second, says in (("prompt={response}", "another template for prompt"), ("promt={prompt}", "mean 'prompt'?")):
        columns = ("--column", "prompt={prompt}", "--column", second)
        assert run("check", "prompts", "--input", path, "--tokenizer", tmp_path / "tok", *columns) == 2
        assert says in capsys.readouterr().err


def test_help_teaches(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("--help")
    assert exit_.value.code == 0
    assert "check demonstrations --input" in capsys.readouterr().out


def test_check_with_a_model(run, shared_data, tmp_path, write_records, capsys):
    """Its tokenizer and its context, and a warning where most of a file does not fit."""
    long = {"prompt": "Once upon a time", "response": "there was a dog. " * 200}
    path = write_records(long, long, {**long, "response": "the end"})
    model = shared_data / "tinystories_260k"
    assert run("check", "demonstrations", "--input", path, "--model", model, "--max-response-tokens", 5000) == 0
    printed = capsys.readouterr()
    assert f"{path}: 1 of 3 records kept; dropped: 2 total_too_long" in printed.out
    assert (
        "67% of the records are dropped: 2 total_too_long; the limit that binds: the model's context of 512"
        in printed.err
    )
    assert run("check", "prompts", "--input", path) == 2
    assert "give --model DIR" in capsys.readouterr().err


def test_check_a_known_format_as_a_conversation(run, tmp_path, write_records, tokenizer, capsys):
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
        "{% endfor %}{{ 'assistant:' if add_generation_prompt else '' }}"
    )
    path = write_records({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    folder, template = tmp_path / "tok", ("--chat-template", tmp_path / "own.jinja")
    asked = ("check", "demonstrations", "--input", path, "--tokenizer", folder, "--format", "sharegpt")
    assert run(*asked, *template) == 0
    assert "learned tokens: least 6, median 6" in capsys.readouterr().out
    assert run(*asked) == 2
    assert "line 1: holds messages, and the tokenizer" in capsys.readouterr().err


def test_clean_goes_on_and_reports(run, tmp_path, write_records, capsys):
    path = write_records(
        *({"prompt": f"question number {i}, please", "user": f"u{i % 9}"} for i in range(40)), {"prompt": "a@b.org"}
    )
    asked = ("clean", "--input", path, "--output", tmp_path / "out", "--split", "0.8,0.1,0.1")
    assert run(*asked) == 0
    printed = capsys.readouterr()
    assert "41 records read; kept: " in printed.out and "dropped: 1 personal_data" in printed.out
    assert "100%" in printed.err
    kept = sum(
        len((tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()) for part in ("train", "validation", "test")
    )
    assert kept == 40
    assert run(*asked) == 2
    assert "a finished preparation is there" in capsys.readouterr().err
    for wrong, says in ((("--split", "1"), "two or three shares"), (("--max-prompt-tokens", 5), "needs --tokenizer")):
        assert run("clean", "--input", path, "--output", tmp_path / "new", *wrong) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("clean", "--prefix", -5),
        ("clean", "--max-characters", 0),
        ("clean", "--max-per-user", -1),
        ("clean", "--max-prompt-tokens", "many"),
        ("clean", "--near-duplicates", "abc"),
        ("clean", "--near-duplicates", 0),
        ("clean", "--region", "USA"),
        ("clean", "--region", "XX"),
        ("check", "--max-length", 0),
        ("check", "--max-prompt-tokens", 0),
        ("blend", "--tokens", 0),
    ],
)
def test_numbers_without_a_meaning_are_refused(run, capsys, command, option, value):
    with pytest.raises(SystemExit) as exit_:
        run(command, *(("prompts",) if command == "check" else ()), "--input", "x", "--output", "y", option, value)
    assert exit_.value.code == 2
    assert f"argument {option}: {value}: must be " in capsys.readouterr().err


def test_a_region_in_small_letters_finds_phone_numbers(run, tmp_path, write_records, capsys):
    path = write_records({"prompt": "call 650-253-0000"}, {"prompt": "call me"})
    for region, kept in (("us", 1), ("GB", 2), ("NONE", 2)):
        assert run("clean", "--input", path, "--output", tmp_path / region, "--region", region) == 0
        assert f"kept: {kept} all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "target", "says"),
    [
        ("tokenizer", "/proc/x", "nothing can be written to /proc"),
        ("tokenizer", "file", "is there already"),
        ("pretraining", "/proc/x", "nothing can be written to /proc"),
        ("pretraining", "folder/", "name what the files' names begin with"),
        ("blend", "folder/", "name what the files' names begin with"),
        ("clean", "/proc/x", "nothing can be written to /proc"),
        ("clean", "file", "is a file; name a folder"),
        ("clean", "file/x", "is a file; name a folder"),
        ("rankings", "/proc/x", "nothing can be written to /proc"),
        ("rankings", "folder", "is a folder; name a file in it"),
        ("pairs", "none/x", "there is no folder"),
    ],
)
def test_where_nothing_can_be_written_is_known_before_anything_is_read(run, tmp_path, capsys, command, target, says):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    further = {"tokenizer": ("--vocab-size", 300), "pretraining": ("--tokenizer", "x"), "blend": ("--tokenizer", "x")}
    output = target if target.startswith("/") else f"{tmp_path}/{target}"
    assert run(command, "--input", "none.jsonl", "--output", output, *further.get(command, ())) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {output}") and says in error


@pytest.mark.parametrize("command", ["tokenizer", "pretraining", "blend", "clean", "rankings"])
@pytest.mark.parametrize("wrong", ["none.jsonl", "other.jsonl"])
def test_the_first_record_of_all_sources_is_read_before_the_others(
    run, tokenizer, tmp_path, write_records, capsys, command, wrong
):
    tokenizer.save(tmp_path / "tok")
    fine = write_records({"text": "abc", "prompt": "a", "chosen": "b", "rejected": "c"}, "no object", name="fine.jsonl")
    write_records("other", name="other.jsonl")
    tokens = ("--tokenizer", tmp_path / "tok")
    further = {"tokenizer": ("--vocab-size", 300), "pretraining": tokens, "blend": tokens}.get(command, ())
    assert run(command, "--input", fine, tmp_path / wrong, "--output", tmp_path / "out", *further) == 2
    assert wrong in capsys.readouterr().err


def test_rankings_and_back(run, tmp_path, write_records, capsys):
    pairs = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("ab", "bc", "xy", "yz", "zx")]
    assert run("rankings", "--input", write_records(*pairs), "--output", tmp_path / "ranked.jsonl") == 0
    printed = capsys.readouterr().out
    assert "5 votes are 1 rankings of three or more and 0 pairs; 0 without a majority, 1 in a circle" in printed
    assert "line 1: 0 > 1 > 2 > 0, of 3 responses" in printed
    assert (
        tmp_path / "ranked.jsonl"
    ).read_text() == '{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 1, 2]}\n'
    assert run("pairs", "--input", tmp_path / "ranked.jsonl", "--output", tmp_path / "pairs.jsonl") == 0
    assert "1 rankings are 3 pairs" in capsys.readouterr().out


def test_blend(run, tokenizer, tmp_path, write_records, capsys):
    tokenizer.save(tmp_path / "tok")
    many = write_records(*({"text": "abcd efgh"} for _ in range(90)), name="many.jsonl")
    few = write_records(*({"text": "xyz"} for _ in range(90)), name="few.jsonl")
    prefix = tmp_path / "corpus"
    asked = ("--tokenizer", tmp_path / "tok", "--output", prefix, "--tokens", 600)
    assert run("blend", "--input", f"{many}=3", f"{few}=1", *asked) == 0
    assert "many.jsonl: 450 tokens, 74.8%" in capsys.readouterr().out
    documents = IndexedDataset(str(prefix))
    assert sum(map(len, documents)) == 602
    assert {len(document) for document in documents} == {4, 10}
