"""The PNG for a README."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.picture import COLOURS, write_picture


def test_each_run_has_its_colour_in_the_picture(ppo_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = {"PPO": ppo_run(25, "a"), "PPO-ptx": ppo_run(25, "b", seed=1)}
    path = write_picture(runs, ["reward/score_mean", "kl/mean"], tmp_path / "out/curves.png")
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    shown = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels}
    assert {COLOURS[0], COLOURS[1]} <= shown
    assert COLOURS[2] not in shown


def test_a_metric_that_no_run_has_is_named(ppo_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'rm/loss'.*kl/mean"):
        write_picture({"PPO": ppo_run(2)}, ["kl/mean", "rm/loss"], tmp_path / "curves.png")
