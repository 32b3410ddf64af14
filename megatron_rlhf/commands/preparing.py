"""`prepare` tokenizer, pretraining and check: text to what training reads, and what training keeps of a file."""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from megatron_rlhf.commands.outputs import require_new, require_new_corpus
from megatron_rlhf.commands.prepare_records import bar, columns_of, require_readable, shape_of
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.chat.files import read_chat_template
from megatron_rlhf.data.comparisons import Comparison, load_comparisons
from megatron_rlhf.data.demonstrations import Demonstration, load_demonstrations
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.pretraining import build_indexed_dataset, read_texts
from megatron_rlhf.data.prompts import Prompt, load_prompts
from megatron_rlhf.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def prepare_pretraining(options: argparse.Namespace) -> None:
    require_new_corpus(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    size = build_indexed_dataset(_texts(options.input, columns_of(options.column)), tokenizer, options.output)
    print(f"{options.output}.bin, .idx: {size.documents:,} documents, {size.tokens:,} tokens")


def prepare_tokenizer(options: argparse.Namespace) -> None:
    require_new(options.output)
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
    require_readable(sources, partial(read_texts, columns=columns))
    with bar(sources) as progress:
        for source in sources:
            yield from read_texts(source, progress, columns)
