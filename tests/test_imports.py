"""The directions of imports (shared design): which part of the package may know which."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_rlhf"

# Part -> parts it may import in addition to itself. `config.errors` holds one exception class and may be used by all.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "algorithms": set(),
    "data": set(),
    "monitoring": set(),
    "parallel": {"config", "algorithms"},
    "models": {"config", "algorithms", "parallel"},
    "rewards": {"config", "parallel", "models"},
    "rollout": {"config", "algorithms", "parallel", "models", "rewards"},
    "checkpoint": {"config", "parallel", "models"},
    "conversion": {"config", "data", "parallel", "models", "checkpoint"},
    "runs": {"config", "monitoring", "parallel", "models", "rollout", "checkpoint"},
    "evaluation": {
        *("config", "data", "labeling", "monitoring", "parallel", "models", "rewards", "rollout", "conversion", "runs"),
    },
    "trainers": {
        *("config", "algorithms", "data", "monitoring", "parallel", "models", "rewards", "rollout"),
        *("checkpoint", "conversion", "runs", "evaluation", "labeling", "callbacks"),
    },
    "callbacks": set(),
    "planning": {"config"},
    "labeling": {"config", "data"},
    "own_files": {"config"},
    "compose": {"config", "own_files"},
    "help": {"config", "compose"},
    "sweep": {"config", "compose"},
    "doctor": {"config", "parallel", "models"},
    "self_test": {"config", "parallel", "models", "trainers"},
    "commands": {
        *("config", "data", "monitoring", "parallel", "models", "planning", "planned", "conversion", "checkpoint"),
        *("rewards", "evaluation", "labeling", "own_files", "compose", "doctor", "nodes", "cli", "runs"),
    },
    "library": {"config", "compose", "cli", "rewards"},
    "__main__": {"__version__", "config", "commands", "cli"},
    "planned": {"config", "planning", "conversion", "compose"},
    "nodes": {"config", "parallel", "doctor"},
    "cli": {
        "config",
        "parallel",
        "checkpoint",
        "runs",
        "trainers",
        "compose",
        "planned",
        "callbacks",
        "help",
        "own_files",
        "sweep",
    },
}
FOR_ALL = "config.errors"
# Libraries -> the only parts that may import them.
COMMAND_LINE = {"hydra": {"compose", "cli", "own_files"}, "omegaconf": {"compose", "cli"}}
STANDARD = {"__future__", "collections", "contextlib", "dataclasses", "enum", "typing"}
# Parts -> all that they may import outside the package, and what a message calls it.
ONLY = {
    "algorithms": (STANDARD | {"torch", "math"}, "math and torch"),
    "config": (sys.stdlib_module_names, "the standard library"),
}


def sources() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Modules that a source imports, anywhere in it; for `from a import b` both a and a.b, as b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offences(part: str, source: str) -> list[str]:
    """Imports of a source in `part` that the table does not allow."""
    found = []
    for name in imported(source):
        top, *rest = name.split(".")
        if top in COMMAND_LINE and part not in COMMAND_LINE[top]:
            found.append(f"{name}: configurations arrive as dataclasses")
        if part in ONLY and top != PACKAGE and top not in ONLY[part][0]:
            found.append(f"{name}: {part} needs {ONLY[part][1]} alone")
        if top == PACKAGE and rest and not ".".join(rest).startswith(FOR_ALL) and rest[0] not in {part} | ALLOWED[part]:
            found.append(f"{name}: {part} may import {', '.join(sorted(ALLOWED[part])) or 'nothing of ours'}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path == ROOT / PACKAGE / "__init__.py":
        others = {name.split(".")[0] for name in imported(path.read_text())} - set(sys.stdlib_module_names)
        assert not others, "importing the package imports nothing but the standard library"
        return
    assert part_of(path) in ALLOWED, f"{part_of(path)} has no place in the table of this test"
    assert not offences(part_of(path), path.read_text())


def test_entry_points_go_through_the_package():
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("tools/*.py")]:
        tops = {name.split(".")[0] for name in imported(path.read_text())}
        assert not tops & {"tests", "hydra", "omegaconf"}, path


@pytest.mark.parametrize(
    ("part", "source", "reason"),
    [
        ("algorithms", "from megatron_rlhf.parallel import vocab", "nothing of ours"),
        ("config", "import megatron_rlhf.data.records", "nothing of ours"),
        ("config", "import torch", "the standard library alone"),
        ("algorithms", "from megatron.core import parallel_state", "torch alone"),
        ("models", "def f():\n    from megatron_rlhf.trainers.step import Update", "may import algorithms, config"),
        ("trainers", "from omegaconf import OmegaConf", "dataclasses"),
        ("data", "from megatron_rlhf.config.stages import PPOConfig", "nothing of ours"),
        ("rollout", "from megatron_rlhf import checkpoint", "may import"),
    ],
)
def test_a_wrong_import_is_found(part, source, reason):
    (offence,) = offences(part, source)
    assert reason in offence


def test_a_right_import_is_not():
    assert not offences("data", "from megatron_rlhf.config.errors import UserError")
    assert not offences("algorithms", "import math\nimport torch.nn.functional as F\nfrom torch import Tensor")
    assert not offences("rollout", "from megatron_rlhf.rollout.types import Completion")
