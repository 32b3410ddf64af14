"""SFT, reward model, PPO-ptx and evaluation, each run by its command; what they learn, and what they write."""

import json
from pathlib import Path

import pytest
from commands import run_example

COMMON = {"step", "time/step_s", "throughput/tokens_per_s", "throughput/model_flops_per_s", "memory/peak_bytes"}
COMMON |= {"memory/step_peak_bytes", "throughput/padding_share"}
SFT = COMMON | {"sft/loss", "sft/grad_norm", "sft/lr", "samples", "tokens", "skipped_updates"}
SFT |= {"sft/demonstration_loss", "sft/pretraining_loss", "sft/pretraining_share"}
REWARD_MODEL = COMMON | {"rm/loss", "rm/accuracy", "rm/pairs", "rm/grad_norm", "rm/lr", "samples", "skipped_updates"}
# The list of the shared design, and what a run logs beyond it.
PPO = COMMON | set(
    """samples tokens reward/score_mean reward/score_std reward/total_mean kl/mean kl/k3_mean kl/coef policy/loss
    policy/ratio_mean policy/first_ratio_max_gap policy/clip_fraction policy/entropy policy/grad_norm policy/lr value/loss
    value/explained_variance value/grad_norm ptx/loss ptx/coef rollout/response_length_mean rollout/stop_fraction
    rollout/logprob_gap_max time/rollout_s time/scoring_s time/policy_s time/value_s""".split()
)
PPO |= {"time/slowest_rank", "time/slowest_rank_work", "time/rank_spread"}  # it runs on two
PPO_MORE = {"policy/approx_kl", "value/clip_fraction", "skipped_updates", "time/exchange_s"}
PPO_MORE |= {f"memory/{phase}_peak_bytes" for phase in ("rollout", "scoring", "exchange", "policy", "value")}
TAX = {"tax/pretraining_loss", "tax/reference_pretraining_loss", "time/tax_s", "memory/tax_peak_bytes"}
# In the line after a checkpoint.
SAVE = {"time/save_s", "memory/save_peak_bytes"}
# At the end of an epoch.
SAMPLES = {"time/samples_s", "memory/samples_peak_bytes"}
ALWAYS = {".lock", "checkpoints", "config.yaml", "log.txt", "metrics.jsonl", "report.html", "stage", "tensorboard"}
ALWAYS |= {"command", "samples.jsonl"}


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory) -> dict[str, Path]:
    """The four stages, one after the other, PPO and evaluation on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    sft, reward_model, ppo, evaluation = (folder / name for name in ("sft", "reward_model", "ppo", "evaluation"))
    stages = [
        ("train_sft", 1, recipe.sft(str(sft), "sft.epochs=10", "sft.dropout=0", "policy.optimizer.lr=4e-3")),
        ("train_reward_model", 1, recipe.reward_model(str(reward_model), sft, "reward_model.epochs=4")),
        (
            "train_ppo",
            2,
            recipe.ppo(str(ppo), sft, reward_model, "parallel.tensor=2", "run.save_every=2", "run.keep_last=1"),
        ),
        (
            "evaluate",
            2,
            [
                f"run.dir={evaluation}",
                *recipe.data,
                f"policy.init_from={ppo}",
                f"reward.init_from={reward_model}",
                f"data.prompts={recipe.root / 'prompts.jsonl'}",
                f"data.pretraining.source={recipe.root / 'text.txt'}",
                "data.pretraining.sequence_length=24",
                "parallel.pipeline=2",
                "evaluate.ema=true",
                "evaluate.samples=6",
                "sampling.max_response_tokens=12",
                "sampling.temperature=0",
            ],
        ),
    ]
    for script, ranks, arguments in stages:
        finished = run_example(script, *arguments, ranks=ranks, timeout=200)
        assert finished.codes == [0] * ranks, finished.output
    return {"sft": sft, "reward_model": reward_model, "ppo": ppo, "evaluation": evaluation}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_each_run_folder_holds_what_the_design_says_and_no_more(runs):
    assert names(runs["sft"]) == ALWAYS | {"cache"}
    assert names(runs["reward_model"]) == ALWAYS | {"cache"}
    assert names(runs["ppo"]) == ALWAYS | {"cache", "timeline.jsonl"}
    assert names(runs["evaluation"]) == ALWAYS - {"checkpoints"} | {"cache", "evaluation.jsonl"}
    assert names(runs["ppo"] / "checkpoints") == {"latest", "step_3"}
    assert names(runs["ppo"] / "checkpoints" / "step_3") == {
        "checksums.sha256",
        "meta.json",
        "policy",
        "policy_ema",
        "tokenizer",
        "value",
    }
    best = (runs["sft"] / "checkpoints" / "best").read_text()
    assert names(runs["sft"] / "checkpoints") == {"best", "latest", "step_30", "epoch_9", "epoch_10", best}
    assert {name: (folder / "stage").read_text() for name, folder in runs.items()} == {
        "sft": "sft\n",
        "reward_model": "reward_model\n",
        "ppo": "ppo\n",
        "evaluation": "evaluate\n",
    }


def test_metric_names(runs):
    for row in metrics(runs["sft"]):
        assert set(row) - {"sft/validation_loss"} - SAVE - SAMPLES == SFT
    for row in metrics(runs["reward_model"]):
        assert {name for name in row if "validation" not in name} - SAVE == REWARD_MODEL
    for row in metrics(runs["ppo"]):
        assert set(row) - PPO_MORE - TAX - SAVE == PPO
        assert (row["step"] == 2) == (set(row) >= TAX)
    (row,) = metrics(runs["evaluation"])
    assert {
        "reward/score_mean",
        "rollout/stop_fraction",
        "rollout/response_length_mean",
        "tax/pretraining_loss",
    } <= set(row)


def test_every_figure_is_finite_and_no_phase_takes_longer_than_its_step(runs):
    for folder in runs.values():
        for row in metrics(folder):
            assert all(value is not None for value in row.values())
    for row in metrics(runs["ppo"]):
        # Each is the slowest rank's time, so several phases may add up to more than the step.
        assert all(
            0 < row[f"time/{phase}_s"] <= row["time/step_s"] for phase in ("rollout", "scoring", "policy", "value")
        )
        assert row["throughput/tokens_per_s"] > 0


def test_it_learns(runs):
    sft, reward_model = metrics(runs["sft"]), metrics(runs["reward_model"])
    assert sft[-1]["sft/validation_loss"] < 0.5 * sft[0]["sft/loss"]
    assert reward_model[-1]["rm/validation_accuracy"] >= 0.75
    tax = metrics(runs["ppo"])[1]
    assert tax["tax/pretraining_loss"] < tax["tax/reference_pretraining_loss"], "the ptx mix teaches it the text"


def test_samples_and_evaluation_are_readable(runs):
    samples = [json.loads(line) for line in (runs["ppo"] / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "response", "score", "total", "kl"} <= set(samples[0])
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    assert all(sample["prompt"].startswith("say ") for sample in samples)
    rows = [json.loads(line) for line in (runs["evaluation"] / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert [row["prompt_id"] for row in rows] == list(range(6))
    (row,) = metrics(runs["evaluation"])
    assert row["reward/score_mean"] == pytest.approx(sum(r["score"] for r in rows) / 6, rel=1e-5)


def test_config_is_resolved_and_runs_again(runs):
    text = (runs["ppo"] / "config.yaml").read_text()
    assert "ptx_coef: 27.8" in text
    assert "${" not in text


def test_report_and_log(runs):
    for name in ("sft", "reward_model", "ppo"):
        assert len((runs[name] / "report.html").read_text()) > 5000
        assert "http://" not in (runs[name] / "report.html").read_text().replace("http://www.w3.org", "")
    assert "10 of 10 records kept; dropped: none" in (runs["ppo"] / "log.txt").read_text()
