"""SFT, reward model and PPO-ptx at many layouts against one rank: the largest relative differences, in fp32.

Runs tests/distributed/test_layout_matrix.py, in its long form too, and makes a table of what it measured, a row as each layout
ends. Takes about ten minutes on two cores; `-k` picks layouts by name.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.side_by_side import where

MATRIX = Path(__file__).parents[2] / "tests" / "distributed" / "test_layout_matrix.py"
COLUMNS = ("ranks", "trained at", "critic at", "PPO with", "figures", "weights")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which layouts."""
    parser.add_argument("-k", default="every_figure or ppo_is_the_same", help="as pytest's -k; default: all")


class _Table:
    """A pytest plugin that gathers what the tests record, and prints it as they end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.user_properties:
            row = {**dict(report.user_properties), "outcome": report.outcome}
            terminal = self._config.get_terminal_writer()
            if not self.rows:
                terminal.line(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
            terminal.line(f"| {' | '.join(str(row.get(column, '')) for column in COLUMNS)} |", flush=True)
            self.rows.append(row)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", "") if report.passed else None  # its row says so, and no dot is in front of it


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The table. `ratio` is the largest relative difference; if a layout fails, the tests' exit code."""
    table = _Table()
    wanted = ["-m", "slow or not slow", "-k", options.k]
    code = pytest.main([str(MATRIX), *wanted, "-q", "--no-header", "--show-capture=no"], plugins=[table])
    if code:
        sys.exit(code)
    largest = {column: max(float(row[column]) for row in table.rows if column in row) for column in COLUMNS[-2:]}
    return {"ratio": max(largest.values()), "largest": largest, "layouts": table.rows, **where()}
