"""What is converted along with the weights: tokenizer, chat templates, generation settings."""

import shutil
from pathlib import Path

from conversions import round_trip
from transformers import GenerationConfig

from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.data.tokenizer import load_tokenizer


def test_companions_travel_along(world, tmp_path, shared_data):
    source = tmp_path / "source"
    shutil.copytree(shared_data / "tinystories_260k", source)
    (source / "generation_config.json").write_text('{"do_sample": true}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "notes.txt").write_text("not a companion")
    round_trip(source, tmp_path, "policy")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "theirs" / name).read_bytes() == (source / name).read_bytes(), name
    more = Path("additional_chat_templates", "tools.jinja")
    assert (tmp_path / "theirs" / more).read_text() == "{{ tools }}"
    assert not (tmp_path / "theirs" / "notes.txt").exists()


def test_companions_are_found_through_the_runs_that_a_checkpoint_comes_from(tmp_path):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for folder, name in ((model, "config.json"), (tokenizer, "tokenizer.json")):
        folder.mkdir()
        (folder / name).write_text('{"model_type": "mistral"}')
    for run, origin in (("sft", model), ("ppo", tmp_path / "sft")):
        (tmp_path / run / "checkpoints" / "step_3").mkdir(parents=True)
        config = f"data: {{tokenizer: {tokenizer}}}\npolicy: {{init_from: {origin}}}\nreward: {{init_from: null}}"
        (tmp_path / run / "config.yaml").write_text(config)
    found = ExtraFiles.find(tmp_path / "ppo" / "checkpoints" / "step_3", None)
    assert (found.tokenizer, found.config, found.model_type) == (tokenizer, model, "mistral")
    assert ExtraFiles.find(tmp_path / "ppo" / "checkpoints" / "step_3", like=model).tokenizer is None


def test_the_tokenizer_of_a_checkpoint_and_all_its_ends_go_out(tmp_path, shared_data):
    """They take precedence over what the run's configuration names; the model's other generation settings stay."""
    origin, checkpoint = tmp_path / "origin", tmp_path / "run" / "checkpoints" / "step_3"
    shutil.copytree(shared_data / "tinystories_260k", origin, copy_function=shutil.copyfile)
    (origin / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 2}')
    tokenizer = load_tokenizer(shared_data / "tinystories_260k")
    tokenizer.stop_also_at(["<unk>"])
    tokenizer.save(checkpoint / "tokenizer")
    (tmp_path / "run" / "config.yaml").write_text(f"data: {{tokenizer: {origin}}}\npolicy: {{init_from: {origin}}}")
    found = ExtraFiles.find(checkpoint, None)
    assert (found.tokenizer, found.config) == (checkpoint / "tokenizer", origin)
    (tmp_path / "out").mkdir()
    found.copy_to(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.temperature, settings.eos_token_id) == (0.6, [2, 0])
