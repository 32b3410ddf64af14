"""Episodes as text: what reward functions and people read."""

from collections.abc import Sequence

from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.rewards.processes import Answers
from megatron_rlhf.rollout.types import Responses


def response_texts(responses: Responses, tokenizer: Tokenizer) -> list[str]:
    """Each response without its special tokens."""
    starts, ends = responses.prompt_lengths_b.tolist(), (responses.last_b + 1).tolist()
    return [
        tokenizer.decode(row[start:end], continuation=True)
        for row, start, end in zip(responses.tokens_bs.tolist(), starts, ends, strict=True)
    ]


def texts_of(prompts: Sequence[Prompt], responses: Responses, tokenizer: Tokenizer) -> Answers:
    """Responses with their prompts, as reward functions get them."""
    return Answers(
        [prompt.text for prompt in prompts],
        response_texts(responses, tokenizer),
        [dict(prompt.record) for prompt in prompts],
        [prompt.id for prompt in prompts],
    )
