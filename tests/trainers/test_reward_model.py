"""The reward model on the toy recipe: validation by K, the closing bias, accuracy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage, write_lines

from megatron_rlhf.data.comparisons import Comparison
from megatron_rlhf.trainers.reward_model import RankedBatch, RewardModelTrainer


def tokens(*ids):
    return np.array(ids, dtype=np.int32)


def element(prompt, *rankings):
    """A comparison of single-token responses: (responses, ranks) each."""
    return Comparison.of(tokens(*prompt), [([tokens(r) for r in rs], ranks) for rs, ranks in rankings])


def test_pack_lays_out_one_row_a_completion():
    batch = RankedBatch.pack(
        [
            Comparison.of(tokens(1, 2), [((tokens(3), tokens(4, 5, 6)), (1, 0))]),
            Comparison.of(tokens(7), [((tokens(8), tokens(9, 9)), (0, 2)), ((tokens(9, 9), tokens(8)), (0, 1))]),
            element([7], ([8, 9, 6], [0, 2, 2])),
        ]
    )
    assert batch.sequences.tokens_ns.tolist() == [
        [1, 2, 3, 0, 0],
        [1, 2, 4, 5, 6],
        [7, 8, 0, 0, 0],
        [7, 9, 9, 0, 0],
        [7, 8, 0, 0, 0],
        [7, 9, 0, 0, 0],
        [7, 6, 0, 0, 0],
    ]
    assert batch.sequences.lengths == [3, 5, 2, 3, 2, 2, 2]
    assert batch.sequences.wanted(range(7)).nonzero()[:, 1].tolist() == [2, 4, 1, 2, 1, 1, 1]
    assert batch.sequences.prompt_index == [0, 0, 1, 1, 2, 2, 2]
    pairs = zip(batch.better_q.tolist(), batch.worse_q.tolist(), batch.prompt_index_q.tolist(), strict=True)
    assert list(pairs) == [(1, 0, 0), (2, 3, 1), (3, 2, 1), (4, 5, 2), (4, 6, 2)]
    assert batch.completions_q.tolist() == [2, 2, 2, 3, 3]


def test_validation_counts_pairs_over_all_and_by_k():
    """Scores given by hand: K = 2 has 1 and a tie (one half) of 3 pairs right, and so does K = 3. The last prompt was ranked
    twice, as three and as a pair."""
    one, two = element([1], ([2, 3], [0, 1])), element([1], ([2, 3], [1, 0]))
    three = element([1], ([2, 3, 4], [0, 1, 2]), ([4, 2], [1, 0]))
    trainer = SimpleNamespace(validation=[one, two, three])
    scores = torch.tensor([5.0, 1.0, 5.0, 1.0, 1.0, 4.0, 1.0])
    trainer._scores = lambda batch: scores
    metrics = RewardModelTrainer.validate(trainer)
    assert metrics["rm/validation_accuracy_k2"] == pytest.approx(1.5 / 3)
    assert metrics["rm/validation_accuracy_k3"] == pytest.approx(1.5 / 3)
    assert metrics["rm/validation_accuracy"] == pytest.approx(3 / 6)

    def loss(*margins):
        return -np.mean([np.log(1 / (1 + np.exp(-margin))) for margin in margins])

    assert metrics["rm/validation_loss"] == pytest.approx((loss(4) + loss(-4) + loss(-3, 0, 3, 0)) / 3, rel=1e-6)
    assert RewardModelTrainer.validate(SimpleNamespace(validation=[])) == {}


def mean_score(recipe, folder):
    """Scores of demonstrations, by the model reloaded from the checkpoint, one at a time."""
    from toys import make_role

    from megatron_rlhf.conversion.starting_point import REWARD, StartingPoint
    from megatron_rlhf.data.demonstrations import load_demonstrations
    from megatron_rlhf.data.tokenizer import load_tokenizer

    source = StartingPoint.find(str(folder), "reward.init_from", REWARD)
    role = make_role(source.model, name="reward", scalar=True)
    source.load_into(role)
    tokenizer = load_tokenizer(recipe.root / "tokenizer")
    examples = load_demonstrations(recipe.root / "demonstrations.jsonl", tokenizer, 64, 64, 64)
    scores = [role.values(torch.tensor(np.array([d.tokens])).long(), 1)[0, -1] for d in examples]
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std())


@pytest.mark.parametrize(
    "layout", [(1, []), (2, ["parallel.pipeline=2"]), (2, ["parallel.distributed_optimizer=true"])]
)
def test_the_closing_bias_makes_demonstrations_score_zero_on_average(layout, recipe, tmp_path):
    ranks, overrides = layout
    demonstrations = f"data.demonstrations={recipe.root / 'demonstrations.jsonl'}"
    arguments = recipe.reward_model(str(tmp_path / "run"), recipe.root / "sft", demonstrations, *overrides)
    run_ranks(ranks, run_stage, "reward_model", arguments, timeout=400)
    ((mean, spread),) = run_ranks(1, mean_score, recipe, tmp_path / "run")
    assert mean == pytest.approx(0, abs=1e-5)
    assert spread > 1e-4, "they are not all alike"


def head_biases(stage, arguments):
    """The head's bias after every update, and at the end."""
    from megatron_rlhf import cli
    from megatron_rlhf.trainers.step import TrainedRole

    seen = []
    original = TrainedRole.update

    def watched(self, *args, **more):
        update = original(self, *args, **more)
        seen.append(float(self.role.modules[0].output_layer.bias))
        return update

    TrainedRole.update = watched
    trainer = cli.run_stage(stage, arguments)
    return seen, float(trainer.reward.role.modules[0].output_layer.bias)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bias_does_not_move_before_it_is_centred(precision, recipe, tmp_path):
    """A ranking does not determine it; Adam would turn the rounding of its gradient into whole steps."""
    arguments = recipe.reward_model(str(tmp_path / "run"), recipe.root / "sft", f"precision={precision}")
    ((seen, last),) = run_ranks(1, head_biases, "reward_model", arguments, timeout=200)
    assert seen == [0.0] * 4
    assert abs(last) > 1e-3


def test_it_learns_the_ranking(recipe):
    """Fewer words are better: a rule that holds for every prompt."""
    settings = ("reward_model.epochs=6", "reward.optimizer.lr=3e-3", "reward_model.validate_every=4")
    run_ranks(
        1, run_stage, "reward_model", recipe.reward_model("rm_learns", recipe.root / "sft", *settings), timeout=400
    )
    rows = read_metrics(recipe.root / "rm_learns")
    assert rows[-1]["rm/validation_accuracy"] > 0.9
    assert rows[-1]["rm/loss"] < 0.5 * rows[0]["rm/loss"]
    assert ["rm/validation_accuracy" in row for row in rows] == [row["step"] % 4 == 0 for row in rows]
    assert rows[0]["rm/lr"] == pytest.approx(3e-3)
    assert 3e-4 < rows[-1]["rm/lr"] < 4e-4, "cosine down to a tenth"


def test_accuracy_is_of_the_whole_batch(recipe):
    rows = read_metrics(recipe.root / "reward_model")
    for row in rows:
        pairs = row["rm/accuracy"] * row["rm/pairs"]
        assert 2 * pairs == pytest.approx(round(2 * pairs), abs=1e-6), "pairs and halves of pairs"
    assert sum(row["samples"] for row in rows[-1:]) == 20


def test_a_prompt_with_a_tie_among_others_keeps_its_strict_pairs(recipe, tmp_path):
    record = {"prompt": "say beta:", "responses": [" beta", " beta beta", " eta"], "ranks": [0, 1, 1]}
    source = write_lines(tmp_path / "ties.jsonl", [record] * 4)
    arguments = recipe.reward_model(str(tmp_path / "run"), recipe.root / "sft", f"data.comparisons={source}")
    run_ranks(1, run_stage, "reward_model", [*arguments, "data.validation_fraction=0"], timeout=400)
    (row,) = read_metrics(tmp_path / "run")
    assert row["rm/pairs"] == 8
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["rm/loss"] > 0


def test_samples_are_held_out_responses_with_scores_and_what_people_preferred(recipe):
    """The last ones are scored after the bias is set: as the saved model scores them."""
    name = "rm_samples"
    arguments = recipe.reward_model(name, recipe.root / "sft", "reward_model.validate_every=2")
    run_ranks(1, run_stage, "reward_model", arguments, timeout=300)
    rows = [json.loads(line) for line in (recipe.root / name / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4}
    of_last = [row for row in rows if row["step"] == 4]
    assert len({row["prompt"] for row in of_last}) == 3
    for prompt in {row["prompt"] for row in of_last}:
        mine = [row for row in of_last if row["prompt"] == prompt]
        assert sum(row["preferred"] for row in mine) == sum(row["rejected"] for row in mine) > 0
        shortest = min(mine, key=lambda row: len(row["response"]))
        assert shortest["rejected"] == 0, "fewer words are better"
    again = recipe.reward_model(
        "rm_samples_again",
        recipe.root / name,
        "reward_model.validate_every=1",
        "run.stop_at_step=1",
        "reward.optimizer.lr=1e-12",
    )
    run_ranks(1, run_stage, "reward_model", again, timeout=300)
    rows = [json.loads(line) for line in (recipe.root / "rm_samples_again" / "samples.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in of_last], abs=1e-5)
