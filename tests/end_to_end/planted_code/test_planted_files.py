"""Models of others, tokenizers, data and lines of runs (docs/security.md) with code planted in them: it does not run."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from planting import Planted

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.nemo import archive
from megatron_rlhf.data.pretraining import load_pretraining
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_rlhf.monitoring.files import read_records as read_lines

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
