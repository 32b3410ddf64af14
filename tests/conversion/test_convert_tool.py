"""The command line of tools/convert_checkpoint.py: what it writes, what it prints, and how it reports mistakes."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.check.outputs import CheckFailed

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_there_and_back_with_the_tokenizer(world, run, tmp_path, shared_data, capsys):
    source = shared_data / "tinystories_260k"
    assert run("hf-to-megatron", "--hf", source, "--output", tmp_path / "ours") == 0
    assert "llama (ForCausalLM): 47 tensors bit-identical" in capsys.readouterr().out
    assert run("megatron-to-hf", "--checkpoint", tmp_path / "ours", "--output", tmp_path / "theirs") == 0
    assert "no tokenizer" not in capsys.readouterr().out
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "theirs" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_type_and_shards_can_be_chosen(world, run, tmp_path, capsys):
    source = hf_models.save(tmp_path / "source", "pythia")
    assert run("hf-to-megatron", "--hf", source, "--output", tmp_path / "ours") == 0
    options = ("--dtype", "bf16", "--shard-gb", "0.0001", "--role", "policy")
    assert run("megatron-to-hf", "--checkpoint", tmp_path / "ours", "--output", tmp_path / "theirs", *options) == 0
    assert "no tokenizer came along" in capsys.readouterr().out
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    whole = load_file(source / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "theirs" / file)[name], whole[name].bfloat16()), name


def test_a_tokenizer_that_cannot_be_read_is_remarked(world, run, tmp_path, capsys):
    source = hf_models.save(tmp_path / "source", "gpt2")
    assert run("hf-to-megatron", "--hf", source, "--output", tmp_path / "one") == 0
    assert "no tokenizer is there: tried on random tokens alone" in capsys.readouterr().out
    (source / "tokenizer.json").write_text("{")
    assert run("hf-to-megatron", "--hf", source, "--output", tmp_path / "two") == 0
    assert "since its tokenizer cannot be used: " in capsys.readouterr().out


def test_a_mistake_exits_with_2_and_one_message(world, run, tmp_path, monkeypatch, capsys):
    source = hf_models.save(tmp_path / "source", "gpt2")
    capsys.readouterr()
    assert run("hf-to-megatron", "--hf", tmp_path / "nothing", "--output", tmp_path / "ours") == 2
    missing = f"error: --hf {tmp_path / 'nothing'}: no such folder; a model of the Hub has to be downloaded first\n"
    assert capsys.readouterr().err == missing
    assert run("megatron-to-hf", "--checkpoint", source, "--output", tmp_path / "x") == 2
    assert "is a Hugging Face folder already" in capsys.readouterr().err
    assert run("hf-to-megatron", "--hf", source, "--output", source / "config.json" / "x") == 2
    assert "Not a directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert run("hf-to-megatron", "--hf", source, "--output", ".") == 2
    assert "error: --output .: is the current folder, and a new one would replace it" in capsys.readouterr().err
    (tmp_path / "empty").rmdir()
    monkeypatch.chdir(tmp_path)
    for wrong in (("--check-length", "0"), ("--check-length", "-3")):
        with pytest.raises(SystemExit, match="2"):
            run("hf-to-megatron", "--hf", source, "--output", tmp_path / "ours", *wrong)
        assert "must be more than 0" in capsys.readouterr().err
    assert run("hf-to-megatron", "--hf", source, "--role", "reward", "--output", tmp_path / "ours") == 2
    assert "--role reward" in capsys.readouterr().err
    assert run("megatron-to-hf", "--checkpoint", tmp_path / "nothing", "--output", tmp_path / "x") == 2
    assert "--checkpoint" in capsys.readouterr().err
    (tmp_path / "source" / "model.safetensors").write_bytes(b"torn")
    assert run("hf-to-megatron", "--hf", source, "--output", tmp_path / "ours") == 2
    assert "model.safetensors: not a whole safetensors file (4 bytes)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_failed_check_exits_with_1_and_removes_the_output(world, run, tmp_path, monkeypatch, capsys):
    source = hf_models.save(tmp_path / "source", "gpt2")

    def differ(*args):
        raise CheckFailed("tensor transformer.wte.weight differs")

    monkeypatch.setattr(convert, "compare_tensors", differ)
    assert run("hf-to-megatron", "--hf", source, "--output", tmp_path / "ours") == 1
    assert "check failed" in (message := capsys.readouterr().err)
    assert "transformer.wte.weight" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


KILLED_BEFORE_THE_CHECK = """
import os, runpy, signal, sys
from megatron_rlhf.conversion import convert
from megatron_rlhf.checkpoint import sharded
convert.compare_tensors = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_conversion_leaves_no_folder_that_looks_whole(world, run, tmp_path):
    """Killed after everything is written and before anything is checked; the next attempt cleans up the remains."""
    source = hf_models.save(tmp_path / "source", "gpt2")
    there = ["hf-to-megatron", "--hf", source, "--output", tmp_path / "ours"]
    killed = subprocess.run([sys.executable, "-c", KILLED_BEFORE_THE_CHECK, TOOL, *there], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ours.writing", "source"]
    with pytest.raises(UserError, match="neither a checkpoint"):
        sharded.find_checkpoint(tmp_path, "--checkpoint")
    assert run(*there) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_help_says_what_becomes_of_each_role():
    shown = subprocess.run(
        [sys.executable, TOOL, "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert "...ForSequenceClassification with one label" in shown
    assert "Exit code: 0" in shown


def save_wide(folder):
    """A Llama of 0.6 GB in bf16, most of it embeddings; returns its size in bytes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=128_256, **sizes)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    listed, total = {}, 0
    for i, (name, shape) in enumerate(shapes.items()):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02).add_(float("norm" in name))
        save_file({name: tensor}, folder / f"{i}.safetensors", metadata={"format": "pt"})
        listed[name], total = f"{i}.safetensors", total + tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.mark.slow
def test_memory_is_for_a_layer_and_a_piece_of_an_embedding(tmp_path):
    """Python and its libraries take 0.4 GB of what is printed; both embeddings in fp32 would take 1.05 GB on each side."""
    assert save_wide(tmp_path / "source") > 0.55e9
    command = [sys.executable, TOOL, "hf-to-megatron", "--hf", tmp_path / "source", "--output", tmp_path / "ours"]
    command += ["--check-length", "32"]
    shown = subprocess.run(command, check=True, timeout=280, cwd=ROOT, capture_output=True, text=True).stdout
    converting, checking = map(float, re.findall(r"([0-9.]+) GB", shown)[-2:])
    assert 0 < converting <= checking < 1.4, shown


@pytest.mark.slow
def test_many_processes_by_torchrun(tmp_path):
    source = hf_models.save(tmp_path / "source", "llama")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TOOL]
    there = ["hf-to-megatron", "--hf", source, "--output", tmp_path / "ours"]
    back = [
        "megatron-to-hf",
        "--checkpoint",
        tmp_path / "ours",
        "--output",
        tmp_path / "theirs",
        "--shard-gb",
        "0.0001",
    ]
    for arguments in (there, back):
        subprocess.run([*map(str, command + arguments)], check=True, timeout=300, cwd=ROOT)
    theirs = {}
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        theirs |= load_file(path)
    before = load_file(source / "model.safetensors")
    assert before.keys() == theirs.keys()
    assert all(torch.equal(before[name], theirs[name]) for name in before)
