"""SFT, reward model and PPO-ptx from one checkpoint at many layouts: all figures, samples and weights equal those of one rank.

Tolerances, all in fp32, where one rounding is 6e-8 and sums of some hundred terms have another order:

- figures and weights: 1e-5 of their size (for a weight: of its tensor's largest). Adam's epsilon is 1e-4, well above the
  rounding of gradients that are zero by symmetry (a key's bias shifts all scores alike); with the default 1e-8 Adam
  would blow that rounding up to whole steps.
- differences of nearly equal numbers have an absolute tolerance, as their size says nothing about the terms': the policy's
  loss (advantages have mean 0), log-ratios (KL; a log-probability of about 5 nats is accurate to 5e-7), and the two gaps
  that are nothing but rounding.
- sampled text: equal.

The reward model starts from one that has a head: a fresh head is drawn by the last pipeline stage, whose seed is its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from ranks import run_ranks
from recipe import Recipe, read_metrics, run_stage, whole_weights
from toys import assert_close

STAGES = ("sft", "reward_model", "ppo")
RELATIVE = 1e-5
ABSOLUTE = {
    "policy/loss": 1e-6,
    "kl/mean": 2e-5,  # a sum over up to 12 tokens
    "kl/k3_mean": 3e-8,  # the same, of squares: a log-probability's 5e-7 times log-ratios of about 5e-3
    "value/explained_variance": 2e-6,  # one minus a ratio near one
    "policy/approx_kl": 1e-7,
    "rollout/logprob_gap_max": 1e-5,
    "policy/first_ratio_max_gap": 1e-5,
    "policy/grad_cosine": 1e-5,
}


@dataclass(frozen=True)
class Case:
    """Ranks, the layout of the trained models, and for PPO the critic's own layout and further settings."""

    ranks: int
    layout: str
    critic: str = ""
    ppo: str = ""

    def overrides(self, key: str, layout: str) -> list[str]:
        return [f"{key}.{entry}" for entry in layout.split()]


CASES = {
    "tp2_sp": Case(2, "tensor=2 sequence=true", "pipeline=2"),
    "pp2_virtual2": Case(2, "pipeline=2 virtual_stages=2", "pipeline=2 virtual_stages=2"),
    "dp2_distributed": Case(2, "distributed_optimizer=true", "tensor=2"),
    "cp2": Case(2, "context=2", "context=2"),
    "tp2_pp2": Case(4, "tensor=2 pipeline=2", "pipeline=4"),
    "pp2_dp2_distributed_full": Case(
        4, "pipeline=2 distributed_optimizer=true recompute=full", "tensor=2 sequence=true distributed_optimizer=true"
    ),
}
# Token budgets: sequences packed without padding.
PACKED = (
    "sft.micro_batch_size=null sft.micro_batch_tokens=60",
    "reward_model.micro_batch_tokens=90",
    "ppo.micro_batch_size=null ppo.micro_batch_tokens=60 ppo.ptx_micro_batch_tokens=50",
)
PACKED_CASES = {
    "packed": Case(1, ""),
    "packed_pp2_virtual2_full": Case(2, "pipeline=2 virtual_stages=2 recompute=full", "context=2"),
}
LARGE_PACKED = {
    "packed_tp2_sp": Case(2, "tensor=2 sequence=true", "pipeline=2"),
    "packed_cp2": Case(2, "context=2", "distributed_optimizer=true"),
    "packed_tp2_pp2_dp2": Case(8, "tensor=2 pipeline=2 sequence=true", "context=2 pipeline=2 recompute=selective"),
    "packed_pp2_dp2_distributed": Case(4, "pipeline=2 distributed_optimizer=true", "tensor=2 sequence=true"),
}
LARGE = {
    "cp2_tp2_sp_distributed": Case(4, "context=2 tensor=2 sequence=true distributed_optimizer=true", "pipeline=2"),
    "cp2_pp2_full": Case(4, "context=2 pipeline=2 recompute=full", "context=4"),
    "cp2_dp2": Case(4, "context=2 recompute=selective", "context=2 tensor=2 sequence=true"),
    "selective": Case(1, "recompute=selective", "recompute=full"),
    "full_distributed": Case(1, "recompute=full distributed_optimizer=true", "recompute=selective"),
    "tp2": Case(2, "tensor=2", "distributed_optimizer=true"),
    "dp2_selective": Case(2, "recompute=selective", "tensor=2 sequence=true recompute=full"),
    "pp2": Case(2, "pipeline=2", ""),
    "tp4": Case(4, "tensor=4", "tensor=2 pipeline=2 sequence=true"),
    "tp4_sp_full": Case(4, "tensor=4 sequence=true recompute=full", "pipeline=2 virtual_stages=2"),
    "pp4": Case(4, "pipeline=4", "tensor=4"),
    "dp4_distributed": Case(4, "distributed_optimizer=true", "pipeline=4"),
    "tp2_dp2_sp_distributed": Case(4, "tensor=2 sequence=true distributed_optimizer=true", "pipeline=2"),
    "tp2_pp2_virtual2_sp": Case(4, "tensor=2 pipeline=2 virtual_stages=2 sequence=true", "tensor=2 sequence=true"),
    "pp2_dp2_virtual2": Case(4, "pipeline=2 virtual_stages=2 recompute=selective", "distributed_optimizer=true"),
    "tp2_pp2_dp2_sp_distributed": Case(
        8, "tensor=2 pipeline=2 sequence=true distributed_optimizer=true", "tensor=4 sequence=true"
    ),
    "tp4_pp2_sp": Case(8, "tensor=4 pipeline=2 sequence=true", "pipeline=4 distributed_optimizer=true"),
    "tp2_pp4_full": Case(8, "tensor=2 pipeline=4 recompute=full", "tensor=2 pipeline=2 virtual_stages=2"),
    "pp4_dp2": Case(8, "pipeline=4 recompute=selective", "tensor=2 distributed_optimizer=true"),
    "tp2_pp2_virtual2_dp2_all": Case(
        8,
        "tensor=2 pipeline=2 virtual_stages=2 sequence=true distributed_optimizer=true recompute=full",
        "pipeline=2 distributed_optimizer=true recompute=full",
    ),
}


def stages(recipe: Recipe, name: str, case: Case) -> dict[str, list[str]]:
    """Arguments of three steps each."""
    sft, reward_model = recipe.root / "sft", recipe.root / "reward_model"
    trained = case.overrides("parallel", case.layout)
    # Sampling decodes without virtual stages.
    policy = [entry for entry in trained if "virtual_stages" not in entry]
    critic = case.overrides("critic_parallel", case.critic)
    epsilon, reward_epsilon = "policy.optimizer.epsilon=1e-4", "reward.optimizer.epsilon=1e-4"
    # A step that overshoots, as a larger one does from this start, multiplies rounding by a hundred.
    sft_settings = (f"policy.init_from={sft}", "sft.dropout=0", epsilon, "policy.optimizer.lr=1e-4", *trained)
    return {
        "sft": [a for a in recipe.sft(f"{name}_sft", *sft_settings) if not is_shape(a)],
        "reward_model": recipe.reward_model(f"{name}_rm", reward_model, reward_epsilon, *trained),
        "ppo": recipe.ppo(
            f"{name}_ppo",
            sft,
            reward_model,
            "ppo.iterations=2",
            "ppo.gradient_report_every=2",
            epsilon,
            "value.optimizer.epsilon=1e-4",
            *policy,
            *critic,
            *case.ppo.split(),
        ),
    }


def is_shape(argument: str) -> bool:
    return argument.startswith("model")


# PPO only: roles on ranks of their own, sampling at another layout, weights in host memory.
PLACEMENTS = {
    "disaggregated_tp2_and_pp2": Case(
        4, "tensor=2", "pipeline=2", "placement=disaggregated placement.critic_ranks=2 offload.optimizer=true"
    ),
    "generation_tp2_of_tp2_pp2": Case(
        4,
        "tensor=2 pipeline=2",
        "pipeline=4",
        "rollout.parallel.pipeline=1 offload.reference=true offload.reward=true offload.optimizer=true",
    ),
}
LARGE_PLACEMENTS = {
    "disaggregated_dp2_and_one": Case(3, "", "", "placement=disaggregated placement.critic_ranks=1"),
    "disaggregated_one_and_tp2": Case(3, "", "tensor=2", "placement=disaggregated placement.critic_ranks=2"),
    "disaggregated_generation": Case(
        6,
        "pipeline=2 distributed_optimizer=true",
        "distributed_optimizer=true",
        "placement=disaggregated placement.critic_ranks=2 rollout.parallel.pipeline=1 rollout.parallel.tensor=2",
    ),
    "generation_dp4_of_tp2_pp2": Case(
        4,
        "tensor=2 pipeline=2 sequence=true",
        "",
        "rollout.parallel.tensor=1 rollout.parallel.pipeline=1",
    ),
    "generation_tp4_of_dp2": Case(4, "tensor=2", "tensor=2", "rollout.parallel.tensor=4"),
}


def run_all(arguments: dict[str, list[str]]):
    return {stage: run_stage(stage, overrides) for stage, overrides in arguments.items()}


def results_of(
    recipe: Recipe, name: str, case: Case, timeout: float = 400, only: Sequence[str] = STAGES, more: Sequence[str] = ()
):
    arguments = {stage: given for stage, given in stages(recipe, name, case).items() if stage in only}
    for stage, overrides in zip(STAGES, more, strict=False):
        arguments[stage] += overrides.split()
    ranks = run_ranks(case.ranks, run_all, arguments, timeout=timeout)
    weights = {stage: whole_weights([rank[stage] for rank in ranks]) for stage in arguments}
    suffixes = {"sft": "sft", "reward_model": "rm", "ppo": "ppo"}
    folders = {stage: recipe.root / f"{name}_{suffix}" for stage, suffix in suffixes.items()}
    metrics = {stage: read_metrics(folders[stage]) for stage in arguments}
    return weights, metrics, (folders["ppo"] / "samples.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def one_rank(recipe):
    return results_of(recipe, "one_rank", Case(1, ""))


def compare(recipe, one_rank, record_property, name, case, timeout=400, only=STAGES, more=()):
    """All figures and weights compared with one rank's; tools/benchmark.py layouts makes a table of what is recorded."""
    weights, metrics, samples = results_of(recipe, name, case, timeout, only, more)
    expected_weights, expected_metrics, expected_samples = one_rank
    figures, gaps = [], []
    for stage in only:
        rows = expected_metrics[stage]
        assert len(metrics[stage]) == len(rows)
        for row, expected in zip(metrics[stage], rows, strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                wanted = pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE.get(key, 1e-9))
                assert row[key] == wanted, f"{stage}, step {row['step']}: {key}"
                if value and key not in ABSOLUTE:
                    figures.append(abs(row[key] / value - 1))
        for role, arrays in expected_weights[stage].items():
            gaps.append(assert_close(weights[stage][role], arrays, relative=RELATIVE))
    texts = [[json.loads(line)[key] for key in ("step", "prompt", "response")] for line in samples]
    assert texts == [[json.loads(line)[key] for key in ("step", "prompt", "response")] for line in expected_samples]
    record_property("ranks", case.ranks)
    for column, text in (("trained at", case.layout), ("critic at", case.critic), ("PPO with", case.ppo)):
        record_property(column, text)
    record_property("figures", f"{max(figures):.1e}")
    record_property("weights", f"{max(gaps):.1e}")


@pytest.mark.parametrize("name", CASES)
def test_every_figure_at_every_layout(name, recipe, one_rank, record_property):
    compare(recipe, one_rank, record_property, name, CASES[name])


@pytest.mark.parametrize(
    "name", [*PACKED_CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE_PACKED)]
)
def test_every_figure_of_packed_sequences(name, recipe, one_rank, record_property):
    """Compared with rows padded to the longest of two, on one rank."""
    compare(recipe, one_rank, record_property, name, (PACKED_CASES | LARGE_PACKED)[name], more=PACKED)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_ppo_is_the_same_wherever_its_roles_are(name, recipe, one_rank, record_property):
    compare(recipe, one_rank, record_property, name, PLACEMENTS[name], only=["ppo"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_PLACEMENTS)
def test_ppo_is_the_same_at_many_more_placements(name, recipe, one_rank, record_property):
    compare(recipe, one_rank, record_property, name, LARGE_PLACEMENTS[name], only=["ppo"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_every_figure_at_many_more_layouts(name, recipe, one_rank, record_property):
    compare(recipe, one_rank, record_property, name, LARGE[name], timeout=500)


def test_the_micro_batch_size_changes_nothing_but_speed(recipe, one_rank):
    sizes = {
        "sft": ["sft.micro_batch_size=12"],
        "reward_model": ["reward_model.micro_batch_size=5"],
        "ppo": ["ppo.micro_batch_size=5", "ppo.ptx_micro_batch_size=1", "rollout.batch_size=10"],
    }
    arguments = {stage: [*given, *sizes[stage]] for stage, given in stages(recipe, "other_sizes", Case(1, "")).items()}
    ranks = run_ranks(1, run_all, arguments, timeout=400)
    for stage, roles in one_rank[0].items():
        for role, arrays in roles.items():
            assert_close(whole_weights([rank[stage] for rank in ranks])[role], arrays, relative=RELATIVE)


def test_some_responses_stop_and_batches_are_uneven(one_rank):
    """The comparisons above depend on this."""
    _, metrics, _ = one_rank
    assert all(0 < row["rollout/stop_fraction"] < 1 for row in metrics["ppo"])
    assert metrics["reward_model"][-1]["rm/pairs"] < metrics["reward_model"][0]["rm/pairs"], (
        "one prompt in the last batch"
    )
    assert len(metrics["sft"]) == 3
