"""Policy, reference, reward and value model: one class for a model in its layout, read or trained."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_rlhf.config.model import ModelConfig, Precision
from megatron_rlhf.models.gpt import build_chunks
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.pipeline import Microbatch, forward_backward
from megatron_rlhf.parallel.vocab import entropy, token_logprobs


@dataclass
class Role:
    """A model in its layout. `chunks` are this rank's part of it."""

    name: str
    model: ModelConfig
    layout: ParallelLayout
    chunks: Sequence[torch.nn.Module]
    scalar: bool

    @classmethod
    def build(
        cls,
        name: str,
        model: ModelConfig,
        layout: ParallelLayout,
        precision: Precision,
        scalar: bool = False,
        dropout: float = 0.0,
    ) -> "Role":
        """A model with random weights."""
        return cls(name, model, layout, build_chunks(model, layout, precision, scalar, dropout), scalar)

    def frozen(self) -> "Role":
        """The same, without gradients or dropout."""
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        return self

    def pad_length(self, length: int) -> int:
        """The length to which sequences of `length` tokens are padded: sequence parallelism splits it evenly."""
        parts = self.layout.config.tensor if self.layout.config.sequence else 1
        return (length + parts - 1) // parts * parts

    def num_parameters(self) -> int:
        """Weights of the whole model; tied embeddings count once."""
        on_this_rank = sum(p.numel() for chunk in self.chunks for p in chunk.parameters() if not _is_copy(p))
        copies = 1.0 if self.layout.config.tensor == 1 else None
        if copies is None:  # replicated weights count on one tensor-parallel rank only
            sharded = sum(p.numel() for c in self.chunks for p in c.parameters() if _is_sharded(p) and not _is_copy(p))
            on_this_rank = sharded + (on_this_rank - sharded if self.layout.tp_rank == 0 else 0)
        return int(collectives.sum_over(on_this_rank, self.layout.groups.mp))

    @contextlib.contextmanager
    def evaluating(self, decoding: bool = False) -> Iterator[None]:
        """Dropout off, no gradients; decoding also switches sequence parallelism off: one token cannot be split."""
        modes = [chunk.training for chunk in self.chunks]
        modules = [getattr(chunk, "module", chunk) for chunk in self.chunks]
        sequence_parallel = decoding and modules[0].config.sequence_parallel
        for chunk in self.chunks:
            chunk.eval()
        if sequence_parallel:
            _set_sequence_parallel(modules, False)
        try:
            with torch.no_grad():
                yield
        finally:
            if sequence_parallel:
                _set_sequence_parallel(modules, True)
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def values(self, tokens_bs: Tensor, micro_batch_size: int) -> Tensor:
        """The scalar head at every token, [b, s] fp32, on every rank of the layout."""
        assert self.scalar, f"{self.name} has no scalar head"
        return self._read(tokens_bs, lambda output, rows: output.squeeze(-1), tokens_bs.shape, micro_batch_size)

    def logprobs(self, tokens_bs: Tensor, micro_batch_size: int, temperature: float = 1.0) -> Tensor:
        """Log-probability of each token but the first given those before it, [b, s - 1] fp32, on every rank of the layout."""

        def read(logits: Tensor, rows: slice) -> Tensor:
            group = self.layout.groups.tp
            return token_logprobs(logits[:, :-1], tokens_bs[rows, 1:], group, temperature)

        b, s = tokens_bs.shape
        return self._read(tokens_bs, read, torch.Size((b, s - 1)), micro_batch_size)

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of vocabulary-parallel logits [..., vocab / tp], [...]."""
        return entropy(logits, self.layout.groups.tp)

    def _read(self, tokens_bs: Tensor, read, shape: torch.Size, micro_batch_size: int) -> Tensor:
        """Forward passes in microbatches; `read(output, rows)` on the last stage fills those rows of the result."""
        result = torch.zeros(shape, device=tokens_bs.device)
        width = tokens_bs.shape[1]
        padded = torch.nn.functional.pad(tokens_bs, (0, self.pad_length(width) - width))

        def microbatch(rows: slice) -> Microbatch:
            def keep(output: Tensor):
                result[rows] = read(output[:, :width], rows)
                return output.new_zeros(()), {}

            return Microbatch(padded[rows], keep)

        starts = range(0, len(tokens_bs), micro_batch_size)
        with self.evaluating():
            microbatches = [microbatch(slice(start, start + micro_batch_size)) for start in starts]
            forward_backward(self.chunks, microbatches, self.layout, forward_only=True)
        return collectives.from_last_stage(result, self.layout)


def _set_sequence_parallel(modules: Sequence[torch.nn.Module], value: bool) -> None:
    for module in modules:
        set_model_to_sequence_parallel(module, value)


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _is_copy(parameter: torch.nn.Parameter) -> bool:
    # The last pipeline stage's copy of tied embeddings.
    return getattr(parameter, "shared", False)
