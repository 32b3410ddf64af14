"""What a long step says of itself, from a real iteration in which every step counts as long."""

import re

from ranks import run_ranks
from recipe import run_stage


def run_with_all_steps_long(overrides: list[str]) -> None:
    from megatron_rlhf.monitoring import progress

    progress.SECONDS_BETWEEN_LINES = 0.0
    run_stage("ppo", overrides)


def test_rollout_scoring_and_updates_rise_to_their_ends(recipe):
    overrides = recipe.ppo(
        "inside", recipe.root / "sft", recipe.root / "reward_model", "ppo.iterations=1", "ppo.warmup_iterations=1"
    )
    run_ranks(1, run_with_all_steps_long, overrides)
    log = (recipe.root / "inside/log.txt").read_text()
    heard: dict[str, list[int]] = {}
    for phase, share in re.findall(r"PPO step 1: (\w+) (\d+)% \| ", log):
        heard.setdefault(phase, []).append(int(share))
    # Four models read ten episodes in microbatches of two; each of two updates has ten texts and five episodes.
    assert heard["rollout"][0] == 0 and heard["rollout"][-1] == 100
    assert heard["scoring"] == [round(100 * i / 20) for i in range(20)]
    assert heard["value"] == [round(100 * i / 6) for i in range(6)]
    for phase in ("rollout", "policy"):
        assert heard[phase] == sorted(heard[phase]), phase
    assert heard["policy"][0] == 0 and 80 <= heard["policy"][-1] < 100
