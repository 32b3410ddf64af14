"""A stage as its command runs it, on some ranks, and its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ranks import run_ranks
from reference.data import Settings, read_lines
from reference.models import Weights
from safetensors.torch import load_file


class Export(NamedTuple):
    """Weights to convert for `transformers` when the run is over."""

    checkpoint: str
    """The name of a checkpoint, or of a file that names it."""
    role: str
    architecture: str


class Left(NamedTuple):
    """The results of a run."""

    rows: list[dict[str, float]]
    read: list[dict[str, list[list[int]]]]
    """Token ids of each step, by kind, in the order in which the trainer named them."""
    weights: dict[str, Weights]


def run(
    stage: str, settings: Settings, exports: Mapping[str, Export], ranks: int = 1, more: Sequence[str] = ()
) -> Left:
    """Run a stage; `more` are arguments that change no figure, such as the layout."""
    folder = Path(str(settings["run.dir"]))
    arguments = [f"{name}={_written(value)}" for name, value in settings.items()]
    read, *_ = run_ranks(ranks, _run, stage, [*arguments, *more], folder, dict(exports), timeout=300)
    weights = {name: load_file(folder / name / "model.safetensors") for name in exports}
    return Left(_figures(folder / "metrics.jsonl"), read, weights)


def _figures(path: Path) -> list[dict[str, float]]:
    """The metrics, and the cost of each step computed from its rates."""
    rows = read_lines(path)
    for row in rows:
        for name, rate in (("step_tokens", "throughput/tokens_per_s"), ("step_flops", "throughput/model_flops_per_s")):
            row[name] = row[rate] * row["time/step_s"]
    return rows


def _written(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"'{value}'"
    return str(list(value)) if isinstance(value, tuple) else str(value).lower()


def _run(stage: str, arguments: Sequence[str], folder: Path, exports: dict[str, Export]) -> list[dict]:
    from megatron_rlhf import cli
    from megatron_rlhf.conversion import convert
    from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
    from megatron_rlhf.runs.guards import Guard
    from megatron_rlhf.trainers import reward_model, sft

    # Far fewer than these are at hand: several parts of a pass over all of them, too, have to add up.
    sft.VALIDATION_BATCH, reward_model.VALIDATION_COMPLETIONS = 3, 2
    read: list[dict[str, list[list[int]]]] = []
    begin, name = Guard.begin, Guard.name

    def watched_begin(self, step):
        read.append({})
        begin(self, step)

    def watched_name(self, kind, ids, sequences):
        kind = kind.split()[0]  # "comparison 3, response"
        read[-1].setdefault(kind, []).extend([int(token) for token in sequence] for sequence in sequences)
        name(self, kind, ids, sequences)

    Guard.begin, Guard.name = watched_begin, watched_name
    cli.run_stage(stage, arguments)
    for output, export in exports.items():
        checkpoint = folder / "checkpoints" / export.checkpoint
        if checkpoint.is_file():
            checkpoint = checkpoint.with_name(checkpoint.read_text())
        options = convert.CheckOptions([5, 6, 7, 8])
        convert.export_huggingface(
            checkpoint, folder / output, export.role, export.architecture, None, ExtraFiles(), options
        )
    return read
