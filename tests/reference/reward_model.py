"""The reward model (Ouyang et al. 2022, section 3.5, equation 1, and appendix C.2)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from reference import data, models
from reference.data import Ranked, Settings
from reference.models import Adam
from reference.sft import Result


def run(s: Settings) -> Result:
    reward = models.scalar_model(s["reward.init_from"], head_seed=s["run.seed"])
    reward.score.bias.requires_grad_(False)  # no comparison depends on it: it is set at the end
    adam = Adam(reward, s, "reward")
    training = data.rankings(s["data.comparisons"], s)
    if "data.validation" in s:
        validation = data.rankings(s["data.validation"], s)
    else:
        training, validation = data.hold_out(training, s["data.validation_fraction"], s["run.seed"])
    batch_size = s["reward_model.batch_size"]
    total = s["reward_model.epochs"] * -(-len(training) // batch_size)
    batches = data.shuffled_batches(len(training), batch_size, s["run.seed"])

    result = Result([], [], {})
    for step in range(total):
        batch = [training[i] for i in next(batches)]
        rate = models.cosine_rate(
            step, total, s["reward.optimizer.lr"], s["reward_model.final_lr_fraction"], s["reward_model.warmup_steps"]
        )
        loss, pairs, correct = 0.0, 0, 0.0
        for ranking in batch:
            part, margins = comparison_loss(reward, ranking)
            (part / len(batch)).backward()
            loss += part.item() / len(batch)
            pairs, correct = pairs + len(margins), correct + count_correct(margins.tolist())
        row = {
            "step": step + 1,
            "rm/loss": loss,
            "rm/accuracy": correct / pairs,
            "rm/pairs": pairs,
            "rm/grad_norm": adam.step(rate),
            "rm/lr": rate,
            "samples": (step + 1) * batch_size,
            "skipped_updates": 0,
            **models.cost(reward, sum(len(text) for ranking in batch for text in ranking.texts)),
        }
        if (step + 1) % s["reward_model.validate_every"] == 0 or step + 1 == total:
            row |= validate(reward, validation)
        result.rows.append(row)
        result.read.append({"comparison": [text for ranking in batch for text in ranking.texts]})
    if s["data.demonstrations"] is None:
        center(reward, [ranking.texts[i] for ranking in training for i in ranking.best])
    else:
        center(reward, [d.tokens for d in data.demonstrations(s["data.demonstrations"], s)])
    result.weights["reward"] = models.weights_of(reward)
    return result


def comparison_loss(reward: torch.nn.Module, ranking: Ranked) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 1 for one prompt: the mean over its pairs of -log sigmoid(r_better - r_worse); the margins."""
    scores = [models.scalars(reward, text)[-1] for text in ranking.texts]
    margins = torch.stack([scores[better] - scores[worse] for better, worse, _ in ranking.pairs])
    return -torch.nn.functional.logsigmoid(margins).mean(), margins.detach()


def count_correct(margins: Iterable[float]) -> float:
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)


@torch.no_grad()
def validate(reward: torch.nn.Module, rankings: list[Ranked]) -> dict[str, float]:
    """Accuracy over all held-out pairs, and over those of K responses that were ranked together."""
    losses, by_k = [], defaultdict(list)
    for ranking in rankings:
        loss, margins = comparison_loss(reward, ranking)
        losses.append(loss.item())
        for (_, _, k), margin in zip(ranking.pairs, margins.tolist(), strict=True):
            by_k[k].append(margin)
    every = [margin for margins in by_k.values() for margin in margins]
    return {
        "rm/validation_loss": sum(losses) / len(losses),
        "rm/validation_accuracy": count_correct(every) / len(every),
        **{f"rm/validation_accuracy_k{k}": count_correct(margins) / len(margins) for k, margins in by_k.items()},
    }


@torch.no_grad()
def center(reward: torch.nn.Module, texts: list[list[int]]) -> None:
    """A bias makes these score 0 on average (section 3.5, after equation 1)."""
    scores = [models.scalars(reward, text)[-1].item() for text in texts]
    reward.score.bias -= sum(scores) / len(scores)
