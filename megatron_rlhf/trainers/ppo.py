"""PPO with pretraining gradients mixed in: PPO-ptx (Ouyang et al. 2022, section 3.5)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from megatron_rlhf.algorithms.kl import token_kl
from megatron_rlhf.algorithms.masking import whiten
from megatron_rlhf.algorithms.rewards import token_rewards
from megatron_rlhf.algorithms.schedules import constant_lr
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.data.batches import ShuffledBatches
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.pretraining import PretrainingData
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.offload import HostMemory
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.resharding import WeightCopy
from megatron_rlhf.rollout.collect import Roles, collect_rollout
from megatron_rlhf.rollout.types import Experience, Rollout
from megatron_rlhf.runs.agreement import require_same_batch
from megatron_rlhf.runs.fp8_gate import Fp8Gate
from megatron_rlhf.runs.session import Session
from megatron_rlhf.runs.sides import Sides
from megatron_rlhf.trainers.episodes.advantages import estimate_advantages
from megatron_rlhf.trainers.episodes.held_out import Progress, evaluate
from megatron_rlhf.trainers.episodes.metrics import (
    cost_of_iteration,
    policy_metrics,
    rollout_metrics,
    sample_rows,
    value_metrics,
)
from megatron_rlhf.trainers.episodes.microbatches import policy_microbatches
from megatron_rlhf.trainers.episodes.on_policy import require_on_policy
from megatron_rlhf.trainers.episodes.phases import phase_parts
from megatron_rlhf.trainers.episodes.steering import kl_control, text_weight
from megatron_rlhf.trainers.episodes.tax import pretraining_tax
from megatron_rlhf.trainers.episodes.texts import texts_of
from megatron_rlhf.trainers.episodes.values import update_value, value_by_update
from megatron_rlhf.trainers.gradients import DominanceWatch
from megatron_rlhf.trainers.loop import Trainer
from megatron_rlhf.trainers.step import Accumulated, TrainedRole, Update


@dataclass
class PPOTrainer(Trainer):
    """The roles and their data. Where roles are on different ranks, each rank does the work of its own roles, and gets
    no metrics of the others' updates before the iteration ends: the two sides run in parallel."""

    description = "PPO"
    length_key = "ppo.iterations"
    figures = {"reward": "reward/score_mean", "kl": "kl/mean", "ptx": "ptx/loss"}

    config: PPOConfig
    session: Session
    tokenizer: Tokenizer
    prompts: Examples[Prompt]
    pretraining: PretrainingData | None
    policy: TrainedRole
    value: TrainedRole | None
    """None where advantages come from several samples of a prompt."""
    roles: Roles
    held_out: Sequence[Prompt] = ()
    """Answered at times, not trained on."""

    def __post_init__(self) -> None:
        # A callback may put functions of its own in the place of these two (docs/library.md).
        self.estimate_advantages, self.policy_microbatches = estimate_advantages, policy_microbatches
        ppo, seed = self.config.ppo, self.config.run.seed
        self.batches = ShuffledBatches(len(self.prompts), ppo.batch_size // ppo.samples_per_prompt, seed, whole=True)
        self.kl_control, self.text_weight = kl_control(ppo), text_weight(ppo)
        self.dominance = DominanceWatch()
        self.progress = Progress()
        self.sides = Sides(self.session.folder, self.roles.sides)
        self.pretraining_cursor = 0
        self.tokens_seen = 0
        self.pretrained_ahead: Accumulated | None = None
        policy, sampler = self.policy.role, self.roles.sampler
        self.refresh_sampler = None if sampler is policy else WeightCopy(policy.modules, sampler.chunks)
        self.optimizer_memory = HostMemory(lambda: [t for each in self.trained for t in each.optimizer_tensors()])
        guarded = [self.prompts[i].tokens.tolist() for i in range(min(len(self.prompts), self.config.fp8.gate_samples))]
        temperature = self.config.rollout.temperature
        self.gate = Fp8Gate.over(self.config.fp8, self.policy.role, guarded, ppo.micro_batch, temperature)

    @property
    def total_steps(self) -> int:
        return self.config.ppo.iterations

    @property
    def trained(self) -> list[TrainedRole]:
        return [self.policy] if self.value is None else [self.policy, self.value]

    @property
    def readers(self) -> list[Role]:
        trained, roles = [each.role for each in self.trained], self.roles
        return [*trained, roles.reference, roles.sampler, *roles.reward.models.values()]

    @property
    def phase_parts(self) -> dict[str, int]:
        return phase_parts(self.config.ppo, self.scoring, self.config.ppo.recomputes(self.step + 1))

    @property
    def scoring(self) -> Roles:
        """Those that score a rollout. An estimator of one's own has values before any update, even if that would find them."""
        later = self.config.values_in_update and self.estimate_advantages is estimate_advantages
        return replace(self.roles, value=None) if later else self.roles

    @property
    def policy_step(self) -> int:
        """Iterations since the policy began to train; negative while the critic warms up."""
        return self.step - self.config.ppo.critic_warmup_iterations

    def train_step(self) -> dict[str, float]:
        """One rollout and the updates on it."""
        cfg, timer = self.config.ppo, self.session.timer
        rollout = self._collect()
        kl = token_kl(rollout.logprobs_bt, rollout.ref_logprobs_bt)
        totals = rollout.totals(cfg.missing_stop_penalty)
        rewards = token_rewards(totals, kl, rollout.mask_bt, self.kl_control.coef)
        policy_updates, value_updates = [], []
        if self.value is not None and self.scoring.value is None:
            with timer("value"):
                rollout, update = value_by_update(rollout, rewards, self.value, self.config)
            value_updates.append(update)
            self._require_finite(rollout)
        advantages, returns = self.estimate_advantages(rewards, rollout, cfg)
        if cfg.whitens:  # over the whole rollout: every rank holds all of it
            advantages = whiten(advantages, rollout.mask_bt)
        experience = Experience.of(rollout, advantages, returns)
        minibatches = experience.minibatches(cfg.minibatch_size, (self.config.run.seed, self.step), cfg.inner_epochs)
        for number, minibatch in enumerate(minibatches):
            if self.policy_step >= 0:
                with timer("policy"):
                    policy_updates.append(self._update_policy(minibatch))
            if self.value is not None and number >= len(value_updates):
                with timer("value"):
                    value_updates.append(update_value(minibatch, self.value, self.config))
        policy_updates = self.policy.share(policy_updates)
        if self.value is not None:
            value_updates = self.value.share(value_updates)
        metrics = self._metrics(rollout, totals, returns, policy_updates, value_updates)
        if self.policy_step >= 0:
            self.kl_control.update(metrics["kl/mean"], cfg.batch_size)
        self.progress.kl = metrics["kl/mean"]
        self._weigh_text(metrics)
        require_on_policy(metrics, self.step + 1, self.config)
        self.session.samples.log(self.step + 1, sample_rows(rollout, totals, kl, self.tokenizer))
        return metrics

    def after_step(self) -> dict[str, float]:
        """Evaluate on held-out prompts if it is time, and offer the policy's weights as the best."""
        together, every = self.sides.write(self.step, self.session.timer), self.config.evaluation.every
        if not self.held_out or (self.step % every and self.step < self.total_steps):
            return together
        with self.session.timer("evaluation"), self._optimizer_resting():
            metrics, rows = evaluate(self.config, self.roles, self.held_out, self.tokenizer, self._refresh_sampler)
        score = self.progress.add(metrics["evaluation/score_mean"])
        self.session.samples.log(self.step, rows)
        state = {"step": self.step, "figure": -score, "metrics": metrics}
        self.session.offer(f"evaluation_{self.step}", [self.policy], state)
        return metrics | together

    def ends_early(self) -> str | None:
        return self.progress.reason_to_stop(self.config.evaluation)

    def _optimizer_resting(self) -> AbstractContextManager[None]:
        return self.optimizer_memory.asleep() if self.config.offload.optimizer else nullcontext()

    def _weigh_text(self, metrics: dict[str, float]) -> None:
        """Use an iteration's gradient report, if there is one: to warn, and to adapt the text's weight."""
        if "policy/ptx_grad_norm" in metrics:
            norms = metrics["policy/ppo_grad_norm"], metrics["policy/ptx_grad_norm"]
            if not self.config.ppo.steers_text:
                self.dominance.update(*norms, self.text_weight.coef)
            self.text_weight.update(*norms)

    def _collect(self) -> Rollout:
        prompts = [self.prompts[i] for i in next(self.batches) for _ in range(self.config.ppo.samples_per_prompt)]
        require_same_batch(self.step, (prompt.tokens for prompt in prompts))
        self.session.guard.name("prompt", [prompt.id for prompt in prompts], [prompt.tokens for prompt in prompts])
        self._refresh_sampler()
        with self._optimizer_resting():
            rollout = collect_rollout(
                self.scoring,
                [prompt.tokens.tolist() for prompt in prompts],
                [prompt.id for prompt in prompts],
                self.config.rollout,
                self.tokenizer.stop_ids,
                self.tokenizer.pad_id,
                seed=(self.config.run.seed, self.step),
                micro_batch_size=self.config.ppo.micro_batch,
                old_logprobs=self.config.ppo.old_logprobs,
                recompute=self.config.ppo.recomputes(self.step + 1),
                timer=self.session.timer,
                meanwhile=self._pretrain_ahead,
                answers=lambda responses: texts_of(prompts, responses, self.tokenizer),
                stop_watch=self.tokenizer.stop_watch,
            )
        self._require_finite(rollout)
        return rollout

    def _require_finite(self, rollout: Rollout) -> None:
        self.session.guard.require_finite(rollout, self.config.ppo.micro_batch, self.roles.dp_sizes)

    def _refresh_sampler(self) -> None:
        """Copy the policy's current weights to the sampling layout."""
        if self.refresh_sampler is not None:
            with self.session.timer("resharding"):
                self.policy.role.settle()
                self.refresh_sampler()

    def _pretrain_ahead(self) -> None:
        """The pretraining part of the first update, which needs no advantages: while the critic's ranks score, or where
        its gradient must be told apart from PPO's."""
        ppo, has_time = self.config.ppo, not self.policy.role.layout.spans_world
        if not ppo.mixes_text or self.policy_step < 0:
            return
        report = ppo.steers_text or (ppo.reports_gradients and (self.step + 1) % ppo.gradient_report_every == 0)
        if has_time or report:
            with self.session.timer("pretraining_ahead"):
                self.pretrained_ahead = self.policy.accumulate(self._pretraining_microbatches(), keep=report)

    def _update_policy(self, minibatch: Experience) -> Update:
        """Run pretraining and PPO microbatches through one schedule into the same gradient buffers.

        Text comes first, as it does where it was accumulated ahead: sums in one order are the same to the last bit.
        """
        microbatches = self.policy_microbatches(minibatch, self.policy, self.config)
        ahead, self.pretrained_ahead = self.pretrained_ahead, None
        if self.config.ppo.mixes_text and ahead is None:
            microbatches = [*self._pretraining_microbatches(), *microbatches]
        return self.policy.update(microbatches, self.policy_lr(), ahead)

    def _pretraining_microbatches(self) -> list[Microbatch]:
        assert self.pretraining is not None
        ppo, data = self.config.ppo, self.pretraining.train
        count = ppo.ptx_ratio * ppo.minibatch_size
        numbers = [(self.pretraining_cursor + i) % len(data) for i in range(count)]
        sequences = [data[number] for number in numbers]
        self.session.guard.name("text", numbers, sequences)
        self.pretraining_cursor += count
        batch, weight = TokenBatch.pack(sequences, [1] * count), self.text_weight.coef
        return language_model_microbatches(batch, self.policy.role, ppo.ptx_micro_batch, "ptx/loss", weight=weight)

    def policy_lr(self) -> float:
        """Constant after a warmup over the policy's own iterations that starts at a tenth of the peak."""
        return constant_lr(max(self.policy_step, 0), self.config.policy.optimizer.lr, self.config.ppo.warmup_iterations)

    def _metrics(
        self, rollout: Rollout, totals_b: Tensor, returns_bt: Tensor, policy: list[Update], value: list[Update]
    ) -> dict[str, float]:
        cfg = self.config.ppo
        metrics = {
            **rollout_metrics(rollout, totals_b),
            **value_metrics(rollout, returns_bt, value),
            **policy_metrics(policy, self.policy_lr(), cfg.mixes_text),
            "samples": float((self.step + 1) * cfg.batch_size),
            "kl/coef": self.kl_control.coef,
            **({"ptx/coef": self.text_weight.coef} if policy and cfg.mixes_text else {}),
            "skipped_updates": float(sum(update.skipped for update in [*policy, *value])),
        }
        if cfg.tax_every and (self.step + 1) % cfg.tax_every == 0:
            with self.session.timer("tax"):
                samples = self.config.data.pretraining.held_out_samples
                roles = self.policy.role, self.roles.reference
                metrics |= pretraining_tax(*roles, self.pretraining, samples, cfg.ptx_micro_batch)
        cost = cost_of_iteration(self.config, self.policy.role, self.value, self.scoring, rollout, len(policy))
        self.tokens_seen += int(cost["step_tokens"])
        return metrics | cost | {"tokens": float(self.tokens_seen)}

    def close(self) -> None:
        self.roles.reward.close()
        self.sides.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.batches.state_dict(),
            "pretraining_cursor": self.pretraining_cursor,
            "tokens_seen": self.tokens_seen,
            "progress": asdict(self.progress),
            "kl_control": self.kl_control.state_dict(),
            "text_weight": self.text_weight.state_dict(),
            "text_dominates": self.dominance.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state["prompts"])
        self.pretraining_cursor = state["pretraining_cursor"]
        self.tokens_seen = state["tokens_seen"]
        self.progress = Progress(**state.get("progress", {}))
        self.kl_control.load_state_dict(state["kl_control"])
        self.text_weight.load_state_dict(state.get("text_weight", {}))
        self.dominance.in_a_row = state.get("text_dominates", 0)
