"""Write the page of a run, or of several side by side, at any time: while they run, or after they were killed.

megatron-rlhf report runs/ppo                          # runs/ppo/report.html
megatron-rlhf report runs/ppo --watch 30               # again every 30 seconds; the open page follows
megatron-rlhf report runs/ppo runs/rloo runs/grpo      # comparison.html: a table, and curves on the same axes
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rlhf.commands.outputs import require_page
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.report import write_last_figures, write_report

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print where it is; exit code 2 for a folder without metrics."""
    options = _parser().parse_args(arguments)
    try:
        for folder in options.folders:
            if not (folder / "metrics.jsonl").is_file():
                raise UserError(f"{folder} holds no metrics.jsonl: give the folder of a run (run.dir)")
        if options.output is not None:
            require_page(options.output)
        print(_write(options), flush=True)
        while options.watch:
            time.sleep(options.watch)
            _write(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        pass  # the way to end --watch
    return 0


def _write(options: argparse.Namespace) -> Path:
    if len(options.folders) == 1:
        return write_report(options.folders[0], options.output, options.watch)
    return write_last_figures(options.folders, options.output or Path("comparison.html"), options.watch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run.dir of a run, finished or not")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page; default RUN/report.html, of several comparison.html"
    )
    parser.add_argument(
        "--watch", type=_seconds, metavar="SECONDS", help="write it again at this interval, until interrupted"
    )
    return parser


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of seconds, at least 1")
    return int(text)
