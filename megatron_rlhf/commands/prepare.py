"""Prepare data for megatron_rlhf: train a tokenizer, tokenise and blend corpora, clean and split raw records, turn votes into
rankings, check a file before a run does.

    megatron-rlhf prepare tokenizer   --input text.txt --vocab-size 8192 --output my_tokenizer
    megatron-rlhf prepare pretraining --input a.txt b.jsonl.gz --tokenizer my_tokenizer --output corpus/all
    megatron-rlhf prepare blend       --input a.jsonl=0.7 b.txt=0.3 --tokenizer my_tokenizer --output corpus/all
    megatron-rlhf prepare clean       --input api.jsonl --output prompts --near-duplicates 0.8 --split 0.9,0.05,0.05
    megatron-rlhf prepare rankings    --input votes.jsonl --output ranked.jsonl
    megatron-rlhf prepare check demonstrations --input sft.jsonl --model gpt2/
    megatron-rlhf prepare check comparisons --input hh.jsonl.gz --model runs/sft --format hh_rlhf
    megatron-rlhf prepare check demonstrations --input gsm8k.jsonl --tokenizer my_tokenizer \\
        --column 'prompt={question}\\n' --column 'response={answer}'

Inputs are .jsonl, .json, .csv or .txt files (each also .gz), .parquet files, folders of the `datasets` library, or
names on the Hugging Face hub (`name:configuration#split`). Text to tokenise or to train a tokenizer on is the field
`text`. A .txt file is cut into documents at lines `<|endoftext|>`; without any, at the first blank line after each
4,096 characters.

A mistake in the input ends with exit code 2 and a message that names the file and the line.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from megatron_rlhf.commands.numbers import share, whole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.shape import known_formats

# What the commands do is in `preparing` and `prepare_records`: it takes torch, for which --help and a wrong option need not wait.
KINDS = ("prompts", "demonstrations", "comparisons", "text")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        module, _, function = options.run.partition(":")
        getattr(import_module(f"megatron_rlhf.commands.{module}"), function)(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on your text")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE", help="text; for formats see megatron-rlhf prepare --help"
    )
    command.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, at least 259")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, in Hugging Face's format")
    command.add_argument(
        "--column", action="append", default=[], metavar="text=TEMPLATE", help="make the text of columns"
    )
    command.set_defaults(run="preparing:prepare_tokenizer")

    command = commands.add_parser("pretraining", help="tokenise text into Megatron's .bin and .idx")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE", help="text; for formats see megatron-rlhf prepare --help"
    )
    command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    command.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files to write, less .bin, .idx"
    )
    command.add_argument(
        "--column", action="append", default=[], metavar="text=TEMPLATE", help="make the text of columns"
    )
    command.set_defaults(run="preparing:prepare_pretraining")

    command = commands.add_parser("check", help="read a file as training does; print counts and lengths")
    command.add_argument("kind", choices=["demonstrations", "comparisons", "prompts"])
    command.add_argument(
        "--input", required=True, metavar="SOURCE", help="records; for formats see megatron-rlhf prepare --help"
    )
    command.add_argument("--model", metavar="DIR", help="model to train: its tokenizer, its context")
    command.add_argument("--tokenizer", metavar="DIR", help="Hugging Face tokenizer folder; default: the model's")
    command.add_argument("--chat-template", metavar="FILE", help="for messages; default: the tokenizer's")
    command.add_argument("--format", metavar="NAME", help=f"{', '.join(known_formats())}, or a YAML file")
    command.add_argument("--chat", action="store_true", help="read texts as turns of a conversation")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=TEMPLATE", help="make a column from others; repeatable"
    )
    for what in ("prompt", "response"):
        command.add_argument(
            f"--max-{what}-tokens", type=whole(1), default=1024, metavar="N", help="default 1024, as the paper"
        )
    command.add_argument(
        "--max-length", type=whole(1), metavar="N", help="both together; default: the model's context, or 2048"
    )
    command.set_defaults(run="preparing:check")
    _add_record_commands(commands)
    return parser


def _add_record_commands(commands: Any) -> None:
    command = commands.add_parser("clean", help="filter, split by user, report; goes on where it was stopped")
    command.add_argument("--kind", choices=KINDS, default="prompts", help="what the records are; default prompts")
    _add_shape(command, many=True)
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, or to go on with")
    command.add_argument(
        "--prefix",
        type=whole(0),
        metavar="N",
        help="equal first characters are a duplicate; default: 200 for prompts, else 0: off",
    )
    command.add_argument(
        "--near-duplicates", type=share, metavar="S", help="MinHash similarity that is one, such as 0.8"
    )
    command.add_argument(
        "--max-per-user", type=whole(0), metavar="N", help="default: 200 for prompts, else 0: no limit"
    )
    command.add_argument("--max-characters", type=whole(1), metavar="N", help="longer prompts are dropped")
    command.add_argument(
        "--max-prompt-tokens", type=whole(1), metavar="N", help="longer prompts are dropped; needs --tokenizer"
    )
    command.add_argument("--tokenizer", metavar="DIR", help="for --max-prompt-tokens")
    command.add_argument(
        "--personal", choices=("drop", "mask", "keep"), default="drop", help="records with personal data"
    )
    command.add_argument(
        "--region", type=_region, default="US", help="of phone numbers without a country code, or none"
    )
    command.add_argument("--split", metavar="SHARES", help="train, validation[, test] by user, such as 0.9,0.05,0.05")
    command.add_argument("--seed", type=int, default=0, help="of the split")
    command.set_defaults(run="prepare_records:clean")
    for name, what in (
        ("rankings", "pairwise votes (prompt, chosen, rejected) to rankings of K"),
        ("pairs", "rankings of K to pairwise votes"),
    ):
        command = commands.add_parser(name, help=what)
        _add_shape(command, many=True)
        command.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
        command.set_defaults(run=f"prepare_records:{name}")
    command = commands.add_parser("blend", help="several corpora by weight into one .bin and .idx")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE=WEIGHT", help="text; shares are of tokens"
    )
    command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    command.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files to write, less .bin, .idx"
    )
    command.add_argument(
        "--tokens",
        type=whole(1),
        metavar="N",
        help="tokens to reach, repeating what ends; default: until the first corpus ends",
    )
    command.add_argument(
        "--column", action="append", default=[], metavar="text=TEMPLATE", help="make the text of columns"
    )
    command.set_defaults(run="prepare_records:blend_corpora")


def _add_shape(command: argparse.ArgumentParser, many: bool = False) -> None:
    command.add_argument(
        "--input",
        nargs="+" if many else None,
        required=True,
        metavar="SOURCE",
        help="records; for formats see megatron-rlhf prepare --help",
    )
    command.add_argument("--format", metavar="NAME", help=f"{', '.join(known_formats())}, or a YAML file")
    command.add_argument("--chat", action="store_true", help="read texts as turns of a conversation")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=TEMPLATE", help="make a column from others; repeatable"
    )


def _region(text: str) -> str | None:
    from phonenumbers import SUPPORTED_REGIONS  # takes time, for which --help need not wait

    if text.lower() == "none":
        return None
    if text.upper() not in SUPPORTED_REGIONS:
        raise argparse.ArgumentTypeError(f"{text}: must be a country's two letters, such as US, GB or DE, or none")
    return text.upper()
