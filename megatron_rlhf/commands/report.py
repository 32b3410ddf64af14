"""Write report.html of a run again: `megatron-rlhf report runs/ppo`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlhf.monitoring.report import write_report

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print where it is; exit code 2 for a folder without metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="run.dir of a run, finished or not")
    folder = parser.parse_args(arguments).folder
    if not (folder / "metrics.jsonl").is_file():
        print(f"error: {folder} holds no metrics.jsonl: give the folder of a run (run.dir)", file=sys.stderr)
        return USER_ERROR
    print(write_report(folder))
    return 0
