"""The scripts of slurm/ under a real Slurm: 2 nodes x 2 tasks over gloo, shrunk by nothing but overrides."""

import json
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


def test_requeued_job_ends_with_the_metrics_of_an_undisturbed_one(
    cluster: Cluster, scripts: Path, recipe: Recipe, undisturbed: tuple[Path, str]
) -> None:
    overrides = recipe.ppo(
        "requeued", recipe.root / "sft", recipe.root / "reward_model", *SMALL_PPO, "ppo.kl_coef=0.07"
    )
    number = cluster.submit(scripts / "ppo_175b.sh", *overrides, flags=TWO_NODES, PLAN="0")
    folder = recipe.root / "requeued"
    cluster.wait_for_file(folder / "metrics.jsonl", number, timeout=MINUTES)
    cluster.client("scontrol", "requeue", str(number))
    cluster.wait(number, timeout=MINUTES, until=["PENDING"])
    cluster.client("scontrol", "update", f"JobId={number}", "StartTime=now")
    job = cluster.wait(number, timeout=MINUTES)
    log = cluster.log(number)
    assert job.state == "COMPLETED", log
    assert job.restarts == 1
    assert "asked to stop: saved" in log
    assert "resumed from" in log
    assert read_metrics(folder) == read_metrics(undisturbed[0])
    assert json.loads((folder / "checkpoints" / "step_3" / "meta.json").read_text())["state"]["step"] == 3
