"""Opening a run folder."""

import errno
import tempfile

import pytest
from ranks import run_ranks

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.runs import run_lock


def try_with_a_read_only_file_system_on(broken_rank, folder):
    """The message on each rank."""
    import torch.distributed as dist

    def refuse(**kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    if dist.get_rank() == broken_rank:
        tempfile.TemporaryFile = refuse
    try:
        run_lock.require_writable(folder)
    except UserError as error:
        return str(error)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("heard", ["cannot be written: Read-only file system", None])
def test_one_rank_tries_whether_the_folder_can_be_written(tmp_path, heard):
    answers = run_ranks(2, try_with_a_read_only_file_system_on, 0 if heard else 1, tmp_path)
    assert answers[0] == answers[1], "all hear the same"
    assert (heard in answers[0]) if heard else answers[0] == [], "and nothing is left in the folder"
