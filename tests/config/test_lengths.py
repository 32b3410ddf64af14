"""Lengths that are not given follow the models' context."""

import pytest

from megatron_rlhf.config.data import PromptDataConfig
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import settle_response, share_context
from megatron_rlhf.config.stages import RolloutConfig
from megatron_rlhf.config.training import SamplingConfig


def shared(context: int, prompt: int | None = None, response: int | None = None, **more: int) -> tuple[int, int]:
    data = PromptDataConfig(prompts="-", max_prompt_tokens=prompt)
    sampling = RolloutConfig(max_response_tokens=response, **more)
    share_context(data, sampling, "rollout", context)
    return data.longest_prompt, sampling.longest_response


@pytest.mark.parametrize(
    ("context", "prompt", "response", "expected"),
    [
        (1024, None, None, (512, 512)),  # GPT-2
        (2048, None, None, (1024, 1024)),  # InstructGPT
        (8192, None, None, (1024, 1024)),
        (513, None, None, (256, 256)),
        (1024, 100, None, (100, 924)),
        (1024, None, 100, (924, 100)),
        (8192, None, 3000, (1024, 3000)),
        (1024, 1000, 1000, (1000, 1000)),  # refused elsewhere, by a message that names both
    ],
)
def test_what_is_not_given_gets_what_is_left(context, prompt, response, expected) -> None:
    assert shared(context, prompt, response) == expected


def test_what_leaves_no_room_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens=1024 leaves no room for a response.* of 1024 tokens"):
        shared(1024, prompt=1024)
    with pytest.raises(UserError, match=r"rollout\.max_response_tokens=70 leaves no room for a prompt"):
        shared(64, response=70)
    with pytest.raises(UserError, match=r"rollout\.min_response_tokens=40 must be at most .*max_response_tokens=32"):
        shared(64, min_response_tokens=40)


@pytest.mark.parametrize(("room", "expected"), [(60, 60), (5000, 1024), (0, 1)])
def test_a_response_takes_the_room_there_is(room: int, expected: int) -> None:
    sampling = SamplingConfig()
    settle_response(sampling, "sampling", room)
    assert sampling.longest_response == expected
    settle_response(sampling, "sampling", 7)  # given by now
    assert sampling.longest_response == expected
