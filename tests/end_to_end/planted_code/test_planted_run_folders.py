"""What runs, adapters and labeling projects keep on the disk, with code planted in it by whoever made the folder."""

import json
import pickle
import sqlite3
import subprocess

import numpy as np
import pytest
import torch
from commands import ROOT
from planting import Planted
from safetensors.torch import save_file

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.data.files.item_store import ABOUT, BIN, IDX, ItemWriter, StoredItems, pack, read_about
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import Settings, Task

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1),
}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}


@pytest.fixture
def adapter(tmp_path):
    """A sound folder of peft's, and its base."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA))
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, "base_model_name_or_path": str(base)}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}, folder / "adapter_model.safetensors"
    )
    return folder


def open_adapter(folder) -> StartingPoint:
    return StartingPoint.find(str(folder), "policy.init_from", POLICY)


def change(folder, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_pickled_weights_of_an_adapter(adapter, trace):
    """peft reads adapter_model.bin where it is the only one."""
    torch.save({"lora_A": Planted(trace)}, adapter / "adapter_model.bin")
    assert open_adapter(adapter).adapter is not None, "beside safetensors, it is not read"
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled adapters are not read"):
        open_adapter(adapter)
    for content in (pickle.dumps(Planted(trace)), (adapter / "adapter_model.bin").read_bytes()):
        (adapter / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors: not a whole safetensors file"):
            open_adapter(adapter)


def test_code_of_an_adapter_and_of_its_tokenizer(adapter, tmp_path, trace):
    """peft imports what auto_mapping names."""
    (adapter / "code.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Mine: ...\n")
    change(adapter, auto_mapping={"parent_library": "code", "base_model_class": "Mine"})
    auto_map = {"AutoTokenizer": ["code.Mine", "code.Mine"]}
    (adapter / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": auto_map}))
    (adapter / "tokenizer.model").write_bytes(b"")
    found = open_adapter(adapter)
    with pytest.raises(UserError, match="no fast tokenizer can be loaded"):
        load_tokenizer(found.tokenizer or adapter)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": "two"}, r"r='two' must be a whole number"),
        ({"r": 0}, r"r=0 must be a whole number of at least 1"),
        ({"r": True}, r"r=True must be a whole number"),
        ({"lora_alpha": [4]}, r"lora_alpha=\[4\] must be a number"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan must be a number"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\] must be an object of numbers"),
        ({"alpha_pattern": {"q_proj": "4"}}, r"alpha_pattern=.* must be an object of numbers"),
        ({"rank_pattern": {"q_proj": 0.5}}, r"rank_pattern=.* must be an object of whole numbers"),
        ({"use_rslora": "no"}, r"use_rslora='no' must be true or false"),
        ({"base_model_name_or_path": ["x"]}, r"base_model_name_or_path=\['x'\] must be a text"),
        ({"base_model_name_or_path": "a\0b"}, r"policy\.init_from=.*is not a Hugging Face folder here"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
    ],
)
def test_settings_of_an_adapter_that_are_none(adapter, settings, says):
    change(adapter, **settings)
    with pytest.raises(UserError, match=says):
        open_adapter(adapter)


def test_settings_of_an_adapter_that_are_missing(adapter):
    path = adapter / "adapter_config.json"
    for name in ("r", "lora_alpha"):
        path.write_text(json.dumps({k: v for k, v in SETTINGS.items() if k != name} | {"base_model_name_or_path": ""}))
        with pytest.raises(UserError, match=rf"adapter_config\.json: {name} is missing"):
            open_adapter(adapter)


def test_an_adapter_of_whole_numbers(adapter):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2, dtype=torch.int32)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora_B\.weight holds torch\.int32, and not fractions"):
        open_adapter(adapter)


# --- run folders ------------------------------------------------------------------------------------------------------


def stored(folder) -> StoredItems:
    return StoredItems(folder, Prompt)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "cache" / "prompts-0"
    writer = ItemWriter(folder, Prompt)
    writer([Prompt(0, "a", None, np.arange(3))])
    writer.publish({"source": "prompts.jsonl"})
    assert stored(folder)[0].text == "a"
    return folder


def put(folder, content: bytes) -> None:
    (folder / BIN).write_bytes(content)
    (folder / IDX).write_bytes(len(content).to_bytes(8, "little"))


@pytest.mark.parametrize("form", ["pickle", "objects", "structured", "elsewhere", "other", "deep"])
def test_tokenised_records_in_the_cache_of_a_run(store, trace, form):
    """Arrays of objects are pickles to numpy."""
    sound = pack(Prompt(0, "a", None, np.arange(3)))
    kinds = {"objects": b'"|O"', "structured": b'"O,O"', "elsewhere": b'"<i8/../x"'}
    if form in kinds:
        bad = sound.replace(b'"<i8"', kinds[form])
        bad = (len(bad) - 4 - 24).to_bytes(4, "little") + bad[4:-24] + pickle.dumps(Planted(trace))
    else:
        other = {"pickle": pickle.dumps(Planted(trace)), "other": b"[]", "deep": b"[" * 100_000}[form]
        bad = len(other).to_bytes(4, "little") + other
    put(store, bad)
    with pytest.raises(UserError, match=r"prompts-0: not the tokenised records that were written there .*delete"):
        stored(store)[0]


def test_what_describes_tokenised_records(store, trace):
    for content in (pickle.dumps(Planted(trace)), b"[" * 100_000, b"[]", b"\xff"):
        (store / ABOUT).write_bytes(content)
        assert read_about(store) is None, "they are made anew"


@pytest.mark.parametrize("name", ["step_a[$(mkdir {trace})]", "a[$(mkdir {trace})]", "step_1; mkdir {trace}", "../x"])
def test_the_newest_checkpoint_of_a_job_that_starts_again(tmp_path, trace, name):
    """A job script calculates with its number, and bash runs commands in what it takes for a number."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(name.format(trace=trace))
    (run / "metrics.jsonl").write_text(f'{{"step": a[$(mkdir {trace})]}}\n')
    row = ["2026-11-26", "1", "1", f"a[$(mkdir {trace})]", "-", f"a[$(mkdir {trace})]", "1", f"$(mkdir {trace})"]
    (run / "restarts.tsv").write_text("\t".join(row) + "\n")
    steps = "begin run.dir=$1; steps_done; record 1 killed; last_end; go_on 1 0 || true"
    script = f'source "$0"; {steps}; tail -n 1 "$1/restarts.tsv"'
    finished = subprocess.run(
        ["bash", "-c", script, str(ROOT / "slurm" / "restarts.sh"), str(run)],
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stdout.splitlines()[-1].split("\t")[3:] == ["-", "-", "0", "1", "killed"], finished


# --- labeling projects ------------------------------------------------------------------------------------------------


def test_a_labeling_project(tmp_path, trace):
    """SQLite loads libraries by an SQL function, which triggers and views could call; it is off."""
    path = tmp_path / "labels.sqlite"
    project = Project.create(path, Settings())
    project.close()
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TRIGGER planted AFTER INSERT ON tasks BEGIN SELECT load_extension('/planted'); END")
    project = Project.open(path)
    with pytest.raises(sqlite3.OperationalError, match=r"load_extension|not authorized|unsafe"):
        project.add_tasks([Task("p", ("a", "b"), ("x", "y"), None)])
    project.close()
    raw.close()
    path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
    path.write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises(UserError, match="is no labeling project"):
        Project.open(path)


@pytest.mark.parametrize("value", ["[" * 100_000, "{", "9" * 5000])
def test_settings_of_a_labeling_project(tmp_path, value):
    path = tmp_path / "labels.sqlite"
    Project.create(path, Settings()).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE settings SET value = ? WHERE name = 'labels_per_prompt'", (value,))
    with pytest.raises(UserError, match=r"labels\.sqlite: .*labels_per_prompt"):
        Project.open(path)
