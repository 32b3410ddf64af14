"""PPO-ptx as a whole, on the toy recipe: schedules, controls, guards, and what counts as on-policy."""

import itertools
import json
import math

import pytest
import torch
from ranks import RankFailed, run_ranks
from recipe import read_metrics, run_stage, whole_weights
from toys import assemble, assert_close, weight_blocks


def run(recipe, name, *more, ranks=1, function=run_stage):
    """Results of all ranks, and the metrics."""
    arguments = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model", *more)
    return run_ranks(ranks, function, "ppo", arguments, timeout=400), read_metrics(recipe.root / name)


@pytest.fixture(scope="module")
def plain(recipe):
    return run(recipe, "ppo_plain")[1]


def test_the_first_update_after_a_rollout_is_on_policy(plain):
    for row in plain:
        assert row["policy/first_ratio_max_gap"] < 1e-5
        assert row["rollout/logprob_gap_max"] < 1e-5
        assert row["policy/ratio_mean"] == pytest.approx(1, abs=0.05)


def test_learning_rate_warms_up_over_iterations_from_a_tenth(plain):
    assert [row["policy/lr"] for row in plain] == pytest.approx([1e-5, 5.5e-5, 1e-4])


def test_the_first_policy_is_the_reference(plain):
    assert plain[0]["kl/mean"] == pytest.approx(0, abs=1e-5)
    assert any(abs(row["kl/mean"]) > 1e-5 for row in plain[1:])


def test_counts(plain):
    assert [row["step"] for row in plain] == [1, 2, 3]
    assert [row["samples"] for row in plain] == [10, 20, 30]
    assert [row["kl/coef"] for row in plain] == [0.02] * 3
    assert all(row["skipped_updates"] == 0 for row in plain)
    assert ["tax/pretraining_loss" in row for row in plain] == [False, True, False]
    # Two updates of 10 texts of 24 tokens each, and the episodes.
    assert plain[0]["tokens"] > 2 * 10 * 24 + 10


def test_the_same_seed_gives_the_same_run_and_another_seed_another(recipe, plain):
    assert run(recipe, "ppo_again")[1] == plain
    other = run(recipe, "ppo_other_seed", "run.seed=7")[1]
    assert other[0]["reward/score_mean"] != plain[0]["reward/score_mean"]


def test_adaptive_control_follows_the_measured_kl(recipe):
    settings = ("ppo.kl_control=adaptive", "ppo.kl_target=0.02", "ppo.kl_horizon=50", "policy.optimizer.lr=1e-3")
    _, rows = run(recipe, "ppo_adaptive", *settings)
    coefficient = 0.02
    for row in rows:
        assert row["kl/coef"] == pytest.approx(coefficient, rel=1e-6)
        coefficient *= 1 + max(-0.2, min(0.2, row["kl/mean"] / 0.02 - 1)) * 10 / 50
    assert len({row["kl/coef"] for row in rows}) == 3


def follow_average(stage, arguments):
    """The trainer's moving average, and the same computed here from the weights after each update."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.ppo import PPOTrainer

    history = []
    original = PPOTrainer._update_policy

    def watched(self, minibatch):
        if not history:
            history.append(assemble([weight_blocks(self.policy.role)], 301))
        update = original(self, minibatch)
        now = assemble([weight_blocks(self.policy.role)], 301)
        history.append({name: 0.9 * history[-1][name] + 0.1 * now[name] for name in now})
        return update

    PPOTrainer._update_policy = watched
    trainer = cli.run_stage(stage, arguments)
    with trainer.policy.average.as_weights() as averaged:
        return assemble([weight_blocks(averaged)], 301), history[-1], len(history) - 1


def test_moving_average_after_every_update(recipe):
    ((average, expected, updates),), _ = run(recipe, "ppo_average", "ppo.ema_decay=0.9", function=follow_average)
    assert updates == 6
    assert_close(average, expected, relative=1e-5)


def record_prompts(stage, arguments):
    """Ids of the prompts of every rollout."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers import ppo

    seen = []
    original = ppo.collect_rollout

    def watched(roles, prompts, prompt_ids, *args, **more):
        seen.append(list(prompt_ids))
        return original(roles, prompts, prompt_ids, *args, **more)

    ppo.collect_rollout = watched
    cli.run_stage(stage, arguments)
    return seen


def test_every_prompt_is_drawn_equally_often(recipe):
    """10 prompts in batches of 4: the rest of an epoch begins the next batch. A resume includes this rest."""
    sizes = ("ppo.batch_size=4", "ppo.minibatch_size=4", "ppo.iterations=5", "ppo.ptx_coef=0", "run.save_every=3")
    (straight,), _ = run(recipe, "ppo_prompts", *sizes, function=record_prompts)
    drawn = [prompt for rollout in straight for prompt in rollout]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    (first,), _ = run(recipe, "ppo_prompts_stopped", *sizes, "run.stop_at_step=3", function=record_prompts)
    (rest,), _ = run(recipe, "ppo_prompts_stopped", *sizes, "run.resume=true", function=record_prompts)
    assert first + rest == straight


def test_the_policys_schedules_begin_with_its_first_update(recipe):
    """Two iterations train only the critic; then the policy does what it does from the start without them."""
    settings = ("ppo.kl_control=adaptive", "ppo.kl_target=0.02", "ppo.kl_horizon=50")
    _, rows = run(recipe, "ppo_late", *settings, "ppo.critic_warmup_iterations=2", "ppo.iterations=5")
    assert [row["policy/lr"] for row in rows] == pytest.approx([0, 0, 1e-5, 5.5e-5, 1e-4])
    assert [row["kl/coef"] for row in rows[:3]] == [0.02] * 3
    for before, row in itertools.pairwise(rows[2:]):
        change = 1 + max(-0.2, min(0.2, before["kl/mean"] / 0.02 - 1)) * 10 / 50
        assert row["kl/coef"] == pytest.approx(before["kl/coef"] * change, rel=1e-6)
    assert rows[3]["kl/coef"] == pytest.approx(0.02 * 0.96)


def test_kl_is_reported_by_two_estimators(recipe, plain):
    """Both from the samples' log-ratios; k3 is never negative, and the two agree while the policy has hardly moved."""
    (seen,), rows = run(recipe, "ppo_kl", "policy.optimizer.lr=1e-3", function=record_log_ratios)
    for row, sequences in zip(rows, seen, strict=True):
        k1 = sum(sum(ratios) for ratios in sequences) / len(sequences)
        k3 = sum(math.exp(-x) - 1 + x for ratios in sequences for x in ratios) / len(sequences)
        assert row["kl/mean"] == pytest.approx(k1, rel=1e-4, abs=1e-5)
        assert row["kl/k3_mean"] == pytest.approx(k3, rel=1e-3, abs=1e-5)
    assert rows[-1]["kl/k3_mean"] > 1e-3
    assert all(row["kl/k3_mean"] >= 0 for row in plain)


def record_log_ratios(stage, arguments):
    """log pi - log pi_ref of every sampled token, one list per response."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.ppo import PPOTrainer

    seen = []
    original = PPOTrainer._collect

    def watched(self):
        rollout = original(self)
        ratios = (rollout.logprobs_bt - rollout.ref_logprobs_bt).double()
        seen.append([row[mask].tolist() for row, mask in zip(ratios, rollout.mask_bt, strict=True)])
        return rollout

    PPOTrainer._collect = watched
    cli.run_stage(stage, arguments)
    return seen


def test_critic_warmup_leaves_the_policy_alone(recipe):
    results, rows = run(recipe, "ppo_warmup", "ppo.critic_warmup_iterations=2", "ppo.iterations=2")
    before = whole_weights(run_ranks(1, frozen_policy, str(recipe.root / "sft")))["policy"]
    assert_close(whole_weights(results)["policy"], before, relative=0)
    for row in rows:
        assert "policy/loss" not in row
        assert row["policy/lr"] == 0
        assert row["value/grad_norm"] > 0


def frozen_policy(folder):
    from toys import make_role

    from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint

    source = StartingPoint.find(folder, "policy.init_from", POLICY)
    role = make_role(source.model)
    source.load_into(role)
    return {"policy": weight_blocks(role)}


def test_a_response_that_never_stops_is_penalised(recipe):
    """The score remains the reward model's own; the total, which the policy is trained on, includes the penalty."""
    _, rows = run(
        recipe, "ppo_missing_stop", "ppo.missing_stop_penalty=100", "ppo.iterations=1", "ppo.warmup_iterations=1"
    )
    _, without = run(
        recipe, "ppo_no_penalty", "ppo.missing_stop_penalty=0", "ppo.iterations=1", "ppo.warmup_iterations=1"
    )
    (row,), (free,) = rows, without
    unstopped = 1 - row["rollout/stop_fraction"]
    assert 0 < unstopped < 1
    assert row["reward/score_mean"] == free["reward/score_mean"] == free["reward/total_mean"]
    assert row["reward/score_std"] == free["reward/score_std"]
    assert row["reward/total_mean"] == pytest.approx(row["reward/score_mean"] - 100 * unstopped, rel=1e-5)
    assert row["value/loss"] > 10 * free["value/loss"], "returns have it"
    samples = [
        json.loads(line) for line in (recipe.root / "ppo_missing_stop" / "samples.jsonl").read_text().splitlines()
    ]
    penalties = {round(sample["score"] - sample["total"]) for sample in samples}
    assert penalties == {0, 100}


def test_minimum_lengths_stay_on_policy(recipe):
    """Stop tokens are not sampled early, yet keep their share of every log-probability."""
    _, rows = run(recipe, "ppo_minimum", "rollout.min_response_tokens=6", "ppo.max_logprob_gap=1e-4")
    assert all(row["rollout/response_length_mean"] >= 6 for row in rows)


def test_temperature_top_k_and_top_p_stay_on_policy(recipe):
    settings = ("rollout.temperature=0.7", "rollout.top_k=50", "rollout.top_p=0.9", "ppo.max_logprob_gap=1e-4")
    _, rows = run(recipe, "ppo_filtered", *settings, "ppo.iterations=2")
    assert all(row["policy/first_ratio_max_gap"] < 1e-4 for row in rows)


def test_a_gap_stops_the_run_in_fp32(recipe):
    with pytest.raises(RankFailed, match=r"RolloutMismatch(?s:.*)ppo\.max_logprob_gap=1e-12(?s:.*)a bug"):
        run(recipe, "ppo_gap", "ppo.max_logprob_gap=1e-12")


def test_bf16_has_room_for_rounding_and_a_threshold_all_the_same(recipe):
    _, rows = run(recipe, "ppo_bf16", "precision=bf16", "ppo.iterations=2")
    assert 1e-4 < rows[-1]["rollout/logprob_gap_max"] < 0.2
    with pytest.raises(RankFailed, match=r"RolloutMismatch(?s:.*)max_logprob_gap=0\.0001: with precision=bf16"):
        run(recipe, "ppo_bf16_strict", "precision=bf16", "ppo.iterations=2", "ppo.max_logprob_gap=1e-4")


def test_without_pretraining_text_there_is_no_ptx(recipe):
    arguments = [
        argument
        for argument in recipe.ppo("ppo_alone", recipe.root / "sft", recipe.root / "reward_model", "ppo.ptx_coef=0")
        if not argument.startswith("data.pretraining")
    ]
    run_ranks(1, run_stage, "ppo", arguments, timeout=400)
    for row in read_metrics(recipe.root / "ppo_alone"):
        assert "ptx/loss" not in row
        assert "tax/pretraining_loss" not in row
        assert row["policy/grad_norm"] > 0


def mean_entropy(stage, arguments):
    """Entropy and value statistics of the first minibatch, computed here from whole distributions."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.ppo import PPOTrainer

    seen = []
    original = PPOTrainer._update_policy

    def watched(self, minibatch):
        role = self.policy.role
        with role.layout, role.evaluating():
            tokens = minibatch.tokens_bs
            logits = role.modules[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        known = logits[..., ~role.unknown_v]  # the tokenizer has fewer tokens than the model has rows
        logprobs = (known / self.config.rollout.temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1).gather(1, minibatch.positions_bt)
        seen.append(float(entropy[minibatch.mask_bt].mean()))
        return original(self, minibatch)

    PPOTrainer._update_policy = watched
    cli.run_stage(stage, arguments)
    return seen


def test_entropy_is_of_the_sampled_distribution(recipe):
    (seen,), rows = run(
        recipe,
        "ppo_entropy",
        "rollout.temperature=0.8",
        "ppo.iterations=1",
        "ppo.warmup_iterations=1",
        function=mean_entropy,
    )
    assert rows[0]["policy/entropy"] == pytest.approx(sum(seen) / len(seen), rel=1e-5)
