"""Logging for a job of a thousand processes: one rank logs."""

import logging
from pathlib import Path

from megatron_rlhf.config.errors import UserError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
OUR_LOGGERS = ("megatron_rlhf", "__main__")


def setup_logging(run_dir: Path, rank: int, level: str = "INFO", logging_rank: int = 0) -> None:
    """Send the log of `logging_rank` to stderr and to `run_dir/log.txt`, and silence the other ranks.

    A CRITICAL record is the exception: it means that its rank is lost, so it is shown on any rank, with the rank's
    number. `level` applies to our own code; libraries are logged from WARNING on, and Python's warnings go to the log,
    each of them once. Calling it again replaces what an earlier call, or Hydra, has set up.
    """
    if level.upper() not in LEVELS:
        raise UserError(f"log level {level!r}: expected one of {', '.join(LEVELS)}")
    speaks = rank == logging_rank
    who = "" if speaks else f"[rank {rank}] "
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if speaks:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(run_dir) / "log.txt", encoding="utf-8"))
    logging.basicConfig(
        level=logging.WARNING if speaks else logging.CRITICAL,
        format=f"%(asctime)s %(levelname)s {who}%(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level.upper() if speaks else logging.CRITICAL)
    logging.captureWarnings(True)
    # Libraries reset Python's own once-only registry with `simplefilter("always")`; this filter cannot be reset.
    logging.getLogger("py.warnings").filters = [_OnlyOnce()]


class _OnlyOnce(logging.Filter):
    """Passes each text only once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage().strip()
        is_new = text not in self._seen
        self._seen.add(text)
        record.msg, record.args = text, ()
        return is_new
