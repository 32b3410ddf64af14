"""Rankings and demonstrations by people: make a project, serve its page, see how far it is, export."""

import argparse
import logging
import math
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.commands.numbers import whole
from megatron_rlhf.commands.outputs import require_lines
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.evaluation.agreement import Agreement, Judgement, agreement
from megatron_rlhf.labeling.answers import cards, dense
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import DEMONSTRATIONS, HELD_OUT, RANKINGS, TRAINING, Answer, Settings

DESCRIPTION = """Labels by people: rankings of 2 to 9 outputs a prompt, or demonstrations.

    megatron-rlhf label create labels.sqlite --tasks sft=a.jsonl ppo=b.jsonl --labelers ann bob --held-out cy
    megatron-rlhf label serve labels.sqlite
    megatron-rlhf label export labels.sqlite --output comparisons.jsonl --team training

docs/labeling.md tells what labelers see, and how to let them in from other machines."""
LOOPBACK = ("localhost", "127.0.0.1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def agreement_by_team(project: Project) -> Mapping[str, Agreement]:
    """Agreement among training labelers, and among held-out ones."""
    if project.settings.kind != RANKINGS:
        return {}
    return {team: agreement(_judgement(answer) for answer in project.answers([team])) for team in (TRAINING, HELD_OUT)}


def _judgement(answer: Answer) -> Judgement:
    """Of each text once: outputs that are the same text are ranked together, which is no agreement on a pair."""
    places = [card.places[0] for card in cards(answer.task.outputs, seed="")]
    ranks, ratings = ([answer.content[name][place] for place in places] for name in ("ranks", "ratings"))
    return Judgement(answer.number, answer.labeler, dense(ranks), ratings)


def create(options: argparse.Namespace) -> None:
    settings = Settings(
        kind=options.kind,
        title=options.title,
        instructions=_read(options.instructions) if options.instructions else "",
        labels_per_prompt=options.labels_per_prompt,
        require_ratings=options.require_ratings,
    )
    tasks = _tasks(options, options.kind)
    project = Project.create(options.project, settings)
    try:
        project.add_tasks(tasks)
        _add_labelers(project, options)
    except UserError:
        project.close()
        for suffix in ("", "-wal", "-shm"):  # nothing was there before
            Path(f"{options.project}{suffix}").unlink(missing_ok=True)
        raise
    _describe(project)


def add(options: argparse.Namespace) -> None:
    project = _open_to_write(options.project)
    tasks = _tasks(options, project.settings.kind)
    _add_labelers(project, options)
    added = project.add_tasks(tasks)
    if added < len(tasks):
        print(
            f"{len(tasks) - added} of {len(tasks)} prompts are in the project already, with the same outputs: left out"
        )
    _describe(project)


def status(options: argparse.Namespace) -> None:
    project = Project.open(options.project)
    _describe(project)
    if project.settings.kind != RANKINGS:
        return
    for team, found in agreement_by_team(project).items():
        if not found.prompts:
            print(f"{team}: no prompt that several ranked yet")
            continue
        error = f" +- {found.error:.1f}" if math.isfinite(found.error) else ""  # of one prompt there is none
        alpha = f", Krippendorff's alpha {found.alpha:.3f}" if math.isfinite(found.alpha) else ""
        several = f"{found.prompts} prompts that several ranked"
        print(f"{team}: pairwise agreement {found.percent:.1f}{error}%{alpha} ({several})")


def export(options: argparse.Namespace) -> None:
    from megatron_rlhf.labeling.export import export as write

    project = Project.open(options.project)
    require_lines(options.output, ("prompt", "labeler", "team", "task"))
    teams = [TRAINING, HELD_OUT] if options.team == "all" else [options.team]
    count = write(project, options.output, teams, options.blank)
    print(f"{options.output}: {count} {project.settings.kind}")


def serve(options: argparse.Namespace) -> None:
    import uvicorn

    from megatron_rlhf.labeling.access import ADMIN, Access
    from megatron_rlhf.labeling.app import create_app

    project = _open_to_write(options.project)
    token = options.token or os.environ.get("LABELING_TOKEN")
    if token is None and options.host not in LOOPBACK:
        raise UserError(
            f"--host {options.host}: from other machines the page needs --token, a secret of 16 characters or more, such as "
            f"{secrets.token_hex(16)}; each labeler's login link follows from it"
        )
    if token is not None and len(token) < 16:
        raise UserError(f"--token of {len(token)} characters: at least 16, such as {secrets.token_hex(16)}")
    if not project.labelers():
        raise UserError(
            f"{options.project} has no labelers; add some: megatron-rlhf label add {options.project} --labelers NAME ..."
        )
    listening = _listen(options.host, options.port)
    port = listening.getsockname()[1]
    base = (options.url or f"http://{options.host}:{port}").rstrip("/")
    access = Access(token, project.settings.secret)
    if token is None:
        print(f"{base} (Ctrl+C ends it; nothing is lost)", flush=True)
    else:
        names = {"whoever runs this": ADMIN, **{name: name for name in project.labelers()}}
        print("\n".join(f"{shown}: {base}{access.link(name)}" for shown, name in names.items()), flush=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    app = create_app(project, access, agreement_by_team, https=base.startswith("https:"))
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning")).run(sockets=[listening])


def _open_to_write(path: Path) -> Project:
    project = Project.open(path)
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written to: it is read-only for this user")
    return project


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error}; give another --port, or 0 for any that is free"
        ) from error
    return listening


def _tasks(options: argparse.Namespace, kind: str) -> list[Any]:
    # Both take a second, for which a server need not wait.
    from megatron_rlhf.commands.prepare_records import columns_of
    from megatron_rlhf.labeling.tasks import read_tasks

    return read_tasks(options.tasks, kind, columns_of(options.column))


def _add_labelers(project: Project, options: argparse.Namespace) -> None:
    project.add_labelers(options.labelers, TRAINING)
    project.add_labelers(options.held_out, HELD_OUT)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--instructions {path}: {error}") from error


def _describe(project: Project) -> None:
    print(
        f"{project.path}: {project.size()} prompts, {project.settings.kind}, {project.settings.labels_per_prompt} a prompt"
    )
    for entry in project.progress():
        left = project.left(entry.labeler)
        print(f"  {entry.labeler} ({entry.team}): {entry.done} done, {entry.skipped} skipped, {left} left")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("create", help="make a project")
    _content_options(command)
    command.add_argument("--kind", choices=[RANKINGS, DEMONSTRATIONS], default=RANKINGS, help="default rankings")
    command.add_argument(
        "--labels-per-prompt", type=int, default=1, metavar="N", help="labels a prompt, of each team; default 1"
    )
    command.add_argument("--require-ratings", action="store_true", help="each output needs a 1-7 rating")
    command.add_argument("--title", default="Labels", help="what the page is called")
    command.add_argument("--instructions", metavar="FILE", help="text that labelers can open")
    command.set_defaults(run=create)

    command = commands.add_parser("add", help="add prompts or labelers to a project")
    _content_options(command)
    command.set_defaults(run=add)

    command = commands.add_parser("serve", help="serve the page")
    _project_option(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1, this machine alone"
    )
    command.add_argument("--port", type=whole(0, 65535), default=8420, help="default 8420; 0 for any that is free")
    command.add_argument(
        "--token", help="secret that login links follow from; also as LABELING_TOKEN in the environment"
    )
    command.add_argument(
        "--url", help="how labelers reach the page, if a proxy stands before it: https://labels.example.org"
    )
    command.set_defaults(run=serve)

    command = commands.add_parser("status", help="print progress and agreement")
    _project_option(command)
    command.set_defaults(run=status)

    command = commands.add_parser("export", help="write comparisons or demonstrations as training reads them")
    _project_option(command)
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help=".jsonl file to write")
    command.add_argument(
        "--team", choices=["all", TRAINING, HELD_OUT], default="all", help="whose answers; default all"
    )
    command.add_argument(
        "--blank", action="store_true", help="keep responses without a text: to compare policies, not to train"
    )
    command.set_defaults(run=export)
    return parser


def _project_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("project", type=Path, metavar="PROJECT", help="the project's file")


def _content_options(command: argparse.ArgumentParser) -> None:
    _project_option(command)
    command.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="records to label, NAME being who wrote the responses: what evaluate wrote, or {prompt, responses}",
    )
    command.add_argument("--labelers", nargs="+", default=[], metavar="NAME", help="labelers whose answers train")
    command.add_argument("--held-out", nargs="+", default=[], metavar="NAME", help="labelers kept for evaluation")
    command.add_argument(
        "--column", action="append", default=[], metavar="NAME=TEMPLATE", help="make a column from others; repeatable"
    )
