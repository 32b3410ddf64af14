"""`-m`: a run for each combination of values, one after the other, in a folder of its own."""

import json
import os

import pytest
import yaml
from commands import run_example

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.sweep import combinations

GIVEN = ["run.dir=runs/x", "data.prompts=a,b.jsonl", "policy.init_from=sft", "data.tokenizer=t"]


def test_values_are_combined_and_texts_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = combinations(
        "ppo", PPOConfig, ["-m", *GIVEN, "ppo.kl_coef=0.02,0.05", "recipe=instructgpt,instructgpt_1_3b"]
    )
    assert [run.name for run in runs] == [
        f"ppo.kl_coef={kl},recipe={name}" for kl in ("0.02", "0.05") for name in ("instructgpt", "instructgpt_1_3b")
    ]
    configs = [compose_config("ppo", PPOConfig, run.overrides)[0] for run in runs]
    assert [config.ppo.kl_coef for config in configs] == [0.02, 0.02, 0.05, 0.05]
    assert [config.run.dir for config in configs] == [f"runs/x/{run.name}" for run in runs]
    assert {config.data.prompts for config in configs} == {"a,b.jsonl"}
    (one, other) = combinations("ppo", PPOConfig, [*GIVEN, "ppo.advantages=gae,rloo", "-m"])
    assert (one.name, other.name) == ("ppo.advantages=gae", "ppo.advantages=rloo")
    assert (
        len(combinations("ppo", PPOConfig, [*GIVEN, "policy.optimizer.betas=[0.9,0.95]", "run.seed=range(3)", "-m"]))
        == 3
    )


def test_a_resumed_sweep_begins_what_it_had_not_begun(tmp_path):
    (tmp_path / "run.seed=1").mkdir()
    given = [*GIVEN, f"run.dir={tmp_path}", "run.resume=true", "run.seed=1,2", "-m"]
    resumed = [
        compose_config("ppo", PPOConfig, run.overrides)[0].run.resume for run in combinations("ppo", PPOConfig, given)
    ]
    assert resumed == [True, False]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "-m: no key has several values"),
        (["ppo.kl_koef=1,2"], "did you mean ppo.kl_coef?"),
        (["ppo.kl_coef=0.1,much"], "ppo.kl_coef=much"),
        (["ppo.kl_coef=0.1,-1"], "ppo.kl_coef=-1.0 must be at least 0"),
        (["recipe=instructgpt,nope"], "recipe=nope: there is no"),
    ],
)
def test_a_mistake_in_any_run_is_named_before_the_first(more, says):
    with pytest.raises(UserError) as caught:
        combinations("ppo", PPOConfig, [*GIVEN, *more, "-m"])
    assert says in str(caught.value)


def test_an_array_of_jobs_takes_its_number_from_the_environment(monkeypatch):
    """As docs/cluster.md writes it; what Slurm does with it: tests/slurm."""
    monkeypatch.setitem(os.environ, "SLURM_ARRAY_TASK_ID", "3")
    own = ["run.dir=/shared/runs/seed_${oc.env:SLURM_ARRAY_TASK_ID}", "run.seed=${oc.env:SLURM_ARRAY_TASK_ID}"]
    config, resolved = compose_config("ppo", PPOConfig, [*GIVEN, *own])
    assert (config.run.dir, config.run.seed) == ("/shared/runs/seed_3", 3)
    assert yaml.safe_load(resolved)["run"]["seed"] == 3


def test_each_run_leaves_what_a_run_leaves(recipe):
    arguments = recipe.sft("sweep", "sft.max_steps=1", "policy.optimizer.lr=0.002,0.001", "-m")
    finished = run_example("train_sft", *(a for a in arguments if a != "policy.optimizer.lr=1e-3"), ranks=2)
    assert finished.codes == [0, 0], finished.output
    assert "run 2 of 2: policy.optimizer.lr=0.001" in finished.output
    for value in ("0.002", "0.001"):
        run = recipe.root / "sweep" / f"policy.optimizer.lr={value}"
        (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert row["step"] == 1
        assert yaml.safe_load((run / "config.yaml").read_text())["policy"]["optimizer"]["lr"] == float(value)
        assert (run / "report.html").is_file()
