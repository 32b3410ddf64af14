"""Supervised fine-tuning (Ouyang et al. 2022, section 3.5 and appendix C.1), with pretraining text mixed in."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from reference import data, models
from reference.data import Settings
from reference.models import Adam, Weights
from reference.sampling import Vocabulary, respond, row_key


@dataclass
class Result:
    """The results of a run."""

    rows: list[dict[str, float]]
    """The rows of metrics.jsonl."""
    read: list[dict[str, list[list[int]]]]
    """Token ids of each step, by kind."""
    weights: dict[str, Weights]


def run(s: Settings) -> Result:
    policy, reward = models.language_model(s["policy.init_from"]), models.scalar_model(s["reward.init_from"])
    adam = Adam(policy, s, "policy")
    demonstrations = data.demonstrations(s["data.demonstrations"], s)
    validation = data.demonstrations(s["data.validation"], s)

    mix, batch_size = Fraction(str(s["data.pretraining_mix"])), s["sft.batch_size"]
    total = len(_counts(mix, batch_size, len(demonstrations), s["sft.epochs"]))
    text = iter(data.pretraining_text(s, math.floor(total * batch_size * mix)).train)
    order = data.shuffled_batches(len(demonstrations), len(demonstrations), s["run.seed"])
    left = next(order)  # of an epoch

    result, targets, best = Result([], [], {}), 0, -float("inf")
    for step, (texts_now, wanted) in enumerate(_counts(mix, batch_size, len(demonstrations), s["sft.epochs"])):
        chosen, left = [demonstrations[i] for i in left[:wanted]], left[wanted:]
        kinds = {
            "demonstration": [(d.tokens, d.prompt_length) for d in chosen],
            "pretraining": [(tokens, 1) for tokens in itertools.islice(text, texts_now)],
        }
        share = _text_share(float(mix), batch_size, texts_now)
        losses = {}
        for kind, weight in (("demonstration", 1 - share), ("pretraining", share)):
            if kinds[kind]:
                losses[kind] = models.text_loss(policy, kinds[kind], lambda part, w=weight: (w * part).backward())
        targets += sum(len(tokens) - first for batch in kinds.values() for tokens, first in batch)
        read_tokens = sum(len(tokens) for batch in kinds.values() for tokens, _ in batch)
        rate = models.cosine_rate(
            step, total, s["policy.optimizer.lr"], s["sft.final_lr_fraction"], s["sft.warmup_steps"]
        )
        row = {
            "step": step + 1,
            "sft/loss": (1 - share) * losses["demonstration"] + share * losses.get("pretraining", 0.0),
            **{f"sft/{kind}_loss": loss for kind, loss in losses.items()},
            "sft/pretraining_share": share,
            "sft/grad_norm": adam.step(rate),
            "sft/lr": rate,
            "samples": (step + 1) * batch_size,
            "tokens": targets,
            "skipped_updates": 0,
            **models.cost(policy, read_tokens),
        }
        if not left:
            left = next(order)
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
        result.read.append(
            {"demonstration": [d.tokens for d in chosen], "text": [tokens for tokens, _ in kinds["pretraining"]]}
        )
    result.weights["policy"] = models.weights_of(policy)
    return result


def _counts(mix: Fraction, batch_size: int, demonstrations: int, epochs: int) -> list[tuple[int, int]]:
    """(texts, demonstrations) of each step: of all examples so far, a share `mix` is text, rounded down; an epoch's last
    step has the remaining demonstrations."""
    counts: list[tuple[int, int]] = []
    for _ in range(epochs):
        left = demonstrations
        while left:
            examples = len(counts) * batch_size
            texts = math.floor((examples + batch_size) * mix) - math.floor(examples * mix)
            counts.append((texts, min(batch_size - texts, left)))
            left -= counts[-1][1]
    return counts


def _text_share(mix: float, batch_size: int, texts: int) -> float:
    """Weight of the mean over the text: the mix, but at least one example's share where only some batches have a text."""
    return min(max(mix, 1 / batch_size), 1 - 1 / batch_size) if texts else 0.0


@torch.no_grad()
def mean_reward(
    policy: torch.nn.Module, reward: torch.nn.Module, validation: list[data.Demonstration], s: Settings
) -> float:
    """Of responses to the first validation prompts (appendix C.1: the reward model's score chooses the epoch)."""
    vocabulary = Vocabulary.of(s)
    scores = []
    for number, demonstration in enumerate(itertools.islice(validation, s["sft.selection_samples"])):
        prompt = demonstration.tokens[: demonstration.prompt_length]
        response = respond(policy, prompt, row_key(s["run.seed"], 0, number, 0), s, "sampling", vocabulary)
        scores.append(models.scalars(reward, prompt + response.tokens)[-1].item())
    return sum(scores) / len(scores)
