"""Unusable accelerators are hidden from Megatron-Core, which would use them; without any, Adam can still be saved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import utils
from megatron.core.package_info import __version__ as MEGATRON_CORE
from megatron.core.transformer import attention
from packaging.version import Version as PkgVersion

from megatron_rlhf.parallel import accelerators, compat

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_A_GPU = """
from megatron_rlhf import self_test
self_test.main()
"""
# As on a machine with a GPU and nothing else; nothing is computed on it.
ON_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
import megatron_rlhf.parallel
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
assert optimizer.Adam is distrib_optimizer.Adam
print(optimizer.Adam.__name__, distrib_optimizer.HAVE_APEX_OR_TE)
"""


def python(program: str, packages: Path) -> str:
    """Output of a program that finds `packages` before everything else."""
    paths = os.pathsep.join(map(str, [packages, ROOT, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_package(folder: Path, name: str, content: str) -> None:
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_a_container_without_a_gpu_trains(tmp_path: Path) -> None:
    """Apex can be imported and its kernels cannot run; Transformer Engine cannot even be imported."""
    write_package(
        tmp_path, "transformer_engine.__init__", "raise AssertionError('Could not find `transformer_engine_torch`')\n"
    )
    write_package(tmp_path, "apex.__init__", "")
    write_package(
        tmp_path, "apex.multi_tensor_apply", "def multi_tensor_applier(*args):\n    raise RuntimeError('needs a GPU')\n"
    )
    write_package(tmp_path, "apex.optimizers", "class FusedAdam: ...\nclass FusedSGD: ...\n")
    write_package(tmp_path, "amp_C", "multi_tensor_l2norm = multi_tensor_scale = None\n")
    python(WITHOUT_A_GPU, tmp_path)


def test_a_gpu_without_accelerators_has_an_adam_that_can_be_saved(tmp_path: Path) -> None:
    assert python(ON_A_GPU, tmp_path) == "AdamWithGroupStep True\n"


@pytest.mark.parametrize("error", ["RuntimeError", "AssertionError", "OSError"])
def test_an_accelerator_that_fails_in_its_own_code_is_as_good_as_missing(tmp_path, monkeypatch, error):
    package = f"broken_{error.lower()}"
    write_package(tmp_path, f"{package}.__init__", "")
    write_package(tmp_path, f"{package}.pytorch", f"raise {error}('libcuda.so.1: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(accelerators, "_OPTIONAL", {"Engine": f"{package}.pytorch", "Apex": "no_such_package"})
    monkeypatch.setattr(accelerators, "_broken", {})
    accelerators.hide_broken()
    for name in (package, f"{package}.pytorch"):
        with pytest.raises(ModuleNotFoundError):
            __import__(name)
    expected = f"accelerators: Engine broken ({error}: libcuda.so.1: no such file), Apex no"
    assert accelerators.describe_accelerators() == expected


def test_what_the_sampling_engine_lacks(monkeypatch) -> None:
    monkeypatch.setattr(compat, "DYNAMIC_ENGINE", False)
    assert (
        accelerators.dynamic_engine_lacks() == f"it needs Megatron-Core 0.19 (Python 3.12), and this is {MEGATRON_CORE}"
    )
    monkeypatch.setattr(compat, "DYNAMIC_ENGINE", True)
    assert accelerators.dynamic_engine_lacks() == "it needs a GPU, and torch sees none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, found in (("HAVE_FA4", False), ("HAVE_FA3", False), ("flash_attn_varlen_func", None)):
        monkeypatch.setattr(attention, name, found, raising=False)
    assert accelerators.dynamic_engine_lacks() == "it needs flash-attn 2.7.3 or newer, and none can be imported"
    monkeypatch.setattr(attention, "flash_attn_varlen_func", print)
    for version, lacks in (("2.6.0", "it needs flash-attn 2.7.3 or newer, and this is 2.6.0"), ("2.8.1", None)):
        monkeypatch.setattr(utils, "_fa_version", PkgVersion(version))
        assert accelerators.dynamic_engine_lacks() == lacks
