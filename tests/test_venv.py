"""tools/venv.sh, which the two commands source: the Python that is asked for, its environment, and no second installation."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Says that it is Python 3.MINOR, makes environments with itself in them, and notes what pip is asked for.
PYTHON = """#!/bin/sh
case "$*" in
--version) echo Python 3.{minor}.7 ;;
-c*) echo 3.{minor} ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; : >"$3/bin/activate" ;;
"-m pip "*) echo "3.{minor} $*" >>"{log}" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("setup.py", "requirements.lock", "tools/venv.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def python(clone: Path, minor: int) -> Path:
    path = clone / f"python3.{minor}"
    path.write_text(PYTHON.format(minor=minor, log=clone / "pip.log"))
    path.chmod(0o755)
    return path


def source(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euc", "source tools/venv.sh requirements.lock"]
    environment = {"PATH": f"{clone}:/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


def installed(clone: Path) -> list[str]:
    return (clone / "pip.log").read_text().splitlines() if (clone / "pip.log").exists() else []


@pytest.mark.parametrize("minor", [9, 14])
def test_a_python_that_was_not_tested_is_named(clone: Path, minor: int) -> None:
    done = source(clone, PYTHON=str(python(clone, minor)))
    assert done.returncode == 2
    assert f"Python 3.10 to 3.13 is needed, {clone}/python3.{minor} is Python 3.{minor}.7" in done.stderr
    assert not (clone / ".venv").exists()


def test_another_python_gets_another_environment_and_the_same_none(clone: Path) -> None:
    for minor, count in ((11, 2), (11, 2), (12, 4)):
        done = source(clone, PYTHON=str(python(clone, minor)))
        assert done.returncode == 0, done.stderr
        assert len(installed(clone)) == count, installed(clone)
    assert "making .venv anew: its Python is 3.11" in done.stdout
    assert installed(clone)[2] == "3.12 -m pip install --quiet -r requirements.lock"
    # Without PYTHON the environment that is there stays, whatever the machine's python3 is.
    python(clone, 10).rename(clone / "python3")
    assert source(clone).returncode == 0
    assert len(installed(clone)) == 4


def test_a_second_environment_beside_the_first(clone: Path) -> None:
    source(clone, PYTHON=str(python(clone, 11)))
    source(clone, PYTHON=str(python(clone, 13)), VENV=".venv-other")
    assert [line.split()[0] for line in installed(clone)] == ["3.11"] * 2 + ["3.13"] * 2
    assert (clone / ".venv" / "bin" / "python").exists()
