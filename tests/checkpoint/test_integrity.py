"""Checksums: every kind of damage is found and named, and `sha256sum` agrees."""

import os
import re
import subprocess

import pytest
import torch.distributed as dist
from ranks import run_ranks

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.integrity import MANIFEST, find_damage

META = '{"format": 1, "roles": {"policy": {}, "value": {}}, "state": {}}'


def write(folder):
    with sharded.writing(folder) as aside:
        if dist.get_rank() == 0:
            for role in ("policy", "value"):
                (aside / role).mkdir()
                for index in range(3):
                    (aside / role / f"__{index}_0.distcp").write_bytes(os.urandom(1000))
            (aside / sharded.META).write_text(META)
        dist.barrier()


@pytest.fixture
def checkpoint(tmp_path, world):
    write(tmp_path / "step_1")
    assert find_damage(tmp_path / "step_1") is None
    return tmp_path / "step_1"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "value" not in line))


DAMAGES = {
    "one_bit": ("policy/__1_0.distcp", flip, "policy/__1_0.distcp is not what was written"),
    "last_byte": ("value/__2_0.distcp", cut, "value/__2_0.distcp is not what was written"),
    "no_file": ("value/__0_0.distcp", os.unlink, "value/__0_0.distcp is missing"),
    "description": (sharded.META, lambda path: path.write_text(META + " "), "meta.json is not what was written"),
    "broken_description": (sharded.META, cut, "meta.json is broken"),
    "no_description": (sharded.META, os.unlink, "meta.json is missing"),
    "no_checksums": (MANIFEST, os.unlink, f"{MANIFEST} is missing: it was not written to its end"),
    "half_a_line": (MANIFEST, lambda path: path.write_bytes(path.read_bytes()[:-20]), f"{MANIFEST}, line 7 is broken|"),
    "half_of_the_checksums": (MANIFEST, cut_in_half, f"{MANIFEST} is cut off: it has no files of value"),
    "folder": ("", lambda path: subprocess.run(["rm", "-r", path], check=True), "meta.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind, checkpoint):
    name, damage, says = DAMAGES[kind]
    damage(checkpoint / name)
    found = find_damage(checkpoint)
    assert found is not None and re.search(says, found), found


def test_damage_of_another_role_does_not_matter(checkpoint):
    flip(checkpoint / "value" / "__0_0.distcp")
    assert find_damage(checkpoint, "policy") is None
    assert "value/__0_0.distcp" in find_damage(checkpoint, "value")


def test_sha256sum_reads_the_checksums(checkpoint):
    def check():
        return subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST], cwd=checkpoint, check=False).returncode

    assert check() == 0
    flip(checkpoint / "policy" / "__0_0.distcp")
    assert check() == 1


def find(folder):
    return find_damage(folder)


def test_ranks_share_the_reading_and_agree(checkpoint):
    """Five ranks for seven files: whichever rank reads the damaged one, all learn of it."""
    flip(checkpoint / "value" / "__1_0.distcp")
    found = run_ranks(5, find, checkpoint)
    assert found == ["value/__1_0.distcp is not what was written (its checksum differs)"] * 5
