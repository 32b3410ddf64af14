"""The end of a run as a Hugging Face folder: `run.export_hf`."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_rlhf.checkpoint import naming
from megatron_rlhf.config.errors import RunFailed, UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.config.training import ExportChoice, RunConfig
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.check.outputs import CheckFailed
from megatron_rlhf.conversion.check.tokens import SAMPLE_TEXT
from megatron_rlhf.conversion.convert import CheckOptions
from megatron_rlhf.conversion.hf.export import choose_architecture
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.parallel import collectives

log = logging.getLogger(__name__)

FOLDER = "huggingface"
"""In the run folder."""


def require_exportable(run: RunConfig, model: ModelConfig, starts: Mapping[str, str | None]) -> None:
    """Raise UserError, before a run begins, where its end has no place in transformers, or would replace what is no export
    of this run.

    Args:
        starts: what each key of the configuration names as weights to start from.
    """
    if run.export_hf is None:
        return
    try:
        choose_architecture(model, None)
    except UserError as error:
        raise UserError(f"run.export_hf={run.export_hf.value}: {error}") from error
    output = Path(run.dir) / FOLDER
    own = naming.latest(Path(run.dir) / "checkpoints") is not None
    if output.exists() and not own:
        raise UserError(
            f"run.export_hf={run.export_hf.value}: {output} is there already, and not from this run; move it away, or "
            "choose another run.dir"
        )
    for key, start in starts.items():
        if start is not None and Path(start).expanduser().resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"run.export_hf={run.export_hf.value} would replace {output}, which {key}={start} starts from; move that "
                f"folder away and name it in {key}, or leave run.export_hf out"
            )


def export(run: RunConfig, role: str, tokenizer: Tokenizer) -> None:
    """Write the best or the last checkpoint's role to the run folder, checked as every conversion is. Collective.

    It replaces the export of an earlier call: a run that is over can be resumed, and be longer.
    """
    if run.export_hf is None:
        return
    output, root = Path(run.dir) / FOLDER, Path(run.dir) / "checkpoints"
    best = naming.best(root) if run.export_hf is ExportChoice.best else None
    checkpoint = best or naming.latest(root)
    assert checkpoint is not None, "the last step of a run is always saved"
    dist.barrier()  # all ranks have found it
    aside = output.with_name(f".{FOLDER}.new")
    collectives.on_first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
    companions = ExtraFiles.find(checkpoint, None)
    companions.special_tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    options = CheckOptions(tokenizer.encode(SAMPLE_TEXT, bos=True))
    try:
        report = convert.export_huggingface(checkpoint, aside, role, None, None, companions, options)
        collectives.on_first_rank(lambda: _replace(output, aside), (OSError,))
    except (CheckFailed, UserError, OSError) as error:  # a damaged checkpoint, a full disk
        raise RunFailed(f"run.export_hf={run.export_hf.value}: the run is saved, its export is not: {error}") from error
    log.info("%s of %s as a Hugging Face folder: %s: %s", role, checkpoint.name, output, report)


def _replace(output: Path, by: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    by.rename(output)
