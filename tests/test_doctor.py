"""tools/doctor.py: what it reports as broken, what as merely absent, and what it advises."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rlhf import doctor, nodes
from megatron_rlhf.doctor import ABSENT, BROKEN, OK, Finding
from megatron_rlhf.parallel import accelerators

TOOL = Path(__file__).resolve().parents[1] / "tools" / "doctor.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("doctor_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_is_fit(tool, capsys):
    assert tool(["--no-self-test"]) == 0
    assert "Megatron-Core" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_the_self_test_runs_its_ranks():
    assert doctor.self_test().state == OK


def test_a_failing_self_test_is_broken(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    finding = doctor.self_test()
    assert finding.state == BROKEN
    assert "nosuch0" in finding.detail, "the reason, not just that there is one"
    assert "--module megatron_rlhf.self_test" in finding.fix


def test_the_reason_is_the_first_ranks_exception():
    printed = """[rank1]: Traceback (most recent call last):
[rank1]:   File "layout.py", line 102, in create
[rank1]:     raise RuntimeError(
[rank1]: RuntimeError: einops is not installed.
[rank0]: torch.distributed.DistBackendError: Connection closed by peer
"""
    assert doctor.first_exception(printed) == "RuntimeError: einops is not installed."
    assert doctor.first_exception("nothing of the kind") == ""


def test_a_machine_with_nothing_installed_is_told_what_to_install(tmp_path):
    """The tool runs from the clone, with a Python that has no packages at all."""
    bare = [sys.executable, "-I", "-S", str(TOOL)]
    done = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "No module named 'torch'" in done.stdout
    assert "not installed: hydra, omegaconf" in done.stdout
    assert "fix: pip install -e . in the repository" in done.stdout


def test_another_megatron_core_is_broken(monkeypatch, tool, capsys):
    monkeypatch.setattr(doctor, "version", lambda package: "0.15.0")
    assert tool([]) == 1
    printed = capsys.readouterr().out
    python = ".".join(map(str, sys.version_info[:2]))
    assert f"0.15.0: Python {python} needs {doctor.MEGATRON_CORE}" in printed
    assert f"fix: pip install megatron-core=={doctor.MEGATRON_CORE}" in printed
    assert "self-test" not in printed


@pytest.mark.parametrize(
    ("python", "torch_version", "states"),
    [
        ((3, 10, 0), "2.9.0a0+nv25.09", (OK, OK)),
        ((3, 13, 9), "2.14.1", (OK, OK)),
        ((3, 9, 18), "2.8.0", (BROKEN, BROKEN)),
        ((3, 14, 0), "2.15.0+cpu", (BROKEN, BROKEN)),
        ((3, 11, 0), "3.0.0", (OK, BROKEN)),
    ],
)
def test_which_python_and_torch_serve(monkeypatch, python, torch_version, states):
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(torch, "__version__", torch_version)
    findings = doctor._python(), doctor._torch()
    assert tuple(finding.state for finding in findings) == states
    setup = (TOOL.parents[1] / "setup.py").read_text()
    assert f'"{doctor.TORCH}"' in setup and 'python_requires=">=3.10,<3.14"' in setup


def test_a_test_of_ranks_is_a_world_apart(monkeypatch):
    """With torchrun's TORCHELASTIC_USE_AGENT_STORE, two nodes that are well would wait for each other without end."""
    theirs = ("RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_PROCID", "MASTER_PORT")
    for name in (*theirs, "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    kept = doctor.separate_environment()
    assert kept["SLURM_CONF"] == "1" and not set(theirs) & set(kept)


def test_each_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in ("cpu", "cuda:1", torch.device("cuda", 2)):
        nodes._synchronize(device)
    assert waited == ["cuda:1", torch.device("cuda", 2)]


@pytest.mark.parametrize(
    ("needed", "found", "serves"),
    [
        ("0.16.1", "0.16.1", True),
        ("0.16.1", "0.16.2", False),
        ("0.19.2", "0.19.2", True),
        ("0.19.2", "0.19.10", True),
        ("0.19.2", "0.19.0", False),
        ("0.19.2", "0.20.0", False),
        ("0.19.2", "0.16.1", False),
    ],
)
def test_which_megatron_core_serves(monkeypatch, needed, found, serves):
    """As in setup.py."""
    monkeypatch.setattr(doctor, "MEGATRON_CORE", needed)
    assert doctor._serves(found) is serves


def test_a_driver_that_torch_does_not_see_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_output", lambda *command: "NVIDIA H100\nNVIDIA H100\n")
    finding = by_name(doctor.examine())["CUDA"]
    assert finding.state == BROKEN
    assert finding.detail == "the driver sees 2 x NVIDIA H100, torch none"


def test_accelerators_that_cannot_be_imported_are_broken(monkeypatch):
    def fail(module):
        raise RuntimeError("Found empty `transformer-engine` meta package installed.\nmore")

    monkeypatch.setattr(doctor, "version", lambda package: "1.0")
    monkeypatch.setattr(doctor, "_gpus", lambda: 1)
    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    engine, apex = doctor._transformer_engine(), doctor._apex()
    assert (engine.state, apex.state) == (BROKEN, BROKEN)
    assert "Found empty `transformer-engine`" in engine.detail
    assert "more" not in engine.detail
    assert "unrelated package" in apex.fix


def test_the_sampling_engine_says_what_it_lacks(monkeypatch):
    lacks = "it needs a GPU, and torch sees none"
    monkeypatch.setattr(accelerators, "dynamic_engine_lacks", lambda: lacks)
    finding = doctor._dynamic_engine()
    assert (finding.state, finding.detail) == (ABSENT, lacks)
    monkeypatch.setattr(accelerators, "dynamic_engine_lacks", lambda: None)
    assert doctor._dynamic_engine().state == OK


def test_what_is_missing_is_no_fault(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    found = by_name(doctor.examine())
    assert found["Slurm"].state == found["Transformer Engine"].state == ABSENT
    assert not doctor.broken(list(found.values()))
