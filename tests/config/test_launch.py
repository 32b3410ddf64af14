"""Who a process is, read from the environment that python, torchrun or srun gives it."""

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.launch import Launch, detect_launch, tell_launcher, without_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
SALLOC = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch(0, 1, 0)),
        (TORCHRUN, Launch(5, 8, 1)),
        (SRUN, Launch(3, 4, 1)),
        (SRUN | TORCHRUN, Launch(5, 8, 1)),  # torchrun inside an srun step
        (SRUN | {"WORLD_SIZE": "4"}, Launch(3, 4, 1)),  # a job script that exports only the world size
        ({"RANK": "0"}, Launch(0, 1, 0)),
        ({"WORLD_SIZE": "1"}, Launch(0, 1, 0)),
        # A shell of salloc, with no step of its own or in the step that Slurm keeps for it; the batch script; extern.
        ({name: value for name, value in SALLOC.items() if name != "SLURM_STEP_ID"}, Launch(0, 1, 0)),
        (SALLOC | {"SLURM_STEP_ID": "4294967290"}, Launch(0, 1, 0)),
        (SALLOC | {"SLURM_STEP_ID": "4294967291"}, Launch(0, 1, 0)),
        (SALLOC | {"SLURM_STEP_ID": "4294967292"}, Launch(0, 1, 0)),
        (SALLOC | {"SLURM_STEP_ID": "interactive"}, Launch(0, 1, 0)),
    ],
)
def test_who_a_process_is(environment, launch):
    assert detect_launch(environment) == launch


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "3"}, "RANK=3 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not"),
        (TORCHRUN | {"RANK": "one"}, "RANK=one: a whole number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1: a whole number"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8: ranks go from 0"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        (TORCHRUN | {"WORLD_SIZE": "8.0"}, "WORLD_SIZE=8.0: a whole number"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x: a whole number"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4, SLURM_NTASKS=4"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_NTASKS"}, "SLURM_NTASKS=: a whole number"),
    ],
)
def test_what_no_launcher_sets_is_named(environment, says):
    with pytest.raises(UserError) as caught:
        detect_launch(environment)
    assert says in str(caught.value)


def test_a_process_of_no_world_does_not_take_torchruns_for_its_own():
    """As torchrun sets them."""
    names = (
        "LOCAL_RANK RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE "
    )
    names += "MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE PET_NNODES"
    kept = {"PATH": "/bin", "MASTER": "x", "RANKS": "3", "SLURM_JOB_ID": "7"}
    assert without_ranks(kept | dict.fromkeys(names.split(), "1")) == kept


def test_the_launcher_finds_the_reason_where_torchrun_looks_for_it(tmp_path):
    """Read back by torch's own class."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    tell_launcher("error: run.dir=x", {"TORCHELASTIC_ERROR_FILE": str(path)})
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert ChildFailedError("train", {0: failure}).format_msg().strip().splitlines()[-2].endswith(": error: run.dir=x")
    tell_launcher("no launcher", {})
