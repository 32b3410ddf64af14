"""Whole conversions: read, write to a temporary folder, check, and only then move the result into place."""

import contextlib
import dataclasses
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint import integrity, sharded
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, model_differences
from megatron_rlhf.conversion import peft
from megatron_rlhf.conversion.adapted import Merged, factor_shapes
from megatron_rlhf.conversion.architecture import WORD_EMBEDDINGS, Head, tensor_shapes
from megatron_rlhf.conversion.check.outputs import CheckFailed, compare_outputs, compare_tensors
from megatron_rlhf.conversion.check.tokens import check_batches
from megatron_rlhf.conversion.hf import export as hf_export
from megatron_rlhf.conversion.hf import extra_files
from megatron_rlhf.conversion.hf.export import AsType, Exported, choose_architecture, write_weights
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.conversion.hf.folder import same_bits
from megatron_rlhf.conversion.hf.load import is_hf_folder
from megatron_rlhf.conversion.hf.weights import Described, Weights
from megatron_rlhf.conversion.nemo import archive as nemo_archive
from megatron_rlhf.conversion.whole_tensors import CheckpointReader, TensorSource, places, write_checkpoint
from megatron_rlhf.parallel.collectives import on_first_rank
from megatron_rlhf.parallel.layout import ParallelLayout

ROLES = {"policy": "policy", "ema": "policy_ema", "reward": "reward", "value": "value"}
"""What users call a role -> its folder in a checkpoint."""
_HEADS = {"policy": Head.language, "policy_ema": Head.language, "reward": Head.score, "value": Head.token}

_ERRORS = (CheckFailed, UserError, OSError)
"""With which the first rank's work ends on all ranks; OSError: a full disk."""

_NEEDS_CODE = (
    f"the score's bias is kept as the tensor score.bias, for which {extra_files.REWARD_CODE} beside it has the place: load the "
    "model with trust_remote_code=True; without it transformers leaves the bias out and says so, and all scores are "
    "shifted by that one number"
)


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    architecture: str
    head: Head
    tensors: int
    """Number of Hugging Face tensors, each of which was compared bit by bit."""
    largest_difference: float
    """Largest difference of outputs, in fp32, over all test tokens."""
    largest_output: float
    positions: tuple[int, int]
    """Lengths of the longest row that both models ran on, and of the model's context."""
    peak_bytes_converting: int
    """Peak memory of this process before the check."""
    peak_bytes: int
    """The same, including the check."""
    needs_code: bool = False
    """A reward model with a bias that transformers' own class does not support."""

    def __str__(self) -> str:
        text = (
            f"{self.architecture} ({self.head.value}): {self.tensors} tensors bit-identical, outputs of up to "
            f"{self.largest_output:.3g} within {self.largest_difference:.2g} over {self.positions[0]} of "
            f"{self.positions[1]} positions; peak memory {self.peak_bytes_converting / 1e9:.2f} GB converting, "
            f"{self.peak_bytes / 1e9:.2f} GB with the check"
        )
        return f"{text}; {_NEEDS_CODE}" if self.needs_code else text


@dataclass(frozen=True)
class CheckOptions:
    """What the two models are run on."""

    text_tokens: Sequence[int] = ()
    """A text, tokenized by the model's own tokenizer."""
    length: int = 2048
    """Longest row, in tokens; the model's context where that is shorter."""

    def require_known_tokens(self, model: ModelConfig, tokenizer: Path | None) -> None:
        """Raise UserError when the tokenizer gives tokens that the model does not have."""
        if (largest := max(self.text_tokens, default=0)) >= model.vocab_size:
            raise UserError(
                f"{tokenizer}: its tokenizer gives token {largest}, but the model knows {model.vocab_size}: it is another "
                "model's"
            )


def import_huggingface(
    source: Path, output: Path, role: str | None, check: CheckOptions, allow_pickle: bool = False
) -> Report:
    """Write a Hugging Face folder as one of our checkpoints, with one role. Collective.

    Raises:
        UserError: for an input that cannot be converted.
        CheckFailed: when the result is not the same model; the output is removed.
    """
    described = Described.read(source)
    name = _role_for(described, role, source)
    check.require_known_tokens(described.model, source)
    weights = Weights.open(source, described, allow_pickle=allow_pickle)
    weights.require_one_type_a_tensor()
    with _into(output) as folder:
        write_checkpoint(folder / name, weights)
        on_first_rank(lambda: extra_files.keep(source, folder), _ERRORS)
        sharded.write_description(
            folder, {name: (described.model, described.scalar, "")}, {"imported_from": str(source)}
        )
        reader = CheckpointReader(folder / name, described.shapes, described.model.num_layers)
        return _checked(reader, reader, weights, check)


def import_nemo(archive: Path, output: Path) -> int:
    """Write a `.nemo` archive of a GPT as our checkpoint with a policy; returns how many tensors were compared.

    transformers cannot run such a model: only tensors are checked, read back and compared bit by bit. Collective.
    """
    with _into(output) as folder, nemo_archive.opened(archive, folder.parent) as (model, source):
        write_checkpoint(folder / "policy", source)
        sharded.write_description(folder, {"policy": (model, False, "")}, {"imported_from": str(archive)})
        reader = CheckpointReader(folder / "policy", tensor_shapes(model, scalar=False), model.num_layers)

        def compare() -> int:
            every = places(reader.shapes, reader.num_layers)
            for place in every:
                if not same_bits(reader.read(place), source.read(place)):
                    raise CheckFailed(f"tensor {place} differs from the archive's")
            return len(every)

        return on_first_rank(compare, _ERRORS)


def export_huggingface(
    checkpoint: Path,
    output: Path,
    role: str,
    architecture: str | None,
    dtype: torch.dtype | None,
    extra: ExtraFiles,
    check: CheckOptions,
    shard_bytes: int = hf_export.SHARD_BYTES,
    with_adapter: bool = True,
) -> Report:
    """Write one role of one of our checkpoints as a Hugging Face folder. Collective.

    `with_adapter`: adapters are added to the weights; otherwise they are left out.

    Raises:
        UserError: for a role or a shape that cannot be converted.
        CheckFailed: when the result is not the same model; the output is removed.
    """
    model, scalar, adapter = _role_shape(checkpoint, role)
    described = Described(choose_architecture(model, architecture, extra.model_type), model, _HEADS[role])
    if described.architecture.head_module(described.head) is None:
        name = described.architecture.class_name(described.head)
        raise UserError(f"--role {role}: transformers has no {name}, which a value model would become")
    check.require_known_tokens(model, extra.tokenizer)
    stored: TensorSource = CheckpointReader(checkpoint / role, _shapes(model, scalar, adapter), model.num_layers)
    if adapter is not None:
        stored = Merged(stored, model, adapter if with_adapter else dataclasses.replace(adapter, targets=()))
    reader = AsType(stored, dtype)
    exported = Exported.of(described, reader)
    with _into(output) as folder:
        write_weights(folder, exported, shard_bytes)

        def complete() -> None:
            extra.copy_to(folder, generation=not scalar)
            extra_files.write_config(folder, described, exported.dtype(WORD_EMBEDDINGS), extra, exported.needs_code)

        on_first_rank(complete, _ERRORS)
        weights = Weights.open(folder, Described.read(folder))
        return _checked(reader, exported, weights, check, exported.needs_code)


def export_peft(
    checkpoint: Path, output: Path, role: str, architecture: str | None, extra: ExtraFiles, base: str
) -> str:
    """Write a role's adapters as a folder for `peft`; returns what was checked. Collective.

    Args:
        base: Hugging Face folder of the model that they adapt. If it is here, its weights must be those that the
            adapters were trained beside, bit by bit or rounded to the checkpoint's type.
    """
    model, scalar, adapter = _role_shape(checkpoint, role)
    if adapter is None:
        raise UserError(f"--adapter only: the {role} in {checkpoint} has no adapters")
    if scalar:
        raise UserError(f"--adapter only --role {role}: peft has no place for this head; take --adapter merged")
    described = Described(choose_architecture(model, architecture, extra.model_type), model, Head.language)
    reader = CheckpointReader(checkpoint / role, _shapes(model, scalar, adapter), model.num_layers)
    with _into(output) as folder:

        def write() -> str:
            peft.write(folder, described, reader, adapter, base)
            extra.copy_to(folder, generation=False)
            if not is_hf_folder(base):
                return f"adapters of rank {adapter.rank}; their base {base} is not here, and was not compared"
            _require_same_base(Path(base), reader, model)
            again = peft.PeftFolder.open(folder, "--output")
            if again.adapter != adapter:
                raise CheckFailed(f"read back, the adapters are {again.adapter}, and not {adapter}")
            return f"adapters of rank {adapter.rank}; their base is {base}, whose weights are the checkpoint's"

        return on_first_rank(write, _ERRORS)


def _require_same_base(base: Path, reader: CheckpointReader, model: ModelConfig) -> None:
    described = Described.read(base)
    if described.scalar or model_differences(model, described.model):
        raise UserError(f"--base {base}: is not the model that the adapters were trained beside")
    stored = Weights.open(base, described)
    for place in places(described.shapes, model.num_layers):
        trained_on = reader.read(place)
        if not same_bits(trained_on, stored.read(place).to(trained_on.dtype)):
            raise UserError(f"--base {base}: tensor {place} is not the one that the adapters were trained beside")


def _role_for(described: Described, role: str | None, source: Path) -> str:
    """The folder of the checkpoint that an import writes."""
    name = ROLES[role] if role else {Head.language: "policy", Head.score: "reward", Head.token: "value"}[described.head]
    if described.scalar != (_HEADS[name] is not Head.language):
        has = "a scalar head" if described.scalar else "no scalar head (init_from of a reward model starts a new one)"
        raise UserError(f"--role {role}: {source} has {has}")
    return name


def _shapes(model: ModelConfig, scalar: bool, adapter: Adapter | None) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(model, scalar) | (factor_shapes(model, adapter) if adapter else {})


def _role_shape(checkpoint: Path, role: str) -> tuple[ModelConfig, bool, Adapter | None]:
    """Raises UserError for a role that is not there or whose files are not what was written. Collective."""
    roles = sharded.read_meta(checkpoint)["roles"]
    if role not in roles:
        names = {folder: name for name, folder in ROLES.items()}
        held = ", ".join(names.get(folder, folder) for folder in roles)
        raise UserError(f"--role {names[role]}: {checkpoint} holds {held}")
    if problem := integrity.find_damage(checkpoint, role):
        raise UserError(f"{checkpoint}: the checkpoint is damaged: {problem}")
    content = roles[role]
    return (
        sharded.model_from_json(content["model"]),
        content["scalar"],
        sharded.adapter_from_json(content.get("adapter")),
    )


@contextlib.contextmanager
def _into(output: Path) -> Iterator[Path]:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not empty; name a new folder")
    if output.resolve() == Path.cwd():
        raise UserError(f"--output {output}: is the current folder, and a new one would replace it; name another")
    dist.barrier()  # all ranks have checked before one writes
    with sharded.writing(output) as folder:
        yield folder


def _checked(
    source: TensorSource, exported: TensorSource, hf: Weights, check: CheckOptions, needs_code: bool = False
) -> Report:
    layout = ParallelLayout.create(ParallelConfig(), range(1))

    def compare() -> Report:
        described, converting = hf.described, _peak_bytes()
        tensors = compare_tensors(exported, hf)
        batches = check_batches(described.model, check.text_tokens, check.length)
        difference, largest = compare_outputs(source, hf, layout, batches)
        return Report(
            architecture=described.architecture.model_type,
            head=described.head,
            tensors=tensors,
            largest_difference=difference,
            largest_output=largest,
            positions=(batches[0].tokens_bs.shape[1], described.model.max_sequence_length),
            peak_bytes_converting=converting,
            peak_bytes=_peak_bytes(),
            needs_code=needs_code,
        )

    return on_first_rank(compare, _ERRORS)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
