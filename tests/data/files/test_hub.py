"""Names on the Hugging Face hub, where there is a network and where there is none."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.data.files import hub
from megatron_rlhf.data.tokenizer import load_tokenizer


@pytest.fixture
def network(tmp_path, monkeypatch, shared_data):
    """A hub that has one model; says what was asked for."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(shutil.copytree(shared_data / "tinystories_260k", tmp_path / "cache", dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_model_and_a_tokenizer_are_downloaded_without_code_or_pickles(network, tmp_path):
    found = StartingPoint.find("someone/stories", "policy.init_from", POLICY)
    assert (found.path, found.model.num_layers) == (tmp_path / "cache", 5)
    assert load_tokenizer("stories").vocab_size == 512
    assert network == [("someone/stories", hub.MODEL_FILES), ("stories", hub.TOKENIZER_FILES)]
    assert not any(name.endswith((".bin", ".py", ".pt")) for name in hub.MODEL_FILES)


def test_paths_are_no_names(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/sft", "./stories", "/nowhere", "~/stories", "a/b/c"):
        with pytest.raises(UserError, match=r"policy.init_from=.*: no such folder$"):
            StartingPoint.find(path, "policy.init_from", POLICY)
    assert not network


def test_without_a_network_the_command_is_named(monkeypatch):
    def download(name, allow_patterns):
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nand no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as error:
        StartingPoint.find("someone/stories", "reward.init_from", POLICY)
    assert str(error.value) == (
        "reward.init_from=someone/stories: no such folder; a model of the Hugging Face hub cannot be downloaded here (Cannot "
        "find an appropriate cached snapshot folder): run `hf download someone/stories --local-dir stories` where there is "
        "a network, and give reward.init_from=stories"
    )
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"`hf download nobody/nothing-like-it --local-dir nothing-like-it`"):
        load_tokenizer("nobody/nothing-like-it")  # HF_HUB_OFFLINE=1 in tests
