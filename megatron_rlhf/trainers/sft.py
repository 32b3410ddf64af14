"""Supervised fine-tuning on demonstrations (Ouyang et al. 2022, appendix C.1), text mixed in where asked (C.3)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_rlhf.algorithms.schedules import cosine_lr
from megatron_rlhf.config.checking.checks import can_decode
from megatron_rlhf.config.stages import SFTConfig
from megatron_rlhf.config.training import SamplingConfig, Selection
from megatron_rlhf.data.batches import ShuffledBatches
from megatron_rlhf.data.demonstrations import Demonstration
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.mix import Mix
from megatron_rlhf.data.pretraining import PretrainingData
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches, language_model_nll
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rollout.collect import sample_responses
from megatron_rlhf.rollout.types import Responses
from megatron_rlhf.runs.agreement import require_same_batch
from megatron_rlhf.runs.fp8_gate import Fp8Gate
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.loop import Trainer
from megatron_rlhf.trainers.step import TrainedRole

log = logging.getLogger(__name__)

Example = tuple[Any, Any]
"""Tokens, and which are targets, as in `TokenBatch.pack`."""


@dataclass
class SFTTrainer(Trainer):
    """The policy and its data."""

    length_key = "sft.epochs, sft.max_steps"
    figures = {"loss": "sft/loss"}

    config: SFTConfig
    session: Session
    tokenizer: Tokenizer
    policy: TrainedRole
    demonstrations: Examples[Demonstration] | None
    validation: Examples[Demonstration] | None
    pretraining: PretrainingData | None
    reward: Role | None = None

    def __post_init__(self) -> None:
        sft = self.config.sft
        self.mix = Mix(sft.batch_size, self.config.data.pretraining_mix)
        self.batches: ShuffledBatches | None = None
        if self.demonstrations is not None:
            self.batches = ShuffledBatches(len(self.demonstrations), sft.batch_size, self.config.run.seed)
        self.epochs_done = 0
        self.texts_seen = 0
        self.tokens_seen = 0
        self.gate = Fp8Gate.over(self.config.fp8, self.policy.role, self._first_texts(), sft.micro_batch)

    def _first_texts(self) -> list[Any]:
        if self.demonstrations is not None:
            count = min(len(self.demonstrations), self.config.fp8.gate_samples)
            return [self.demonstrations[i].tokens.tolist() for i in range(count)]
        assert self.pretraining is not None
        text = self.pretraining.train
        return [text[i] for i in range(min(len(text), self.config.fp8.gate_samples))]

    @cached_property
    def total_steps(self) -> int:
        """sft.max_steps where it is given, else all epochs."""
        if self.config.sft.max_steps is not None:
            return self.config.sft.max_steps
        assert self.demonstrations is not None, "check_sft asks for sft.max_steps where there are no demonstrations"
        return self.mix.steps(len(self.demonstrations), self.config.sft.epochs)

    @property
    def trained(self) -> list[TrainedRole]:
        return [self.policy]

    @property
    def description(self) -> str:  # type: ignore[override]
        return "pretraining" if self.batches is None else "SFT"

    def train_step(self) -> dict[str, float]:
        """One update on one batch: the mean over demonstrations and the mean over text, each over its own target tokens."""
        sft, optimizer = self.config.sft, self.config.policy.optimizer
        texts, demonstrations = self._next_texts(), self._next_demonstrations()
        require_same_batch(self.step, [sequence for sequence, _ in texts + demonstrations])
        share = self.mix.weight(len(demonstrations), len(texts))
        kinds = [
            (name, _pack(examples), weight)
            for name, examples, weight in (
                ("sft/pretraining_loss", texts, share),
                ("sft/demonstration_loss", demonstrations, 1 - share),
            )
            if examples
        ]
        microbatches = [
            microbatch
            for name, batch, weight in kinds
            for microbatch in language_model_microbatches(batch, self.policy.role, sft.micro_batch, name, weight=weight)
        ]
        lr = cosine_lr(self.step, self.total_steps, optimizer.lr, sft.final_lr_fraction, sft.warmup_steps)
        update = self.policy.update(microbatches, lr)
        tokens = sum(sum(batch.sequences.lengths) for _, batch, _ in kinds)
        self.tokens_seen += sum(batch.num_targets for _, batch, _ in kinds)
        return {
            "sft/loss": sum(weight * update.statistics[name] for name, _, weight in kinds),
            **(update.statistics | {"sft/pretraining_share": share} if self.pretraining is not None else {}),
            "sft/grad_norm": update.grad_norm,
            "sft/lr": lr,
            "samples": float((self.step + 1) * sft.batch_size),
            "tokens": float(self.tokens_seen),
            "skipped_updates": float(update.skipped),
            "step_tokens": float(tokens),
            "step_flops": 6.0 * tokens * self.policy.role.num_parameters,
        }

    def _next_demonstrations(self) -> list[Example]:
        count = self.config.sft.batch_size - self.mix.texts(self.step)
        if self.batches is None or not count:
            return []
        assert self.demonstrations is not None
        indices = self.batches.take(count)
        chosen = [self.demonstrations[index] for index in indices]
        self.session.guard.name("demonstration", indices, [one.tokens for one in chosen])
        return [_example(one) for one in chosen]

    def _next_texts(self) -> list[Example]:
        count = self.mix.texts(self.step)
        if self.pretraining is None or not count:
            return []
        data = self.pretraining.train
        numbers = [(self.texts_seen + i) % len(data) for i in range(count)]
        self.texts_seen += count
        texts = [data[number] for number in numbers]
        self.session.guard.name("text", numbers, texts)
        return [(text, 1) for text in texts]

    def validation_loss(self) -> float | None:
        """Mean loss per target token: on validation demonstrations, else on held-out text; None if there is neither."""
        if self.validation is not None:
            examples: list[Example] = [_example(d) for d in self.validation]
        elif self.pretraining is not None and self.pretraining.held_out is not None and self.batches is None:
            held_out = self.pretraining.held_out
            count = min(len(held_out), self.config.data.pretraining.held_out_samples)
            examples = [(held_out[i], 1) for i in range(count)]
        else:
            return None
        total, tokens = 0.0, 0
        for start in range(0, len(examples), VALIDATION_BATCH):
            part = examples[start : start + VALIDATION_BATCH]
            nll, count = language_model_nll(self.policy.role, _pack(part), self.config.sft.micro_batch)
            total, tokens = total + nll, tokens + count
        return total / max(tokens, 1)

    def answer(self) -> float | None:
        """Sample responses to validation prompts for samples.jsonl; returns their mean reward-model score, which is how the
        paper chose its SFT model, if there is a reward model."""
        judged = self.config.sft.selection_samples if self.reward is not None else 0
        count = judged or self.config.sft.logged_samples
        if self.demonstrations is None or not count or (not judged and not can_decode(self.config.parallel)):
            return None
        examples = self.validation or self.demonstrations
        chosen = [examples[i] for i in range(min(len(examples), count))]
        prompts = [d.tokens[: d.prompt_length].tolist() for d in chosen]
        sampling, tokenizer = self._sampling(max(map(len, prompts))), self.tokenizer
        seed = (self.config.run.seed, 0)
        ids = list(range(len(prompts)))
        completions = sample_responses(
            self.policy.role, prompts, ids, sampling, tokenizer.stop_ids, seed, tokenizer.stop_watch
        )
        scores = None
        if self.reward is not None:
            responses = Responses.pack(prompts, completions, tokenizer.pad_id, collectives.device())
            scores = self.reward.scores(responses.sequences, self.config.sft.micro_batch)
        rows = [
            {
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(completions[i].tokens, continuation=True),
                "stopped": completions[i].stopped,
                **({} if scores is None else {"score": float(scores[i])}),
            }
            for i, prompt in enumerate(prompts[: self.config.sft.logged_samples])
        ]
        self.session.samples.log(self.step, rows)
        return None if scores is None else float(scores.mean())

    def _sampling(self, longest: int) -> SamplingConfig:
        """Responses that nobody judges are cut where the model's context ends after the longest prompt."""
        asked = self.config.sampling
        room = min(asked.longest_response, self.policy.role.model.max_sequence_length - longest)
        return replace(asked, max_response_tokens=room, min_response_tokens=min(asked.min_response_tokens, room))

    def after_step(self) -> dict[str, float]:
        """At the end of an epoch, and of the run: validate, save these weights, and mark the best so far."""
        before, self.epochs_done = self.epochs_done, self.batches.epoch if self.batches is not None else 0
        ends = self.epochs_done > before
        return self._end_epoch(ends) if ends or self.step == self.total_steps else {}

    def _end_epoch(self, whole: bool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        loss = self.validation_loss()
        if loss is not None:
            metrics["sft/validation_loss"] = loss
        with self.session.timer("samples"):
            reward = self.answer()
        if reward is not None:
            metrics["sft/validation_reward"] = reward
        by_reward = self.config.sft.select_by is Selection.reward_model
        figure = -metrics["sft/validation_reward"] if by_reward else loss
        name = self._epoch_name(whole)
        if figure is not None and name is not None:  # there is something to choose from, and a criterion
            self.session.offer(name, [self.policy], {"step": self.step, "figure": figure, "metrics": metrics})
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        log.info("%s: %s", name or f"step {self.step}", shown or "no validation data")
        return metrics

    def _epoch_name(self, whole: bool) -> str | None:
        """Name of the weights at this step; None where there are no epochs to choose from."""
        if self.batches is None:
            return None
        done = self.epochs_done
        return f"epoch_{done}" if whole else f"epoch_{done + 1}_step_{self.step}"  # the run may end inside an epoch

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.tokens_seen,
            "texts_seen": self.texts_seen,
            "batches": self.batches.state_dict() if self.batches is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens_seen = state["tokens_seen"]
        self.texts_seen = state["texts_seen"]
        if self.batches is not None:
            self.batches.load_state_dict(state["batches"])
            self.epochs_done = self.batches.epoch


def selection_prompts(
    config: SFTConfig, demonstrations: Examples[Demonstration], validation: Examples[Demonstration] | None
) -> list[Demonstration]:
    """Demonstrations whose prompts are answered where a reward model judges an epoch."""
    examples = validation or demonstrations
    return [examples[i] for i in range(min(len(examples), config.sft.selection_samples))]


# Sequences of a validation pass held as one batch: bounds the padding, does not affect the numbers.
VALIDATION_BATCH = 256


def _example(demonstration: Demonstration) -> Example:
    turns = demonstration.turns
    return demonstration.tokens, demonstration.prompt_length if turns is None else turns


def _pack(examples: Sequence[Example]) -> TokenBatch:
    return TokenBatch.pack([tokens for tokens, _ in examples], [targets for _, targets in examples])
