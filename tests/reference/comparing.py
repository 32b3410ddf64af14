"""A run compared with the reference: every metric by name, what was read, every weight.

Tolerances, all in fp32, where one rounding is 6e-8 and both sides sum in another order:

- figures: 1e-5 of their size; weights: 1e-5 of their tensor's largest number. Adam's epsilon is 1e-3, well above the
  rounding of gradients that are zero by symmetry (a key's bias shifts all scores alike); with the default 1e-8 Adam
  would blow that rounding up to whole steps.
- differences of nearly equal numbers have an absolute tolerance, as their size says nothing about the terms': the policy's
  loss (advantages have mean 0), scores (sums of numbers of either sign around 1), the explained variance (1 less a
  quotient near 1), log-ratios (KL; a log-probability of about 5 nats is accurate to 5e-7), and the two gaps that are
  nothing but rounding.
- what was read and what was sampled: equal.
"""

from collections.abc import Mapping, Sequence

import pytest
from reference.models import Weights

RELATIVE = 1e-5
ABSOLUTE = {
    "policy/loss": 1e-6,
    "sft/validation_reward": 1e-6,
    "reward/score_mean": 1e-6,
    "reward/total_mean": 1e-6,
    "value/explained_variance": 1e-5,
    "kl/mean": 2e-5,  # a sum over up to 9 tokens
    "kl/k3_mean": 2e-6,
    "policy/approx_kl": 1e-7,
    "rollout/logprob_gap_max": 1e-5,
    "policy/first_ratio_max_gap": 1e-5,
}
UNREPEATABLE = ("time/", "memory/", "throughput/")
"""These depend on the clock and the machine. What the throughputs count is compared: `step_tokens` and `step_flops`."""


def assert_same_figures(rows: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        known = {name: x for name, x in row.items() if not name.startswith(UNREPEATABLE)}
        assert known.keys() == wanted.keys(), f"step {wanted['step']}: only one side has these metrics"
        for name, x in wanted.items():
            assert known[name] == pytest.approx(x, rel=RELATIVE, abs=ABSOLUTE.get(name, 1e-9)), (
                f"step {wanted['step']}: {name}"
            )


def assert_same_data(read: Sequence[Mapping[str, list]], expected: Sequence[Mapping[str, list]]) -> None:
    """The same texts in the same steps; their order within a step changes no sum."""
    assert len(read) == len(expected)
    for step, (texts, wanted) in enumerate(zip(read, expected, strict=True), start=1):
        for kind, sequences in wanted.items():
            assert sorted(texts.get(kind, [])) == sorted(sequences), f"step {step}: {kind}"
        assert set(texts) <= set(wanted), f"step {step}"


def assert_same_weights(weights: Mapping[str, Weights], expected: Mapping[str, Weights]) -> None:
    assert weights.keys() == expected.keys()
    for role, tensors in expected.items():
        assert weights[role].keys() == tensors.keys(), role
        for name, tensor in tensors.items():
            gap, largest = (weights[role][name] - tensor).abs().max(), tensor.abs().max()
            assert gap <= RELATIVE * largest, f"{role}, {name}: differs by {gap:.3g}, largest number {largest:.3g}"
