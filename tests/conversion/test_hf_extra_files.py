"""What travels with the weights: tokenizer, chat templates, generation settings."""

import shutil
from pathlib import Path

from conversions import round_trip

from megatron_rlhf.conversion.hf.extra_files import ExtraFiles


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
