"""How users submit: from anywhere, any way, with any environment; and what reaches the tasks and the planner."""

import shutil
from pathlib import Path

import pytest
from stub import Stub, StubJob

pytestmark = pytest.mark.timeout(600)


def tasks(job: StubJob, start: int = 0) -> list[str]:
    """The overrides of the first rank, after those that the scripts add."""
    ended = job.end()
    assert ended.state == "COMPLETED", job.log
    ranks = job.ranks(start)
    assert [line[1] for line in ranks] == [str(rank) for rank in range(len(ranks))]
    return ranks[0][4:]


def test_what_sbatch_exports_is_not_what_tasks_get(stub: Stub) -> None:
    """Many sites' default is NONE. MASTER_ADDR, MASTER_PORT and the virtual environment are the script's."""
    jobs = [stub.submit(f"export_{what}", flags=[f"--export={what}"]) for what in ("NONE", "FOO=1", "ALL")]
    for job in jobs:
        assert tasks(job)[:2] == ["recipe=instructgpt_175b", "run.auto_resume=true"]


def test_where_the_script_lies(stub: Stub, tmp_path: Path) -> None:
    original = stub.repository / "slurm" / "ppo_175b.sh"
    link = tmp_path / "a link.sh"
    link.symlink_to(original)
    copy = Path(shutil.copy(original, tmp_path / "edited copy.sh"))
    lost = stub.submit("lost_copy", script=copy)
    linked = stub.submit("linked", "stub.text=a b", "stub.quote='\"", script=link)
    copied = stub.submit("copied", "stub.text=two\nlines", script=copy, REPOSITORY=str(stub.repository))
    beside = stub.submit("beside", script=copy, submitted_in=stub.repository)
    assert tasks(linked)[-2:] == ["stub.text=a b", "stub.quote='\""]
    assert "'stub.text=a b' 'stub.quote='\\''\"'" in linked.log.splitlines()[0]
    assert tasks(copied)[-1] == "stub.text=two"  # a line of the stub's file ends there
    assert "$'stub.text=two\\nlines'" in copied.log.splitlines()[0]
    assert tasks(beside)
    ended = lost.end()
    assert (ended.state, ended.exit_code) == ("FAILED", 2), lost.log
    assert "common.sh: no such file; set REPOSITORY to the repository" in lost.last_line


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--ntasks=4", "--nodes=2", "--ntasks-per-node=8"], "cluster.nodes=2 cluster.gpus_per_node=2"),
        (["--gpus-per-task=1", "--gpus-per-node=2"], "cluster.nodes=2 cluster.gpus_per_node=2"),
        (["--mem=0", "--nodes=1"], "cluster.nodes=1 cluster.gpus_per_node=2"),
        (["--ntasks=3"], "cluster.nodes=3 cluster.gpus_per_node=1"),
    ],
)
def test_the_planner_is_asked_about_the_tasks_that_run(stub: Stub, flags: list[str], asked: str) -> None:
    job = stub.submit(f"planned_{len(flags)}_{flags[0].strip('-')}", flags=flags)
    tasks(job)
    assert asked in job.log
    assert len(job.ranks(0)) == int(job.ranks(0)[0][2])


def test_an_array_is_several_runs(stub: Stub) -> None:
    """One of them dies and comes back alone; each has a folder of its own."""
    folder = stub.cluster.folder / "runs" / "array_${oc.env:SLURM_ARRAY_TASK_ID}"
    job = stub.submit("array", f"run.dir={folder}", "stub.first=kill@1", flags=["--array=1-2"])
    stub.cluster.see_through(job.number, 240)
    stub.cluster.see_through(job.number, 240)
    runs = [StubJob(stub.cluster, job.number, folder.with_name(f"array_{index}")) for index in (1, 2)]
    for index, run in enumerate(runs, start=1):
        assert [row["job"] for row in run.record] == [f"{job.number}_{index}"]
        assert len(run.ranks(0)) == len(run.ranks(1)) == 4
        assert (run.folder / "checkpoints" / "latest").read_text() == "step_3"


def test_the_run_folder_is_an_argument_or_in_a_file(stub: Stub) -> None:
    """In either way a job that dies comes back."""
    jobs = [stub.submit(f"folder_by_{key}", "stub.first=kill@1", run_dir_by=key) for key in ("config", "recipe")]
    for job in jobs:
        assert job.end().state == "COMPLETED", job.log
        assert [row["checkpoint"] for row in job.record] == ["step_1"]


def test_the_recipe_is_a_variable_or_an_argument(stub: Stub) -> None:
    by_variable = stub.submit("recipe_variable", RECIPE="instructgpt_6b")
    by_argument = stub.submit("recipe_argument", "recipe=instructgpt_6b")
    for job in (by_variable, by_argument):
        assert [a for a in tasks(job) if a.startswith("recipe=")] == ["recipe=instructgpt_6b"]


def test_the_chain_keeps_words_and_waits_for_a_job_that_comes_back(stub: Stub) -> None:
    runs = stub.cluster.folder / "runs" / "chain"
    settings = {
        **dict.fromkeys(("TOKENIZER", "POLICY", "DEMONSTRATIONS", "COMPARISONS", "PROMPTS", "PRETRAINING"), "/x"),
        "RUNS": str(runs),
        "SBATCH_FLAGS": "--nodes=1 --ntasks-per-node=2\n--gpus-per-node=2 --cpus-per-task=1",
        "SFT_OVERRIDES": "stub.first=kill@1\n\n'stub.text=a \"b\" c'  ",
        "PPO_OVERRIDES": '"stub.text=it\'s" stub.list=[1,2]',
        "VENV": "",
        "CLUSTER": "",
        "SBATCH_EXPORT": "NONE",
    }
    printed = stub.cluster.client("bash", str(stub.repository / "slurm" / "pipeline_175b.sh"), **settings)
    numbers = [int(words[words.index("job") + 1].rstrip(",")) for words in map(str.split, printed.splitlines())]
    sft, reward, ppo = (
        StubJob(stub.cluster, number, runs / name)
        for number, name in zip(numbers, ("sft", "reward", "ppo"), strict=True)
    )
    for job in (sft, reward, ppo):
        assert job.end().state == "COMPLETED", job.log
    assert sft.end().restarts == 1
    assert tasks(sft)[-2:] == ["stub.first=kill@1", 'stub.text=a "b" c']
    assert tasks(sft)[0] == "recipe=instructgpt_175b/ppo_initialization"
    assert tasks(ppo)[-2:] == ["stub.text=it's", "stub.list=[1,2]"]
