"""The command line of the entry points: compose a typed configuration with Hydra, run, and turn mistakes into messages.

Only `examples/` and `tools/` import this module; below it, configurations are plain dataclasses.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from megatron_rlhf.compose import Config, compose_config, help_text
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.parallel import runtime
from megatron_rlhf.trainers.session import Session
from megatron_rlhf.trainers.setup import check_machine

Trainer = TypeVar("Trainer")
USER_ERROR = 2


def launch(
    stage: str,
    schema: type[Config],
    check: Callable[[Config], None],
    build: Callable[[Config, Session], Any],
    arguments: Sequence[str] | None = None,
) -> None:
    """Compose, check, build and run one stage; the exit code is 2 for a user's mistake, named in one message on one rank.

    Args:
        stage: name of `conf/<stage>.yaml`.
        check: raises UserError for contradictions in the configuration; runs before anything is built.
        build: makes a trainer with `run()`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(help_text(stage, schema))
        return
    with exit_code_on_failure():
        if "--cfg" in arguments:
            print(compose_config(stage, schema, [a for a in arguments if a != "--cfg"])[1], end="")
            return
        prepare(stage, schema, check, build, arguments).run()
    runtime.shutdown()


def prepare(
    stage: str,
    schema: type[Config],
    check: Callable[[Config], None],
    build: Callable[[Config, Session], Trainer],
    overrides: Sequence[str],
) -> Trainer:
    """Compose, check and build one stage inside this process; the caller runs it."""
    config, resolved = compose_config(stage, schema, overrides)
    check(config)
    check_machine(config, runtime.detect_launch().world_size)  # type: ignore[arg-type]
    runtime.initialize()
    return build(config, Session.open(config.run, resolved))  # type: ignore[attr-defined]


@contextlib.contextmanager
def exit_code_on_failure() -> Iterator[None]:
    """A user's mistake becomes one message on one rank and exit code 2; anything else its traceback and exit code 1."""
    rank = runtime.detect_launch().rank
    try:
        yield
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(USER_ERROR)
    except Exception:
        logging.getLogger(__name__).critical("rank %d failed:\n%s", rank, traceback.format_exc())
        _leave(1)


def _leave(code: int) -> None:
    """Exit without waiting for collectives that will never come: the launcher ends the other ranks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
