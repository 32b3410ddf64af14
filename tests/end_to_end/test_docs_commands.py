"""Every command of docs/ runs: read by bash word by word, shrunk by settings alone, in a folder that has what the page names.

A page's commands run one after the other. Of benchmarks and examples of minutes it is tested that they are there and know their
options; what needs more than this machine says so.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from commands import INSTALLED, ROOT, free_port, run_command, run_example
from doc_pages import PAGES, Command, blocks, recorded
from doc_worlds import make_world
from ranks import CONTEXT

from megatron_rlhf.labeling.project import Project

TOKENS = ["data.max_prompt_tokens=32", "data.pretraining.sequence_length=24"]
SHRUNK = {
    "sft": ["sft.max_steps=1", "sft.batch_size=4", "data.max_prompt_tokens=32", "data.max_response_tokens=32"],
    "reward-model": ["reward_model.max_steps=1", "reward_model.batch_size=4", "data.max_response_tokens=32"],
    "ppo": [
        *("ppo.iterations=1", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.ptx_ratio=1", "ppo.warmup_iterations=1"),
        *("rollout.max_response_tokens=8", "ppo.tax_every=0", *TOKENS),
    ],
    "evaluate": ["evaluate.samples=4", "evaluate.task_limit=1", "sampling.max_response_tokens=8", *TOKENS],
    "iterate": ["evaluate.samples=4", "sampling.max_response_tokens=8", "data.max_prompt_tokens=32"],
    "plan": ["--layouts", "0"],
    "label serve": ["--port", "0"],
}
LONG = ("quickstart.sh", "happier_stories", "benchmark")
SERVER_SECONDS = 60


def page_commands(page: Path, folder: Path) -> list[Command]:
    return [command for block in blocks(page) for command in recorded(block.runnable, folder) if block.runnable.strip()]


@pytest.fixture(scope="module")
def world(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("docs"), recipe)


@pytest.fixture
def folder(world, tmp_path) -> Path:
    """A page's own: it changes what others start from."""
    return shutil.copytree(world, tmp_path / "page")


def readme_settings(stage: str) -> list[str]:
    """What `...` stands for: the README's settings of a stage, without its layout."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    script = {"sft": "train_sft", "reward-model": "train_reward_model", "ppo": "train_ppo"}[stage]
    (line,) = re.findall(rf"examples/{script}\.py (.*)", readme)
    return [word for word in shlex.split(line) if not word.startswith("parallel.")]


def filled_in(command: Command, folder: Path) -> list[str]:
    """The arguments, with `...` as what it stands for as far as the command does not say otherwise, and names for a `*`."""
    given = [word for word in command.arguments if word != "..."]
    if "..." not in command.arguments:
        return [found for word in given for found in (sorted(map(str, folder.glob(word))) if "*" in word else [word])]
    keys = {word.partition("=")[0] for word in given}
    scored = any(key.startswith("reward") for key in keys)
    more = [
        word
        for word in readme_settings(command.stage)
        if word.partition("=")[0] not in keys and not (scored and word.startswith("reward."))
    ]
    return [*given, *more]


def run_page_command(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run one command as it stands, with the settings that shrink it; returns what it printed."""
    arguments = filled_in(command, folder)
    name = " ".join(arguments[:2]) if command.stage == "label" else command.stage
    for word in arguments:
        if word.startswith("run.dir="):  # as in the reader's folder, where no such run is yet
            shutil.rmtree(folder / word.partition("=")[2], ignore_errors=True)
    for key, value in command.environment.items():
        monkeypatch.setenv(key, value)
    has_tasks = any(word.startswith("evaluate.tasks=") for word in arguments)
    arguments += [word for word in SHRUNK.get(name, []) if has_tasks or not word.startswith("evaluate.task_limit=")]
    if name == "label serve":
        return served(arguments, folder)
    finished = run_example(command.script, *arguments, ranks=command.ranks, folder=folder, timeout=200)
    assert finished.codes == [0] * command.ranks, f"{shlex.join(arguments)}:\n{finished.output}"
    return finished.output


def served(arguments: list[str], folder: Path) -> str:
    """Start a server, wait until it says where it is, end it."""
    output = folder / "served"
    process = CONTEXT.Process(target=run_command, args=(0, 1, free_port(), INSTALLED, arguments, output, folder))
    process.start()
    deadline = time.monotonic() + SERVER_SECONDS
    while process.is_alive() and "http" not in (output.read_text() if output.exists() else ""):
        assert time.monotonic() < deadline, "the server did not say where it is"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert "http" in output.read_text(), output.read_text()
    return output.read_text()


def label_everything(folder: Path) -> None:
    """Training labelers rank all that there is."""
    project = Project.open(folder / "labels.sqlite")
    for labeler in ("ann", "bob"):
        while (task := project.current(labeler)) is not None:
            size = len(project.task(task).outputs)
            content = {"ranks": list(range(1, size + 1)), "ratings": [None] * size, "metadata": [[]] * size, "note": ""}
            project.record(labeler, task, "submit", content, f"{labeler} {task}")
    project.close()


def between(page: str, command: Command, folder: Path) -> None:
    """What a reader has done before a command, or people have."""
    if page == "benchmarks":  # their prompts are longer than the toy's context
        shutil.rmtree(folder / "runs" / "ppo")
        shutil.copytree(folder / "gpt2", folder / "runs" / "ppo")
    if page == "labeling" and command.arguments[:2] == ["label", "status"]:
        label_everything(folder)
    if page == "evaluation" and command.stage == "compare":  # the others are evaluated in the same way
        for name in ("base", "sft"):
            shutil.copytree(folder / "runs" / "eval_ppo", folder / "runs" / f"eval_{name}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
@pytest.mark.timeout(600)
def test_the_commands_of_a_page_run(page, folder, tmp_path, monkeypatch):
    for command in page_commands(page, tmp_path):
        if command.stage not in LONG:
            between(page.stem, command, folder)
            run_page_command(command, folder, monkeypatch)


def test_commands_of_minutes_are_there_and_know_their_options(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    long = [command for page in PAGES for command in page_commands(page, tmp_path) if command.stage in LONG]
    assert {command.stage for command in long} == set(LONG)
    for command in long:
        assert any((ROOT / "examples" / f"{command.script}{ending}").is_file() for ending in ("", ".py")), command
        if command.stage == "benchmark":
            name, *options = command.arguments
            parser = argparse.ArgumentParser()
            importlib.import_module(f"benchmarks.{name}").arguments(parser)
            parser.parse_args(options)
