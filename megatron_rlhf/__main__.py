"""One command for everything: `megatron-rlhf COMMAND ...`, or `python -m megatron_rlhf COMMAND ...`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from megatron_rlhf import __version__
from megatron_rlhf.config.keys import nearest

STAGES = {
    "sft": ("sft", "supervised fine-tuning on demonstrations"),
    "reward-model": ("reward_model", "a reward model from rankings"),
    "ppo": ("ppo", "PPO with pretraining gradients mixed in"),
    "evaluate": ("evaluate", "sample responses, score them, measure the loss on held-out text"),
}
CHAT = {"chat": "talk with a model in the terminal"}
COMMANDS = {
    "prepare": "data: clean, split, rank, tokenise, blend, check",
    "convert": "Hugging Face folders to checkpoints of ours and back, checked",
    "label": "rankings and demonstrations by people",
    "plan": "memory, time and cost before a GPU is requested",
    "doctor": "is this machine fit to train on",
    "report": "write report.html of a run again",
    "compare": "one page for evaluations of reward models and policies",
    "iterate": "sample, rank, train the reward model again, PPO again",
}
"""Each is the `main` of a module in `commands`."""
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name in STAGES:
        from megatron_rlhf.cli import launch

        launch(STAGES[name][0], arguments[1:])
        return 0
    if name in CHAT:
        from megatron_rlhf.cli import launch_chat

        launch_chat(arguments[1:])
        return 0
    if name in COMMANDS:
        sys.argv[0] = f"megatron-rlhf {name}"  # in usage lines
        return import_module(f"megatron_rlhf.commands.{name}").main(arguments[1:])
    near = nearest(name, [*STAGES, *CHAT, *COMMANDS])
    hint = f"did you mean {near}?" if near else "--help lists them"
    print(f"error: there is no command {name}; {hint}", file=sys.stderr)
    return USER_ERROR


def _help() -> str:
    whole = {name: about for name, (_, about) in STAGES.items()} | CHAT | COMMANDS
    lines = [f"  {name:<14}{about}" for name, about in whole.items()]
    return "\n".join(
        [
            "usage: megatron-rlhf COMMAND ...     (the same: python -m megatron_rlhf COMMAND ...)",
            "",
            *lines,
            "",
            "`megatron-rlhf COMMAND --help` tells more. On several GPUs: torchrun --nproc-per-node 8 -m megatron_rlhf ppo ...",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
