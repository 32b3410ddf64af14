"""`metrics.jsonl` and `samples.jsonl`: what is in them, and that a resumed run leaves the same files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring import files
from megatron_rlhf.monitoring.metrics import MetricsLogger, SamplesLogger, read_metrics


def test_a_line_is_one_step_with_the_keys_in_order(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, enabled=True, tensorboard=False)
    logger.log(1, {"reward/score_mean": 0.5, "kl/mean": torch.tensor(2.0), "tokens": np.int64(7)})
    # Not closed: what a killed run has logged is on disk.
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "reward/score_mean": 0.5, "kl/mean": 2.0, "tokens": 7}\n'
    )


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = MetricsLogger(tmp_path, enabled=True)
    with caplog.at_level(logging.WARNING):
        logger.log(3, {"policy/loss": float("nan"), "value/loss": torch.tensor(float("inf")), "kl/mean": 1.0})
    logger.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 3, "policy/loss": None, "value/loss": None, "kl/mean": 1.0}
    ]
    assert "step 3" in caplog.text
    assert "policy/loss = nan" in caplog.text
    assert "value/loss = inf" in caplog.text
    assert "kl/mean" not in caplog.text


def test_a_killed_and_resumed_run_leaves_the_same_file(tmp_path: Path) -> None:
    whole = MetricsLogger(tmp_path / "whole", enabled=True, tensorboard=False)
    killed = MetricsLogger(tmp_path / "killed", enabled=True, tensorboard=False)
    for step in range(1, 7):
        whole.log(step, {"loss": 1 / step})
    for step in range(1, 5):
        killed.log(step, {"loss": 1 / step})
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')

    resumed = MetricsLogger(tmp_path / "killed", enabled=True, tensorboard=False)
    resumed.truncate(3)
    for step in range(4, 7):
        resumed.log(step, {"loss": 1 / step})
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_truncation_drops_a_half_written_line_and_can_come_in_mid_run(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, enabled=True, tensorboard=False)
    logger.log(1, {"loss": 3.0})
    logger.log(2, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    logger.truncate(2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    logger.truncate(1)
    logger.log(2, {"loss": 1.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]


def test_a_crash_while_truncating_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsLogger(tmp_path, enabled=True, tensorboard=False)
    for step in range(1, 4):
        logger.log(step, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        logger.truncate(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_being_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("line", ["{torn", "[1, 2]", '{"loss": 1.0}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_samples_are_a_line_each_and_truncated_alike(tmp_path: Path) -> None:
    logger = SamplesLogger(tmp_path, enabled=True)
    rows: list[dict] = [
        {"prompt": "Wie heißt du?\n", "response": "gut", "score": 1.0, "kl": float("inf")},
        {"prompt": "b"},
    ]
    logger.log(1, rows)
    logger.log(2, rows)
    logger.truncate(1)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "prompt": "Wie heißt du?\n", "response": "gut", "score": 1.0, "kl": None},
        {"step": 1, "prompt": "b"},
    ]


def test_disabled_loggers_leave_nothing(tmp_path: Path) -> None:
    metrics, samples = MetricsLogger(tmp_path / "run", enabled=False), SamplesLogger(tmp_path / "run", enabled=False)
    metrics.log(1, {"loss": float("nan")})
    samples.log(1, [{"prompt": "a"}])
    for logger in (metrics, samples):
        logger.truncate(0)
        logger.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_resumed_run_once(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, enabled=True)
    for step in range(1, 5):
        logger.log(step, {"loss": float(step), "broken": float("nan")})
    logger.truncate(2)
    logger.log(3, {"loss": 30.0})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events.Tags()["scalars"] == ["loss"]
