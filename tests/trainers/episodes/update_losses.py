"""The losses of an update on small batches: by plain autograd from formulas written out here, and by the trainers' code."""

import pytest
import torch
from toys import GPT2_LIKE, LLAMA_LIKE, Block, assemble, assert_close, gradient_blocks, make_role, train, weight_blocks

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.data import PretrainingDataConfig, PromptDataConfig
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.stages import PPOConfig, RolloutConfig
from megatron_rlhf.config.stages.ppo import PPOAlgorithmConfig
from megatron_rlhf.config.training import RunConfig
from megatron_rlhf.data.comparisons import Comparison
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import forward_backward
from megatron_rlhf.rollout.types import Completion, Experience, Responses
from megatron_rlhf.trainers.episodes.microbatches import policy_microbatches, value_microbatches
from megatron_rlhf.trainers.episodes.values import FoundValues
from megatron_rlhf.trainers.reward_model import ranking_microbatches

VOCAB, GAMMA, TEMPERATURE = 67, 27.8, 0.8
DISCOUNT, LAM = 0.9, 0.8
EPISODES = [(3, 5), (7, 2), (1, 6), (4, 4), (6, 1)]  # lengths of prompt and response
TEXTS = [12, 12, 9, 12]
COMPLETIONS = [[4, 6], [3, 5, 2, 7], [5, 4, 6]]  # lengths of the responses to three prompts
RANKS = [[0, 1], [1, 0, 2, 1], [0, 0, 1]]
LAYOUTS = {
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "dp2": (2, ParallelConfig()),
    "dp2_pp2": (4, ParallelConfig(pipeline=2)),
}
MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def config(micro_batch_size=2):
    budget = Budget.of(micro_batch_size)
    return PPOConfig(
        run=RunConfig(dir="unused"),
        data=PromptDataConfig(tokenizer="unused", prompts="unused", pretraining=PretrainingDataConfig()),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        ppo=PPOAlgorithmConfig(micro_batch_size=budget.sequences, micro_batch_tokens=budget.tokens),
    )


def experience(rows=5):
    """Old log-probabilities far from the new ones, so that some ratios are clipped, and likewise for values."""
    random = generator(0)
    prompts = [torch.randint(0, VOCAB, (n,), generator=random).tolist() for n, _ in EPISODES[:rows]]
    answers = [torch.randint(0, VOCAB, (n,), generator=random).tolist() for _, n in EPISODES[:rows]]
    done = [Completion(tokens, [0.0] * len(tokens), False) for tokens in answers]
    packed = Responses.pack(prompts, done, 0, torch.device("cpu"))
    mask = packed.mask_bt

    def noise():
        return torch.where(mask, torch.randn(mask.shape, generator=random), torch.nan)

    logprobs = noise() * 0.3 - 4.2  # near -log 67
    return Experience(packed.tokens_bs, packed.positions_bt, mask, logprobs, noise() * 0.3, noise(), noise())


def texts(rows=4):
    random = generator(1)
    return TokenBatch.pack([torch.randint(0, VOCAB, (n,), generator=random) for n in TEXTS[:rows]], [1, 1, 4, 1][:rows])


def rankings(count=3):
    """Prompts with the responses ranked together; the second prompt's first and last response are also a pair."""
    random = generator(2)

    def tokens(n):
        return torch.randint(0, VOCAB, (n,), generator=random).numpy()

    made = [
        (tokens(3), [(list(map(tokens, lengths)), ranks)]) for lengths, ranks in zip(COMPLETIONS, RANKS, strict=True)
    ]
    responses = made[1][1][0][0]
    made[1][1].append(([responses[0], responses[3]], [1, 0]))
    return made[:count]


def comparisons(count=3):
    return [Comparison.of(*one) for one in rankings(count)]


# --- by plain autograd: one sequence after the other, the formulas of the papers -------------------------------------


def plain_policy_loss(forward, batch):
    total = 0.0
    for row in range(len(batch)):
        length = int(batch.mask_bt[row].sum())
        start = int(batch.positions_bt[row, 0])
        logits = forward(batch.tokens_bs[row, : start + length + 1])
        logprobs = (logits[start : start + length] / TEMPERATURE).log_softmax(-1)
        chosen = logprobs.gather(-1, batch.tokens_bs[row, start + 1 : start + length + 1, None]).squeeze(-1)
        ratio = (chosen - batch.logprobs_bt[row, :length]).exp()
        advantage = batch.advantages_bt[row, :length]
        total = total - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    return total / batch.mask_bt.sum()


def plain_text_loss(forward, batch):
    total = 0.0
    for tokens, target in zip(batch.tokens_bs, batch.target_bs, strict=True):
        places = target.nonzero().flatten()
        logprobs = forward(tokens[: int(places[-1]) + 1]).log_softmax(-1)
        total = total - logprobs[places - 1, tokens[places]].sum()
    return total / batch.num_targets


def plain_value_loss(forward, batch):
    total = 0.0
    for row in range(len(batch)):
        length, start = int(batch.mask_bt[row].sum()), int(batch.positions_bt[row, 0])
        values = forward(batch.tokens_bs[row, : start + length + 1])[start : start + length, 0]
        old, returns = batch.values_bt[row, :length], batch.returns_bt[row, :length]
        clipped = old + (values - old).clamp(-0.2, 0.2)
        total = total + 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum()
    return total / batch.mask_bt.sum()


def plain_loss_of_found_values(forward, batch):
    """The batch's returns are taken for rewards. Each return is the value and all later temporal differences."""
    total = 0.0
    for row in range(len(batch)):
        length, start = int(batch.mask_bt[row].sum()), int(batch.positions_bt[row, 0])
        values = forward(batch.tokens_bs[row, : start + length + 1])[start : start + length, 0]
        old, rewards = [*values.tolist(), 0.0], batch.returns_bt[row, :length].tolist()
        deltas = [rewards[t] + DISCOUNT * old[t + 1] - old[t] for t in range(length)]
        returns = [
            old[t] + sum((DISCOUNT * LAM) ** (later - t) * deltas[later] for later in range(t, length))
            for t in range(length)
        ]
        total = total + 0.5 * ((values - torch.tensor(returns)) ** 2).sum()
    return total / batch.mask_bt.sum()


def plain_ranking_loss(forward, batch):
    total = 0.0
    for prompt, records in rankings(len(batch)):
        terms = []
        for responses, ranks in records:
            scores = [forward(torch.tensor([*prompt, *r]))[-1, 0] for r in responses]
            pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
            terms += [torch.sigmoid(scores[i] - scores[j]).log() for i, j in pairs]
        total = total - sum(terms) / len(terms)
    return total / len(batch)


PLAIN = {
    "policy": plain_policy_loss,
    "text": plain_text_loss,
    "value": plain_value_loss,
    "found_values": plain_loss_of_found_values,
    "ranking": plain_ranking_loss,
    "ranking_in_parts": plain_ranking_loss,
}
BATCHES = {
    "policy": experience,
    "text": texts,
    "value": experience,
    "found_values": experience,
    "ranking": comparisons,
    "ranking_in_parts": comparisons,
}


def is_scalar(kind):
    return kind in ("value", "found_values", "ranking", "ranking_in_parts")


def plain_gradients(kind, rows, model="gpt2"):
    """(loss, gradients) of one kind of loss."""
    role = make_role(MODELS[model], scalar=is_scalar(kind))
    (chunk,) = role.modules

    def forward(tokens):
        return chunk(tokens.unsqueeze(0), torch.arange(len(tokens)).unsqueeze(0), None)[0]

    with role.layout:
        loss = PLAIN[kind](forward, BATCHES[kind](rows))
        loss.backward()
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    return float(loss), assemble([weight_blocks(role)], VOCAB)


# --- by the trainers' microbatches -----------------------------------------------------------------------------------


def microbatches(kind, trained, rows, micro_batch_size):
    batch = BATCHES[kind](rows)
    if kind == "policy":
        return policy_microbatches(batch, trained, config(micro_batch_size))
    if kind == "value":
        return value_microbatches(batch, trained, config(micro_batch_size))
    if kind == "found_values":
        found = FoundValues(torch.where(batch.mask_bt, batch.returns_bt, 0.0), batch.mask_bt, DISCOUNT, LAM)
        return value_microbatches(batch, trained, config(micro_batch_size), found.learn)
    if kind.startswith("ranking"):
        return ranking_microbatches(batch, trained, micro_batch_size, 16 if kind == "ranking" else 2)
    return language_model_microbatches(batch, trained.role, micro_batch_size, "ptx/loss")


LOSSES = {
    "policy": "policy/loss",
    "text": "ptx/loss",
    "value": "value/loss",
    "found_values": "value/loss",
    "ranking": "rm/loss",
    "ranking_in_parts": "rm/loss",
}


def trained_gradients(kind, parallel, rows, micro_batch_size, model="gpt2") -> tuple[float, list[Block]]:
    """(loss, this rank's gradients) of one kind of loss."""
    trained = train(make_role(MODELS[model], parallel, scalar=is_scalar(kind)))
    blocks = gradient_blocks(trained, microbatches(kind, trained, rows, micro_batch_size))
    with trained.role.evaluating():
        again = microbatches(kind, trained, rows, micro_batch_size)
        statistics = forward_backward(trained.role.chunks, again, trained.role.layout, forward_only=True)
    return collectives.reduce_statistics(statistics, trained.role.layout)[LOSSES[kind]], blocks


def summed_gradients(parallel, rows, text_rows, micro_batch_size=2) -> list[Block]:
    """PPO and pretraining in one schedule, as `PPOTrainer` runs them."""
    trained = train(make_role(GPT2_LIKE, parallel))
    ppo = policy_microbatches(experience(rows), trained, config(micro_batch_size))
    text = language_model_microbatches(texts(text_rows), trained.role, 1, "ptx/loss", weight=GAMMA)
    return gradient_blocks(trained, [*text, *ppo])


def check(results, expected_loss, expected, absolute=1e-7):
    for loss, _ in results:
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=absolute), "on every rank"
    # fp32: sums in another order, against the largest entry of each tensor.
    assert_close(assemble([blocks for _, blocks in results], VOCAB), expected, relative=1e-5)
