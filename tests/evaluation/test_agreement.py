"""Agreement by hand."""

import math

import pytest

from megatron_rlhf.evaluation.agreement import Judgement, agreement


def test_percent_error_and_alpha_over_prompts():
    found = agreement(
        [
            Judgement(1, "ann", [0, 1, 2]),
            Judgement(1, "bob", [0, 2, 1]),  # 2 of 3 pairs
            Judgement(2, "ann", [0, 1]),
            Judgement(2, "bob", [0, 1]),  # 1 of 1
            Judgement(3, "ann", [0, 1]),  # nobody else
        ]
    )
    assert (found.percent, found.prompts, found.comparisons) == (75.0, 2, 4)
    # A ratio's error: residuals 2 - 0.75 * 3 = -0.25 and 1 - 0.75 = 0.25, sqrt(2 * (0.0625 * 2) / 1) / 4.
    assert found.error == pytest.approx(12.5)
    assert found.by_labeler == {"ann": (75.0, 4), "bob": (75.0, 4)}
    assert math.isnan(found.rating_alpha)
    assert 0 < found.alpha < 1


def test_perfect_agreement_and_none():
    same = agreement([Judgement(1, name, [0, 1, 1], [7, 3, 3]) for name in ("ann", "bob", "cy")])
    assert (same.percent, same.alpha, same.rating_alpha, same.comparisons) == (100.0, 1.0, 1.0, 9)
    opposite = agreement([Judgement(1, "ann", [0, 1]), Judgement(1, "bob", [1, 0])])
    assert opposite.percent == 0 and opposite.alpha < 0


def test_labelers_who_share_no_prompt():
    apart = agreement([Judgement(1, "ann", [0, 1]), Judgement(2, "bob", [0, 1])])
    assert math.isnan(apart.percent) and math.isnan(apart.alpha) and apart.prompts == 0
