"""Checks of a conversation's configuration."""

from megatron_rlhf.config.checking.checks import check_one_token
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import check_sampling
from megatron_rlhf.config.stages import ChatConfig


def check_chat(config: ChatConfig) -> None:
    """A model to talk with, and what judges where answers are chosen."""
    if config.policy.init_from is None:
        raise UserError("policy.init_from is not given: name the checkpoint or Hugging Face folder to talk with")
    if config.chat.best_of < 1:
        raise UserError(f"chat.best_of={config.chat.best_of} must be at least 1")
    if config.chat.best_of > 1 and config.reward.init_from is None:
        raise UserError(f"chat.best_of={config.chat.best_of} needs reward.init_from, the model that chooses")
    if config.chat.best_of > 1 and config.sampling.beams > 1:
        raise UserError(
            f"chat.best_of={config.chat.best_of} with sampling.beams={config.sampling.beams} is the same answer again and again: "
            "leave one of them out"
        )
    check_sampling(config.sampling, "sampling")
    check_one_token(config.parallel, "a conversation")
