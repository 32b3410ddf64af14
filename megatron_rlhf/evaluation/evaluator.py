"""Sample responses, score them, and measure the loss on held-out text."""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import EvaluateConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.data.comparisons import Ranking
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.pretraining import TokenSequences
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.evaluation.benchmarks.run import Benchmarks
from megatron_rlhf.evaluation.judging import figures, judged
from megatron_rlhf.evaluation.results import GREEDY, JUDGED
from megatron_rlhf.labeling import collecting
from megatron_rlhf.labeling.types import Task
from megatron_rlhf.models.microbatches import TokenBatch, language_model_nll
from megatron_rlhf.models.roles import Role
from megatron_rlhf.monitoring.files import write_lines
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rewards.processes import Answers
from megatron_rlhf.rewards.reward import Reward, Scores, several
from megatron_rlhf.rollout.collect import sample_responses
from megatron_rlhf.rollout.types import Completion, Responses
from megatron_rlhf.runs.session import Session

log = logging.getLogger(__name__)

MICRO_BATCH_SIZE = 8


@dataclass(frozen=True)
class Questions:
    """Prompts to answer."""

    prompts: Sequence[Prompt]
    inputs: list[list[int]]
    """What the policy reads for each prompt, which may start with few-shot examples."""
    policy: str
    """Its name in the output."""


@dataclass
class Evaluator:
    """A frozen policy, optionally a reward model, and what is measured of them."""

    config: EvaluateConfig
    session: Session
    tokenizer: Tokenizer
    questions: Questions | None
    output: Path
    held_out: TokenSequences | None
    benchmarks: Benchmarks | None
    rankings: Sequence[tuple[Record, Ranking]]
    """Of people, to measure the reward model on."""
    policy: Role | None
    """None if only the reward model is measured."""
    reward: Reward | None
    """What scores answers; comparisons measure its model."""

    def run(self) -> dict[str, float]:
        """Write `evaluate.output` in the run folder, one response per line, and log the means."""
        self.session.begin(-1)  # an evaluation in the same folder replaces the previous one
        metrics: dict[str, float] = {}
        if self.questions is not None:
            metrics |= self._answers(self.questions)
        if self.held_out is not None:
            metrics["tax/pretraining_loss"] = self._held_out_loss()
        if self.benchmarks is not None:
            metrics |= self._benchmarks(self.benchmarks)
        if self.rankings:
            metrics |= self._judge()
        self.session.log(0, metrics)
        for name, value in metrics.items():
            log.info("%s %.4f", name, value)
        self.session.close()
        if self.reward is not None:
            self.reward.close()
        return metrics

    def _answers(self, questions: Questions) -> dict[str, float]:
        asked = self.config.evaluate
        completions, places, sources = [], [], []
        greedy = dataclasses.replace(self.config.sampling, temperature=0.0, beams=1)
        ways = ((asked.samples_per_prompt, self.config.sampling, ""), (int(asked.greedy), greedy, GREEDY))
        for times, sampling, way in ways:
            repeated = [i for i in range(len(questions.prompts)) for _ in range(times)]
            completions += self._sample(questions, repeated, sampling)
            places += repeated
            sources += [questions.policy + way] * len(repeated)
        inputs = [questions.inputs[i] for i in places]
        responses = Responses.pack(inputs, completions, self.tokenizer.pad_id, collectives.device())
        lengths = responses.response_lengths_b.float()
        metrics = {
            "rollout/response_length_mean": float(lengths.mean()),
            "rollout/stop_fraction": float(responses.stopped_b.float().mean()),
        }
        prompts = [questions.prompts[place] for place in places]
        texts = [self.tokenizer.decode(completion.tokens, continuation=True) for completion in completions]
        scores = None if self.reward is None else self._scores(self.reward, prompts, texts, responses)
        if scores is not None:
            metrics |= scores.means
        rows: list[dict[str, Any]] = [
            {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "response": texts[i],
                "stopped": completion.stopped,
                "score": None if scores is None else float(scores.total_b[i]),
                **(
                    {} if scores is None else {name: float(part_b[i]) for name, part_b in several(scores.parts).items()}
                ),
                "source": source,
                **({"given": prompt.given} if prompt.messages else {}),
                **({"record": dict(prompt.record)} if prompt.record else {}),
            }
            for i, (prompt, completion, source) in enumerate(zip(prompts, completions, sources, strict=True))
        ]
        rows.sort(key=lambda row: row["prompt_id"])  # stable: samples, then the greedy answer
        if dist.get_rank() == 0:
            write_lines(self.output, rows)
            log.info("%d responses in %s", len(rows), self.output)
            if asked.labels is not None:
                self._collect(asked.labels, questions, rows)
        self.session.samples.log(0, rows[:8])
        return metrics

    def _scores(self, reward: Reward, prompts: Sequence[Prompt], texts: list[str], responses: Responses) -> Scores:
        """By reward models and functions, as in PPO."""
        columns = [dict(prompt.record) for prompt in prompts]
        asked = Answers([prompt.text for prompt in prompts], texts, columns, [prompt.id for prompt in prompts])
        reward.ask_functions(lambda: asked)
        return reward.scores(reward.read(responses.sequences, MICRO_BATCH_SIZE))

    def _sample(self, questions: Questions, places: Sequence[int], sampling: SamplingConfig) -> list[Completion]:
        if not places:  # no greedy answers
            return []
        assert self.policy is not None
        ids, seed, tokenizer = [questions.prompts[i].id for i in places], (self.config.run.seed, 0), self.tokenizer
        inputs = [questions.inputs[i] for i in places]
        return sample_responses(self.policy, inputs, ids, sampling, tokenizer.stop_ids, seed, tokenizer.stop_watch)

    def _collect(self, labels: str, questions: Questions, rows: Sequence[dict[str, Any]]) -> None:
        prompts = {prompt.text: prompt for prompt in questions.prompts}
        answers: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            answers.setdefault(row["prompt"], []).append(row)
        tasks = [
            Task.of(
                prompts[text].given, [row["response"] for row in of], [row["source"] for row in of], prompts[text].user
            )
            for text, of in answers.items()
        ]
        count = collecting.collect(Path(labels), tasks)
        log.info("%s: answers of %s are added; %d prompts to rank", labels, questions.policy, count)

    def _judge(self) -> dict[str, float]:
        assert self.reward is not None
        (model,) = self.reward.models.values()
        rows = judged(model, self.rankings, MICRO_BATCH_SIZE)
        if dist.get_rank() == 0:
            path = self.session.folder / JUDGED
            write_lines(path, rows)
            log.info("%d scored rankings in %s", len(rows), path)
        return figures(rows)

    def _benchmarks(self, benchmarks: Benchmarks) -> dict[str, float]:
        from megatron_rlhf.evaluation.benchmarks.harness import HarnessModel  # an extra, and slow to import

        assert self.policy is not None
        model = HarnessModel(self.policy, self.tokenizer, MICRO_BATCH_SIZE, self.config.sampling, self.config.run.seed)
        folder = self.output.parent / "benchmarks"
        figures = benchmarks.run(model, folder, is_first=dist.get_rank() == 0)
        if figures:
            log.info("benchmarks in %s", folder)
        return {f"benchmark/{name}": value for name, value in figures.items()}

    def _held_out_loss(self) -> float:
        assert self.held_out is not None
        assert self.policy is not None
        count = min(len(self.held_out), self.config.data.pretraining.held_out_samples)
        batch = TokenBatch.pack([self.held_out[i] for i in range(count)], [1] * count)
        nll, tokens = language_model_nll(self.policy, batch, MICRO_BATCH_SIZE)
        return nll / tokens


RUNS_OWN = {
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "log.txt", "report.html", "stage", "command", ".lock", JUDGED),
    *("checkpoints", "cache", "replay", "tensorboard", "evaluation", "benchmarks", "timeline.jsonl", "restarts.tsv"),
}
"""Other files and folders in a run folder."""


def output_file(run_dir: Path, output: str) -> Path:
    """Where the responses are written; creates its folder. Only an earlier evaluation's file is replaced.

    Raises:
        UserError: the file is one of the run's own, or anything but responses, or cannot be written.
    """
    path = run_dir / output
    inside = (
        path.resolve().relative_to(run_dir.resolve()).parts if path.resolve().is_relative_to(run_dir.resolve()) else ()
    )
    if not output or path.is_dir() or (inside[:1] and inside[0] in RUNS_OWN):
        raise UserError(
            f"evaluate.output={output}: {path} is kept for the run itself; name a file such as evaluation.jsonl"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _holds_responses(path):
            raise UserError(f"evaluate.output={output}: {path} is there and holds no responses; name another file")
        writable = os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError as error:
        raise UserError(f"evaluate.output={output}: {path} cannot be written: {error.strerror}") from error
    if not writable:
        raise UserError(f"evaluate.output={output}: {path} cannot be written")
    return path


def _holds_responses(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(2**24)
    try:
        return not first or {"prompt_id", "response"} <= set(json.loads(first))
    except (ValueError, TypeError):
        return False
