"""Prepare data for megatron_rlhf: tokenise pretraining text, train a tokenizer, check a file before a run does.

    python tools/prepare_data.py tokenizer   --input text.txt --vocab-size 8192 --output my_tokenizer
    python tools/prepare_data.py pretraining --input a.txt b.jsonl.gz --tokenizer my_tokenizer --output corpus/all
    python tools/prepare_data.py check demonstrations --input sft.jsonl --tokenizer my_tokenizer
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_rlhf.config.data import written_out
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.pretraining import build_indexed_dataset, read_texts
from megatron_rlhf.data.prompts import load_prompts
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
    size = build_indexed_dataset(_texts(options.input), tokenizer, options.output)
    print(f"{options.output}.bin, .idx: {size.documents:,} documents, {size.tokens:,} tokens")


def prepare_tokenizer(options: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(_texts(options.input), options.vocab_size, options.output)
    print(
        f"{options.output}: {tokenizer.vocab_size:,} tokens, end of text {tokenizer.eos_id}, padding {tokenizer.pad_id}"
    )


def check(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    columns = _columns(options.column)
    kinds = {"demonstrations": _check_demonstrations, "comparisons": _check_comparisons, "prompts": _check_prompts}
    kinds[options.kind](options, tokenizer, columns)


def _check_demonstrations(options: argparse.Namespace, tokenizer: Tokenizer, columns: dict[str, str]) -> None:
    limits = options.max_prompt_tokens, options.max_response_tokens, options.max_length
    examples = load_demonstrations(options.input, tokenizer, *limits, columns)
    print(f"{options.input}: {examples.describe()}")
    _print_lengths("prompt tokens", [item.prompt_length for item in examples])
    _print_lengths("response tokens", [len(item.tokens) - item.prompt_length for item in examples])


def _check_comparisons(options: argparse.Namespace, tokenizer: Tokenizer, columns: dict[str, str]) -> None:
    limits = options.max_prompt_tokens, options.max_response_tokens, options.max_length
    examples = load_comparisons(options.input, tokenizer, *limits, columns)
    print(f"{options.input}: {examples.describe()}")
    _print_lengths("prompt tokens", [len(item.prompt_tokens) for item in examples])
    _print_lengths("response tokens", [len(response) for item in examples for response in item.responses_tokens])
    _print_lengths("responses a prompt", [len(item.responses_tokens) for item in examples])
    print(f"  pairs that are no tie: {sum(len(item.pairs) for item in examples):,}")


def _check_prompts(options: argparse.Namespace, tokenizer: Tokenizer, columns: dict[str, str]) -> None:
    examples = load_prompts(options.input, tokenizer, options.max_prompt_tokens, columns=columns)
    print(f"{options.input}: {examples.describe()}")
    _print_lengths("prompt tokens", [len(item.tokens) for item in examples])
    print(f"  users: {len({item.user for item in examples} - {None}):,}")


def _print_lengths(name: str, lengths: list[int]) -> None:
    least, median, high, most = np.percentile(lengths, [0, 50, 95, 100])
    print(f"  {name}: least {least:.0f}, median {median:.0f}, 95% {high:.0f}, most {most:.0f}")


def _columns(assignments: list[str]) -> dict[str, str]:
    columns = {}
    for assignment in assignments:
        name, equals, template = assignment.partition("=")
        if not equals:
            raise UserError(f"--column {assignment!r}: write NAME=TEMPLATE, such as 'prompt={{question}}'")
        columns[name] = written_out(template)
    return columns


def _texts(sources: list[str]) -> Iterator[str]:
    """The texts of all sources, with a progress bar over the bytes read."""
    total = sum(Path(source).stat().st_size for source in sources if Path(source).is_file())
    with tqdm(total=total or None, unit="B", unit_scale=True, mininterval=0.5) as bar:
        for source in sources:
            yield from read_texts(source, bar.update)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on your text")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE", help="text; for formats see prepare_data.py --help"
    )
    command.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, at least 259")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write, in Hugging Face's format")
    command.set_defaults(run=prepare_tokenizer)

    command = commands.add_parser("pretraining", help="tokenise text into Megatron's .bin and .idx")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="SOURCE", help="text; for formats see prepare_data.py --help"
    )
    command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    command.add_argument(
        "--output", required=True, metavar="PREFIX", help="path of the files to write, less .bin, .idx"
    )
    command.set_defaults(run=prepare_pretraining)

    command = commands.add_parser("check", help="read a file as training does; print counts and lengths")
    command.add_argument("kind", choices=["demonstrations", "comparisons", "prompts"])
    command.add_argument(
        "--input", required=True, metavar="SOURCE", help="records; for formats see prepare_data.py --help"
    )
    command.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=TEMPLATE", help="make a column from others; repeatable"
    )
    command.add_argument("--max-prompt-tokens", type=int, default=1024, metavar="N", help="default 1024, as the paper")
    command.add_argument(
        "--max-response-tokens", type=int, default=1024, metavar="N", help="default 1024, as the paper"
    )
    command.add_argument("--max-length", type=int, default=2048, metavar="N", help="both together; default 2048")
    command.set_defaults(run=check)
    return parser


if __name__ == "__main__":
    sys.exit(main())
