"""Plans: their totals, which presets fit, what is refused with which message, and the command line of tools/plan.py."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlhf.compose import compose_config, recipes
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.planning.output.report import overrides_text
from megatron_rlhf.planning.placement import GIB
from megatron_rlhf.planning.plan import Plan
from megatron_rlhf.planning.ppo import POLICY_SCORING
from megatron_rlhf.planning.search import TIE, cheapest, critics_by_speed, what_would_fit
from megatron_rlhf.planning.stages import STAGES, plan_stage

ROOT = Path(__file__).resolve().parents[2]
Tool = Callable[..., int]


@pytest.fixture(scope="module")
def tool() -> Tool:
    return load_tool()


def load_tool() -> Tool:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main(list(arguments))


def plan(stage: str, *overrides: str, ours: tuple[str, ...] = ()) -> Plan:
    schema = {name: schema for schema, name in STAGES.items()}[stage]
    config, _ = compose_config(stage, schema, list(overrides), missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, list(ours))
    return plan_stage(config, plan_config)


def sized_recipes() -> list[str]:
    """Recipes that state the number of nodes they are made for."""
    return recipes("plan")


def test_every_recipe_of_the_paper_has_a_plan() -> None:
    assert {"instructgpt_1_3b", "instructgpt_6b", "instructgpt_175b"} <= set(sized_recipes())


@pytest.mark.parametrize("name", sized_recipes())
@pytest.mark.parametrize("stage", STAGES.values())
def test_every_preset_fits_its_cluster(name: str, stage: str) -> None:
    made = plan(stage, f"recipe={name}", ours=(f"recipe={name}",))
    assert made.fits, made.arithmetic()


@pytest.mark.parametrize("name", sized_recipes())
def test_the_initialisation_run_fits_the_nodes_of_sft(name: str) -> None:
    made = plan("sft", f"recipe={name}/ppo_initialization", ours=(f"recipe={name}",))
    assert made.fits, made.arithmetic()


@pytest.mark.parametrize(
    ("script", "stage", "recipe"),
    [
        ("sft_175b", "sft", "instructgpt_175b"),
        ("reward_model_6b", "reward_model", "instructgpt_6b"),
        ("ppo_175b", "ppo", "instructgpt_175b"),
        ("ppo_1_3b", "ppo", "instructgpt_1_3b"),
    ],
)
def test_job_scripts_ask_for_the_nodes_of_their_recipe(script: str, stage: str, recipe: str) -> None:
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    config, _ = compose_config("plan", PlanConfig, [f"recipe={recipe}"])
    cluster = config.cluster_for(stage)
    assert f"#SBATCH --nodes={cluster.nodes}\n" in text
    assert f"#SBATCH --ntasks-per-node={cluster.gpus_per_node}\n" in text
    assert f"STAGE={stage}\n" in text
    assert f"RECIPE=${{RECIPE:-{recipe}}}\n" in text


def test_flops_of_the_175b_run_are_the_papers() -> None:
    made = plan("ppo", "recipe=instructgpt_175b", ours=("recipe=instructgpt_175b",))
    ptx = next(phase for phase in made.phases if phase.name == "ptx")
    # 256k episodes x 8 examples x 2048 tokens x 6 x 175e9 weights; the plan adds attention scores, 3%.
    assert made.steps * ptx.flops == pytest.approx(256_000 * 8 * 2048 * 6 * 175e9, rel=0.05)
    # The paper: 60 petaflop/s-days for PPO-ptx at 175B.
    assert made.flops / 8.64e19 == pytest.approx(60, rel=0.1)


def test_memory_adds_up_and_the_peak_is_the_fullest_rank_and_phase() -> None:
    made = plan("ppo", "recipe=instructgpt_175b", ours=("recipe=instructgpt_175b",))
    total = sum(sum(kinds.values()) for kinds in made.memory().values())
    assert total == pytest.approx(made.peak_bytes)
    for rank in range(0, made.cluster.gpus, 8):
        for phase in made.phases:
            state = sum(sum(role.bytes_on(rank, phase.name).values()) for role in made.roles)
            assert state + sum(phase.bytes_on(rank).values()) <= made.peak_bytes + 1


def test_the_copy_of_the_texts_gradient_is_counted_where_gradients_are_reported() -> None:
    def copy(*overrides: str) -> float:
        made = plan("ppo", "recipe=instructgpt_1_3b", *overrides, ours=("recipe=instructgpt_1_3b",))
        (policy,) = (role.placed for role in made.roles if role.name == "policy")
        held = [
            phase.bytes_on(0).get("text's gradient", 0.0) for phase in made.phases if phase.name in ("policy", "ptx")
        ]
        assert len(set(held)) == 1, "the copy is there for the whole update"
        return held[0] / (4 * policy.parameters(0))

    assert copy() == 1.0  # fp32, one number for each weight of the rank
    assert copy("ppo.gradient_report_every=0") == 0.0
    assert copy("ppo.gradient_report_every=0", "ppo.ptx_coef=auto") == 1.0
    assert copy("ppo.ptx_coef=0") == 0.0


DISAGGREGATED = ("recipe=instructgpt_175b", "placement=disaggregated", "placement.critic_ranks=64")


def test_roles_on_ranks_of_their_own_hold_nothing_elsewhere_and_work_side_by_side() -> None:
    together = plan("ppo", "recipe=instructgpt_175b", ours=("recipe=instructgpt_175b",))
    apart = plan("ppo", *DISAGGREGATED, ours=("recipe=instructgpt_175b",))
    roles = {role.name: role for role in apart.roles}
    assert roles["policy"].placed.ranks == range(448) and roles["value"].placed.ranks == range(448, 512)
    assert roles["value"].bytes_on(0, "policy") == roles["policy"].bytes_on(448, "policy") == {}
    # A GPU of the policy's side holds what the colocated plan counts for the policy; what data parallelism shards is
    # divided among 7 copies instead of 8.
    shared, alone = (made.roles[0].bytes_on(0, "policy") for made in (together, apart))
    for kind, held in shared.items():
        assert alone[kind] == pytest.approx(held * (8 / 7 if kind in ("optimizer", "ema") else 1)), kind
    seconds = {phase.name: phase.seconds for phase in apart.phases}
    policy, value = seconds["policy"] + seconds["ptx"], seconds["value"]
    scoring = max(seconds["scoring by policy and reference"], seconds["scoring by reward and value"])
    assert apart.step_seconds == pytest.approx(seconds["rollout"] + scoring + max(policy, value))
    assert together.step_seconds == pytest.approx(sum(phase.seconds for phase in together.phases))


def test_what_rests_on_the_host_is_not_on_the_gpu() -> None:
    ours = ("recipe=instructgpt_175b",)
    resting = plan("ppo", *ours, "offload.reference=true", "offload.optimizer=true", ours=ours)
    policy, reference = resting.roles[:2]
    assert "optimizer" not in policy.bytes_on(0, "rollout") and "optimizer" in policy.bytes_on(0, "ptx")
    assert reference.bytes_on(0, "ptx") == {} and reference.bytes_on(0, "scoring by policy and reference")
    assert resting.peak_bytes < plan("ppo", *ours, ours=ours).peak_bytes


def test_a_copy_to_sample_from_takes_memory() -> None:
    ours = ("recipe=instructgpt_175b",)
    copied = plan("ppo", *ours, "rollout.parallel.pipeline=4", ours=ours)
    sampler = copied.roles[-1]
    assert sampler.name == "sampler" and sampler.placed.parallel.pipeline == 4
    assert sampler.bytes_on(0, "rollout")["weights"] == pytest.approx(
        2 * copied.roles[1].bytes_on(0, "rollout")["weights"], rel=0.05
    )


def test_cheapest_layouts_fit_and_ties_go_to_fewer_stages() -> None:
    config, _ = compose_config("ppo", PPOConfig, ["recipe=instructgpt_6b"], missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, ["cluster.nodes=2"])
    found = [made for _, made in cheapest(config, plan_config, 5)]
    assert len(found) == 5
    assert all(p.fits for p in found)
    seconds = [p.step_seconds for p in found]
    assert all(one <= TIE * min(seconds[i:]) for i, one in enumerate(seconds))
    wide = replace(plan_config, cluster=replace(plan_config.cluster, nodes=64))
    large, _ = compose_config("ppo", PPOConfig, ["recipe=instructgpt_175b"], missing="-")
    shapes = [ParallelConfig(tensor=8, pipeline=p, sequence=True, distributed_optimizer=True) for p in (32, 1, 8)]
    best = critics_by_speed(large, wide, shapes)[0]
    assert best.pipeline == 1, "32 stages of a 6.7B critic save nothing"
    tiny = replace(plan_config, cluster=replace(plan_config.cluster, memory_gib=9.0))
    assert cheapest(config, tiny, 5) == []


def test_the_search_offloads_where_nothing_fits_without() -> None:
    config, _ = compose_config("ppo", PPOConfig, ["recipe=instructgpt_6b"], missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, ["cluster.nodes=2", "cluster.memory_gib=26"])
    found = [made for _, made in cheapest(config, plan_config, 2)]
    assert found
    for made in found:
        assert made.fits
        assert any(role.rests for role in made.roles)
        assert any(phase.name.startswith("copies of") for phase in made.phases)


def test_one_stage_samples_faster_than_eight() -> None:
    ours = ("recipe=instructgpt_175b",)
    plain = plan("ppo", *ours, "rollout.batch_size=64", ours=ours)
    copied = plan("ppo", *ours, "rollout.parallel.pipeline=1", ours=ours)
    seconds = [made.phases[0].seconds for made in (plain, copied)]
    assert seconds[1] < 0.7 * seconds[0]


@pytest.mark.parametrize(
    ("stage", "overrides", "cluster", "changes"),
    [
        ("sft", ["recipe=instructgpt_6b"], ["cluster.memory_gib=41"], {"sft.micro_batch_size"}),
        ("sft", ["recipe=instructgpt_6b", "parallel.tensor=1"], ["cluster.memory_gib=30"], {"parallel.tensor"}),
        ("ppo", ["recipe=instructgpt_6b"], ["cluster.nodes=2", "cluster.memory_gib=50"], {"offload.reference"}),
        ("ppo", ["recipe=instructgpt_6b"], ["cluster.nodes=1", "cluster.memory_gib=24"], {"cluster.nodes"}),
    ],
)
def test_what_does_not_fit_is_told_what_would(
    stage: str, overrides: list[str], cluster: list[str], changes: set[str]
) -> None:
    schema = {name: schema for schema, name in STAGES.items()}[stage]
    config, _ = compose_config(stage, schema, overrides, missing="-")
    plan_config, _ = compose_config("plan", PlanConfig, cluster)
    assert not plan_stage(config, plan_config).fits
    remedy = what_would_fit(config, plan_config)
    assert remedy is not None
    assert changes <= set(remedy[0]), remedy[0]
    written = overrides_text(remedy[0]).split()
    again, _ = compose_config(stage, schema, overrides + [o for o in written if "cluster." not in o], missing="-")
    nodes = [o for o in written if "cluster." in o]
    assert plan_stage(again, compose_config("plan", PlanConfig, cluster + nodes)[0]).fits


def test_memory_of_hosts_counts_what_rests_there_and_checkpoints() -> None:
    ours = ("recipe=instructgpt_175b",)
    plain = plan("ppo", *ours, ours=ours)
    resting = plan("ppo", *ours, "offload.reference=true", "run.async_save=true", ours=ours)
    reference = resting.roles[1]
    assert plain.host["offloaded"] == 0
    assert resting.host["offloaded"] == 8 * reference.bytes_on(0, POLICY_SCORING)["weights"]
    assert plain.host["processes"] == 8 * 6 * GIB
    # Roles one after the other, or all at once in the background.
    assert resting.host["checkpoint"] > plain.host["checkpoint"]
    small = replace(plain, cluster=replace(plain.cluster, host_memory_gib=64))
    assert small.fits_gpu
    assert not small.fits
    assert "is more than the 64 GiB of a node" in small.arithmetic()


def test_the_tool_prints_numbers(tool: Tool, capsys: pytest.CaptureFixture) -> None:
    arguments = ["recipe=instructgpt_175b", "cluster=h100_80gb", "cluster.nodes=64", "--json", "--layouts", "1"]
    assert tool("--stage", "ppo", *arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["schema"] == 2
    (data,) = whole["plans"]
    assert data["gpus"] == 512
    layout = data["layouts"]["policy"]
    assert (layout["tensor"], layout["pipeline"], layout["data"], layout["virtual_stages"]) == (8, 8, 8, 1)
    assert data["settings"] == {
        "ppo.micro_batch_size": 1,
        "rollout.batch_size": 16,
        "ppo.ptx_micro_batch_size": 1,
    }
    assert data["memory"]["peak_bytes"] < data["memory"]["capacity_bytes"] == pytest.approx(73.6 * GIB)
    assert max(data["memory"]["phase_bytes"].values()) == data["memory"]["peak_bytes"]
    assert "save" in data["memory"]["phase_bytes"]
    assert data["host_memory"]["peak_bytes"] == pytest.approx(sum(data["host_memory"]["bytes"].values()))
    assert set(data["memory"]["bytes"]["policy"]) == {"weights", "gradients", "optimizer", "ema"}
    names = ["rollout", "scoring by policy and reference", "scoring by reward and value", "policy", "ptx", "value"]
    assert [phase["name"] for phase in data["phases"]] == names
    assert data["price"] == pytest.approx(3.0 * data["gpu_hours"])
    assert data["checkpoint"]["save_every"] >= 1
    assert len(data["cheapest"]) == 1
    assert data["would_fit"] is None


def test_a_page_shows_memory_and_time(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "plan.html"
    assert (
        tool("--stage", "ppo", "recipe=instructgpt_6b", "cluster.memory_gib=40", "--layouts", "0", "--html", str(page))
        == 3
    )
    text = page.read_text()
    assert "does not fit" in text
    assert "What would fit: <code>" in text
    for name in ("policy", "value", "rollout", "ptx", "save", "checkpoint"):
        assert f"<div>{name}</div>" in text, name
    assert "http" not in text, "it opens without a network"
    assert tool("--stage", "sft", "recipe=instructgpt_6b", "--html", str(tmp_path / "no" / "plan.html")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_tool_plans_the_whole_recipe_and_sorts_overrides_by_stage(
    tool: Tool, capsys: pytest.CaptureFixture
) -> None:
    # Only one stage knows sft.epochs, only the planner workload.*.
    overrides = ["sft.epochs=1", "workload.demonstrations=32000", "ppo.iterations=10"]
    assert tool("recipe=instructgpt_6b", "--layouts", "0", "--json", *overrides) == 0
    sft, reward, ppo = json.loads(capsys.readouterr().out)["plans"]
    assert (sft["steps"], ppo["steps"]) == (1000, 10)
    assert reward["gpus"] == 8
    assert ppo["gpus"] == 16


def test_what_does_not_fit_is_refused_with_the_arithmetic(tool: Tool, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--stage", "sft", "--layouts", "0", "recipe=instructgpt_6b"]
    assert tool(*arguments, "parallel.tensor=1", "parallel.distributed_optimizer=false", "cluster=a100_80gb") == 3
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    assert "policy weights 12.4 + policy gradients 24.8 + policy optimizer 74.4" in printed.err
    assert "is more than the 79.3 - 6 reserved = 73.3 GiB of a GPU (A100 80GB)" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipe=instructgpt_6b", "parallel.tensor=3"],
            "tensor 3 x pipeline 1 x context 1 = 3 does not divide the 16 ranks",
        ),
        (["recipe=instructgpt_6b", "parallel.pipeline=5", "cluster.nodes=5"], "do not divide num_layers 32"),
        (
            ["recipe=instructgpt_6b", "critic_parallel.tensor=3", "cluster.nodes=6"],
            "does not divide num_attention_heads 32",
        ),
        (["recipe=instructgpt_6b", "ppo.kl_koef=1"], "did you mean ppo.kl_coef"),
        (["recipe=instructgpt_6b", "cluster=h300"], "cluster/h300"),
        (["recipe=instructgpt_6b", "cluster.nodess=2"], "did you mean cluster.nodes"),
        (["recipe=instructgpt_7b"], "recipes for this stage: first_try, instructgpt, "),
        (["model=gpt3_1_3b"], "critic_model is not given"),
        (["policy.init_from=/no/such/folder"], "policy.init_from=/no/such/folder"),
    ],
)
def test_mistakes(tool: Tool, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert tool("--stage", "ppo", "--layouts", "0", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_presets_in_the_documentation_are_the_planners(tool: Tool, capsys: pytest.CaptureFixture) -> None:
    """`python tools/plan.py --presets` prints the table."""
    assert tool("--presets") == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 3 * len(sized_recipes())
    assert table in (ROOT / "docs" / "cluster.md").read_text()


def test_fp8_is_planned_for_what_trains() -> None:
    def ppo(*overrides: str) -> tuple[dict[str, float], dict]:
        made = plan("ppo", "recipe=instructgpt_6b", *overrides, ours=("recipe=instructgpt_6b",))
        return {phase.name: phase.seconds for phase in made.phases}, made.memory()

    seconds, held = ppo("precision=bf16")
    in_fp8, held_in_fp8 = ppo("precision=fp8_hybrid")
    assert in_fp8["rollout"] == seconds["rollout"], "sampling stays in bf16"
    assert in_fp8["ptx"] < 0.75 * seconds["ptx"]
    # The policy reads in fp8, the reference in bf16.
    assert 0.6 * seconds["scoring by policy and reference"] < in_fp8["scoring by policy and reference"]
    assert in_fp8["scoring by policy and reference"] < 0.9 * seconds["scoring by policy and reference"]
    extra = {
        role: sum(held_in_fp8[role].values()) - sum(held[role].values())
        for role in ("policy", "reference", "reward", "value")
    }
    assert extra["reference"] == extra["reward"] == 0
    assert extra["policy"] == extra["value"] == pytest.approx(held["value"]["weights"], rel=0.05)  # 2 bytes per weight


def test_without_a_critic_there_is_no_value_model_and_no_memory_or_time_for_one() -> None:
    base = ("recipe=instructgpt_1_3b",)
    gae, rloo = (
        plan("ppo", *base, *more, ours=base) for more in ((), ("ppo.advantages=rloo", "ppo.samples_per_prompt=4"))
    )
    assert {role.name for role in gae.roles} - {role.name for role in rloo.roles} == {"value"}
    assert {phase.name for phase in gae.phases} - {phase.name for phase in rloo.phases} == {"value"}
    (rank, phase, _) = rloo.fullest
    value = next(role for role in gae.roles if role.name == "value")
    assert gae.peak_bytes >= rloo.peak_bytes + sum(value.bytes_on(rank, phase.name).values())
    assert rloo.step_seconds < gae.step_seconds
    scoring = [next(phase for phase in made.phases if "reward" in phase.name) for made in (gae, rloo)]
    # Two models read 400 + 300 tokens an episode; one reads the prompt once for four samples.
    assert scoring[0].flops == pytest.approx(2 * scoring[1].flops * 700 / 400, rel=0.02)
    assert rloo.phases[0].seconds < gae.phases[0].seconds, "and so does the sampler"


def test_each_reward_model_is_planned_and_a_function_needs_no_gpu() -> None:
    base = ("recipe=instructgpt_1_3b",)
    one, two, none = (
        plan("ppo", *base, *more, ours=base)
        for more in (
            ("reward.init_from=-",),
            ("rewards.a.init_from=-", "rewards.b.init_from=-", "rewards.c.function=-.py:f"),
            ("reward.function=-.py:f",),
        )
    )
    names = [{role.name for role in made.roles} for made in (one, two, none)]
    assert names[0] - names[2] == {"reward"}
    assert names[1] - names[2] == {"reward a", "reward b"}
    assert none.peak_bytes < one.peak_bytes < two.peak_bytes
