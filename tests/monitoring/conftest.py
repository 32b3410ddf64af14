"""Run folders as PPO, SFT and reward-model training write them, made of sines and seeded noise."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlhf.monitoring.metrics import MetricsLogger, SamplesLogger


def ppo_metrics(step: int, steps: int, noise: random.Random) -> dict[str, float]:
    done = 1 - math.exp(-4 * step / steps)
    rollout, policy, value = (seconds * noise.uniform(0.9, 1.1) for seconds in (30, 25, 8))
    return {
        "samples": 512 * step,
        "tokens": 512 * 180 * step,
        "reward/score_mean": -0.4 + 1.9 * done + noise.gauss(0, 0.12),
        "reward/total_mean": -0.7 + 2.2 * done + noise.gauss(0, 0.12),
        "reward/score_std": 1.0 - 0.4 * done + noise.gauss(0, 0.03),
        "kl/mean": 9 * done**1.5 + noise.gauss(0, 0.4) * done,
        "kl/k3_mean": 9 * done**1.5 + abs(noise.gauss(0, 0.2)) * done,
        "kl/coef": 0.02,
        "policy/loss": -0.02 + noise.gauss(0, 0.008),
        "policy/ratio_mean": 1 + noise.gauss(0, 2e-4),
        "policy/first_ratio_max_gap": 10 ** noise.gauss(-5.5, 0.3),
        "policy/clip_fraction": abs(0.05 * done + noise.gauss(0, 0.01)),
        "policy/entropy": 2.4 - 0.9 * done + noise.gauss(0, 0.05),
        "policy/grad_norm": 10 ** noise.gauss(0.2, 0.2),
        "policy/lr": 1e-6 * min(1.0, 0.1 + step / 10),
        "value/loss": 0.4 * math.exp(-6 * step / steps) + 0.05 + noise.gauss(0, 0.01),
        "value/explained_variance": 0.8 * done + noise.gauss(0, 0.04),
        "value/grad_norm": 10 ** noise.gauss(0.8, 0.2),
        "value/lr": 9e-6 * min(1.0, 0.1 + step / 10),
        "ptx/loss": 2.61 + 0.03 * done + noise.gauss(0, 0.02),
        "rollout/response_length_mean": 120 + 60 * done + noise.gauss(0, 5),
        "rollout/stop_fraction": min(1.0, 0.7 + 0.28 * done + noise.gauss(0, 0.02)),
        "rollout/logprob_gap_max": 10 ** noise.gauss(-5.2, 0.3),
        "time/rollout_s": rollout,
        "time/scoring_s": 4.0,
        "time/policy_s": policy,
        "time/value_s": value,
        "time/step_s": rollout + policy + value + 7,
        "throughput/tokens_per_s": 92160 / (rollout + policy + value + 7),
        "throughput/padding_share": noise.uniform(0.01, 0.09),
        "throughput/model_flops_per_s": 3.1e14 * noise.uniform(0.95, 1.05),
        "memory/peak_bytes": 61.5 * 2**30,
    } | ({"tax/pretraining_loss": 2.6 + 0.04 * done + noise.gauss(0, 0.004)} if step % 10 == 0 else {})


@pytest.fixture
def ppo_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a PPO run folder: metrics, samples and config."""

    def make(steps: int = 30, name: str = "ppo_13b", seed: int = 0) -> Path:
        run_dir, noise = tmp_path / name, random.Random(seed)
        metrics, samples = MetricsLogger(run_dir, enabled=True, tensorboard=False), SamplesLogger(run_dir, enabled=True)
        for step in range(1, steps + 1):
            metrics.log(step, ppo_metrics(step, steps, noise))
            if step == 1 or step % 10 == 0:
                row = {
                    "prompt": f"Question at {step}?",
                    "response": f"Answer {step}.",
                    "score": step / steps,
                    "kl": 1.5,
                }
                samples.log(step, [row, row])
        (run_dir / "config.yaml").write_text("policy:\n  learning_rate: 1.0e-06\n")
        return run_dir

    return make
