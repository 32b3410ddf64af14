"""The command line of the entry points: compose a typed configuration with Hydra, run, turn mistakes into messages.

Only `examples/` and `tools/` import this module; below it, configurations are plain dataclasses.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf import sweep
from megatron_rlhf.compose import compose_config, share_out
from megatron_rlhf.config.checking import checks
from megatron_rlhf.config.checking import evaluation as evaluation_checks
from megatron_rlhf.config.errors import Interrupted, RunFailed, UserError
from megatron_rlhf.config.launch import detect_launch, tell_launcher
from megatron_rlhf.config.stages import ChatConfig, EvaluateConfig, PPOConfig, RewardModelConfig, SFTConfig
from megatron_rlhf.config.training import AUTO
from megatron_rlhf.help import help_text
from megatron_rlhf.own_files import CONFIG_DIR

# torch and Megatron-Core take seconds to import: not at the top, so that help and error messages do not wait for them.

USER_ERROR = 2
INTERRUPTED = 75
# Launchers kill all ranks when one exits with a code: the first rank, which has it, waits for the others to leave.
SECONDS_TO_LEAVE = 2.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """What an entry point runs. Settings start from `conf/<name>.yaml`; `trainers.setup.BUILD` makes the trainer."""

    schema: type
    check: Callable[[Any], None]
    """Raises UserError for contradictions in the configuration; runs before anything is built."""


STAGES = {
    "sft": Stage(SFTConfig, checks.check_sft),
    "reward_model": Stage(RewardModelConfig, checks.check_reward_model),
    "ppo": Stage(PPOConfig, checks.check_ppo),
    "evaluate": Stage(EvaluateConfig, evaluation_checks.check_evaluate),
}


def launch(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Run one stage as a command; the exit code is 2 for a user's mistake, named in one message on one rank."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    schema = STAGES[stage].schema
    with exit_code_on_failure():
        arguments = _joined(arguments)
        if _help(stage, schema, arguments):
            return
        if "--cfg" in arguments:
            print(compose_config(stage, schema, [a for a in arguments if a != "--cfg"])[1], end="")
        else:
            if set(arguments) & set(sweep.FLAGS):
                _run_each(stage, sweep.combinations(stage, schema, arguments))
            else:
                run_stage(stage, arguments)
            from megatron_rlhf.parallel import runtime

            runtime.shutdown()


def _run_each(stage: str, combinations: Sequence[sweep.Combination]) -> None:
    """The runs of a sweep, one after the other, on the same ranks."""
    for number, one in enumerate(combinations, start=1):
        if detect_launch().rank == 0:
            print(f"run {number} of {len(combinations)}: {one.name}", flush=True)
        run_stage(stage, one.overrides)


def launch_chat(arguments: Sequence[str] | None = None) -> None:
    """Talk with a model: a command as the stages' are, without a run."""
    from megatron_rlhf.config.checking.chat import check_chat

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with exit_code_on_failure():
        arguments = _joined(arguments)
        if _help("chat", ChatConfig, arguments):
            return
        config, _ = compose_config("chat", ChatConfig, arguments)
        check_chat(config)
        from megatron_rlhf.parallel import runtime
        from megatron_rlhf.trainers.setup.chat import build_chat
        from megatron_rlhf.trainers.setup.machine import check_machine

        check_machine(config, detect_launch().world_size)
        runtime.initialize()
        build_chat(config).run()
        runtime.shutdown()


def _help(stage: str, schema: type, arguments: Sequence[str]) -> bool:
    """Print the help, if it is asked for: of all keys, or of those with the word behind `--help`."""
    asked = [i for i, argument in enumerate(arguments) if argument in ("-h", "--help")]
    if asked:
        print(help_text(stage, schema, next(iter(arguments[asked[0] + 1 :]), None)))
    return bool(asked)


def _joined(arguments: list[str]) -> list[str]:
    """`--config-dir DIR` as one argument, as `--config-dir=DIR` is."""
    joined = list(arguments)
    while CONFIG_DIR in joined[:-1]:
        at = joined.index(CONFIG_DIR)
        joined[at : at + 2] = [f"{CONFIG_DIR}={joined[at + 1]}"]
    return joined


def run_stage(stage: str, overrides: Sequence[str]) -> Any:
    """Compose, check, build and run one stage inside this process; returns its trainer."""
    return run_config(stage, *compose_config(stage, STAGES[stage].schema, overrides))


def run_config(stage: str, config: Any, resolved: str, callbacks: Sequence[Any] = ()) -> Any:
    """Check, build and run a stage with a configuration; `resolved` is its YAML. Returns the trainer."""
    checks.check_run(config.run)
    STAGES[stage].check(config)
    from megatron_rlhf.parallel import runtime
    from megatron_rlhf.runs.session import Session
    from megatron_rlhf.runs.watching.watchdog import Watchdog
    from megatron_rlhf.trainers.setup.machine import check_machine
    from megatron_rlhf.trainers.setup.stages import BUILD

    check_machine(config, detect_launch().world_size)
    planned = _plan_checkpoints(config)
    runtime.initialize(config.run.rendezvous_timeout_s, config.watchdog.timeout_s)
    with Watchdog(config.watchdog.timeout_s, Path(config.run.dir) / "stacks") as watchdog:
        session = Session.open(stage, config, resolved)
        if planned:
            logging.getLogger(__name__).info("run.save_every=auto: a checkpoint every %d steps", config.run.save_every)
        trainer = BUILD[stage](config, session)
        if callbacks:
            from megatron_rlhf.callbacks import as_callbacks

            trainer.callbacks = as_callbacks(callbacks)
        roles = [trained.role.name for trained in getattr(trainer, "trained", ())]
        watchdog.follow(session.timer, lambda: getattr(trainer, "step", 0), roles)
        trainer.run()
    return trainer


def _plan_checkpoints(config: Any) -> bool:
    """`run.save_every=auto` becomes a number of steps, the same on every rank; returns whether it was given."""
    if config.run.save_every != AUTO or isinstance(config, EvaluateConfig):  # which saves nothing
        return False
    import torch

    from megatron_rlhf.planned import steps_between_saves

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    config.run.save_every = steps_between_saves(config, detect_launch().world_size, gpu)
    return True


def share_out_overrides(overrides: Sequence[str], stages: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of a script of several stages, for each stage those that it accepts; see `compose.share_out`."""
    return share_out({stage: STAGES[stage].schema for stage in stages}, overrides)


@contextlib.contextmanager
def exit_code_on_failure() -> Iterator[None]:
    """A user's mistake becomes one message on one rank and exit code 2; other failures a traceback and exit code 1.

    A run that was asked to stop, and has saved, exits with code 75 (EX_TEMPFAIL): slurm/common.sh queues it again.
    """
    rank = 0  # until it is known
    try:
        rank = detect_launch().rank
        yield
    except Interrupted as reason:
        logging.getLogger(__name__).info("%s", reason)
        if rank > 0:
            _leave(0)
        tell_launcher(str(reason))
        time.sleep(SECONDS_TO_LEAVE)
        _leave(INTERRUPTED)
    except UserError as error:
        if rank > 0:  # the first rank most likely has the same mistake: it reports it, and the launcher ends this one
            time.sleep(SECONDS_TO_LEAVE)
        if _is_first_to_report(error):
            _report(f"error{f' on rank {rank}' if rank else ''}: {error}")
        _leave(USER_ERROR)
    except RunFailed as error:
        if _is_first_to_report(error):
            _report(f"error: {error}")
        _leave(1)
    except Exception as error:
        logging.getLogger(__name__).critical("rank %d failed:\n%s", rank, traceback.format_exc())
        tell_launcher(f"{type(error).__name__} on rank {rank}, whose traceback is above: {error}")
        _leave(1)


def _report(message: str) -> None:
    """On the screen, and where the launcher's own report ends with it."""
    print(message, file=sys.stderr, flush=True)
    tell_launcher(message)


def _is_first_to_report(error: Exception) -> bool:
    if "torch" not in sys.modules:  # no world has been joined
        return True
    from megatron_rlhf.parallel import runtime

    return runtime.is_first_to_report(str(error))


def _leave(code: int) -> None:
    """Exit without waiting for collectives that will never complete: the launcher ends the other ranks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for helper in multiprocessing.active_children():  # of libraries: they would live on, and Slurm waits for them
        helper.kill()
    os._exit(code)
