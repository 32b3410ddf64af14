"""Checks what works on this machine: packages and their versions, GPUs, collectives, one training step."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron_rlhf.config.launch import without_ranks

OK, ABSENT, BROKEN = "ok", "absent", "BROKEN"
MEGATRON_CORE = "0.19.2" if sys.version_info >= (3, 12) else "0.16.1"
"""Version for this Python; from 3.12 on any 0.19 from this one."""
TORCH = "torch>=2.9,<2.15"
SELF_TEST_TIMEOUT = 180
PACKAGES = (
    "hydra omegaconf datasets transformers einops psutil safetensors tensorboard tqdm jinja2 matplotlib numpy".split()
)
_CONTAINER = "use NVIDIA's PyTorch container (Dockerfile)"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    name: str
    state: str
    detail: str
    """Its version, or what is wrong."""
    buys: str
    """What it is used for."""
    fix: str = ""
    """How to fix it, where it is broken."""


def examine() -> list[Finding]:
    """Everything except the self-test. Nothing here raises: what goes wrong is a finding."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _cuda,
        _nccl,
        _megatron_core,
        _packages,
        _transformer_engine,
        _apex,
        _flash_attention,
        _dynamic_engine,
        _slurm,
    ]
    return [check() for check in checks]


def self_test() -> Finding:
    """Ranks on this node alone: one for each GPU, or two on a CPU; collectives, then one update of a small model."""
    ranks = max(_gpus(), 2) if _gpus() != 1 else 1
    backend = "NCCL" if _gpus() else "gloo"
    what = f"{ranks} ranks over {backend}: collectives and a training step"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--module", "megatron_rlhf.self_test"]
    try:
        done = subprocess.run(
            command,
            env={"OMP_NUM_THREADS": "1", **separate_environment()},
            capture_output=True,
            text=True,
            timeout=SELF_TEST_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        busy = f"{os.getloadavg()[0]:.0f} processes want the {os.cpu_count()} cores"
        hint = (
            "ranks cannot reach each other: check the firewall, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; or this "
        )
        hint += f"machine is busy: {busy}"
        return Finding("self-test", BROKEN, f"{what} did not end in {SELF_TEST_TIMEOUT} s", "", hint)
    if done.returncode:
        reason = first_exception(done.stderr) or f"exit code {done.returncode}"
        return Finding("self-test", BROKEN, f"{what}: {reason}", "", f"run `{' '.join(command)}` to see it whole")
    return Finding("self-test", OK, what, "")


def separate_environment() -> dict[str, str]:
    """Of a test's ranks, which are a world of their own: a job step has Slurm's and torchrun's variables."""
    return {k: v for k, v in without_ranks().items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}


def report(findings: list[Finding]) -> str:
    """A table, then how to fix what is broken."""
    details = ["see below" if finding.state == BROKEN else finding.detail for finding in findings]
    widths = [max(map(len, column)) for column in ([f.name for f in findings], [f.state for f in findings], details)]
    lines = [
        f"{f.name:<{widths[0]}}  {f.state:<{widths[1]}}  {detail:<{widths[2]}}  {f.buys}".rstrip()
        for f, detail in zip(findings, details, strict=True)
    ]
    lines += [f"\n{finding.name}: {finding.detail}\n  fix: {finding.fix}" for finding in broken(findings)]
    return "\n".join(lines)


def broken(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state == BROKEN]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    state = OK if (3, 10) <= sys.version_info < (3, 14) else BROKEN
    return Finding("Python", state, found, "runs it all", "Python 3.10 to 3.13 is needed")


def _torch() -> Finding:
    fix = f"pip install '{TORCH}', for your CUDA version"
    try:
        import torch
    except Exception as error:
        return Finding("torch", BROKEN, _first_line(error), "tensors", fix)
    least, below = (tuple(map(int, pair)) for pair in re.findall(r"(\d+)\.(\d+)", TORCH))
    number = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if number is None or not least <= tuple(map(int, number.groups())) < below:
        return Finding("torch", BROKEN, f"{torch.__version__}: needed is {TORCH}", "tensors", fix)
    return Finding("torch", OK, torch.__version__, "tensors")


def _cuda() -> Finding:
    buys = "training on GPUs; without it everything runs on CPUs over gloo"
    driver = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    if _gpus():
        import torch

        return Finding("CUDA", OK, f"{torch.version.cuda}, {_gpus()} x {torch.cuda.get_device_name()}", buys)
    if driver:
        detail = f"the driver sees {len(driver)} x {driver[0]}, torch none"
        return Finding(
            "CUDA", BROKEN, detail, buys, f"install a torch built for the driver's CUDA version, or {_CONTAINER}"
        )
    return Finding("CUDA", ABSENT, "no GPU", buys)


def _nccl() -> Finding:
    buys = "collectives between GPUs"
    if not _gpus():
        return Finding("NCCL", ABSENT, "no GPU", buys)
    try:
        import torch.cuda.nccl

        return Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())), buys)
    except Exception as error:
        return Finding("NCCL", BROKEN, _first_line(error), buys, _CONTAINER)


def _megatron_core() -> Finding:
    buys = "models, optimizer, pipeline schedules"
    found = _version("megatron-core")
    fix = f"pip install megatron-core=={MEGATRON_CORE}"
    if found is None or not _serves(found):
        needed = f"Python {sys.version_info.major}.{sys.version_info.minor} needs {MEGATRON_CORE}"
        return Finding("Megatron-Core", BROKEN, f"{found or 'not installed'}: {needed}", buys, fix)
    try:
        import megatron_rlhf.models.gpt  # noqa: F401
    except Exception as error:
        return Finding("Megatron-Core", BROKEN, _first_line(error), buys, f"{fix}, or {_CONTAINER}")
    return Finding("Megatron-Core", OK, found, buys)


def _serves(megatron_core: str) -> bool:
    """0.16.1 itself; of 0.19 this patch release and those after it."""
    found, least = (
        [int(part) for part in text.split(".")[:3] if part.isdigit()] for text in (megatron_core, MEGATRON_CORE)
    )
    return found == least or (least[1] > 16 and found[:2] == least[:2] and found > least)


def _packages() -> Finding:
    """Other imports of this package and of Megatron-Core; searched for, not imported, which would take seconds."""
    buys = "configuration, data, tokenizers, reports"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(
            "packages", BROKEN, f"not installed: {', '.join(missing)}", buys, "pip install -e . in the repository"
        )
    return Finding("packages", OK, f"{len(PACKAGES)} found", buys)


def _transformer_engine() -> Finding:
    fix = (
        f"pip install --no-build-isolation -e '.[gpu]', or {_CONTAINER}; or remove it: pip uninstall transformer-engine"
    )
    return _optional("Transformer Engine", "transformer-engine", "transformer_engine.pytorch", "fused layers, fp8", fix)


def _apex() -> Finding:
    buys = "fused Adam and norms"
    found = _optional("Apex", "apex", "apex.optimizers", buys, "")
    if found.state == BROKEN:  # PyPI has another package of that name
        fix = (
            f"pip uninstall apex (PyPI's apex is an unrelated package); NVIDIA's is built from source, or {_CONTAINER}"
        )
        return Finding("Apex", BROKEN, found.detail, buys, fix)
    return found


def _flash_attention() -> Finding:
    fix = "pip install flash-attn --no-build-isolation, or pip uninstall flash-attn"
    return _optional("flash-attn", "flash-attn", "flash_attn", "faster attention in Transformer Engine", fix)


def _dynamic_engine() -> Finding:
    buys = "rollout.engine=megatron: paged cache, captured graphs"
    try:
        from megatron_rlhf.parallel.accelerators import dynamic_engine_lacks

        missing = dynamic_engine_lacks()
    except Exception as error:  # Megatron-Core cannot be imported: a finding of its own
        missing = _first_line(error)
    return Finding("sampling engine", OK if missing is None else ABSENT, missing or "Megatron-Core's", buys)


def _slurm() -> Finding:
    buys = "slurm/*.sh: many nodes, requeueing"
    if shutil.which("srun") is None:
        return Finding("Slurm", ABSENT, "no srun", buys)
    return Finding("Slurm", OK, _number(_output("srun", "--version")) or "installed", buys)


def _optional(name: str, package: str, module: str, buys: str, fix: str) -> Finding:
    """A package that may be missing, but must work where it is installed."""
    found = _version(package)
    if found is None:
        return Finding(name, ABSENT, "not installed", buys)
    if not _gpus():
        return Finding(name, ABSENT, f"{found}, of no use without a GPU", buys)
    try:
        importlib.import_module(module)
    except Exception as error:  # a wheel without its compiled part raises RuntimeError, not ImportError
        return Finding(name, BROKEN, f"{found} cannot be imported: {_first_line(error)}", buys, fix)
    return Finding(name, OK, found, buys)


def _gpus() -> int:
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:
        return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a program prints; nothing if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _number(printed: str) -> str:
    """The version in "slurm 23.02.1" or Debian's "slurm-wlm 22.05.8"."""
    found = re.search(r"\d+(\.\w+)+", printed)
    return found.group() if found else ""


def first_exception(printed: str) -> str:
    """Last line of a rank's first traceback: 'RuntimeError: ...'; later ones only follow from it."""
    found = re.search(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception|Interrupt)\b.*)$", printed, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()
