"""Settings in files of one's own, flags, and --help."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhf.cli import STAGES
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.keys import keys, nearest
from megatron_rlhf.config.stages import PPOConfig, SFTConfig
from megatron_rlhf.help import FIRST, help_text


def sft(*overrides: str) -> SFTConfig:
    return compose_config("sft", SFTConfig, ["run.dir=x", *overrides])[0]


def test_a_file_comes_after_the_recipe_and_before_keys(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "sft: {epochs: 7, batch_size: 5}\nparallel:\n  tensor: 2\nmodel: {num_layers: 3, hidden_size: 8, "
        "num_attention_heads: 2, vocab_size: 11}\n"
    )
    config = sft(f"config={mine}", "recipe=instructgpt_1_3b", "sft.batch_size=6")
    assert (config.sft.epochs, config.sft.batch_size, config.parallel.tensor) == (7, 6, 2)
    assert config.policy.optimizer.lr == sft("recipe=instructgpt_1_3b").policy.optimizer.lr
    assert config.model is not None
    assert config.model.num_layers == 3


def test_a_file_can_choose_a_shape_where_there_is_none(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {num_layers: 3, hidden_size: 8, num_attention_heads: 2, vocab_size: 11, positions: rope}\n")
    config = sft(f"config={mine}")
    assert config.model is not None
    assert (config.model.num_layers, config.model.positions.value) == (3, "rope")


def test_the_configuration_of_a_former_run_is_a_start(tmp_path: Path) -> None:
    overrides = ["recipe=instructgpt_1_3b", "run.dir=runs/a", "policy.init_from=sft", "data.prompts=p.jsonl"]
    before, resolved = compose_config("ppo", PPOConfig, [*overrides, "rewards.fit.function=a.py:f", "ppo.kl_coef=0.5"])
    (tmp_path / "config.yaml").write_text(resolved)
    again, _ = compose_config("ppo", PPOConfig, [f"config={tmp_path}/config.yaml"])
    assert again == before
    changed, _ = compose_config("ppo", PPOConfig, [f"config={tmp_path}/config.yaml", "run.dir=runs/b"])
    assert changed.run.dir == "runs/b"


def test_a_recipe_is_a_file_anywhere(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults:\n  - /recipe/instructgpt_1_3b/sft\n  - _self_\nsft: {epochs: 2}\n")
    config = sft(f"recipe={mine}")
    assert config.sft.epochs == 2
    assert config.policy.optimizer.lr == sft("recipe=instructgpt_1_3b").policy.optimizer.lr


def test_a_folder_of_groups_beside_ours(tmp_path: Path) -> None:
    for group in ("recipe/mine", "model"):
        (tmp_path / group).mkdir(parents=True)
    (tmp_path / "recipe" / "mine" / "sft.yaml").write_text("# @package _global_\nsft: {epochs: 3}\n")
    (tmp_path / "model" / "small.yaml").write_text(
        "defaults: [schema]\nnum_layers: 2\nhidden_size: 8\nnum_attention_heads: 2\nvocab_size: 11\n"
    )
    config = sft(f"--config-dir={tmp_path}", "recipe=mine", "model=small")
    assert config.sft.epochs == 3
    assert config.model is not None
    assert config.model.hidden_size == 8


def test_a_folder_of_groups_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a & b, #1 (c)=[d] 'e' {g} ü"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "small.yaml").write_text(
        "defaults: [schema]\nnum_layers: 2\nhidden_size: 8\nnum_attention_heads: 2\nvocab_size: 11\n"
    )
    (folder / "a = (b) & #c.yaml").write_text("sft: {epochs: 3}\n")
    config = sft(f"--config-dir={folder}", "model=small", f"config={folder / 'a = (b) & #c.yaml'}")
    assert config.model is not None
    assert (config.model.hidden_size, config.sft.epochs) == (8, 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sft: {epoch: 3}", "mine.yaml: there is no key sft.epoch; did you mean sft.epochs?"),
        ("lr: 3", "mine.yaml: there is no key lr; did you mean policy.optimizer.lr?"),
        ("sft: {epochs: 3\nx", "mine.yaml, line 2: not YAML"),
        ("- 3", "settings are keys and values"),
        ("sft: {epochs: many}", "mine.yaml: sft.epochs: "),
        ("sft: {epochs: null}", "mine.yaml: sft.epochs: "),
        ("sft: 3", "mine.yaml: sft: 3 has to be keys and values"),
        ("model: tiny", "mine.yaml: model: tiny has to be keys and values"),
        ("run.dir: y", "mine.yaml: run.dir is written as a key in a key: `run: {dir: ...}`"),
        ("sft: {epochs: 3}\nsft: {batch_size: 2}", "mine.yaml, line 2: not YAML (sft is there twice)"),
        ("sft: {epochs: 3}\n? [a, b]\n: 1", "mine.yaml, line 2: not YAML (a key is a word)"),
        pytest.param(f"sft: {{epochs: {'9' * 5000}}}", "mine.yaml: not YAML (Exceeds the limit", id="a long number"),
        pytest.param(f"sft: {'[' * 20_000}", "mine.yaml: not YAML (maximum recursion depth", id="many brackets"),
        ("ppo: {kl_coef: 0.1}", "there is no key ppo; it is a key of ppo: is this the file of another stage?"),
        ("recipe: first_try", "a recipe is chosen in the command, recipe=first_try"),
        ("defaults: 3", "mine.yaml: defaults is a list of files in conf/"),
        ("defaults: [/recipe/nope/sft]", "mine.yaml: Could not load 'recipe/nope/sft'"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        sft(f"config={tmp_path}/mine.yaml")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("config=/no/such.yaml", "config=/no/such.yaml: /no/such.yaml cannot be read"),
        ("recipe=/no/such.yaml", "cannot be read"),
        ("--config-dir=/no/such", "there is no folder /no/such"),
        ("--config-dir", "give --config-dir=DIR"),
        ("--config=mine.yaml", "settings in a file are config=FILE"),
        ("config=", "config=: names no file"),
        ("config", "config: a setting is key=value"),
        ("config=/", "config=/: / is a folder, and a file of settings is needed"),
        ("--learning-rate=1", "there is no such flag; did you mean policy.optimizer.lr=...?"),
        ("-m", "a loop of the shell or as a Slurm job array"),
        ("sft.epochs=1,2", "for x in 1 2; do ... sft.epochs=$x run.dir=runs/$x; done"),
        ("recipe=nope", "or a file of yours, recipe=path/to/file.yaml"),
    ],
)
def test_what_is_not_there_is_told_what_to_do_instead(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        sft(override)
    assert says in str(caught.value)


def test_the_folder_of_a_former_run_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("sft: {epochs: 3}\n")
    with pytest.raises(UserError) as caught:
        sft(f"config={tmp_path}")
    assert f"did you mean {tmp_path}/config.yaml?" in str(caught.value)
    (tmp_path / "mine").write_text("sft: {epochs: 3}\n")
    assert sft(f"recipe={tmp_path}/mine").sft.epochs == 3, "a recipe may have any name"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "policy.optimizer.lr"),
        ("learning_rate", "policy.optimizer.lr"),
        ("value.learning_rate", "value.optimizer.lr"),
        ("beta", "ppo.kl_coef"),
        ("kl", "ppo.kl_coef"),
        ("output_dir", "run.dir"),
        ("kl_coef", "ppo.kl_coef"),
        ("ppo.kl_koef", "ppo.kl_coef"),
        ("train.steps", "ppo.iterations"),
        ("max_steps", "ppo.iterations"),
    ],
)
def test_synonyms_are_understood(name: str, meant: str) -> None:
    assert nearest(name, keys(PPOConfig)) == meant


def test_a_word_may_mean_another_key_in_another_stage() -> None:
    assert nearest("train.steps", keys(SFTConfig)) == "sft.max_steps"


@pytest.mark.parametrize("stage", STAGES)
def test_help_begins_with_fifteen_keys_that_there_are(stage: str) -> None:
    known = keys(STAGES[stage].schema)
    assert len(FIRST[stage]) == 15
    assert set(FIRST[stage]) <= set(known)
    text = help_text(stage, STAGES[stage].schema)
    assert text.index("what a first run needs") < text.index("all keys")
    assert all(f"\n{path}" in text[text.index("all keys") :] for path in known)
    assert "instructgpt_6b" in text or stage == "evaluate"


def test_help_searches() -> None:
    found = help_text("ppo", PPOConfig, "ppo.kl")
    assert {line.split(" ")[0] for line in found.splitlines() if not line.startswith(" ")} == {
        "ppo.kl_coef",
        "ppo.kl_control",
        "ppo.kl_target",
        "ppo.kl_horizon",
    }
    assert "Weight of the per-token KL penalty" in found
    assert help_text("ppo", PPOConfig, "xyzzy") == "no key of ppo has xyzzy in its name or meaning"


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = "import sys; from megatron_rlhf.__main__ import main; main(['ppo', *sys.argv[1:]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, timeout=60, capture_output=True)
    wrong = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, "lr=1"], timeout=60, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "error: lr=1: there is no key lr; did you mean policy.optimizer.lr?"
    assert " torch\n" not in wrong.stderr


def test_help_of_every_other_command_does_not_wait_for_torch() -> None:
    code = (
        "import contextlib, sys\n"
        "from megatron_rlhf.__main__ import COMMANDS, main\n"
        "inner = [['prepare', 'clean'], ['convert', 'megatron-to-hf'], ['label', 'create']]\n"
        "for words in [*([name] for name in COMMANDS), *inner]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*words, '--help'])\n"
        "    assert 'torch' not in sys.modules, words"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_the_roles_that_convert_offers_are_those_it_can_write() -> None:
    from megatron_rlhf.commands import convert, converting
    from megatron_rlhf.conversion import key_maps
    from megatron_rlhf.conversion.convert import ROLES as KNOWN_ROLES

    assert tuple(KNOWN_ROLES) == convert.ROLES
    assert tuple(converting.DTYPES) == convert.DTYPES
    assert key_maps.names() == convert.ARCHITECTURES
