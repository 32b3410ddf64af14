"""Plans: their totals, which presets fit, and what each option adds or saves."""

from dataclasses import replace

import pytest
from plans import ROOT, plan, sized_recipes

from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.cluster import PlanConfig
from megatron_rlhf.planning.placement import GIB
from megatron_rlhf.planning.plan import PlannedPhase
from megatron_rlhf.planning.ppo import POLICY_SCORING
from megatron_rlhf.planning.stages import STAGES


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
    whole = next(
        phase.seconds
        for phase in plan("ppo", *DISAGGREGATED, "placement.portions=1", ours=("recipe=instructgpt_175b",)).phases
        if "value" in phase.name
    )
    last, meanwhile = seconds["scoring by reward and value"], seconds["scoring by reward and value, meanwhile"]
    assert (last, meanwhile) == pytest.approx((whole / 8, whole * 7 / 8)), "all but one of 8 portions"
    sampling = max(seconds["rollout"], meanwhile)
    scoring = max(seconds["scoring by policy and reference"], last)
    assert apart.step_seconds == pytest.approx(sampling + scoring + max(policy, value))
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


def test_a_paged_cache_has_whole_blocks_and_is_read_as_far_as_it_is_filled() -> None:
    ours = ("recipe=instructgpt_175b",)

    def rollout(*overrides: str) -> PlannedPhase:
        made = plan(
            "ppo", *ours, "data.max_prompt_tokens=500", "rollout.max_response_tokens=300", *overrides, ours=ours
        )
        return next(phase for phase in made.phases if phase.name == "rollout")

    copy = "rollout.parallel.pipeline=1"  # where neither engine has several batches in flight
    own, paged = rollout(copy), rollout(copy, "rollout.engine=megatron")
    limited = rollout(copy, "rollout.engine=megatron", "rollout.cache_gb=3")
    held = [phase.bytes_on(0)["kv cache"] for phase in (own, paged, limited)]
    assert held[1] / held[0] == pytest.approx(1024 / 800)
    assert held[2] == 3 * 2**30
    assert paged.seconds < own.seconds
    one_batch, four = (rollout("rollout.batch_size=16", *engine) for engine in (["rollout.engine=megatron"], []))
    assert one_batch.bytes_on(0)["kv cache"] / four.bytes_on(0)["kv cache"] == pytest.approx(1024 / 800 / 4)
    assert one_batch.seconds > four.seconds, "stages wait for each other"


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


def test_the_value_model_scores_only_where_its_first_update_does_not() -> None:
    base = ("recipe=instructgpt_1_3b",)
    several, one = (
        plan("ppo", *base, "ppo.batch_size=64", f"ppo.minibatch_size={size}", ours=base) for size in (32, 64)
    )
    scoring = [next(phase for phase in made.phases if "reward" in phase.name) for made in (several, one)]
    assert scoring[0].flops == pytest.approx(2 * scoring[1].flops), "reward and value model, or the reward model"


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
