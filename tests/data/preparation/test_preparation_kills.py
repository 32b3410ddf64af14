"""`prepare clean` as a command that is killed (SIGKILL) at random points and given again: the same bytes in the end."""

import json
import random
import subprocess
import sys
import time

import pytest
from commands import ROOT

PARTS = ("train", "validation", "test")


def write_prompts(path, count, seed=0):
    noise = random.Random(seed)
    words = "red green blue one two three four five how why what who makes needs takes gives".split()
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(noise.choices(words, k=9)) + (" a@b.org" if noise.random() < 0.1 else "")
            file.write(json.dumps({"prompt": text, "user": f"u{noise.randrange(count // 20)}"}) + "\n")


def clean(source, output):
    rules = ("--prefix", "20", "--split", "0.8,0.1,0.1", "--max-per-user", "15", "--personal", "mask")
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "clean"]
    return subprocess.Popen(
        [*command, "--input", str(source), "--output", str(output), *rules],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def written(output):
    return sum(path.stat().st_size for path in output.glob("*.jsonl")) if output.exists() else 0


def kill_when(process, output, size):
    """SIGKILL as soon as this many bytes are there; False if it has ended before."""
    deadline = time.monotonic() + 300
    while process.poll() is None and written(output) < size:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return process.returncode == -9


def same_after_kills(tmp_path, count, kills, seed):
    source = tmp_path / "prompts.jsonl"
    write_prompts(source, count)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished = clean(source, whole)
    _, errors = finished.communicate()
    assert finished.returncode == 0, errors
    total, chance = written(whole), random.Random(seed)
    places = sorted(chance.randrange(1, total) for _ in range(kills))
    happened = sum(kill_when(clean(source, parts), parts, place) for place in places)
    assert happened >= kills - 1, "the last may come too late"
    if not (parts / "report.json").exists():
        last = clean(source, parts)
        _, errors = last.communicate()
        assert last.returncode == 0, errors
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        # The command, with the name of the folder, is in the page.
        ours, theirs = ((folder / path.name).read_text().replace(str(folder), "") for folder in (parts, whole))
        assert ours == theirs, path.name


def test_killed_at_a_few_points(tmp_path):
    same_after_kills(tmp_path, 6000, 3, seed=1)


@pytest.mark.slow
def test_killed_at_many_points(tmp_path):
    same_after_kills(tmp_path, 100_000, 20, seed=2)
