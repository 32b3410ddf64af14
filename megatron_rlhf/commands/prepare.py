"""Prepare data for megatron_rlhf: train a tokenizer, tokenise and blend corpora, clean and split raw records, turn votes into
rankings, check a file before a run does.

    python tools/prepare_data.py tokenizer   --input text.txt --vocab-size 8192 --output my_tokenizer
    python tools/prepare_data.py pretraining --input a.txt b.jsonl.gz --tokenizer my_tokenizer --output corpus/all
    python tools/prepare_data.py blend       --input a.jsonl=0.7 b.txt=0.3 --tokenizer my_tokenizer --output corpus/all
    python tools/prepare_data.py clean       --input api.jsonl --output prompts --near-duplicates 0.8 --split 0.9,0.05,0.05
    python tools/prepare_data.py rankings    --input votes.jsonl --output ranked.jsonl
    python tools/prepare_data.py check demonstrations --input sft.jsonl --model gpt2/
    python tools/prepare_data.py check comparisons --input hh.jsonl.gz --model runs/sft --format hh_rlhf
    python tools/prepare_data.py check demonstrations --input gsm8k.jsonl --tokenizer my_tokenizer \\
        --column 'prompt={question}\\n' --column 'response={answer}'

Inputs are .jsonl, .json, .csv or .txt files (each also .gz), .parquet files, folders of the `datasets` library, or
names on the Hugging Face hub (`name:configuration#split`). Text to tokenise or to train a tokenizer on is the field
`text`. A .txt file is cut into documents at lines `<|endoftext|>`; without any, at the first blank line after each
4,096 characters.

A mistake in the input ends with exit code 2 and a message that names the file and the line.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_rlhf.commands.prepare_records import add_commands, bar, columns_of, shape_of
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.chat.files import read_chat_template
from megatron_rlhf.data.comparisons import Comparison, load_comparisons
from megatron_rlhf.data.demonstrations import Demonstration, load_demonstrations
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.formats.shape import Shape, known_formats
from megatron_rlhf.data.pretraining import build_indexed_dataset, read_texts
from megatron_rlhf.data.prompts import Prompt, load_prompts
from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def prepare_pretraining(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    size = build_indexed_dataset(_texts(options.input, columns_of(options.column)), tokenizer, options.output)
    print(f"{options.output}.bin, .idx: {size.documents:,} documents, {size.tokens:,} tokens")


def prepare_tokenizer(options: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(_texts(options.input, columns_of(options.column)), options.vocab_size, options.output)
    print(
        f"{options.output}: {tokenizer.vocab_size:,} tokens, end of text {tokenizer.eos_id}, padding {tokenizer.pad_id}"
    )


def check(options: argparse.Namespace) -> None:
    tokenizer, context = _tokenizer_and_context(options)
    shape = shape_of(options)
    kinds: dict[str, Callable[..., Examples[Any]]] = {
        "demonstrations": _check_demonstrations,
        "comparisons": _check_comparisons,
        "prompts": _check_prompts,
    }
    examples = kinds[options.kind](options, tokenizer, context, shape)
    if (warning := examples.warning()) is not None:
        print(f"warning: {warning}", file=sys.stderr)


def _tokenizer_and_context(options: argparse.Namespace) -> tuple[Tokenizer, int]:
    """Of the model that is to be trained, or as the options say."""
    folder, context = options.tokenizer, options.max_length
    if options.model is not None:
        from megatron_rlhf.conversion.starting_point import TRAINED_REWARD, StartingPoint

        found = StartingPoint.find(options.model, "--model", TRAINED_REWARD)
        folder, context = folder or found.tokenizer, context or found.model.max_sequence_length
        if folder is None:
            raise UserError(f"--model {options.model}: no tokenizer came with it; name one: --tokenizer DIR")
    if folder is None:
        raise UserError("give --model DIR, the model to train, or --tokenizer DIR")
    tokenizer = load_tokenizer(folder)
    if options.chat_template is not None:
        tokenizer.use_chat_template(read_chat_template(options.chat_template, "--chat-template", tokenizer.hf))
    return tokenizer, context or 2048


def _check_demonstrations(
    options: argparse.Namespace, tokenizer: Tokenizer, context: int, shape: Shape
) -> Examples[Demonstration]:
    limits = options.max_prompt_tokens, options.max_response_tokens, context
    examples = load_demonstrations(options.input, tokenizer, *limits, shape)
    print(f"{options.input}: {examples.describe()}")
    _print_lengths("prompt tokens", [item.prompt_length for item in examples])
    _print_lengths("learned tokens", [int(item.target.sum()) for item in examples])
    return examples


def _check_comparisons(
    options: argparse.Namespace, tokenizer: Tokenizer, context: int, shape: Shape
) -> Examples[Comparison]:
    limits = options.max_prompt_tokens, options.max_response_tokens, context
    examples = load_comparisons(options.input, tokenizer, *limits, shape)
    print(f"{options.input}: {examples.describe()}")
    _print_lengths("prompt tokens", [len(item.prompt_tokens) for item in examples])
    _print_lengths("response tokens", [len(response) for item in examples for response in item.responses_tokens])
    _print_lengths("responses a prompt", [len(item.responses_tokens) for item in examples])
    print(f"  pairs that are no tie: {sum(len(item.pairs) for item in examples):,}")
    return examples


def _check_prompts(options: argparse.Namespace, tokenizer: Tokenizer, context: int, shape: Shape) -> Examples[Prompt]:
    examples = load_prompts(options.input, tokenizer, min(options.max_prompt_tokens, context), columns=shape)
    print(f"{options.input}: {examples.describe()}")
    _print_lengths("prompt tokens", [len(item.tokens) for item in examples])
    print(f"  users: {len({item.user for item in examples} - {None}):,}")
    return examples


def _print_lengths(name: str, lengths: list[int]) -> None:
    least, median, high, most = np.percentile(lengths, [0, 50, 95, 100])
    print(f"  {name}: least {least:.0f}, median {median:.0f}, 95% {high:.0f}, most {most:.0f}")


def _texts(sources: list[str], columns: dict[str, str]) -> Iterator[str]:
    """The texts of all sources, with a progress bar over the bytes read."""
    with bar(sources) as progress:
        for source in sources:
            yield from read_texts(source, progress, columns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on your text")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE", help="text; for formats see prepare_data.py --help"
    )
    command.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, at least 259")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, in Hugging Face's format")
    command.add_argument(
        "--column", action="append", default=[], metavar="text=TEMPLATE", help="make the text of columns"
    )
    command.set_defaults(run=prepare_tokenizer)

    command = commands.add_parser("pretraining", help="tokenise text into Megatron's .bin and .idx")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE", help="text; for formats see prepare_data.py --help"
    )
    command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    command.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files to write, less .bin, .idx"
    )
    command.add_argument(
        "--column", action="append", default=[], metavar="text=TEMPLATE", help="make the text of columns"
    )
    command.set_defaults(run=prepare_pretraining)

    command = commands.add_parser("check", help="read a file as training does; print counts and lengths")
    command.add_argument("kind", choices=["demonstrations", "comparisons", "prompts"])
    command.add_argument(
        "--input", required=True, metavar="SOURCE", help="records; for formats see prepare_data.py --help"
    )
    command.add_argument("--model", metavar="DIR", help="model to train: its tokenizer, its context")
    command.add_argument("--tokenizer", metavar="DIR", help="Hugging Face tokenizer folder; default: the model's")
    command.add_argument("--chat-template", metavar="FILE", help="for messages; default: the tokenizer's")
    command.add_argument("--format", metavar="NAME", help=f"{', '.join(known_formats())}, or a YAML file")
    command.add_argument("--chat", action="store_true", help="read texts as turns of a conversation")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=TEMPLATE", help="make a column from others; repeatable"
    )
    command.add_argument("--max-prompt-tokens", type=int, default=1024, metavar="N", help="default 1024, as the paper")
    command.add_argument(
        "--max-response-tokens", type=int, default=1024, metavar="N", help="default 1024, as the paper"
    )
    command.add_argument(
        "--max-length", type=int, metavar="N", help="both together; default: the model's context, or 2048"
    )
    command.set_defaults(run=check)
    add_commands(commands)
    return parser
