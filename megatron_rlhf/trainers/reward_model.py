"""A reward model from K-wise rankings: all comparisons of one prompt are one batch element (Ouyang et al. 2022, section 3.5)."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.algorithms.losses import count_ranked_prompts, ranking_loss
from megatron_rlhf.algorithms.schedules import cosine_lr
from megatron_rlhf.config.stages import RewardModelConfig
from megatron_rlhf.data.batches import ShuffledBatches, shard
from megatron_rlhf.data.comparisons import Comparison
from megatron_rlhf.models.microbatches import pad_to_layout
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.runs.agreement import require_same_batch
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.loop import Trainer
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedBatch:
    """Completions of some prompts, one row each: n = sum of their K."""

    tokens_ns: Tensor
    last_n: Tensor
    """Position of the last token, where the score is read."""
    ranks_n: Tensor
    prompt_index_n: Tensor

    @classmethod
    def pack(cls, comparisons: Sequence[Comparison]) -> "RankedBatch":
        rows, ranks, prompts = [], [], []
        for index, comparison in enumerate(comparisons):
            for response, rank in zip(comparison.responses_tokens, comparison.ranks, strict=True):
                rows.append([*comparison.prompt_tokens.tolist(), *response.tolist()])
                ranks.append(rank)
                prompts.append(index)
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        parts = (tokens, lengths - 1, torch.tensor(ranks), torch.tensor(prompts))
        return cls(*(part.to(collectives.device()) for part in parts))


@dataclass
class RewardModelTrainer(Trainer):
    """The reward model and its comparisons."""

    description = "reward model"
    figures = {"loss": "rm/loss", "accuracy": "rm/accuracy"}

    config: RewardModelConfig
    session: Session
    reward: TrainedRole
    training: Sequence[Comparison]
    validation: Sequence[Comparison]
    demonstrations: Sequence[Sequence[int]]
    """Prompt and response tokens whose mean score the closing bias makes 0."""

    def __post_init__(self) -> None:
        algorithm = self.config.reward_model
        self.batches = ShuffledBatches(len(self.training), algorithm.batch_size, self.config.run.seed)

    @property
    def total_steps(self) -> int:
        return self.config.reward_model.epochs * self.batches.batches_per_epoch

    @property
    def trained(self) -> list[TrainedRole]:
        return [self.reward]

    def train_step(self) -> dict[str, float]:
        """One update on the rankings of one batch of prompts."""
        algorithm, optimizer = self.config.reward_model, self.config.reward.optimizer
        indices = next(self.batches)
        comparisons = [self.training[i] for i in indices]
        for index, comparison in zip(indices, comparisons, strict=True):
            texts = [
                [*comparison.prompt_tokens.tolist(), *response.tolist()] for response in comparison.responses_tokens
            ]
            self.session.guard.name(f"comparison {index}, response", range(len(texts)), texts)
        require_same_batch(
            self.step, (tokens for c in comparisons for tokens in (c.prompt_tokens, *c.responses_tokens))
        )
        lr = cosine_lr(self.step, self.total_steps, optimizer.lr, algorithm.final_lr_fraction, algorithm.warmup_steps)
        update = self.reward.update(ranking_microbatches(comparisons, self.reward, algorithm.micro_batch_size), lr)
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
        """Validate now and then; after the last step, set the bias."""
        done = self.step == self.total_steps
        metrics = self.validate() if done or self.step % self.config.reward_model.validate_every == 0 else {}
        if done:
            self._center_on_demonstrations()
        return metrics

    def validate(self, comparisons: Sequence[Comparison] | None = None) -> dict[str, float]:
        """Accuracy over held-out pairs, over all and by the number of completions K; a tie of scores counts half."""
        comparisons = self.validation if comparisons is None else comparisons
        if not comparisons:
            return {}
        by_k: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        loss, prompts = 0.0, 0
        for start in range(0, len(comparisons), VALIDATION_PROMPTS):
            part = comparisons[start : start + VALIDATION_PROMPTS]
            batch = RankedBatch.pack(part)
            scores_n = self._scores(batch)
            for index, comparison in enumerate(part):
                rows = batch.prompt_index_n == index
                one, statistics = ranking_loss(scores_n[rows], batch.ranks_n[rows], batch.prompt_index_n[rows])
                counts = by_k[len(comparison.ranks)]
                counts[0] += float(statistics["correct_pairs"])
                counts[1] += float(statistics["pairs"])
                loss, prompts = loss + float(one), prompts + 1
        correct, pairs = (sum(counts[i] for counts in by_k.values()) for i in (0, 1))
        return {
            "rm/validation_loss": loss / prompts,
            "rm/validation_accuracy": correct / pairs,
            **{f"rm/validation_accuracy_k{k}": counts[0] / counts[1] for k, counts in sorted(by_k.items())},
        }

    def _scores(self, batch: RankedBatch) -> Tensor:
        values_ns = self.reward.role.values(batch.tokens_ns, self.config.reward_model.micro_batch_size * 4)
        return values_ns.gather(1, batch.last_n.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def _center_on_demonstrations(self) -> None:
        """Shift the bias so that demonstrations score 0 on average: PPO's rewards then start near 0."""
        total, count = 0.0, len(self.demonstrations)
        for start in range(0, count, VALIDATION_PROMPTS):
            part = self.demonstrations[start : start + VALIDATION_PROMPTS]
            width = max(map(len, part))
            tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in part], device=collectives.device())
            last = torch.tensor([len(row) - 1 for row in part], device=tokens.device)
            values = self.reward.role.values(tokens, self.config.reward_model.micro_batch_size * 4)
            total += float(values.gather(1, last.unsqueeze(-1)).sum())
        mean = total / max(count, 1)
        self.reward.add_to("output_layer.bias", -mean)
        log.info("bias %.4f: %d demonstrations now score 0 on average", -mean, count)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state["batches"])


# Prompts scored together in a validation pass: bounds the padding, never the numbers.
VALIDATION_PROMPTS = 32


def ranking_microbatches(
    comparisons: Sequence[Comparison], reward: TrainedRole, micro_batch_size: int
) -> list[Microbatch]:
    """This data-parallel rank's prompts, each whole in one microbatch, normalised by the prompts of the whole batch."""
    layout = reward.role.layout
    ranked = sum(count_ranked_prompts(torch.tensor(c.ranks), torch.zeros(len(c.ranks))) for c in comparisons)
    normalizer = float(max(ranked, 1))

    def microbatch(part: Sequence[Comparison], counts: bool) -> Microbatch:
        batch = RankedBatch.pack(part)

        def loss_of(values_ns1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            scores_n = values_ns1.squeeze(-1).gather(1, batch.last_n.unsqueeze(-1)).squeeze(-1)
            loss, statistics = ranking_loss(scores_n, batch.ranks_n, batch.prompt_index_n, normalizer)
            loss = loss * counts
            counted = {f"rm/{name}": statistics[name] * counts for name in ("correct_pairs", "pairs")}
            return loss, {"rm/loss": loss.detach(), **counted}

        return Microbatch(pad_to_layout(batch.tokens_ns, reward.role), loss_of)

    mine = shard(comparisons, layout.dp_rank, layout.dp_size)
    if not mine:
        return [microbatch(comparisons[:1], False)]
    return [microbatch(mine[i : i + micro_batch_size], True) for i in range(0, len(mine), micro_batch_size)]
