"""Policies side by side: who wins, what the best of n samples buys, and whether a proxy reward still means what it should."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

from megatron_rlhf.evaluation.estimates import Estimate, estimate
from megatron_rlhf.evaluation.statistics import best_of_n_kl

Scores = Mapping[Any, Sequence[float]]
"""Prompt -> the scores of a policy's answers to it."""


@dataclass(frozen=True)
class WinRate:
    """How often one policy beats another, in percent; a tie counts half."""

    wins: Estimate
    ties: float
    """Share of ties, in percent."""


def win_rates(policies: Mapping[str, Scores]) -> dict[tuple[str, str], WinRate]:
    """(policy, other) -> how often the policy's answer has the higher score, over all pairs of answers to a prompt that both
    answered; nothing for policies that share no prompt."""
    found: dict[tuple[str, str], WinRate] = {}
    for one, other in combinations(policies, 2):
        outcomes = [
            (0.5 if x == y else float(x > y), prompt)
            for prompt, scores in policies[one].items()
            for x in scores
            for y in policies[other].get(prompt, ())
        ]
        _add(found, one, other, outcomes)
    return found


def win_rates_by_people(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], WinRate]:
    """The same from rankings by people: rows {"prompt", "ranks", "sources"}, as megatron-rlhf label exports them."""
    outcomes: dict[tuple[str, str], list[tuple[float, Hashable]]] = {}
    for row in rows:
        for i, j in combinations(range(len(row["ranks"])), 2):
            one, other = row["sources"][i], row["sources"][j]
            if one is None or other is None or one == other:
                continue
            better = (row["ranks"][j] > row["ranks"][i]) - (row["ranks"][j] < row["ranks"][i])
            if one > other:
                one, other, better = other, one, -better
            outcomes.setdefault((one, other), []).append((0.5 + 0.5 * better, row["prompt"]))
    found: dict[tuple[str, str], WinRate] = {}
    for (one, other), results in sorted(outcomes.items()):
        _add(found, one, other, results)
    return found


def _add(
    found: dict[tuple[str, str], WinRate], one: str, other: str, outcomes: Sequence[tuple[float, Hashable]]
) -> None:
    if not outcomes:
        return
    values, prompts = [value for value, _ in outcomes], [prompt for _, prompt in outcomes]
    ties = 100 * values.count(0.5) / len(values)
    found[one, other] = WinRate(estimate(values, prompts, scale=100), ties)
    found[other, one] = WinRate(estimate([1 - value for value in values], prompts, scale=100), ties)


@dataclass(frozen=True)
class BestOfN:
    """The mean of the best of n samples, at its KL from a single sample."""

    n: int
    kl: float
    mean: Estimate


def best_of_n(scores: Scores, values: Scores | None = None) -> list[BestOfN]:
    """For n = 1, 2, 4, ... up to the fewest samples of a prompt: the expected value of the sample with the highest score.

    Unbiased, over all ways to draw n of a prompt's samples (Nakano et al. 2021, appendix I). Among equal scores the first
    sample counts as lower.

    Args:
        scores: what the best is chosen by, the proxy.
        values: what is averaged, such as a gold reward; the scores themselves if not given.
    """
    values = scores if values is None else values
    most = min(map(len, scores.values()), default=0)
    found, n = [], 1
    while n <= most:
        means = [_expected_best(scores[prompt], values[prompt], n) for prompt in scores]
        found.append(BestOfN(n, best_of_n_kl(n), estimate(means, list(scores))))
        n *= 2
    return found


def _expected_best(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """The sample of rank i (from 0, the lowest) is the best of n in comb(i, n - 1) of the comb(N, n) draws."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    return sum(comb(i, n - 1) * values[sample] for i, sample in enumerate(order)) / comb(len(order), n)


def means(scores: Scores) -> Estimate:
    """Mean score of a policy's answers."""
    return estimate(
        [x for answers in scores.values() for x in answers],
        [prompt for prompt, answers in scores.items() for _ in answers],
    )
