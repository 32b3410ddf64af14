"""Numbers that are not finite: traced to role, microbatch and samples, and the samples kept for replay."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from recipe import Recipe, read_metrics, run_stage
from toys import GPT2_LIKE, make_role

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.rollout.types import Completion, Responses, Rollout
from megatron_rlhf.runs.guards import Guard, NotFinite


def replays(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "replay").glob("*.json")}


def spoil_loss_of_token(overrides: Sequence[str], token: int) -> None:
    """The log-probabilities of every microbatch with this token are not finite."""
    from megatron_rlhf.models.logits import Logits

    honest = Logits.logprobs

    def spoilt(self, tokens, temperature=1.0):
        logprobs = honest(self, tokens, temperature)
        return torch.where((tokens == token).any() & torch.is_grad_enabled(), torch.nan, logprobs)

    Logits.logprobs = spoilt
    run_stage("sft", overrides)


def test_a_loss_is_traced_to_the_demonstrations_of_its_microbatch(recipe: Recipe) -> None:
    """Two data-parallel ranks with microbatches of one sequence: exactly the corrupted samples are named."""
    lines = [json.loads(line) for line in (recipe.root / "demonstrations.jsonl").read_text().splitlines()]
    spoilt = {i for i, line in enumerate(lines) if "iota" in line["response"]}
    from megatron_rlhf.data.tokenizer import load_tokenizer

    (token,) = load_tokenizer(str(recipe.root / "tokenizer")).encode(" iota")
    overrides = ("data.pretraining_mix=0", "sft.micro_batch_size=1", "run.save_every=0")
    run_ranks(2, spoil_loss_of_token, recipe.sft("bad_loss", *overrides), token)
    folder = recipe.root / "bad_loss"
    named = set()
    for name, content in replays(folder).items():
        assert re.fullmatch(r"step_\d+_policy_update_1_rank_[01]\.json", name)
        assert content["role"] == "policy" and content["not_finite"] == "sft/demonstration_loss"
        for entry in content["microbatches"]:
            (sample,) = entry["samples"]
            named.add(lines[int(sample.removeprefix("demonstration "))]["response"])
            assert token in entry["tokens"][0] or entry["statistics"]["sft/demonstration_loss"] == "nan"
    assert named == {lines[i]["response"] for i in spoilt} != set()
    log = (folder / "log.txt").read_text()
    assert "update skipped" in log and read_metrics(folder)[-1]["step"] == 3, "the run goes on"


def spoil_gradient(overrides: Sequence[str]) -> None:
    from megatron_rlhf.models.logits import Logits

    honest = Logits.logprobs

    def spoilt(self, tokens, temperature=1.0):
        logprobs = honest(self, tokens, temperature)
        return logprobs + torch.sqrt(logprobs * 0)  # 0, whose gradient is infinity times 0

    Logits.logprobs = spoilt
    run_stage("sft", overrides)


def test_a_gradient_alone_keeps_the_whole_minibatch(recipe: Recipe) -> None:
    run_ranks(1, spoil_gradient, recipe.sft("bad_gradient", "run.stop_at_step=1", "data.validation=null"))
    log = (recipe.root / "bad_gradient" / "log.txt").read_text()
    assert re.search(
        r"step 1, policy: gradient not finite; microbatch 0, 1, .* of rank 0, made of \w+ \d+, .* and 4 more", log
    )
    (content,) = replays(recipe.root / "bad_gradient").values()
    assert content["not_finite"] == "gradient"
    samples = [sample for entry in content["microbatches"] for sample in entry["samples"]]
    assert len(samples) == 12
    assert {sample.split()[0] for sample in samples} == {"demonstration", "text"}


def spoil_role(overrides: Sequence[str], role: str, rows: list[int]) -> None:
    """Makes this role's output for these rows of the rollout not finite."""
    from megatron_rlhf.models.roles import Role

    def spoilt(method):
        def judge(self, *arguments, **named):
            result = method(self, *arguments, **named)
            if self.name == role:
                result[rows] = -torch.inf
            return result

        return judge

    Role.values, Role.logprobs = spoilt(Role.values), spoilt(Role.logprobs)  # type: ignore[method-assign]
    run_stage("ppo", overrides)


@pytest.mark.parametrize(
    ("role", "what"),
    [
        ("reward", "score"),
        pytest.param("value", "value", marks=pytest.mark.slow),
        pytest.param("reference", "log-probability", marks=pytest.mark.slow),
        pytest.param("policy", "log-probability", marks=pytest.mark.slow),
    ],
)
def test_a_rollout_is_traced_to_role_and_prompts_and_ends_the_run(recipe: Recipe, role: str, what: str) -> None:
    name = f"bad_{role}"
    overrides = recipe.ppo(name, recipe.root / "sft", recipe.root / "reward_model")
    place = r"prompt \d+ \(microbatch \d of data-parallel rank [01]\)"
    says = rf"NotFinite: not finite at step 1: {role}: {what} of {place}, {place}\. The samples are in .*step_1_rollout\.json"
    with pytest.raises(RankFailed, match=says):
        run_ranks(2, spoil_role, overrides, role, [3, 4])
    (content,) = replays(recipe.root / name).values()
    assert [entry["role"] for entry in content["microbatches"]] == [role, role]
    assert "-inf" in content["microbatches"][0]["values"]


@pytest.mark.parametrize("size", [2, Budget(tokens=20)])
@pytest.mark.parametrize("spoilt", ["score", "log-probability"])
def test_the_microbatch_that_is_named_is_the_one_that_the_row_was_in(size, spoilt, tmp_path: Path, world: None) -> None:
    """Prompts of 2 tokens, responses of 1 to 6: log-probabilities are read without the last token."""
    completions = [Completion([5] * n, [0.0] * n, True) for n in (1, 6, 2, 5, 3, 4)]
    responses = Responses.pack([[row, 7] for row in range(6)], completions, 0, torch.device("cpu"))
    table, scores = torch.zeros(responses.mask_bt.shape), torch.zeros(6)
    bad = table.clone()
    (scores if spoilt == "score" else bad)[4] = torch.nan
    rollout = Rollout(responses, table, table, bad, table, scores, torch.arange(100, 106))
    role = make_role(GPT2_LIKE, scalar=spoilt == "score")
    read: list[list[int]] = []
    role.modules[0].register_forward_hook(lambda module, args, output: read.append(args[0].flatten().tolist()))
    (role.values if spoilt == "score" else role.logprobs)(responses.sequences, size)
    (microbatch,) = [i for i, tokens in enumerate(read) if 4 in tokens[:1] or [4, 7] in map(list, pairwise(tokens))]
    guard = Guard(tmp_path)
    guard.begin(1)
    with pytest.raises(NotFinite, match=rf"prompt 104 \(microbatch {microbatch} of data-parallel rank 0\)"):
        guard.require_finite(rollout, size, dict.fromkeys(("policy", "reference", "reward", "value"), 1))


def test_rows_are_identified_whatever_was_cut_or_padded(tmp_path: Path) -> None:
    guard = Guard(tmp_path)
    guard.begin(3)
    guard.name("prompt", [7, 8], [np.array([5, 6]), np.array([5, 6, 7])])
    guard.name("text", [0], [torch.tensor([1, 2, 3, 4])])
    assert guard.identify([5, 6, 9, 9]) == "prompt 7"
    assert guard.identify([5, 6, 7, 9]) == "prompt 8"
    assert guard.identify([1, 2, 3, 4, 0, 0]) == "text 0"
    assert guard.identify([1, 2, 3]) == "text 0"
    assert guard.identify([2, 3]) == "unknown sample"
    guard.begin(4)
    assert guard.identify([1, 2, 3]) == "unknown sample"
