"""One rank logs; the others are silent unless they fail."""

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.logs import OUR_LOGGERS, setup_logging

ours = logging.getLogger("megatron_rlhf.somewhere")
library = logging.getLogger("some.library")


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root, python_warnings = logging.getLogger(), logging.getLogger("py.warnings")
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # pytest's own, which `force=True` would close
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        handler.close()
    root.handlers, python_warnings.filters = handlers, []
    root.setLevel(level)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_the_logging_rank_writes_to_stderr_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path / "run", rank=0, level="info")
    ours.info("step done")
    ours.debug("too much")
    library.info("chatter")
    library.warning("heed this")
    text = (tmp_path / "run/log.txt").read_text()
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) INFO step done\n\1 WARNING heed this\n", text)
    assert capsys.readouterr().err == text


def test_other_ranks_are_heard_only_when_lost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path, rank=3)
    ours.error("the same mistake on all ranks")
    library.error("the same failure on all ranks")
    ours.critical("no answer from rank 5")
    err = capsys.readouterr().err
    assert err.endswith(" CRITICAL [rank 3] no answer from rank 5\n")
    assert "same" not in err
    assert not (tmp_path / "log.txt").exists()


def test_another_rank_can_be_chosen(tmp_path: Path) -> None:
    setup_logging(tmp_path, rank=3, logging_rank=3)
    ours.info("here")
    assert "INFO here" in (tmp_path / "log.txt").read_text()


def test_warnings_come_into_the_log_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path, rank=0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        for _ in range(3):
            warnings.warn("deprecated kernel", UserWarning, stacklevel=1)
    assert capsys.readouterr().err.count("UserWarning: deprecated kernel") == 1


def test_a_second_call_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path / "a", rank=0)
    setup_logging(tmp_path / "b", rank=0, level="ERROR")
    ours.error("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "a/log.txt").read_text() == ""


def test_an_unknown_level_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'LOUD': expected one of DEBUG, INFO"):
        setup_logging(tmp_path, rank=0, level="LOUD")
