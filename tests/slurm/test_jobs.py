"""The scripts of slurm/ under a real Slurm: 2 nodes x 2 tasks over gloo, scaled down only by overrides."""

import re
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from recipe import Recipe, read_metrics

pytestmark = pytest.mark.timeout(600)

MINUTES = 300.0  # a limit for hangs, far above what a job takes
TWO_NODES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
SMALL = [
    "model=null",  # the checkpoints bring their small shapes
    "precision=fp32",
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "parallel.virtual_stages=1",
]
SMALL_PPO = [*SMALL, "model@critic_model=null", "critic_parallel.tensor=4", "ppo.ptx_micro_batch_size=2"]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, scripts: Path, recipe: Recipe) -> tuple[Path, str]:
    """A finished PPO-ptx job: its run folder and its log."""
    overrides = recipe.ppo(
        "slurm_ppo", recipe.root / "sft", recipe.root / "reward_model", *SMALL_PPO, "ppo.kl_coef=0.07"
    )
    number = cluster.submit(scripts / "ppo_175b.sh", *overrides, flags=TWO_NODES)
    job = cluster.wait(number, timeout=MINUTES)
    assert job.state == "COMPLETED", cluster.log(number)
    return recipe.root / "slurm_ppo", cluster.log(number)


def test_ppo_runs_on_two_nodes_and_overrides_reach_it(undisturbed: tuple[Path, str]) -> None:
    folder, log = undisturbed
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["ppo"]["kl_coef"] == 0.07
    assert config["ppo"]["clip"] == 0.2
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["kl/coef"] == 0.07 for row in rows)
    assert all("ptx/loss" in row for row in rows)
    assert "4 ranks" in log
    assert "tensor 2 x pipeline 2 x data 1" in log  # the planner's table and the run's own log
    assert (folder / "report.html").is_file()


def interrupt(cluster: Cluster, number: int, how: str) -> None:
    """As a cluster does it: the signal before the time limit, or a requeue by Slurm itself."""
    if how == "signal":
        cluster.client("scancel", "--batch", "--signal=USR1", str(number))
    else:
        cluster.client("scontrol", "requeue", str(number))


@pytest.mark.parametrize("how", ["signal", pytest.param("requeue", marks=pytest.mark.slow)])
def test_interrupted_job_ends_with_the_metrics_of_an_undisturbed_one(
    cluster: Cluster, scripts: Path, recipe: Recipe, undisturbed: tuple[Path, str], how: str
) -> None:
    overrides = recipe.ppo(how, recipe.root / "sft", recipe.root / "reward_model", *SMALL_PPO, "ppo.kl_coef=0.07")
    number = cluster.submit(scripts / "ppo_175b.sh", *overrides, flags=TWO_NODES, PLAN="0")
    folder = recipe.root / how
    cluster.wait_for_file(folder / "metrics.jsonl", number, timeout=MINUTES)
    interrupt(cluster, number, how)
    cluster.wait(number, timeout=MINUTES, until=["PENDING"])
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert saved, "it stopped without a checkpoint"
    assert saved != ["step_3"], "it was interrupted too late to mean anything"
    # Not the two minutes that Slurm waits; but in the same second, slurmd would still refuse this job's credential.
    cluster.client("scontrol", "update", f"JobId={number}", "StartTime=now+3")
    job = cluster.wait(number, timeout=MINUTES)
    log = cluster.log(number)
    assert job.state == "COMPLETED", log
    assert job.restarts == 1
    assert "asked to stop: saved" in log
    assert f"resumed from {folder}/checkpoints/{saved[-1]}" in log
    assert read_metrics(folder) == read_metrics(undisturbed[0])


def pipeline(cluster: Cluster, scripts: Path, recipe: Recipe, runs: Path, **changed: str) -> list[int]:
    """Submit the chain, scaled down; returns the ids of its three jobs."""
    small = "model=null precision=fp32 parallel.tensor=1 parallel.pipeline=1 parallel.virtual_stages=1"
    settings = {
        "RUNS": str(runs),
        "TOKENIZER": str(recipe.root / "tokenizer"),
        "POLICY": str(recipe.root / "sft"),
        "DEMONSTRATIONS": str(recipe.root / "demonstrations.jsonl"),
        "COMPARISONS": str(recipe.root / "comparisons.jsonl"),
        "PROMPTS": str(recipe.root / "prompts.jsonl"),
        "PRETRAINING": str(recipe.root / "text.txt"),
        "SBATCH_FLAGS": "--nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1",
        "SFT_OVERRIDES": f"{small} sft.epochs=1 data.pretraining.sequence_length=24",
        "REWARD_OVERRIDES": f"{small} reward_model.batch_size=10",
        "PPO_OVERRIDES": f"{small} model@critic_model=null critic_parallel.tensor=2 data.max_prompt_tokens=32 "
        "data.pretraining.sequence_length=24 rollout.max_response_tokens=8 ppo.iterations=1 "
        "ppo.warmup_iterations=0 ppo.batch_size=4 ppo.minibatch_size=4 ppo.ptx_ratio=1",
        **changed,
    }
    printed = cluster.client("bash", str(scripts / "pipeline_175b.sh"), **settings)
    return [int(words[words.index("job") + 1].rstrip(",")) for words in map(str.split, printed.splitlines())]


def test_the_chain_runs_sft_reward_model_and_ppo(cluster: Cluster, scripts: Path, recipe: Recipe) -> None:
    runs = recipe.root / "chain"
    jobs = pipeline(cluster, scripts, recipe, runs)
    for number in jobs:
        assert cluster.wait(number, timeout=MINUTES).state == "COMPLETED", cluster.log(number)
    assert [sorted(row["step"] for row in read_metrics(runs / stage))[-1] for stage in ("reward", "ppo")] == [2, 1]
    assert f"from {runs}/sft/checkpoints/" in cluster.log(jobs[2])
    assert f"from {runs}/reward/checkpoints/" in cluster.log(jobs[2])
    # The run that PPO starts from is the paper's: demonstrations with 10% pretraining text.
    assert yaml.safe_load((runs / "sft" / "config.yaml").read_text())["data"]["pretraining_mix"] == 0.1


def test_a_failed_stage_stops_the_chain(cluster: Cluster, scripts: Path, recipe: Recipe) -> None:
    missing = str(recipe.root / "no_such_file.jsonl")
    runs = recipe.root / "broken_chain"
    sft, reward, ppo = pipeline(cluster, scripts, recipe, runs, DEMONSTRATIONS=missing, PLAN="0")
    failed = cluster.wait(sft, timeout=MINUTES)
    assert (failed.state, failed.exit_code) == ("FAILED", 2)
    assert missing in cluster.log(sft)
    assert cluster.wait(reward, timeout=MINUTES).state == "CANCELLED"
    assert cluster.wait(ppo, timeout=MINUTES).state == "CANCELLED"
    assert not (runs / "reward").exists()
    assert not (runs / "ppo").exists()


ONE_TASK = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.mark.parametrize(
    ("flags", "overrides", "environment", "message"),
    [
        ([], ["ppo.kl_koef=1"], {}, "there is no key ppo.kl_koef; did you mean ppo.kl_coef?"),
        ([], ["parallel.tensor=3"], {}, "does not divide the 1 ranks of this job"),
        ([], [], {"CLUSTER": "laptop"}, "the planner says that this run does not fit its GPUs"),
        ([], ["run.dir=/proc/run"], {"PLAN": "0", "SMALL": "yes"}, "run.dir=/proc/run cannot be written"),
        ([], [], {"CONTAINER_IMAGE": "/no/such/image.sqsh"}, "CONTAINER_IMAGE=/no/such/image.sqsh: no such file"),
        ([], [], {"CONTAINER_IMAGE": "registry/image:1"}, "this cluster's srun has no --container-image (pyxis)"),
        ([], [], {"VENV": "/no/such/venv"}, "VENV=/no/such/venv: no virtual environment there"),
        ([], [], {"MASTER_ADDR": "no-such-node.invalid"}, "(no-such-node.invalid) cannot be resolved"),
        (["--gpus-per-node=0"], [], {"CLUSTER": "h100_80gb"}, "of partition gpu gives this job no GPUs"),
    ],
)
def test_mistakes_end_the_job_with_the_reason_in_its_log(
    cluster: Cluster,
    scripts: Path,
    recipe: Recipe,
    flags: list[str],
    overrides: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    single = ["parallel.tensor=1", "parallel.pipeline=1", "critic_parallel.tensor=1"]
    arguments = {o.split("=")[0]: o for o in [f"run.dir={recipe.root / 'mistake'}", *single, *overrides]}
    if environment.get("SMALL"):
        start = recipe.ppo("mistake", recipe.root / "sft", recipe.root / "reward_model", *SMALL_PPO)
        arguments = {o.split("=")[0]: o for o in [*start, *arguments.values()]}
    script = scripts / "ppo_175b.sh"
    number = cluster.submit(script, *arguments.values(), flags=[*ONE_TASK, *flags], **environment)
    job = cluster.wait(number, timeout=MINUTES)
    log = cluster.log(number)
    assert (job.state, job.exit_code) == ("FAILED", 2), log
    assert message in log
    assert "Traceback" not in log


def test_a_port_in_use_is_named_and_a_free_one_is_found(cluster: Cluster, scripts: Path, recipe: Recipe) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        number = cluster.submit(scripts / "ppo_175b.sh", flags=ONE_TASK, MASTER_PORT=port)
        assert cluster.wait(number, timeout=MINUTES).exit_code == 2
    assert f"MASTER_PORT={port} is in use" in cluster.log(number)


def test_a_node_that_never_starts_python_is_named(cluster: Cluster, scripts: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (python.parent / "activate").write_text(f'PATH="{python.parent}:$PATH"\n')
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME == n2 ]] && sleep 600\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    missing = ("policy.init_from", "reward.init_from", "data.prompts", "data.pretraining.source", "data.tokenizer")
    overrides = [
        "recipe=null",
        f"run.dir={tmp_path / 'run'}",
        "run.rendezvous_timeout_s=4",
        *(f"{k}=none" for k in missing),
    ]
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    variables = {"PLAN": "0", "VENV": str(python.parents[1]), "MAX_RESTARTS": "0"}
    number = cluster.submit(scripts / "ppo_175b.sh", *overrides, flags=flags, **variables)
    job = cluster.wait(number, timeout=MINUTES)
    log = cluster.log(number)
    assert (job.state, job.exit_code) == ("FAILED", 1), log
    assert re.search(
        r"error: after \d+ s 1 of 2 ranks have arrived .*: rank 0 on n1\. Not arrived: rank 1, expected on n2", log
    )


def test_the_doctor_sees_every_node(cluster: Cluster, scripts: Path, recipe: Recipe) -> None:
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    overrides = [f"run.dir={recipe.root / 'doctor'}", "ppo.kl_koef=1"]  # the wrong key ends the job after the doctor
    number = cluster.submit(scripts / "ppo_175b.sh", *overrides, flags=flags, DOCTOR="1")
    cluster.wait(number, timeout=MINUTES)
    log = cluster.log(number)
    for line in ("n1: ", "n2: "):
        assert re.search(
            rf"^{line}(ok|SLOW OR DIFFERENT).*: [\d.e-]+ TFLOP/s, [\d.e-]+ GB/s with n\d, Python", log, re.M
        ), log
    assert "there is no key ppo.kl_koef" in log


def test_a_heterogeneous_job_has_policy_and_critic_on_nodes_of_their_own(
    cluster: Cluster, scripts: Path, recipe: Recipe, undisturbed: tuple[Path, str]
) -> None:
    overrides = recipe.ppo("heterogeneous", recipe.root / "sft", recipe.root / "reward_model", *SMALL_PPO)
    layout = ["parallel.pipeline=1", "critic_parallel.tensor=1", "ppo.kl_coef=0.07"]
    one_node = ["--nodes=1", "--cpus-per-task=1", "--gpus-per-node=2"]
    parts = [*one_node, "--ntasks-per-node=2", ":", *one_node, "--ntasks-per-node=1"]
    number = cluster.submit(scripts / "ppo_175b_het.sh", *overrides, *layout, flags=parts)
    job = cluster.wait(number, timeout=MINUTES)
    log = cluster.log(number)
    assert job.state == "COMPLETED", log
    assert "3 ranks" in log and "'placement=disaggregated' 'placement.critic_ranks=1'" in log
    assert "tensor 2 x pipeline 1 x data 1" in log and "tensor 1 x pipeline 1 x data 1" in log
    for row, expected in zip(read_metrics(recipe.root / "heterogeneous"), read_metrics(undisturbed[0]), strict=True):
        assert row["reward/score_mean"] == pytest.approx(expected["reward/score_mean"], rel=1e-4)
        assert row["value/loss"] == pytest.approx(expected["value/loss"], rel=1e-4)


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, scripts: Path, recipe: Recipe) -> None:
    one_rank = ["parallel.tensor=1", "parallel.pipeline=1", "critic_parallel.tensor=1", "ppo.iterations=1000"]
    start = recipe.ppo("cancelled", recipe.root / "sft", recipe.root / "reward_model", *SMALL_PPO)
    arguments = {o.split("=")[0]: o for o in [*start, *one_rank]}
    number = cluster.submit(scripts / "ppo_175b.sh", *arguments.values(), flags=ONE_TASK, PLAN="0")
    cluster.wait_for_file(recipe.root / "cancelled" / "metrics.jsonl", number, timeout=MINUTES)
    cluster.client("scancel", str(number))
    job = cluster.wait(number, timeout=MINUTES, until=["CANCELLED"])
    time.sleep(3)
    assert cluster.job(number).state == "CANCELLED"
    assert job.restarts == 0
