"""Supervised fine-tuning (Ouyang et al. 2022, section 3.5 and appendix C.1), with pretraining text mixed in."""

import itertools
from dataclasses import dataclass

import torch
from reference import data, models
from reference.data import Settings
from reference.models import Adam, Weights
from reference.sampling import Vocabulary, respond, row_key


@dataclass
class Result:
    """What a run leaves behind."""

    rows: list[dict[str, float]]
    """Of metrics.jsonl."""
    read: list[dict[str, list[list[int]]]]
    """Token ids of each step, by kind."""
    weights: dict[str, Weights]


def run(s: Settings) -> Result:
    policy, reward = models.language_model(s["policy.init_from"]), models.scalar_model(s["reward.init_from"])
    adam = Adam(policy, s, "policy")
    demonstrations = data.demonstrations(s["data.demonstrations"], s)
    validation = data.demonstrations(s["data.validation"], s)

    texts_a_step = round(s["sft.batch_size"] * s["data.pretraining_mix"])
    batch_size = s["sft.batch_size"] - texts_a_step
    steps_an_epoch = -(-len(demonstrations) // batch_size)
    total = s["sft.epochs"] * steps_an_epoch
    text = data.pretraining_text(s, total * texts_a_step).train
    batches = data.shuffled_batches(len(demonstrations), batch_size, s["run.seed"])

    result, targets, best = Result([], [], {}), 0, -float("inf")
    for step in range(total):
        chosen = [demonstrations[i] for i in next(batches)]
        texts = text[step * texts_a_step :][:texts_a_step]
        batch = [(d.tokens, d.prompt_length) for d in chosen] + [(tokens, 1) for tokens in texts]
        targets += sum(len(tokens) - first for tokens, first in batch)
        read_tokens = len(batch) * max(len(tokens) for tokens, _ in batch)
        rate = models.cosine_rate(
            step, total, s["policy.optimizer.lr"], s["sft.final_lr_fraction"], s["sft.warmup_steps"]
        )
        loss = models.text_loss(policy, batch, torch.Tensor.backward)
        row = {
            "step": step + 1,
            "sft/loss": loss,
            "sft/grad_norm": adam.step(rate),
            "sft/lr": rate,
            "samples": (step + 1) * s["sft.batch_size"],
            "tokens": targets,
            "skipped_updates": 0,
            **models.cost(policy, read_tokens),
        }
        if (step + 1) % steps_an_epoch == 0:
            with torch.no_grad():
                row["sft/validation_loss"] = models.text_loss(
                    policy, [(d.tokens, d.prompt_length) for d in validation], lambda part: None
                )
                row["sft/validation_reward"] = mean_reward(policy, reward, validation, s)
            merit = (
                row["sft/validation_reward"] if s["sft.select_by"] == "reward_model" else -row["sft/validation_loss"]
            )
            if merit > best:
                best, result.weights["best"] = merit, models.weights_of(policy)
        result.rows.append(row)
        result.read.append({"demonstration": [d.tokens for d in chosen], "text": texts})
    result.weights["policy"] = models.weights_of(policy)
    return result


@torch.no_grad()
def mean_reward(
    policy: torch.nn.Module, reward: torch.nn.Module, validation: list[data.Demonstration], s: Settings
) -> float:
    """Of responses to the first validation prompts (appendix C.1: the epoch is chosen by the reward model's score)."""
    vocabulary = Vocabulary.of(s)
    scores = []
    for number, demonstration in enumerate(itertools.islice(validation, s["sft.selection_samples"])):
        prompt = demonstration.tokens[: demonstration.prompt_length]
        response = respond(policy, prompt, row_key(s["run.seed"], 0, number, 0), s, "sampling", vocabulary)
        scores.append(models.scalars(reward, prompt + response.tokens)[-1].item())
    return sum(scores) / len(scores)
