"""Sample responses, score them, and measure the loss on held-out text."""

import json
import logging
from dataclasses import dataclass

import torch.distributed as dist

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import EvaluateConfig
from megatron_rlhf.data.examples import Examples
from megatron_rlhf.data.pretraining import TokenSequences
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.microbatches import TokenBatch, language_model_nll
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rollout.collect import sample_responses
from megatron_rlhf.rollout.types import Responses
from megatron_rlhf.runs.session import Session

log = logging.getLogger(__name__)

MICRO_BATCH_SIZE = 8


@dataclass
class Evaluator:
    """A frozen policy, perhaps a reward model, and prompts."""

    config: EvaluateConfig
    session: Session
    tokenizer: Tokenizer
    prompts: Examples[Prompt]
    held_out: TokenSequences | None
    policy: Role
    reward: Role | None
    few_shot: str | None = None

    def run(self) -> dict[str, float]:
        """Write `evaluate.output` in the run folder, a line a response, and log the means."""
        evaluate, run = self.config.evaluate, self.config.run
        self.session.begin(-1)  # an evaluation in the same folder replaces the one before
        chosen = [self.prompts[i] for i in range(min(evaluate.samples, len(self.prompts)))]
        tokens = [self._with_examples(prompt) for prompt in chosen]
        self._require_context(max(map(len, tokens)))
        ids = [prompt.id for prompt in chosen]
        tokenizer = self.tokenizer
        completions = sample_responses(
            self.policy, tokens, ids, self.config.sampling, tokenizer.stop_ids, (run.seed, 0), tokenizer.stop_watch
        )
        responses = Responses.pack(tokens, completions, self.tokenizer.pad_id, collectives.device())
        lengths = responses.response_lengths_b.float()
        metrics = {
            "rollout/response_length_mean": float(lengths.mean()),
            "rollout/stop_fraction": float(responses.stopped_b.float().mean()),
        }
        scores = None
        if self.reward is not None:
            values_bs = self.reward.values(responses.sequences, MICRO_BATCH_SIZE)
            scores_b = values_bs.gather(1, responses.last_b.unsqueeze(-1)).squeeze(-1)
            metrics["reward/score_mean"] = float(scores_b.mean())
            scores = scores_b.tolist()
        if self.held_out is not None:
            metrics["tax/pretraining_loss"] = self._held_out_loss()
        rows = [
            {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "response": self.tokenizer.decode(completion.tokens, continuation=True),
                "stopped": completion.stopped,
                "score": None if scores is None else scores[i],
            }
            for i, (prompt, completion) in enumerate(zip(chosen, completions, strict=True))
        ]
        if dist.get_rank() == 0:
            path = self.session.folder / evaluate.output
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            log.info("%d responses in %s", len(rows), path)
        self.session.samples.log(0, rows[:8])
        self.session.log(0, metrics)
        for name, value in metrics.items():
            log.info("%s %.4f", name, value)
        self.session.close()
        return metrics

    def _with_examples(self, prompt: Prompt) -> list[int]:
        if self.few_shot is None:
            return prompt.tokens.tolist()
        return self.tokenizer.encode(self.few_shot + prompt.text, bos=True)

    def _require_context(self, longest: int) -> None:
        limit, response = self.policy.model.max_sequence_length, self.config.sampling.max_response_tokens
        if longest + response > limit:
            raise UserError(
                f"sampling.max_response_tokens={response} after the longest prompt ({longest} tokens"
                f"{', evaluate.few_shot included' if self.few_shot else ''}) is more than the model's context of {limit}"
            )

    def _held_out_loss(self) -> float:
        assert self.held_out is not None
        count = min(len(self.held_out), self.config.data.pretraining.held_out_samples)
        batch = TokenBatch.pack([self.held_out[i] for i in range(count)], [1] * count)
        nll, tokens = language_model_nll(self.policy, batch, MICRO_BATCH_SIZE)
        return nll / tokens
