"""From a configuration to a conversation."""

import sys

from megatron_rlhf.config.lengths import settle_response
from megatron_rlhf.config.stages import ChatConfig
from megatron_rlhf.conversion.starting_point import POLICY, REWARD
from megatron_rlhf.data.tokenizer import require_tokenizer_fits
from megatron_rlhf.evaluation.chat import ChatRoom
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.trainers.setup import parts
from megatron_rlhf.trainers.setup.tokenizer_choice import find_tokenizer


def build_chat(config: ChatConfig) -> ChatRoom:
    """`megatron-rlhf chat`."""
    named = {"a": (config.policy.init_from, "policy.init_from"), "b": (config.other.init_from, "other.init_from")}
    starts = {
        name: parts.find_start(path, key, POLICY, None, "model")
        for name, (path, key) in named.items()
        if path is not None
    }
    judge = None
    if config.reward.init_from is not None:
        judge = parts.find_start(config.reward.init_from, "reward.init_from", REWARD, None, "model")
        parts.check_role("reward", judge[1], config, "critic_parallel")
    sources = {named[name][1]: source for name, (source, _) in starts.items()}
    tokenizer, _ = find_tokenizer(config.data, {**sources, "reward.init_from": judge[0] if judge else None})
    for _, model in [*starts.values(), *([judge] if judge else [])]:
        require_tokenizer_fits(tokenizer, model.vocab_size, "the model's vocab_size")
    for _, model in starts.values():
        parts.check_role("policy", model, config)
    context = min(model.max_sequence_length for _, model in starts.values())
    settle_response(config.sampling, "sampling", context // 2, longest=256)
    few_shot = "" if config.chat.few_shot is None else parts.read_text(config.chat.few_shot, "chat.few_shot")
    layout = ParallelLayout.create(config.parallel)
    layout.seed(config.run.seed)
    policies = {}
    for name, (source, model) in starts.items():
        policies[name] = parts.make_role("policy", model, layout, config, source).frozen()
        policies[name].know_only(tokenizer.known_ids)
    reward = None
    if judge is not None:
        critic_layout = ParallelLayout.create(config.critic_parallel)
        reward = parts.make_role("reward", judge[1], critic_layout, config, judge[0], scalar=True).frozen()
    return ChatRoom(config, tokenizer, policies, reward, few_shot, _ask, _tell)


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
