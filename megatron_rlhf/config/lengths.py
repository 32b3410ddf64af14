"""Lengths that are not given follow the context of the models that read them."""

from megatron_rlhf.config.data import PromptRulesConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.training import SamplingConfig

LONGEST = 1024
"""InstructGPT's prompts and responses have at most 1k tokens each."""


def share_context(data: PromptRulesConfig, sampling: SamplingConfig, group: str, context: int) -> None:
    """Fill in `data.max_prompt_tokens` and `{group}.max_response_tokens` where they are not given: half of the context each,
    or what the given one leaves of it; at most `LONGEST`. Whether two given ones fit is not asked here.

    Raises:
        UserError: a given one leaves no room, or is less than the shortest response.
    """
    prompt, response = data.max_prompt_tokens, sampling.max_response_tokens
    if prompt is None and response is None:
        prompt = response = context // 2
    elif prompt is None and response is not None:
        prompt = _rest(f"{group}.max_response_tokens", response, "a prompt", context)
    elif response is None and prompt is not None:
        response = _rest("data.max_prompt_tokens", prompt, "a response", context)
    assert prompt is not None and response is not None
    if data.max_prompt_tokens is None:
        data.max_prompt_tokens = min(LONGEST, prompt)
    settle_response(sampling, group, response)


def settle_response(sampling: SamplingConfig, group: str, room: int, longest: int = LONGEST) -> None:
    """Fill in the longest response where it is not given: as long as there is room, at most `longest`."""
    if sampling.max_response_tokens is None:
        sampling.max_response_tokens = max(1, min(longest, room))
        check_sampling(sampling, group)


def check_sampling(sampling: SamplingConfig, key: str) -> None:
    """Limits must be consistent, as far as they are given."""
    longest = sampling.max_response_tokens
    if longest is not None and sampling.min_response_tokens > longest:
        raise UserError(
            f"{key}.min_response_tokens={sampling.min_response_tokens} must be at most {key}.max_response_tokens={longest}"
        )
    if sampling.beams > 1:
        _check_beams(sampling, key)


def _check_beams(sampling: SamplingConfig, key: str) -> None:
    """Beam search does not sample."""
    given = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    for name, plain in {"temperature": (0.0, 1.0), "top_k": (0,), "top_p": (1.0,)}.items():
        if given[name] not in plain:
            raise UserError(
                f"{key}.{name}={given[name]:g} with {key}.beams={sampling.beams}: beam search takes the best continuations and "
                f"samples none; leave one of them out"
            )


def _rest(key: str, given: int, what: str, context: int) -> int:
    if given >= context:
        raise UserError(f"{key}={given} leaves no room for {what} in the model's context of {context} tokens; lower it")
    return context - given
