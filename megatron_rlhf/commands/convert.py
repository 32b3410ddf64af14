"""Convert models between Hugging Face folders and checkpoints of megatron_rlhf.

    python tools/convert_checkpoint.py hf-to-megatron --hf pythia-160m --output checkpoints/pythia
    python tools/convert_checkpoint.py hf-to-megatron --nemo gpt_2b.nemo --output checkpoints/gpt_2b
    python tools/convert_checkpoint.py megatron-to-hf --checkpoint runs/ppo --output assistant --dtype bf16
    python tools/convert_checkpoint.py megatron-to-hf --checkpoint runs/rm --role reward --output judge
    python tools/convert_checkpoint.py megatron-to-hf --checkpoint runs/lora --adapter only --output adapter     # for peft
    torchrun --nproc-per-node 8 tools/convert_checkpoint.py megatron-to-hf ...     # shares the work among 8 processes

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
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

import megatron_rlhf.parallel  # noqa: F401  # before anything of Megatron-Core
from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.cli import SECONDS_TO_LEAVE
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.launch import detect_launch
from megatron_rlhf.conversion import convert, key_maps
from megatron_rlhf.conversion.check.outputs import CheckFailed
from megatron_rlhf.conversion.check.tokens import SAMPLE_TEXT
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles, holds_tokenizer
from megatron_rlhf.conversion.hf.folder import CONFIG
from megatron_rlhf.conversion.hf.load import is_hf_folder
from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlhf.parallel import runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    rank = 0  # until it is known
    try:
        rank = detect_launch().rank
        runtime.initialize(timeout_minutes=24 * 60)  # one rank checks while the others wait
        message, code = f"{options.output}: {options.run(options)}", 0
    except (UserError, OSError) as error:  # OSError: no folder to write into, a full disk
        message, code = f"error: {error}", 2
    except CheckFailed as error:
        message, code = f"check failed, {options.output} was not written: {error}", 1
    _tell(message, code, rank)
    return code


def _tell(message: str, code: int, rank: int) -> None:
    """The first rank reports; another rank does so if the first has not had the same failure."""
    if code and rank > 0:
        time.sleep(SECONDS_TO_LEAVE)  # the launcher ends all ranks when one leaves
    new = code != 0 and runtime.is_first_to_report(message)
    if rank == 0 or new:
        print(message, file=sys.stderr if code else sys.stdout, flush=True)


def import_model(options: argparse.Namespace) -> str:
    output = Path(options.output)
    if options.nemo is not None:
        return f"{convert.import_nemo(Path(options.nemo), output)} tensors bit-identical to the archive's"
    source = Path(options.hf)
    if not source.is_dir():
        raise UserError(f"--hf {source}: no such folder; a model of the Hub has to be downloaded first")
    tokenizer, remark = _tokenizer(source, "no tokenizer is there: tried on random tokens alone")
    check = CheckOptions(_text(tokenizer), options.check_length)
    return f"{convert.import_huggingface(source, output, options.role, check, options.allow_pickle)}{remark}"


def export_model(options: argparse.Namespace) -> str:
    if is_hf_folder(options.checkpoint):
        raise UserError(f"--checkpoint {options.checkpoint}: is a Hugging Face folder already ({CONFIG})")
    checkpoint = sharded.find_checkpoint(options.checkpoint, "--checkpoint")
    companions = ExtraFiles.find(checkpoint, Path(options.like) if options.like else None)
    none = "no tokenizer came along (name a folder that has one with --like)"
    tokenizer, remark = _tokenizer(companions.tokenizer, none)
    if tokenizer is not None:
        companions.special_tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    role = convert.ROLES[options.role] if options.role else _only_role(checkpoint)
    if options.adapter == "only":
        base = options.base or (str(companions.config) if companions.config else None)
        if base is None:
            raise UserError("--adapter only: name the Hugging Face folder of the model that was adapted with --base")
        return convert.export_peft(checkpoint, Path(options.output), role, options.architecture, companions, base)
    report = convert.export_huggingface(
        checkpoint,
        Path(options.output),
        role,
        options.architecture,
        DTYPES.get(options.dtype),
        companions,
        CheckOptions(_text(tokenizer), options.check_length),
        round(options.shard_gb * 1e9),
        with_adapter=options.adapter != "none",
    )
    return f"{report}{remark}"


def _only_role(checkpoint: Path) -> str:
    roles = list(sharded.read_meta(checkpoint)["roles"])
    return roles[0] if len(roles) == 1 else "policy"


def _tokenizer(folder: Path | None, none: str) -> tuple[Tokenizer | None, str]:
    """A folder's tokenizer, and a remark if there is none, or none that can be used."""
    if folder is None or not holds_tokenizer(folder):
        return None, f"; {none}"
    try:
        return load_tokenizer(folder), ""
    except UserError as error:  # the model is converted anyway
        return None, f"; tried on random tokens alone, since its tokenizer cannot be used: {error}"


def _text(tokenizer: Tokenizer | None) -> list[int]:
    return [] if tokenizer is None else tokenizer.encode(SAMPLE_TEXT, bos=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("hf-to-megatron", help="a Hugging Face folder or a .nemo archive -> a checkpoint")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR", help=f"Hugging Face folder; model types: {', '.join(key_maps.names())}")
    source.add_argument(
        "--nemo", metavar="FILE", help="NeMo's archive of a GPT; its own config names the shape; no code in it is run"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    command.add_argument("--role", choices=["policy", "reward", "value"], help="default: what the model's head fits")
    command.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, through torch's restricted unpickler"
    )
    _add_check_length(command)
    command.set_defaults(run=import_model)

    command = commands.add_parser("megatron-to-hf", help="one role of a checkpoint -> a Hugging Face folder")
    command.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a step folder, or a run folder: its best, else its newest",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    command.add_argument("--role", choices=list(convert.ROLES), help="default: policy, or the only role there is")
    command.add_argument("--dtype", choices=list(DTYPES), help="type of the weights; default: as in the checkpoint")
    command.add_argument(
        "--architecture", choices=key_maps.names(), help="model type to write; default: one that fits the shape"
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
    command.set_defaults(run=export_model)
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
