"""A wheel works without a clone: built, installed in a fresh environment, it trains two steps somewhere else."""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from recipe import make_data

import megatron_rlhf
from megatron_rlhf.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # pip builds where the source is
    for name in ("megatron_rlhf", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    built = run(*build, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    binaries = folder / "venv" / "bin"
    site = Path(
        run(
            binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).stdout.strip()
    )
    # Behind the environment's own packages, so that what it has comes first.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-deps", "-q", wheel]
    done = run(*install, cwd=folder)
    assert done.returncode == 0, done.stderr
    return binaries


@pytest.mark.timeout(600)
def test_two_steps_without_a_clone(installed: Path, tmp_path: Path) -> None:
    recipe = make_data(tmp_path)
    arguments = recipe.sft("run", "run.stop_at_step=2")
    trained = run(installed / "megatron-rlhf", "sft", *arguments, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_2").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()
    where = run(installed / "python", "-c", "import megatron_rlhf; print(megatron_rlhf.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where.stdout
    again = run(installed / "python", "-m", "megatron_rlhf", "report", tmp_path / "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.timeout(600)
def test_recipes_and_clusters_come_along(installed: Path, tmp_path: Path) -> None:
    planned = run(installed / "megatron-rlhf", "plan", "recipe=instructgpt_6b", "--layouts", "0", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert run(installed / "megatron-rlhf", "--version", cwd=tmp_path).stdout.strip() == megatron_rlhf.__version__


def test_commands_are_listed_and_near_ones_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("sft", "reward-model", "ppo", "evaluate", *COMMANDS))
    assert main(["pppo"]) == 2
    assert "there is no command pppo; did you mean ppo?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture) -> None:
    with contextlib.suppress(SystemExit):  # argparse's way to end
        main([name, "--help"])
    assert "usage: megatron-rlhf" in capsys.readouterr().out
