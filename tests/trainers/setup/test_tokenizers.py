"""One tokenizer for all models of a run: it travels with checkpoints, and another one is refused before a model is built."""

import json

import pytest
from ranks import run_ranks
from recipe import read_metrics, run_stage, write_lines

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_rlhf.models.roles import Role

BRIEF = ("ppo.iterations=1", "ppo.warmup_iterations=1")


@pytest.fixture
def other(recipe, tmp_path):
    """A tokenizer of the same size with other merges."""
    words = [" ".join(reversed(line.split())) for line in (recipe.root / "text.txt").read_text().splitlines()]
    own = load_tokenizer(recipe.root / "tokenizer")
    tokenizer = train_tokenizer([word[::-1] for word in words], own.vocab_size, tmp_path / "other")
    assert tokenizer.vocab_size == own.vocab_size
    return tmp_path / "other"


def test_a_checkpoint_brings_its_tokenizer(recipe, tmp_path):
    """A run that names it and one that does not are the same run."""
    carried = sharded.find_checkpoint(recipe.root / "sft", "test")
    own = load_tokenizer(recipe.root / "tokenizer")
    assert load_tokenizer(carried / "tokenizer").fingerprint == own.fingerprint
    assert sharded.read_meta(carried)["tokenizer"] == own.fingerprint
    assert "tokenizer/tokenizer.json" in (carried / "checksums.sha256").read_text()
    start = recipe.root / "sft", recipe.root / "reward_model"
    for name, tokenizer in (("named", recipe.root / "tokenizer"), ("carried", "null")):
        settings = recipe.ppo(str(tmp_path / name), *start, *BRIEF, f"data.tokenizer={tokenizer}")
        run_ranks(1, run_stage, "ppo", settings)
    assert read_metrics(tmp_path / "named") == read_metrics(tmp_path / "carried")


def stages(recipe, folder, tokenizer):
    own = [f"run.dir={folder}", f"data.tokenizer={tokenizer}"]
    sft, reward = recipe.root / "sft", recipe.root / "reward_model"
    prompts = [f"data.prompts={recipe.root / 'prompts.jsonl'}", "sampling.max_response_tokens=4"]
    return {
        "sft": [*recipe.sft("x", *own, f"policy.init_from={sft}")],
        "reward_model": recipe.reward_model("x", sft, *own),
        "ppo": recipe.ppo("x", sft, reward, *own),
        "evaluate": [*own, f"policy.init_from={sft}", *prompts],
    }


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "evaluate"])
def test_another_tokenizer_is_refused_before_models_are_built(world, recipe, tmp_path, other, stage, monkeypatch):
    monkeypatch.setattr(Role, "build", lambda *args, **kwargs: pytest.fail("a model was built"))
    overrides = stages(recipe, tmp_path / "run", other)[stage]
    with pytest.raises(UserError, match=r"init_from: .* trained with another tokenizer .*allow_other_tokenizer=true"):
        run_stage(stage, overrides)


def test_a_reward_model_of_another_tokenizer(recipe, tmp_path, other):
    """Policy and PPO agree; the reward model was trained on other ids: refused, or accepted with an explicit setting."""
    settings = ["data.allow_other_tokenizer=true", f"data.tokenizer={other}"]
    run_ranks(
        1, run_stage, "reward_model", recipe.reward_model(str(tmp_path / "judge"), recipe.root / "sft", *settings)
    )
    ppo = recipe.ppo(str(tmp_path / "ppo"), recipe.root / "sft", tmp_path / "judge", *BRIEF)
    with pytest.raises(AssertionError, match=r"reward.init_from: .*judge.* trained with another tokenizer"):
        run_ranks(1, run_stage, "ppo", ppo)
    allowed = [*ppo, "data.allow_other_tokenizer=true", f"run.dir={tmp_path / 'allowed'}"]
    run_ranks(1, run_stage, "ppo", allowed)
    assert len(read_metrics(tmp_path / "allowed")) == 1


def test_resumed_with_another_tokenizer(recipe, tmp_path, other):
    settings = recipe.sft(str(tmp_path / "run"), "sft.max_steps=2", "run.stop_at_step=1")
    run_ranks(1, run_stage, "sft", settings)
    again = [*settings, "run.resume=true", "run.stop_at_step=null", f"data.tokenizer={other}"]
    with pytest.raises(AssertionError, match=r"run.resume: .*step_1 was trained with another tokenizer"):
        run_ranks(1, run_stage, "sft", again)


def test_ends_travel_with_the_policy(recipe, tmp_path):
    """Ends that only a Hugging Face folder names reach the checkpoint, and from there the next stage."""
    folder = tmp_path / "tokenizer"
    load_tokenizer(recipe.root / "tokenizer").save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 40], "top_p": 0.9}))
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "say beta:"}])
    settings = [f"data.tokenizer={folder}", "sft.max_steps=1", 'data.stop=["<|pad|>","."]']
    run_ranks(1, run_stage, "sft", recipe.sft(str(tmp_path / "sft"), *settings))
    carried = sharded.find_checkpoint(tmp_path / "sft", "test") / "tokenizer"
    assert json.loads((carried / "generation_config.json").read_text()) == {"eos_token_id": [1, 40, 0], "top_p": 0.9}
    evaluate = [f"run.dir={tmp_path / 'evaluate'}", f"policy.init_from={tmp_path / 'sft'}", f"data.prompts={prompts}"]
    (stops,) = run_ranks(1, stop_ids_of_an_evaluation, [*evaluate, "sampling.max_response_tokens=4"])
    assert stops == (1, 40, 0)


def stop_ids_of_an_evaluation(overrides):
    from megatron_rlhf import cli

    return cli.run_stage("evaluate", overrides).tokenizer.stop_ids
