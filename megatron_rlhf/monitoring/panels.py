"""Which metrics share axes, with what title and unit. A metric not named here is drawn under "Other"."""

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    unit: str
    metrics: dict[str, str]
    """Metric name -> what to call its line; empty where the panel has a single line."""
    band: str | None = None
    """Metric that gives the half width of a band around the first line."""
    scale: float = 1.0
    """Stored values times `scale` are in `unit`."""
    logarithmic: bool = False
    from_zero: bool = False
    """The axis starts at zero: for quantities read as amounts rather than as changes."""


@dataclass(frozen=True)
class Group:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


GROUPS = (
    Group(
        "Reward",
        (
            Panel(
                "Reward score",
                "reward-model units",
                {"reward/score_mean": "the reward's own", "reward/total_mean": "after penalties"},
                band="reward/score_std",
            ),
            Panel("Score on held-out prompts", "the reward's own", {"evaluation/score_mean": ""}),
            Panel(
                "Scores not given in time",
                "responses of an iteration",
                {"reward/timeouts": "training", "evaluation/timeouts": "held-out"},
                from_zero=True,
            ),
            Panel("KL from the reference", "nats per sequence", {"kl/mean": "k1", "kl/k3_mean": "k3"}),
            Panel("KL coefficient", "reward per nat", {"kl/coef": ""}, from_zero=True),
        ),
    ),
    Group(
        "Behaviour",
        (
            Panel("Policy entropy", "nats per token", {"policy/entropy": ""}),
            Panel(
                "Response length",
                "tokens, mean",
                {"rollout/response_length_mean": "training", "evaluation/response_length_mean": "held-out"},
            ),
            Panel(
                "Responses that stop",
                "fraction of samples",
                {"rollout/stop_fraction": "training", "evaluation/stop_fraction": "held-out"},
            ),
        ),
    ),
    Group(
        "Alignment tax",
        (
            Panel(
                "Held-out pretraining loss",
                "nats per token",
                {"tax/pretraining_loss": "policy", "tax/reference_pretraining_loss": "reference"},
            ),
            Panel("Pretraining loss in training (ptx)", "nats per token", {"ptx/loss": ""}),
            Panel(
                "Gradients in the sum",
                "norm before clipping; the text's with gamma",
                {"policy/ppo_grad_norm": "PPO", "policy/ptx_grad_norm": "text"},
                logarithmic=True,
            ),
            Panel("Angle between the two gradients", "cosine", {"policy/grad_cosine": ""}),
            Panel("gamma", "weight of the text's loss", {"ptx/coef": ""}, from_zero=True),
        ),
    ),
    Group(
        "Losses",
        (
            Panel(
                "SFT loss",
                "nats per token",
                {
                    "sft/loss": "training",
                    "sft/demonstration_loss": "of demonstrations",
                    "sft/pretraining_loss": "of text",
                    "sft/validation_loss": "validation",
                },
            ),
            Panel("Text in the SFT loss", "fraction of its weight", {"sft/pretraining_share": ""}, from_zero=True),
            Panel("Ranking loss", "nats per comparison", {"rm/loss": "training", "rm/validation_loss": "validation"}),
            Panel(
                "Ranking accuracy",
                "fraction of comparisons",
                {"rm/accuracy": "training", "rm/validation_accuracy": "validation"},
            ),
            Panel("Policy loss", "clipped surrogate", {"policy/loss": ""}),
            Panel("Value loss", "half the squared error", {"value/loss": ""}),
            Panel("Explained variance", "of the returns; 1 is perfect", {"value/explained_variance": ""}),
        ),
    ),
    Group(
        "Optimisation",
        (
            Panel("Probability ratio", "new / old, mean", {"policy/ratio_mean": ""}),
            Panel("Clipped ratios", "fraction of tokens", {"policy/clip_fraction": ""}, from_zero=True),
            Panel(
                "Rollout against trainer",
                "largest gap of a token",
                {"policy/first_ratio_max_gap": "ratio", "rollout/logprob_gap_max": "log-probability"},
                logarithmic=True,
            ),
            Panel(
                "fp8 against bf16",
                "gap of a token's log-probability",
                {"fp8/logprob_gap_mean": "mean", "fp8/logprob_gap_max": "largest"},
                logarithmic=True,
            ),
            Panel("Policy computes in fp8", "1 = yes", {"fp8/active": ""}, from_zero=True),
            Panel(
                "Gradient norm",
                "before clipping",
                {
                    name: name.split("/")[0]
                    for name in ("policy/grad_norm", "value/grad_norm", "sft/grad_norm", "rm/grad_norm")
                },
                logarithmic=True,
            ),
            Panel(
                "Learning rate",
                "per step",
                {name: name.split("/")[0] for name in ("policy/lr", "value/lr", "sft/lr", "rm/lr")},
                from_zero=True,
            ),
        ),
    ),
    Group(
        "Cost",
        (
            Panel(
                "Scoring while others sample",
                "seconds of a step",
                {"time/scoring_while_sampling_s": "scored meanwhile", "time/waiting_s": "waited for responses"},
                from_zero=True,
            ),
            Panel("Throughput", "tokens per second", {"throughput/tokens_per_s": ""}, from_zero=True),
            Panel("Padding", "fraction of tokens read", {"throughput/padding_share": ""}, from_zero=True),
            Panel("Model FLOPs", "FLOP per second", {"throughput/model_flops_per_s": ""}, from_zero=True),
            Panel("MFU", "share of the peak", {"throughput/mfu": ""}, from_zero=True),
            Panel(
                "Peak memory",
                "GiB, by phase",
                {
                    "memory/peak_bytes": "so far",
                    **{f"memory/{phase}_peak_bytes": phase for phase in ("rollout", "scoring", "policy", "value")},
                },
                scale=2**-30,
                from_zero=True,
            ),
        ),
    ),
)

TIME_TOTAL = "time/step_s"
TIME_PHASES = "time/*_s"
BESIDE = ("time/waiting_s", "time/scoring_while_sampling_s")
"""Seconds that other ranks spend in phases of their own."""
COUNTERS = ("step", "samples", "tokens")

HEADLINES = (
    "reward/score_mean",
    "evaluation/score_mean",
    "kl/mean",
    "rm/validation_accuracy",
    "rm/accuracy",
    "sft/validation_loss",
    "sft/loss",
    "rm/loss",
    "tax/pretraining_loss",
    "policy/entropy",
    "rollout/response_length_mean",
    "rollout/stop_fraction",
    "value/explained_variance",
    "throughput/tokens_per_s",
    "memory/peak_bytes",
)
"""The principal metrics, most important first."""


def panel_of(metric: str) -> Panel:
    """The panel of a single metric; an unknown metric gets its own name as the title."""
    for group in GROUPS:
        for panel in group.panels:
            if metric in panel.metrics:
                label = panel.metrics[metric]
                return replace(panel, title=f"{panel.title}, {label}" if label else panel.title, metrics={metric: ""})
    return Panel(metric, "", {metric: ""})


def phases(names: Collection[str]) -> list[str]:
    """The metrics that hold the seconds of one phase of a step."""
    return [name for name in names if fnmatch.fnmatch(name, TIME_PHASES) and name not in (TIME_TOTAL, *BESIDE)]


def groups_for(names: Collection[str]) -> list[Group]:
    """The groups and panels that have something to show, with a last one for the metrics that no panel names."""
    known = {*COUNTERS, TIME_TOTAL, *phases(names)}
    groups = []
    for group in GROUPS:
        panels = []
        for panel in group.panels:
            known |= {*panel.metrics, panel.band or ""}
            present = {name: label for name, label in panel.metrics.items() if name in names}
            if present:
                panels.append(replace(panel, metrics=present))
        groups.append(Group(group.title, tuple(panels)))
    groups.append(Group("Other", tuple(panel_of(name) for name in names if name not in known)))
    return [group for group in groups if group.panels]
