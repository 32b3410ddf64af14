"""Convert models between Hugging Face folders and checkpoints of megatron_rlhf.

    megatron-rlhf convert hf-to-megatron --hf pythia-160m --output checkpoints/pythia
    megatron-rlhf convert hf-to-megatron --nemo gpt_2b.nemo --output checkpoints/gpt_2b
    megatron-rlhf convert megatron-to-hf --checkpoint runs/ppo --output assistant --dtype bf16
    megatron-rlhf convert megatron-to-hf --checkpoint runs/rm --role reward --output judge
    megatron-rlhf convert megatron-to-hf --checkpoint runs/lora --adapter only --output adapter     # for peft
    torchrun --nproc-per-node 8 -m megatron_rlhf convert megatron-to-hf ...     # shares the work among 8 processes

Training takes a Hugging Face folder as it is (policy.init_from=DIR): import one only to check it or to load it faster.

Nothing is trusted: when a conversion is written, every tensor is compared bit by bit, and both models run on the same
tokens in fp32, padded on the right as in training and on the left as in sampling. A result that differs is deleted.
Tensors are streamed, so memory is needed for one layer and one output file, not for the model: the check takes a layer
in fp32 and its activations over --check-length tokens, and an embedding in pieces. The peak memory is printed.

A policy becomes ...ForCausalLM, a reward model ...ForSequenceClassification with one label, a value model
...ForTokenClassification with one label.

Exit code: 0 converted and checked; 1 the check failed; 2 a mistake in the input, which the message names. (torchrun
turns any failure into 1.)
"""

import argparse
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

import megatron_rlhf

# What the commands do is in `converting`: it takes torch, for which --help and a wrong option need not wait.
DTYPES = ("fp32", "bf16", "fp16")
ROLES = ("policy", "ema", "reward", "value")
_KEY_MAPS = Path(megatron_rlhf.__file__).parent / "conversion" / "key_maps"
ARCHITECTURES = sorted(module.name for module in pkgutil.iter_modules([str(_KEY_MAPS)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
    from megatron_rlhf.commands.converting import run

    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    command = commands.add_parser("hf-to-megatron", help="a Hugging Face folder or a .nemo archive -> a checkpoint")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR", help=f"Hugging Face folder; model types: {', '.join(ARCHITECTURES)}")
    source.add_argument(
        "--nemo", metavar="FILE", help="NeMo's archive of a GPT; its own config names the shape; no code in it is run"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    command.add_argument("--role", choices=["policy", "reward", "value"], help="default: what the model's head fits")
    command.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, through torch's restricted unpickler"
    )
    _add_check_length(command)

    command = commands.add_parser("megatron-to-hf", help="one role of a checkpoint -> a Hugging Face folder")
    command.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a step folder, or a run folder: its best, else its newest",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    command.add_argument("--role", choices=ROLES, help="default: policy, or the only role there is")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as in the checkpoint")
    command.add_argument(
        "--architecture", choices=ARCHITECTURES, help="model type to write; default: one that fits the shape"
    )
    command.add_argument(
        "--adapter",
        choices=["merged", "only", "none"],
        default="merged",
        help="of a model with LoRA adapters: added to its weights (default), alone as a folder for peft, or left out",
    )
    command.add_argument(
        "--base",
        metavar="DIR",
        help="Hugging Face folder that --adapter only refers to; default: what the run began from",
    )
    command.add_argument(
        "--like",
        metavar="DIR",
        help="Hugging Face folder to take tokenizer, chat template, generation settings and config.json from; default: "
        "those of the model that was imported, or of the run",
    )
    command.add_argument(
        "--shard-gb", type=_positive(float), default=5.0, metavar="GB", help="largest file of weights; default 5"
    )
    _add_check_length(command)
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
        return value

    parse.__name__ = kind.__name__  # named in argparse's own message
    return parse


def _add_check_length(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--check-length",
        type=_positive(int),
        default=2048,
        metavar="N",
        help="longest row of the check, in tokens; default 2048, or the model's context where it is shorter",
    )
