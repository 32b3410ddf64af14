"""Supervised fine-tuning on the toy recipe: which tokens count, the pretraining mix, the choice of the best epoch."""

import json
import math

import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage

from megatron_rlhf.models.microbatches import TokenBatch


def run(recipe, name, *more, function=run_stage):
    results = run_ranks(1, function, "sft", recipe.sft(name, *more), timeout=400)
    return results, read_metrics(recipe.root / name)


def test_only_response_tokens_are_targets():
    batch = TokenBatch.pack([[5, 6, 7, 8], torch.tensor([1, 2])], [2, 1])
    assert batch.tokens_bs.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch.target_bs.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch.num_targets == 3


def first_batch(stage, arguments):
    """The first batch, and its loss by the model before the first update, one sequence at a time."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.sft import SFTTrainer

    seen = []
    original = SFTTrainer._next_batch

    def watched(self):
        batch = original(self)
        total = 0.0
        for tokens, target in zip(batch.tokens_bs, batch.target_bs, strict=True):
            logprobs = self.policy.role.logprobs(tokens.unsqueeze(0), 1)[0]
            total -= float(logprobs[target[1:]].double().sum())
        seen.append((batch.target_bs[:, 1].tolist(), total / int(batch.target_bs.sum()), batch.tokens_bs.tolist()))
        return batch

    SFTTrainer._next_batch = watched
    cli.run_stage(stage, arguments)
    return seen


def test_loss_and_mix_of_every_batch(recipe):
    (seen,), rows = run(recipe, "sft_batches", "sft.dropout=0", function=first_batch)
    for row, (plain_text, loss, _) in zip(rows, seen, strict=True):
        assert row["sft/loss"] == pytest.approx(loss, rel=1e-5)
        assert plain_text == [False] * 9 + [True] * 3, "a quarter of 12 is text, all of whose tokens count"
    texts = [str(row) for _, _, batch in seen for row in batch[9:]]
    assert len(set(texts)) == 9, "each batch takes the next text"


def test_dropout_and_schedule(recipe):
    _, without = run(recipe, "sft_without", "sft.dropout=0", "sft.epochs=2")
    _, with_dropout = run(recipe, "sft_with", "sft.dropout=0.2", "sft.epochs=2")
    assert without[0]["sft/loss"] != with_dropout[0]["sft/loss"]
    cosine = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(6)]
    assert [row["sft/lr"] for row in without] == pytest.approx(cosine)
    assert [row["step"] for row in without] == list(range(1, 7))
    assert ["sft/validation_loss" in row for row in without] == [False, False, True] * 2


def test_the_epoch_with_the_lowest_validation_loss_is_named_best(recipe):
    """A learning rate so high that the first epoch is best."""
    _, rows = run(recipe, "sft_best", "sft.epochs=3", "policy.optimizer.lr=0.3", "sft.dropout=0")
    losses = [row["sft/validation_loss"] for row in rows if "sft/validation_loss" in row]
    best = losses.index(min(losses)) + 1
    folder = recipe.root / "sft_best" / "checkpoints"
    assert (folder / "best").read_text() == f"epoch_{best}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "epoch_1",
        "epoch_2",
        "epoch_3",
        "latest",
        "step_9",
    ]
    assert losses[0] != losses[-1]


def test_a_reward_model_may_choose(recipe):
    settings = ("sft.select_by=reward_model", f"reward.init_from={recipe.root / 'reward_model'}")
    lengths = ("sampling.max_response_tokens=8", "sft.epochs=2", "sft.selection_samples=6")
    _, rows = run(recipe, "sft_chosen", *settings, *lengths)
    rewards = [row["sft/validation_reward"] for row in rows if "sft/validation_reward" in row]
    assert len(rewards) == 2
    best = (recipe.root / "sft_chosen" / "checkpoints" / "best").read_text()
    assert best == f"epoch_{rewards.index(max(rewards)) + 1}"


def test_text_alone_trains_a_language_model(recipe):
    arguments = [
        a for a in recipe.sft("sft_text") if not a.startswith(("data.demonstrations", "data.validation", "sft.epochs"))
    ]
    more = ["data.pretraining_mix=1", "sft.max_steps=20", "policy.optimizer.lr=5e-3", "sft.dropout=0"]
    # The longest text that fits: every position of the context is read, and one token more is predicted.
    longest = "data.pretraining.sequence_length=64"
    run_ranks(1, run_stage, "sft", [*arguments, *more, longest], timeout=400)
    rows = read_metrics(recipe.root / "sft_text")
    assert rows[-1]["sft/loss"] < 0.8 * rows[0]["sft/loss"]
    assert rows[-1]["sft/validation_loss"] < rows[0]["sft/loss"]
    assert rows[-1]["tokens"] == 20 * 12 * 64


def test_bf16_learns(recipe):
    _, rows = run(recipe, "sft_bf16", "precision=bf16", "sft.epochs=3", "policy.optimizer.lr=3e-3")
    assert rows[-1]["sft/loss"] < rows[0]["sft/loss"] - 0.3
    meta = json.loads((recipe.root / "sft_bf16" / "checkpoints" / "step_9" / "meta.json").read_text())
    assert meta["state"]["step"] == 9
