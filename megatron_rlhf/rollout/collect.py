"""One rollout: the policy answers, and all roles evaluate."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.rollout import RolloutConfig, SamplingEngine
from megatron_rlhf.config.stages.ppo import OldLogprobs
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rewards.processes import Answers
from megatron_rlhf.rewards.reward import Reward
from megatron_rlhf.rollout.delivery import Delivery, Sender
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.judging import Judge, Timer
from megatron_rlhf.rollout.sampling import row_keys
from megatron_rlhf.rollout.sequences import StopWatch
from megatron_rlhf.rollout.types import Completion, Responses, Rollout


@dataclass
class Roles:
    """The models of a rollout."""

    policy: Role
    sampler: Role
    """Generates the responses: the policy itself, or a copy of it at the layout for sampling."""
    reference: Role
    reward: Reward
    value: Role | None
    """None where advantages come from several samples of a prompt."""
    delivery: Delivery | None = None
    """Of responses to the ranks of reward and value model, where they are others than the sampler's."""

    @property
    def dp_sizes(self) -> dict[str, int]:
        """In how many parts each role reads a rollout."""
        policy, critic = self.policy.layout.dp_size, self.reward.layout.dp_size
        return {"policy": policy, "reference": self.reference.layout.dp_size, "reward": critic, "value": critic}

    @property
    def sides(self) -> dict[str, int]:
        """Roles that share ranks, and the first of these."""
        if self.delivery is None:
            return {"all ranks": 0}
        critics = [*["reward"] * bool(self.reward.models), *["value"] * (self.value is not None)]
        return {"policy, reference": 0, ", ".join(critics): self.delivery.critic.ranks.start}


def sample_responses(
    policy: Role,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    seed: tuple[int, int],
    stop_watch: Callable[[], StopWatch | None] = lambda: None,
    listen: Callable[[int, int], object] | None = None,
    sender: Sender | None = None,
) -> list[Completion]:
    """One response to each prompt of the whole batch, on every rank of the policy; data-parallel ranks share the work.

    `seed` is (run seed, iteration). A prompt that occurs twice in a batch gets two different samples. `listen` hears this rank's
    share, as in `generate`; `sender` takes this replica's responses as they end.
    """
    occurrences = _occurrences(prompt_ids)
    keys = row_keys(*seed, torch.tensor(prompt_ids), torch.tensor(occurrences))
    shares = deal_by_length(list(map(len, prompts)), policy.layout.dp_size)
    mine = shares[policy.layout.dp_rank]
    texts = [prompts[i] for i in mine]
    ended = sender.take if sender is not None else None
    sampler = engine_of(config)
    sampled = (
        sampler(policy, texts, keys[mine], config, stop_ids, stop_watch, listen=listen, ended=ended) if mine else []
    )
    parts = collectives.gather_over_data(sampled, policy.layout)
    completions = {i: c for share, part in zip(shares, parts, strict=True) for i, c in zip(share, part, strict=True)}
    return [completions[i] for i in range(len(prompts))]


def engine_of(config: SamplingConfig) -> Callable[..., list[Completion]]:
    """What samples: our own `generate`, or its counterpart by Megatron-Core's engine, which only some machines can import."""
    if not isinstance(config, RolloutConfig) or config.engine is SamplingEngine.native:
        return generate
    from megatron_rlhf.rollout import megatron_engine

    return functools.partial(megatron_engine.generate, cache_gb=config.cache_gb)


def deal_by_length(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of prompts in `parts` shares of nearly the same number and sum of lengths: dealt out back and forth,
    longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    turn = [*range(parts), *reversed(range(parts))]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for place, i in enumerate(order):
        shares[turn[place % len(turn)]].append(i)
    return shares


def collect_rollout(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: tuple[int, int],
    micro_batch_size: Budget | int,
    old_logprobs: OldLogprobs,
    recompute: bool,
    timer: Timer,
    meanwhile: Callable[[], None],
    answers: Callable[[Responses], Answers],
    stop_watch: Callable[[], StopWatch | None] = lambda: None,
) -> Rollout:
    """Sample a response to each prompt, then score it. Every rank gets the whole rollout.

    Args:
        recompute: the policy scores it too, as it must where `old_logprobs` are the recomputed ones.
        meanwhile: what a rank does when its own roles are done, before it waits for the results of other ranks.
        answers: the responses as reward functions read them.
    """
    judge = Judge(roles.reward, roles.value, prompts, pad_id, Budget.of(micro_batch_size), answers)
    completions, responses = sample_and_judge(roles, judge, prompt_ids, config, stop_ids, seed, stop_watch, timer)
    tokens_bs, temperature = responses.tokens_bs, config.temperature
    with timer("scoring"):
        readers = [roles.reference, *([roles.policy] if recompute else [])]
        logprobs_bs = [
            role.logprobs(responses.sequences, micro_batch_size, temperature, as_response=True) for role in readers
        ]
    meanwhile()
    with timer("exchange"):
        scores = roles.reward.scores(judge.scores())
        values_bs = collectives.publish(judge.values(tokens_bs.shape[1]), roles.reward.layout)
        portions_b = collectives.publish(judge.portions(), roles.reward.layout)
        for judged in logprobs_bs:
            collectives.publish(judged, roles.policy.layout)
        sampled = torch.zeros(responses.mask_bt.shape, device=tokens_bs.device)
        sampled[responses.mask_bt] = torch.tensor(
            [logprob for completion in completions for logprob in completion.logprobs], device=tokens_bs.device
        )
        reference, *recomputed = map(responses.at_response, logprobs_bs)
        return Rollout(
            responses=responses,
            prompts_b=torch.tensor(prompt_ids, device=tokens_bs.device),
            sampled_logprobs_bt=sampled,
            logprobs_bt=sampled if old_logprobs is OldLogprobs.sampled else recomputed[0],
            ref_logprobs_bt=reference,
            values_bt=responses.at_response(values_bs),
            scores_b=scores.total_b,
            parts=scores.parts,
            timeouts=scores.timeouts,
            recomputed_logprobs_bt=recomputed[0] if recomputed else None,
            portions_b=portions_b,
        )


def sample_and_judge(
    roles: Roles,
    judge: Judge,
    prompt_ids: Sequence[int],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    seed: tuple[int, int],
    stop_watch: Callable[[], StopWatch | None],
    timer: Timer = lambda phase: nullcontext(),
) -> tuple[list[Completion], Responses]:
    """A response to each of the judge's prompts, which it has read. It reads them as they end, where it has ranks of its own."""
    sampler, prompts, delivery = roles.sampler, judge.prompts, roles.delivery
    sender = None
    if delivery is not None:
        shares = deal_by_length(list(map(len, prompts)), sampler.layout.dp_size)
        if not sampler.layout.is_member:
            return judge.as_they_come(delivery.receive(shares), timer)
        sender = delivery.sender(shares, prompts, judge.budget)
    with timer("rollout"):
        completions = sample_responses(sampler, prompts, prompt_ids, config, stop_ids, seed, stop_watch, sender=sender)
    with timer("scoring"):
        return completions, judge.all_at_once(completions)


def _occurrences(ids: Sequence[int]) -> list[int]:
    seen: dict[int, int] = {}
    result = []
    for i in ids:
        result.append(seen.get(i, 0))
        seen[i] = result[-1] + 1
    return result
