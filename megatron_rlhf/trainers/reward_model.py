"""A reward model from K-wise rankings: all comparisons of one prompt are one batch element (Ouyang et al. 2022, section 3.5)."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_rlhf.algorithms.losses import comparison_loss, correct_pairs
from megatron_rlhf.algorithms.schedules import cosine_lr
from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.stages import RewardModelConfig
from megatron_rlhf.data.batches import ShuffledBatches
from megatron_rlhf.data.comparisons import Comparison
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.microbatches import local_rows, texts_to_score
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.packing import Sequences, share_out
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.runs.agreement import require_same_batch
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.loop import Trainer
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class RankedBatch:
    """Completions of some prompts, n = sum of their numbers; and pairs of them, q = sum of their comparisons."""

    sequences: Sequences
    """Prompts, each read once for all its completions; `wanted` is the last token of each, where the score is read."""
    better_q: Tensor
    worse_q: Tensor
    prompt_index_q: Tensor
    completions_q: Tensor
    """How many completions were ranked together."""

    @classmethod
    def pack(cls, comparisons: Sequence[Comparison]) -> "RankedBatch":
        rows: list[list[int]] = []
        prompts: list[int] = []
        pairs = []
        for index, comparison in enumerate(comparisons):
            better, worse, of = torch.from_numpy(comparison.pairs).unbind(dim=1)
            pairs.append(torch.stack([better + len(rows), worse + len(rows), torch.full_like(of, index), of]))
            rows += [[*comparison.prompt_tokens.tolist(), *r.tolist()] for r in comparison.responses_tokens]
            prompts += [index] * len(comparison.responses_tokens)
        sequences = texts_to_score(rows, [len(comparisons[index].prompt_tokens) for index in prompts], prompts)
        return cls(sequences, *(part.to(collectives.device()) for part in torch.cat(pairs, dim=1)))

    def margins(self, scores_n: Tensor) -> Tensor:
        """By how much the better completion of each pair scores higher, [q]."""
        return scores_n[self.better_q] - scores_n[self.worse_q]


@dataclass
class RewardModelTrainer(Trainer):
    """The reward model and its comparisons."""

    description = "reward model"
    length_key = "reward_model.epochs, reward_model.max_steps"
    figures = {"loss": "rm/loss", "accuracy": "rm/accuracy"}

    config: RewardModelConfig
    session: Session
    tokenizer: Tokenizer
    reward: TrainedRole
    training: Sequence[Comparison]
    validation: Sequence[Comparison]
    demonstrations: Sequence[Sequence[int]]
    """Prompt and response tokens whose mean score the final bias sets to 0."""

    def __post_init__(self) -> None:
        algorithm = self.config.reward_model
        self.batches = ShuffledBatches(len(self.training), algorithm.batch_size, self.config.run.seed)

    @property
    def total_steps(self) -> int:
        algorithm = self.config.reward_model
        return algorithm.max_steps or algorithm.epochs * self.batches.batches_per_epoch

    @property
    def trained(self) -> list[TrainedRole]:
        return [self.reward]

    def train_step(self) -> dict[str, float]:
        """One update from the rankings of one batch of prompts."""
        algorithm, optimizer = self.config.reward_model, self.config.reward.optimizer
        indices = next(self.batches)
        comparisons = [self.training[i] for i in indices]
        for index, comparison in zip(indices, comparisons, strict=True):
            texts = [
                [*comparison.prompt_tokens.tolist(), *response.tolist()] for response in comparison.responses_tokens
            ]
            self.session.guard.name(f"comparison {index}, response", range(len(texts)), texts)
        contents: list[Any] = [x for c in comparisons for x in (c.prompt_tokens, *c.responses_tokens, c.pairs.ravel())]
        require_same_batch(self.step, contents)
        lr = cosine_lr(self.step, self.total_steps, optimizer.lr, algorithm.final_lr_fraction, algorithm.warmup_steps)
        sizes = algorithm.micro_batch, algorithm.max_completions
        update = self.reward.update(ranking_microbatches(comparisons, self.reward, *sizes), lr)
        statistics = update.statistics
        tokens = sum(len(c.prompt_tokens) + len(r) for c in comparisons for r in c.responses_tokens)
        return {
            "rm/loss": statistics["rm/loss"],
            "rm/accuracy": statistics["rm/correct_pairs"] / max(statistics["rm/pairs"], 1.0),
            "rm/pairs": statistics["rm/pairs"],
            "rm/grad_norm": update.grad_norm,
            "rm/lr": lr,
            "samples": float((self.step + 1) * algorithm.batch_size),
            "skipped_updates": float(update.skipped),
            "step_tokens": float(tokens),
            "step_flops": 6.0 * tokens * self.reward.role.num_parameters,
        }

    def after_step(self) -> dict[str, float]:
        """Validate at intervals; after the last step, set the bias."""
        done = self.step == self.total_steps
        if not done and self.step % self.config.reward_model.validate_every:
            return {}
        metrics = self.validate()
        if done:
            self._center_on_demonstrations()
        self._log_samples()
        return metrics

    def _log_samples(self) -> None:
        """Scores of the responses to the first prompts, held out where there are some, and how often people preferred each."""
        comparisons = (self.validation or self.training)[:LOGGED_PROMPTS]
        batch = RankedBatch.pack(comparisons)
        scores = iter(self._scores(batch.sequences).tolist())
        rows = [
            {
                "prompt": self.tokenizer.decode(comparison.prompt_tokens.tolist()),
                "response": self.tokenizer.decode(response.tolist(), continuation=True),
                "score": next(scores),
                "preferred": int((comparison.pairs[:, 0] == i).sum()),
                "rejected": int((comparison.pairs[:, 1] == i).sum()),
            }
            for comparison in comparisons
            for i, response in enumerate(comparison.responses_tokens)
        ]
        self.session.samples.log(self.step, rows)

    def validate(self, comparisons: Sequence[Comparison] | None = None) -> dict[str, float]:
        """Accuracy over held-out pairs, over all and by the number K of completions that were ranked together; a tie of
        scores counts half."""
        comparisons = self.validation if comparisons is None else comparisons
        if not comparisons:
            return {}
        by_k: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        loss = 0.0
        for part in _parts(comparisons, [len(c.responses_tokens) for c in comparisons], VALIDATION_COMPLETIONS):
            batch = RankedBatch.pack(part)
            margin_q = batch.margins(self._scores(batch.sequences))
            loss += float(comparison_loss(margin_q, batch.prompt_index_q, normalizer=1.0)[0])
            for k, correct in zip(batch.completions_q.tolist(), correct_pairs(margin_q).tolist(), strict=True):
                by_k[k][0] += correct
                by_k[k][1] += 1
        correct, pairs = (sum(counts[i] for counts in by_k.values()) for i in (0, 1))
        return {
            "rm/validation_loss": loss / len(comparisons),
            "rm/validation_accuracy": correct / pairs,
            **{f"rm/validation_accuracy_k{k}": counts[0] / counts[1] for k, counts in sorted(by_k.items())},
        }

    def _scores(self, sequences: Sequences) -> Tensor:
        return self.reward.role.scores(sequences, self.config.reward_model.micro_batch * SCORED_AT_ONCE)

    @torch.no_grad()
    def _center_on_demonstrations(self) -> None:
        """Shift the bias so that demonstrations score 0 on average: PPO's rewards then start near 0."""
        total, count = 0.0, len(self.demonstrations)
        for part in _parts(self.demonstrations, [1] * count, VALIDATION_COMPLETIONS):
            total += float(self._scores(texts_to_score(part)).sum())
        mean = total / max(count, 1)
        self.reward.add_to("output_layer.bias", -mean)
        log.info("bias %.4f: %d demonstrations now score 0 on average", -mean, count)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state["batches"])


# Prompts in samples.jsonl, each with all its responses.
LOGGED_PROMPTS = 3


# Completions scored together in a validation pass: bounds the padding, does not affect the numbers.
VALIDATION_COMPLETIONS = 256


# Without gradients there is memory for this many times a microbatch.
SCORED_AT_ONCE = 4


def ranking_microbatches(
    comparisons: Sequence[Comparison], reward: TrainedRole, micro_batch_size: Budget | int, max_completions: int
) -> list[Microbatch]:
    """This data-parallel rank's share of the batch, normalised by the prompts of the whole batch.

    Each prompt is whole in one microbatch, except those that are too large, see `_large_prompts`.
    """
    role, prompts, budget = reward.role, float(len(comparisons)), Budget.of(micro_batch_size)

    def microbatch(part: Sequence[Comparison], counts: bool) -> Microbatch:
        batch = RankedBatch.pack(part)
        rows = range(len(batch.sequences.lengths))

        def loss_of(scores_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            margin_q = batch.margins(scores_n1.squeeze(-1))
            loss, statistics = comparison_loss(margin_q, batch.prompt_index_q, prompts)
            return loss * counts, _named(loss, statistics, counts)

        return Microbatch.of(role.arrange(batch.sequences, rows, budget), batch.sequences.wanted(rows), loss_of)

    def is_large(comparison: Comparison) -> bool:
        too_long = budget.tokens is not None and comparison.num_tokens > budget.tokens
        return too_long or len(comparison.responses_tokens) > max_completions

    small = [c for c in comparisons if not is_large(c)]
    large = [c for c in comparisons if is_large(c)]
    mine = share_out([c.num_tokens for c in small], budget, role.layout.dp_size)[role.layout.dp_rank]
    microbatches = [microbatch([small[i] for i in part], True) for part in mine]
    if large:
        at_once = Budget(sequences=max_completions) if budget.tokens is None else budget
        microbatches += _large_prompts(large, reward, at_once, prompts)
    return microbatches or [microbatch(small[:1], False)]


def _large_prompts(
    comparisons: Sequence[Comparison], reward: TrainedRole, at_once: Budget, prompts: float
) -> list[Microbatch]:
    """Prompts with too many completions for one pass, in parts, dealt out over all ranks.

    All completions are scored first, without gradients. The loss's derivative with respect to each score, times the
    score when recomputed, has the same gradient with respect to the weights as the loss.
    """
    role, batch = reward.role, RankedBatch.pack(comparisons)
    scores_n = role.scores(batch.sequences, at_once).requires_grad_()
    with torch.enable_grad():
        loss, statistics = comparison_loss(batch.margins(scores_n), batch.prompt_index_q, prompts)
    (slope_n,) = torch.autograd.grad(loss, scores_n)

    def microbatch(rows: list[int], counts: bool) -> Microbatch:
        tells = counts and 0 in rows  # one of all parts carries the metrics of all
        slopes = slope_n[torch.tensor(rows, device=slope_n.device)]

        def loss_of(scores_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return (scores_n1.squeeze(-1) * slopes).sum() * counts, _named(loss, statistics, tells)

        return Microbatch.of(role.arrange(batch.sequences, rows, at_once), batch.sequences.wanted(rows), loss_of)

    return [microbatch(rows, counts) for rows, counts in local_rows(batch.sequences, role, at_once)]


def _named(loss: Tensor, statistics: Mapping[str, Tensor], counts: bool) -> dict[str, Tensor]:
    figures = {"loss": loss.detach(), **{name: statistics[name] for name in ("correct_pairs", "pairs")}}
    return {f"rm/{name}": figure * counts for name, figure in figures.items()}


def _parts(items: Sequence[Item], sizes: Sequence[int], limit: int) -> Iterator[Sequence[Item]]:
    """Consecutive items whose sizes add up to at most `limit`, at least one at a time."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            yield items[start:i]
            start, total = i, 0
        total += size
    yield items[start:]
