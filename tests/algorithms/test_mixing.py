"""gamma steered by the norms of two gradients, against numbers worked by hand."""

import json
import random

import pytest

from megatron_rlhf.algorithms.mixing import BalancedTextWeight, FixedTextWeight


def test_a_fixed_weight_stays():
    weight = FixedTextWeight(27.8)
    weight.update(1.0, 1000.0)
    assert weight.coef == 27.8
    weight.load_state_dict(weight.state_dict())
    assert weight.coef == 27.8


def test_the_first_measurement_decides_at_once():
    weight = BalancedTextWeight(ratio=2.0)
    assert weight.coef == 1.0
    weight.update(3.0, 12.0)  # the text's gradient is 12 at coefficient 1; twice PPO's would be 6
    assert weight.coef == pytest.approx(0.5)
    weight.update(3.0, 6.0)  # on target: nothing changes
    assert weight.coef == pytest.approx(0.5)


def test_averages_by_hand():
    weight = BalancedTextWeight(ratio=0.5, decay=0.5)
    weight.update(4.0, 1.0)  # a = 2, b = 0.5
    assert weight.coef == pytest.approx(0.5 * 2 / 0.5)
    weight.update(1.0, 6.0)  # without its coefficient of 2 the text's is 3: a = 1.5, b = 1.75
    assert weight.coef == pytest.approx(0.5 * 1.5 / 1.75)


def test_the_ratio_holds_while_both_norms_drift_and_scatter():
    noise, weight, ratios = random.Random(0), BalancedTextWeight(ratio=3.0), []
    for step in range(400):
        ppo = 1.5 * noise.uniform(0.7, 1.3)
        text = weight.coef * (5.0 - step / 100) * noise.uniform(0.7, 1.3)  # text is learned: its gradient shrinks
        ratios.append(text / ppo)
        weight.update(ppo, text)
    assert sum(ratios[1:]) / len(ratios[1:]) == pytest.approx(3.0, rel=0.1)


def test_a_gradient_of_zero_says_nothing():
    weight = BalancedTextWeight(ratio=1.0)
    weight.update(2.0, 1.0)
    for norms in ((0.0, 1.0), (1.0, 0.0)):
        weight.update(*norms)
    assert weight.coef == pytest.approx(2.0)


def test_it_goes_on_to_the_last_bit_from_json():
    straight, resumed = BalancedTextWeight(0.7), BalancedTextWeight(0.7)
    for norms in ((1 / 3, 2.1), (0.4, 1 / 7)):
        straight.update(*norms)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for weight in (straight, resumed):
        weight.update(0.9, 1.1)
    assert resumed.coef == straight.coef
    assert resumed.state_dict() == straight.state_dict()
