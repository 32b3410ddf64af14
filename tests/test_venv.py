"""tools/venv.sh: which Python it takes, and what it leaves alone."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("chosen", "found"), [("nowhere/python3.12", "not to be found"), ("./python3.8", "Python 3.8.18")]
)
def test_a_wrong_python_does_not_cost_the_environment(tmp_path, chosen, found):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "venv.sh", tmp_path / "tools")
    kept = _says(tmp_path / ".venv" / "bin" / "python", "3.11")
    _says(tmp_path / "python3.8", "Python 3.8.18")
    ended = subprocess.run(
        ["bash", "-c", "source tools/venv.sh requirements.lock"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHON": chosen},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: Python 3.10 to 3.13 is needed, {chosen} is {found};")
    assert kept.exists()


def test_a_changed_file_is_installed_again_and_so_is_the_former_one(tmp_path):
    """Whichever files a call names: what was installed since counts, not what was installed once."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "venv.sh", tmp_path / "tools")
    _says(tmp_path / ".venv" / "bin" / "python", "3.11")
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name in ("setup.py", "dev.lock"):
        (tmp_path / name).touch()

    def installs(lock: str, *files: str) -> bool:
        (tmp_path / "requirements.lock").write_text(lock)
        command = f"source tools/venv.sh requirements.lock {' '.join(files)}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return "installing the pinned versions" in done.stdout

    calls = [("a",), ("a",), ("a", "dev.lock"), ("a",), ("b",), ("b", "dev.lock"), ("a",), ("a", "dev.lock")]
    assert [installs(*call) for call in calls] == [True, False, True, False, True, False, True, False]


def _says(path: Path, answer: str) -> Path:
    """A program that always prints the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {answer}\n")
    path.chmod(0o755)
    return path
