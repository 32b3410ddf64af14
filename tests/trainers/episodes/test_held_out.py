"""Held-out prompts during PPO: their scores by hand, the best checkpoint, early ends, and all of it resumed."""

import json

import pytest
from ranks import run_ranks
from recipe import file_checksums, read_metrics, run_stage, write_lines

from megatron_rlhf.config.stages.held_out import HeldOutConfig
from megatron_rlhf.trainers.episodes.held_out import Progress

FUNCTION = "def score(prompts, responses, records):\n    return [len(response) / 7 for response in responses]\n"


@pytest.fixture(scope="module")
def arguments(recipe):
    (recipe.root / "by_length.py").write_text(FUNCTION)
    write_lines(
        recipe.root / "held_out_prompts.jsonl", [{"prompt": f"tell {word}:"} for word in ("beta", "eta", "iota")]
    )

    def make(name, *more):
        base = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model")
        base = [argument for argument in base if not argument.startswith("reward.init_from")]
        return [
            *base,
            f"reward.function={recipe.root / 'by_length.py'}:score",
            "ppo.advantages=rloo",
            "ppo.samples_per_prompt=2",
            "ppo.ptx_coef=0",
            "policy.optimizer.lr=3e-3",
            "evaluation.every=2",
            f"evaluation.prompts={recipe.root / 'held_out_prompts.jsonl'}",
            *more,
        ]

    return make


def test_a_score_that_is_no_number_is_never_the_best():
    progress, patient = Progress(), HeldOutConfig(every=1, patience=2)
    for score, best in ((float("nan"), None), (1.0, 1.0), (float("inf"), 1.0), (float("nan"), 1.0)):
        progress.add(score)
        assert progress.best == best
    assert "was better than 1 " in progress.reason_to_stop(patient)
    assert "had a finite score" in Progress(since_best=2).reason_to_stop(patient)


def rows(recipe, name):
    lines = [json.loads(line) for line in (recipe.root / name / "samples.jsonl").read_text().splitlines()]
    return [row for row in lines if row.get("held_out")]


@pytest.fixture(scope="module")
def straight(arguments, recipe):
    run_ranks(
        1,
        run_stage,
        "ppo",
        arguments("held_out", "ppo.iterations=5", "run.save_every=3", "run.keep_last=0"),
        timeout=300,
    )
    return read_metrics(recipe.root / "held_out")


def test_every_two_iterations_and_at_the_end_the_same_prompts_are_answered(straight, recipe):
    assert [row["step"] for row in straight if "evaluation/score_mean" in row] == [2, 4, 5]
    for row in straight:
        if "evaluation/score_mean" in row:
            answered = [sample for sample in rows(recipe, "held_out") if sample["step"] == row["step"]]
            assert [sample["prompt"] for sample in answered] == ["tell beta:", "tell eta:", "tell iota:"]
            scores = [len(sample["response"]) / 7 for sample in answered]
            assert [sample["score"] for sample in answered] == pytest.approx(scores)
            assert row["evaluation/score_mean"] == pytest.approx(sum(scores) / 3)


def test_best_is_the_first_with_the_highest_score(straight, recipe):
    scores = {row["step"]: row["evaluation/score_mean"] for row in straight if "evaluation/score_mean" in row}
    best = max(scores, key=lambda step: scores[step])
    root = recipe.root / "held_out" / "checkpoints"
    assert (root / "best").read_text() == f"evaluation_{best}"
    assert {path.name for path in root.glob("evaluation_*")} == {"evaluation_2", "evaluation_4", "evaluation_5"}
    assert not (root / "evaluation_4" / "value").exists()


def test_greedy_answers_do_not_depend_on_the_seed_of_sampling(straight, arguments, recipe):
    """Both evaluate the weights that training has not changed: a learning rate of (nearly) nothing."""
    for seed in (1, 2):
        more = ["ppo.iterations=1", "policy.optimizer.lr=1e-12", f"run.seed={seed}", "ppo.warmup_iterations=1"]
        run_ranks(1, run_stage, "ppo", arguments(f"held_out_seed_{seed}", *more), timeout=300)
    assert rows(recipe, "held_out_seed_1") == rows(recipe, "held_out_seed_2")


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_bit_for_bit(stop, straight, arguments, recipe):
    """Stopped at an evaluation, and between two."""
    name, sizes = f"held_out_cut_{stop}", ("ppo.iterations=5", f"run.save_every={stop}", "run.keep_last=0")
    run_ranks(1, run_stage, "ppo", arguments(name, *sizes, f"run.stop_at_step={stop}"), timeout=300)
    run_ranks(1, run_stage, "ppo", arguments(name, *sizes, "run.resume=true"), timeout=300)
    assert read_metrics(recipe.root / name) == straight
    assert rows(recipe, name) == rows(recipe, "held_out")
    ours, theirs = (recipe.root / which / "checkpoints" for which in (name, "held_out"))
    assert (ours / "best").read_text() == (theirs / "best").read_text()
    assert file_checksums(ours / "evaluation_5") == file_checksums(theirs / "evaluation_5")


def test_other_ranks_answer_alike(straight, arguments, recipe):
    layout = ["parallel.tensor=2", "placement=disaggregated", "placement.critic_ranks=1", "rollout.parallel.tensor=1"]
    model = [f"reward.init_from={recipe.root / 'reward_model'}", "ppo.iterations=2", "evaluation.every=1"]
    model.append("policy.optimizer.lr=0.1")
    for name, ranks, more in (("held_out_one", 1, []), ("held_out_three", 3, layout)):
        run_ranks(ranks, run_stage, "ppo", arguments(name, *model, *more), timeout=300)
    one, three = (read_metrics(recipe.root / name)[-1] for name in ("held_out_one", "held_out_three"))
    for name in ("score", "model", "function", "response_length"):
        assert three[f"evaluation/{name}_mean"] == pytest.approx(one[f"evaluation/{name}_mean"], rel=1e-5), name
    first, second = (
        [row["response"] for row in rows(recipe, "held_out_one") if row["step"] == step] for step in (1, 2)
    )
    assert first != second, "answers show which update they are from"
    assert [row["response"] for row in rows(recipe, "held_out_three")] == first + second


def test_patience_ends_the_run_and_a_resume_does_not_go_on_unless_it_is_longer(arguments, recipe):
    """Without learning no evaluation is better than the first."""
    still = ["policy.optimizer.lr=1e-12", "evaluation.every=1", "ppo.iterations=9", "run.save_every=0"]
    run_ranks(1, run_stage, "ppo", arguments("patience", *still, "evaluation.patience=2"), timeout=300)
    assert [row["step"] for row in read_metrics(recipe.root / "patience")] == [1, 2, 3]
    assert (recipe.root / "patience" / "checkpoints" / "latest").read_text() == "step_3"
    assert "ended at step 3 of 9: no evaluation of the last 2" in (recipe.root / "patience" / "log.txt").read_text()
    run_ranks(
        1, run_stage, "ppo", arguments("patience", *still, "evaluation.patience=2", "run.resume=true"), timeout=300
    )
    assert len(read_metrics(recipe.root / "patience")) == 3
    run_ranks(
        1, run_stage, "ppo", arguments("patience", *still, "evaluation.patience=3", "run.resume=true"), timeout=300
    )
    assert len(read_metrics(recipe.root / "patience")) == 4


def test_too_much_kl_ends_the_run(arguments, recipe):
    quick = ["policy.optimizer.lr=1e-2", "evaluation.max_kl=0.05", "ppo.iterations=8", "ppo.warmup_iterations=0"]
    run_ranks(1, run_stage, "ppo", arguments("too_far", *quick), timeout=300)
    kl = [row["kl/mean"] for row in read_metrics(recipe.root / "too_far")]
    assert len(kl) < 8
    assert kl[-1] > 0.05
    assert max(kl[:-1]) <= 0.05


def test_an_equal_score_is_no_better():
    """As where a policy has stopped learning: patience would never end."""
    progress, config = Progress(), HeldOutConfig(every=1, patience=2)
    for score, since in ((0.5, 0), (0.5, 1), (0.4, 2), (0.6, 0), (0.6, 1)):
        assert progress.add(score) == score
        assert progress.since_best == since
        assert (progress.reason_to_stop(config) is not None) == (since == 2)
    assert progress.best == 0.6
