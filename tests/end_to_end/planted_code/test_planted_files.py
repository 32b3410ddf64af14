"""Models of others, tokenizers, data and lines of runs (docs/security.md) with code planted in them: it does not run."""

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from planting import Planted
from toys import GPT2_LIKE, make_role

from megatron_rlhf.commands import prepare
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.nemo import archive
from megatron_rlhf.data.pretraining import load_pretraining
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_rlhf.evaluation.benchmarks.harness import HarnessModel
from megatron_rlhf.evaluation.benchmarks.run import Benchmarks
from megatron_rlhf.monitoring.files import read_records as read_lines
from megatron_rlhf.monitoring.report import write_report
from megatron_rlhf.runs.guards import Guard

# --- other people's models --------------------------------------------------------------------------------------------


def nemo_archive(folder: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(folder / "model.nemo", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder / "model.nemo"


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights.ckpt", "model_weights/.metadata"])
def test_nemo_archives(world, tmp_path, trace, name):
    files = {"model_config.yaml": b"num_layers: 4\n"}
    if name.endswith(".yaml"):
        files[name] = f'x: !!python/object/apply:os.mkdir ["{trace}"]\n'.encode()
    elif name.endswith(".metadata"):
        files[name] = pickle.dumps(Planted(trace))
    else:
        content = io.BytesIO()
        torch.save({"model.weight": Planted(trace)}, content)
        files[name] = content.getvalue()
    says = r"plain YAML|mkdir|objects other than tensors"
    with pytest.raises(UserError, match=says), archive.opened(nemo_archive(tmp_path, files), tmp_path):
        pass


def test_links_in_an_archive_are_not_followed(tmp_path):
    path = nemo_archive(tmp_path, {"model_config.yaml": b"num_layers: 4\n"})
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "model_weights.ckpt"), (tarfile.LNKTYPE, "linked")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/hostname"
            tar.addfile(link)
    with pytest.raises(UserError, match="holds no weights known to us"), archive.opened(path, tmp_path):
        pass


def test_pickled_weights_of_a_hugging_face_folder(world, tmp_path, trace):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 8, "n_head": 1}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "vocab_size": 9, "n_positions": 8}))
    torch.save({"wte.weight": Planted(trace)}, tmp_path / "hf" / "pytorch_model.bin")
    for allowed in (False, True):
        with pytest.raises(UserError, match=r"--allow-pickle|objects other than tensors"):
            convert.import_huggingface(tmp_path / "hf", tmp_path / "ours", None, CheckOptions(), allow_pickle=allowed)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(UserError, match=r"names \.\./b\.safetensors, which is no file beside it"):
        convert.import_huggingface(tmp_path / "hf", tmp_path / "ours", None, CheckOptions())


# --- tokenizers and data ----------------------------------------------------------------------------------------------


def test_code_of_a_tokenizer_folder(tmp_path, trace):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Mine: ...\n")
    auto_map = {"AutoTokenizer": ["code.Mine", "code.Mine"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": auto_map}))
    with pytest.raises(UserError, match="no fast tokenizer can be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize("form", ["pickle", "objects"])
def test_cached_indices_of_pretraining_text(tmp_path, trace, form):
    texts = [f"{word} alpha beta gamma delta" for word in ("one", "two", "three", "four")] * 20
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 270, tmp_path / "tokenizer")

    def load() -> object:
        return load_pretraining(tmp_path / "text.jsonl", tokenizer, 8, 4, seed=1, cache_dir=tmp_path / "cache")

    load()
    indices = sorted((tmp_path / "cache" / "indices").glob("*.npy"))
    assert indices
    for path in indices:
        path.unlink()
        if form == "pickle":
            path.write_bytes(pickle.dumps(Planted(trace)))
        else:
            with path.open("wb") as file:
                np.save(file, np.array([Planted(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"not an index of pretraining text .* delete the folder"):
        load()


def put_index(prefix: Path, trace: Path, form: str) -> None:
    """An index that holds a pickle, that ends early, or that names tokens outside of its `.bin`."""
    index = prefix.with_suffix(".idx")
    sound = index.read_bytes()
    count = int.from_bytes(sound[18:26], "little")
    body = 34  # the header: name, version, type of the tokens, numbers of sequences and of documents
    changed = {
        "pickle": pickle.dumps(Planted(trace)),
        "pickle after the header": sound[:body] + pickle.dumps(Planted(trace)),
        "empty": b"",
        "header": sound[:12],
        "length": sound[:body] + (2**31 - 1).to_bytes(4, "little") + sound[body + 4 :],
        "negative length": sound[:body] + (-1).to_bytes(4, "little", signed=True) + sound[body + 4 :],
        "elsewhere": sound[: body + 4 * count] + (2**40).to_bytes(8, "little") + sound[body + 4 * count + 8 :],
        "type": sound[:17] + b"\xff" + sound[18:],
        "count": sound[:18] + (2**60).to_bytes(8, "little") + sound[26:],
    }[form]
    index.unlink()
    index.write_bytes(changed)


INDICES = [
    "pickle",
    "pickle after the header",
    "empty",
    "header",
    "length",
    "negative length",
    "elsewhere",
    "type",
    "count",
]


@pytest.mark.parametrize("form", INDICES)
def test_token_files(tmp_path, trace, form):
    """Of `prepare pretraining` and `prepare blend`: `.bin` and `.idx` are numbers, `.meta.json` is JSON."""
    texts = [f"{word} alpha beta" for word in ("one", "two", "three", "four")]
    tokenizer = train_tokenizer(texts, 270, tmp_path / "tokenizer")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpora = [f"{tmp_path / name}.jsonl={weight}" for name, weight in (("a", 0.75), ("b", 0.25))]
    output = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "blended")]
    prepare.main(["blend", "--input", *corpora, *output, "--tokens", "60"])

    def load() -> object:
        return load_pretraining(tmp_path / "blended", tokenizer, 8, 4, seed=1, cache_dir=tmp_path / "cache")

    load()
    put_index(tmp_path / "blended", trace, form)
    with pytest.raises(UserError, match=r"blended: not a Megatron \.bin and \.idx, or broken"):
        load()
    (tmp_path / "blended.meta.json").write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises(UserError, match=r"blended\.meta\.json: does not name a tokenizer"):
        load()


def test_a_folder_of_records_with_a_script(tmp_path, trace):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    with pytest.raises(UserError, match="cannot load it"):
        list(read_records(folder))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "dataset_info.json").write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises(UserError, match="cannot load it"):
        list(read_records(tmp_path / "saved"))


def test_lines_of_a_run(tmp_path, trace):
    """Metrics, samples and replays are JSON."""
    (tmp_path / "metrics.jsonl").write_bytes(pickle.dumps(Planted(trace)) + b"\n")
    with pytest.raises(UserError, match="expected one JSON object a line"):
        list(read_lines(tmp_path / "metrics.jsonl"))


def test_kept_microbatches_of_a_run(tmp_path, trace):
    """`replay/` is for people: a report of the run does not read it, and a run writes over what is there."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sft/loss": 2.5}\n')
    replay = tmp_path / "replay" / "step_1_rollout.json"
    replay.parent.mkdir()
    replay.write_bytes(pickle.dumps(Planted(trace)))
    assert "2.5" in write_report(tmp_path).read_text()
    guard = Guard(replay.parent)
    guard.begin(1)
    guard._write("rollout", "all", "rollout", [])
    assert json.loads(replay.read_text())["not_finite"] == "rollout"


def test_caches_of_benchmarks(world, tmp_path, trace, monkeypatch):
    """The harness can keep requests as pickles, in a folder that the environment names, and answers in a database."""
    from lm_eval.caching import cache

    asked: list[str] = []

    def planted(name: str) -> str:
        asked.append(name)
        (tmp_path / "planted.pickle").write_bytes(pickle.dumps(Planted(trace)))
        return str(tmp_path / "planted.pickle")

    monkeypatch.setattr(cache, "_cache_file_path", planted)
    monkeypatch.setattr(cache, "PATH", str(tmp_path))
    (tmp_path / "hellaswag.jsonl").write_text('{"query": "a dog", "choices": ["ran.", "sat."], "gold": 0}\n')
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(["a dog ran. it sat."], 270, tokenizer)
    role = make_role(replace(GPT2_LIKE, vocab_size=280, max_sequence_length=64)).frozen()
    model = HarnessModel(role, load_tokenizer(tokenizer), 4, SamplingConfig(batch_size=4), seed=1)
    benchmarks = Benchmarks.load(["instructgpt_hellaswag"], None, str(tmp_path), shots=0)
    assert benchmarks.run(model, tmp_path / "benchmarks", is_first=True)
    assert not asked, "no cache is read or written"
