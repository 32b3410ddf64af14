"""`convert`: models between Hugging Face folders, NeMo's archives and our checkpoints, each checked before it stays."""

import argparse
import sys
import time
from pathlib import Path

import torch
import transformers

import megatron_rlhf.parallel  # noqa: F401  # before anything of Megatron-Core
from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.cli import SECONDS_TO_LEAVE
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.launch import detect_launch
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.check.outputs import CheckFailed
from megatron_rlhf.conversion.check.tokens import SAMPLE_TEXT
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles, holds_tokenizer
from megatron_rlhf.conversion.hf.folder import CONFIG
from megatron_rlhf.conversion.hf.load import is_hf_folder
from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_rlhf.parallel import runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(options: argparse.Namespace) -> int:
    """Converts as the options say, on all ranks, and returns the exit code."""
    transformers.logging.set_verbosity_error()
    rank = 0  # until it is known
    try:
        rank = detect_launch().rank
        runtime.initialize(longest_wait_s=24 * 3600)  # one rank writes while the others wait
        message, code = f"{options.output}: {COMMANDS[options.command](options)}", 0
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


COMMANDS = {"hf-to-megatron": import_model, "megatron-to-hf": export_model}
