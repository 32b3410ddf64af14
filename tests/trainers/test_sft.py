"""Supervised fine-tuning on the toy recipe: which tokens count, the pretraining mix, the choice of the best epoch."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from ranks import run_ranks
from recipe import file_checksums, read_metrics, run_stage

from megatron_rlhf.checkpoint.naming import read_meta
from megatron_rlhf.models.microbatches import TokenBatch
from megatron_rlhf.runs.candidates import candidates


def run(recipe, name, *more, function=run_stage):
    results = run_ranks(1, function, "sft", recipe.sft(name, *more), timeout=400)
    return results, read_metrics(recipe.root / name)


def test_only_response_tokens_are_targets():
    batch = TokenBatch.pack([[5, 6, 7, 8], torch.tensor([1, 2])], [2, 1])
    assert batch.tokens_bs.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch.target_bs.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch.num_targets == 3


def test_targets_may_be_any_tokens():
    """Turns of a conversation: what comes after the last target need not be read."""
    batch = TokenBatch.pack([[5, 6, 7, 8, 9], [1, 2, 3]], [np.array([0, 1, 0, 1, 0], dtype=bool), 1])
    assert batch.target_bs.int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 1, 0, 0]]
    assert batch.num_targets == 4
    assert batch.sequences.lengths == [4, 3]
    assert batch.sequences.wanted_ns.int().tolist() == [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]]


def watch_batches(stage, arguments):
    """For each step: texts, demonstrations, and the mean loss over either by the model before the update, one sequence at a
    time."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.sft import SFTTrainer

    seen = []
    next_texts, next_demonstrations = SFTTrainer._next_texts, SFTTrainer._next_demonstrations

    def mean_loss(role, examples):
        total, count = 0.0, 0
        for tokens, first in examples:
            logprobs = role.logprobs(torch.as_tensor(tokens).long().unsqueeze(0), 1)[0, first - 1 :]
            total, count = total - float(logprobs.double().sum()), count + len(logprobs)
        return total / max(count, 1)

    def texts(self):
        found = next_texts(self)
        seen.append([[t.tolist() for t, _ in found], mean_loss(self.policy.role, found)])
        return found

    def demonstrations(self):
        found = next_demonstrations(self)
        seen[-1] += [len(found), mean_loss(self.policy.role, found)]
        return found

    SFTTrainer._next_texts, SFTTrainer._next_demonstrations = texts, demonstrations
    cli.run_stage(stage, arguments)
    return seen


@pytest.mark.parametrize(
    ("settings", "counts", "weights"),
    [
        ([], [(9, 3)] * 3, [0.25] * 3),
        # 1 text in 10 examples: some batches have one, which counts as one of their examples.
        (
            ["sft.batch_size=4", "data.pretraining_mix=0.1"],
            [(4, 0), (4, 0), (3, 1), (4, 0), (3, 1), (4, 0), (4, 0), (1, 1)],
            [0, 0, 0.25, 0, 0.25, 0, 0, 0.25],
        ),
    ],
    ids=["in_every_batch", "now_and_then"],
)
def test_each_kind_is_a_mean_of_its_own(recipe, settings, counts, weights):
    """All of a text's tokens are targets, of a demonstration only the response; the mix weighs the two means."""
    (seen,), rows = run(recipe, f"sft_mix_{len(counts)}", "sft.dropout=0", *settings, function=watch_batches)
    assert [(demonstrations, len(texts)) for texts, _, demonstrations, _ in seen] == counts
    for row, (texts, of_text, _, of_demonstrations), weight in zip(rows, seen, weights, strict=True):
        assert row["sft/pretraining_share"] == weight
        assert row["sft/loss"] == pytest.approx(weight * of_text + (1 - weight) * of_demonstrations, rel=1e-5)
        assert row["sft/demonstration_loss"] == pytest.approx(of_demonstrations, rel=1e-5)
        assert ("sft/pretraining_loss" in row) == bool(texts)
        assert row.get("sft/pretraining_loss", 0) == pytest.approx(of_text, rel=1e-5)
    read = [str(text) for texts, *_ in seen for text in texts]
    assert len(set(read)) == len(read) >= 3, "each batch takes the next texts"


def test_dropout_and_schedule(recipe):
    _, without = run(recipe, "sft_without", "sft.dropout=0", "sft.epochs=2")
    _, with_dropout = run(recipe, "sft_with", "sft.dropout=0.2", "sft.epochs=2")
    assert without[0]["sft/loss"] != with_dropout[0]["sft/loss"]
    cosine = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(6)]
    assert [row["sft/lr"] for row in without] == pytest.approx(cosine)
    assert [row["step"] for row in without] == list(range(1, 7))
    assert ["sft/validation_loss" in row for row in without] == [False, False, True] * 2


def test_the_epoch_with_the_lowest_validation_loss_is_named_best(recipe):
    """With a learning rate so high that the first epoch is best; of the others the last is kept."""
    _, rows = run(recipe, "sft_best", "sft.epochs=3", "policy.optimizer.lr=0.3", "sft.dropout=0", "run.keep_last=1")
    losses = [row["sft/validation_loss"] for row in rows if "sft/validation_loss" in row]
    best = losses.index(min(losses)) + 1
    folder = recipe.root / "sft_best" / "checkpoints"
    assert (folder / "best").read_text() == f"epoch_{best}"
    kept_last = {f"epoch_{best}", "epoch_3"}
    assert {path.name for path in folder.iterdir()} == {"best", "latest", "step_9"} | kept_last
    assert losses[0] != losses[-1]


def kept(recipe, name) -> dict[str, float]:
    """Candidate -> its figure."""
    folder = recipe.root / name / "checkpoints"
    return {path.name: read_meta(path)["state"]["figure"] for path in candidates(folder)}


def test_a_run_that_ends_inside_an_epoch_takes_no_epochs_name(recipe):
    """Nor does the end of a longer schedule, when it is resumed: no candidate reuses another's name."""
    schedule = ("sft.dropout=0", "policy.optimizer.lr=0.3", "run.keep_last=0")
    _, rows = run(recipe, "sft_inside", "sft.max_steps=5", *schedule)
    losses = {row["step"]: row["sft/validation_loss"] for row in rows if "sft/validation_loss" in row}
    assert kept(recipe, "sft_inside") == {"epoch_1": losses[3], "epoch_2_step_5": losses[5]}
    folder = recipe.root / "sft_inside" / "checkpoints"
    assert (folder / "best").read_text() == min(kept(recipe, "sft_inside").items(), key=lambda item: item[1])[0]
    before = {name: file_checksums(folder / name) for name in kept(recipe, "sft_inside")}
    _, rows = run(recipe, "sft_inside", "sft.max_steps=7", *schedule, "run.resume=true")
    assert list(kept(recipe, "sft_inside")) == ["epoch_1", "epoch_2_step_5", "epoch_2", "epoch_3_step_7"]
    for name, checksums in before.items():
        assert file_checksums(folder / name) == checksums, name


def test_the_best_is_untouched_by_a_resume_that_does_worse(recipe):
    """Stopped after the second epoch, the best, and resumed from before it with another learning rate."""
    base = ("sft.epochs=4", "sft.dropout=0", "run.save_every=4", "run.keep_last=2")
    run(recipe, "sft_worse", *base, "run.stop_at_step=7")
    folder = recipe.root / "sft_worse" / "checkpoints"
    assert (folder / "best").read_text() == "epoch_2"
    shutil.rmtree(folder / "step_7")  # as if the run had been killed before it
    (folder / "latest").unlink()
    before, figure = file_checksums(folder / "epoch_2"), kept(recipe, "sft_worse")["epoch_2"]
    _, rows = run(recipe, "sft_worse", *base, "policy.optimizer.lr=1e-9", "run.resume=true")
    later = [row["sft/validation_loss"] for row in rows if row["step"] > 4 and "sft/validation_loss" in row]
    assert min(later) > figure, "it learns no more: the rate was taken"
    assert (folder / "best").read_text() == "epoch_2"
    assert file_checksums(folder / "epoch_2") == before
    log = (recipe.root / "sft_worse" / "log.txt").read_text()
    assert "from here on policy.optimizer.lr=1e-09 (was 0.001)" in log


def test_without_anything_to_choose_by_no_epoch_is_written(recipe):
    arguments = [a for a in recipe.sft("sft_plain", "sft.epochs=2") if not a.startswith("data.validation=")]
    run_ranks(1, run_stage, "sft", arguments, timeout=400)
    names = sorted(path.name for path in (recipe.root / "sft_plain" / "checkpoints").iterdir())
    assert names == ["latest", "step_6"]


def test_a_reward_model_may_choose(recipe):
    settings = ("sft.select_by=reward_model", f"reward.init_from={recipe.root / 'reward_model'}")
    lengths = ("sampling.max_response_tokens=8", "sft.epochs=2", "sft.selection_samples=6")
    _, rows = run(recipe, "sft_chosen", *settings, *lengths, "policy.optimizer.lr=3e-2")
    rewards = [row["sft/validation_reward"] for row in rows if "sft/validation_reward" in row]
    assert len(set(rewards)) == 2, "of two equal ones, the first would be best whatever is looked for"
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


def samples(recipe, name):
    return [json.loads(line) for line in (recipe.root / name / "samples.jsonl").read_text().splitlines()]


def test_an_epoch_leaves_samples_that_change_nothing(recipe):
    """Dropout draws the same numbers with and without them."""
    settings = ("sft.epochs=2", "sft.dropout=0.2", "sampling.max_response_tokens=1000")
    _, with_samples = run(recipe, "sft_samples", *settings, "sft.logged_samples=3")
    _, without = run(recipe, "sft_no_samples", *settings, "sft.logged_samples=0")
    assert with_samples == without
    rows = samples(recipe, "sft_samples")
    assert [row["step"] for row in rows] == [3, 3, 3, 6, 6, 6]
    assert {row["prompt"] for row in rows} == {"say alpha:"}, "of the validation file"
    assert not (recipe.root / "sft_no_samples" / "samples.jsonl").exists()
    assert all(isinstance(row["response"], str) and isinstance(row["stopped"], bool) for row in rows)


def test_samples_that_a_reward_model_judged_have_its_score(recipe):
    more = (
        f"reward.init_from={recipe.root / 'reward_model'}",
        "sft.selection_samples=5",
        "sampling.max_response_tokens=8",
    )
    _, metrics = run(recipe, "sft_judged", *more, "sft.logged_samples=5")
    scores = [row["score"] for row in samples(recipe, "sft_judged")]
    assert sum(scores) / 5 == pytest.approx(metrics[-1]["sft/validation_reward"], rel=1e-5)
