"""Demonstrations for supervised fine-tuning: a prompt and the response that a labeler wrote."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rlhf.data.examples import Examples, read_prompt
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True, eq=False)
class Demonstration:
    """The loss is on the response: on `tokens[prompt_length:]`, its end included."""

    tokens: Tokens
    """Prompt, response and the token that ends a response, [t]."""

    prompt_length: int


def load_demonstrations(
    source: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_length: int,
    columns: Mapping[str, str] | None = None,
) -> Examples[Demonstration]:
    """Reads records {"prompt", "response"}; `source` and `columns` as in `read_records`.

    Args:
        max_prompt_tokens: The prompt's limit, beginning of text included.
        max_response_tokens: The response's limit, its end included, as when sampling.
        max_length: The limit of both together: the model's context.

    What is over a limit is dropped and counted as `prompt_too_long`, `response_too_long` or `total_too_long`.

    Raises:
        UserError: A mistake in the source, an empty prompt or response (with its line), or nothing left.
    """
    texts = [(read_prompt(record, tokenizer), record.response("response")) for record in read_records(source, columns)]
    prompts = tokenizer.encode_stream((prompt for prompt, _ in texts), bos=True)
    responses = tokenizer.encode_stream((response for _, response in texts), continuation=True)
    items: list[Demonstration] = []
    dropped: Counter[str] = Counter()
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = np.append(np.concatenate([prompt, response]), np.int32(tokenizer.end_id))
        if len(prompt) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
        elif len(response) + 1 > max_response_tokens:
            dropped["response_too_long"] += 1
        elif len(tokens) > max_length:
            dropped["total_too_long"] += 1
        else:
            items.append(Demonstration(tokens, len(prompt)))
    return Examples(str(source), items, dropped)
