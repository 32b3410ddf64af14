"""Policy, reference, reward and value model: one class for a model in its layout, frozen or trained."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import Fp8Recipe, ModelConfig, Precision
from megatron_rlhf.models import adapters, fp8, trainable
from megatron_rlhf.models.adapters import FirstAdapters
from megatron_rlhf.models.gpt import build_chunks
from megatron_rlhf.models.layers.linear import packed_weights
from megatron_rlhf.models.logits import Logits
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.offload import HostMemory
from megatron_rlhf.parallel.packing import Arrangement, Sequences, Tally, arrange, as_sequences, plan
from megatron_rlhf.parallel.pipeline import Microbatch, forward_backward
from megatron_rlhf.parallel.vocab import without


@dataclass
class Role:
    """A model in its layout. `chunks` are this rank's part of it; a rank outside the layout has none, and computes nothing."""

    name: str
    model: ModelConfig
    layout: ParallelLayout
    chunks: Sequence[torch.nn.Module]
    scalar: bool
    resting: HostMemory | None = None
    """Frozen weights that are in host memory except during the passes that read them."""
    unknown_v: Tensor | None = None
    """bool over the padded vocabulary: rows of the embedding that are not tokens of the tokenizer. None: all rows are tokens."""
    tally: Tally = field(default_factory=Tally)
    """What it has read on this rank."""
    adapter: Adapter | None = None
    """Its low-rank adapters."""
    trains_some_layers: bool = False
    """Not every layer may have an optimizer's state."""
    first: FirstAdapters | None = None
    """Of a reference whose weights are the policy's, except for the adapters."""

    @classmethod
    def build(
        cls,
        name: str,
        model: ModelConfig,
        layout: ParallelLayout,
        precision: Precision,
        scalar: bool = False,
        dropout: float = 0.0,
        fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise,
        adapter: Adapter | None = None,
        adapter_dropout: float = 0.0,
    ) -> "Role":
        """A model with random weights, and adapters that do nothing yet."""
        options = precision, scalar, dropout, fp8_recipe, adapter, adapter_dropout
        chunks = build_chunks(model, layout, *options) if layout.is_member else []
        return cls(name, model, layout, chunks, scalar, adapter=adapter)

    def know_only(self, tokens: Sequence[int]) -> None:
        """Declares these the only tokens: other rows of the embedding are never sampled.

        The distribution of responses is over these, when they are sampled and in every pass that is compared with sampling
        (`respond`). The loss on text stays over all rows, as in transformers: it teaches that the others do not occur.
        """
        rows = self.model.padded_vocab_size(self.layout.config.tensor)
        unknown_v = torch.ones(rows, dtype=torch.bool)
        unknown_v[torch.tensor(tokens)] = False
        self.unknown_v = unknown_v.to(collectives.device()) if unknown_v[: self.model.vocab_size].any() else None

    def respond(self, logits: Tensor) -> Tensor:
        """Logits [..., vocab] or [..., vocab / tp] of the distribution that responses are sampled from."""
        return without(logits, self.unknown_v, self.layout.groups.tp)

    def reset_head(self, seed: int) -> None:
        """New weights for the scalar head, which depend only on the seed."""
        for chunk in self.modules:
            if chunk.post_process:
                chunk.output_layer.reset(seed)

    def reset_adapters(self, seed: int) -> None:
        """New weights for the adapters, which depend only on the seed."""
        for chunk in self.modules:
            adapters.reset(chunk, seed)

    def merge_adapters(self) -> None:
        """Add the adapters to the weights beside them: it is then a model without any."""
        for chunk in self.modules:
            adapters.merge(chunk)
        self.adapter = None

    def train_only(self, patterns: Sequence[str]) -> None:
        """Freeze all weights but those that the patterns select; to be called before an optimizer is made."""
        self.trains_some_layers = True
        for chunk in self.modules:
            trainable.train_only(chunk, patterns)
            trainable.carry_gradients(chunk)

    def as_it_started(self, name: str, keep: bool) -> "Role":
        """A frozen role of the weights that this one has now, and of no other memory: only the adapters of this one train.

        `keep`: these adapters belong to the start; otherwise they are new, and the start has none.
        """
        assert self.adapter is not None, "without adapters, the weights that train would be the frozen ones"
        return dataclasses.replace(self, name=name, chunks=self.modules, first=FirstAdapters(self.modules, keep))

    def freeze_head_bias(self) -> None:
        """Freezes the scalar head's bias; to be called before an optimizer is made."""
        for chunk in self.modules:
            if chunk.post_process:
                chunk.output_layer.bias.requires_grad_(False)

    @property
    def modules(self) -> list[GPTModel]:
        """The chunks without the wrapper that data parallelism puts around them; their weights are there to be read."""
        self.settle()
        return self.unwrapped

    @property
    def unwrapped(self) -> list[GPTModel]:
        """The same where weights are not read: data-parallel ranks may still be sending each other those of an update."""
        return [getattr(chunk, "module", chunk) for chunk in self.chunks]

    def settle(self) -> None:
        """Wait for updated weights that data-parallel ranks are still sending each other. Passes do, for those they use."""
        for chunk in self.chunks:
            for group in getattr(chunk, "bucket_groups", ()):
                if group.param_gather_handle is not None:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def frozen(self) -> "Role":
        """The same, without gradients or dropout."""
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        return self

    def offload(self) -> None:
        """From now on the frozen weights are in host memory except during the passes that read them."""
        self.resting = HostMemory(
            lambda: [parameter for chunk in self.chunks for parameter in chunk.parameters()], constant=True
        )
        self.resting.rest()

    def pad_length(self, length: int) -> int:
        """The length to which sequences of `length` tokens are padded: parallelism and fp8 want multiples."""
        parts = self.layout.config.token_multiple * fp8.token_multiple(self.unwrapped)
        return (length + parts - 1) // parts * parts

    @functools.cached_property
    def num_parameters(self) -> int:
        """Weights of the whole model; tied embeddings and weights replicated over ranks count once, rows that pad the
        vocabulary not at all. Collective over the world."""
        return collectives.publish_object(self._count_parameters() if self.layout.is_member else 0, self.layout)

    def _count_parameters(self) -> int:
        parameters = [p for chunk in self.modules for p in chunk.parameters() if not getattr(p, "shared", False)]
        first = self.layout.tp_rank == 0
        here = sum(p.numel() for p in parameters if first or getattr(p, "tensor_model_parallel", False))
        rows = self.model.padded_vocab_size(self.layout.config.tensor) - self.model.vocab_size
        matrices = 1 if self.scalar or self.model.tied_embeddings else 2
        return int(collectives.sum_over(here, self.layout.groups.mp)) - rows * matrices * self.model.hidden_size

    @property
    def in_fp8(self) -> bool:
        """Whether its layers compute in fp8 now."""
        return fp8.is_on(self.unwrapped)

    def switch_fp8(self, on: bool) -> None:
        """Layers in fp8 or in bf16, from the next forward pass on."""
        fp8.switch(self.modules, on)

    @contextlib.contextmanager
    def without_fp8(self) -> Iterator[None]:
        """Layers in bf16 within a `with` block."""
        with fp8.switched(self.modules, on=False):
            yield

    @contextlib.contextmanager
    def decoding(self, in_fp8: bool = False) -> Iterator[None]:
        """`evaluating` for many passes of one token each: fp8 only if requested and the model trains in it."""
        precision = self.without_fp8()
        if self.in_fp8 and in_fp8:
            precision = fp8.decoding(self.chunks, fp8.token_multiple(self.unwrapped))
        with precision, self.evaluating(decoding=True), packed_weights(self.unwrapped):
            yield

    @contextlib.contextmanager
    def evaluating(self, decoding: bool = False) -> Iterator[None]:
        """Dropout off, no gradients; decoding also switches sequence parallelism off: one token cannot be split."""
        modes, modules = [chunk.training for chunk in self.chunks], self.unwrapped
        sequence_parallel = decoding and any(module.config.sequence_parallel for module in modules)
        for chunk in self.chunks:
            chunk.eval()
        if sequence_parallel:
            _set_sequence_parallel(modules, False)
        try:
            with torch.no_grad(), self.first.back() if self.first else contextlib.nullcontext():
                yield
        finally:
            if sequence_parallel:
                _set_sequence_parallel(modules, True)
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def values(self, sequences: Sequences | Tensor, micro_batch_size: Budget | int) -> Tensor:
        """The scalar head's output at wanted tokens, [b, s] fp32, zeros elsewhere; the whole batch on the layout's ranks."""
        assert self.scalar, f"{self.name} has no scalar head"
        return self._read(as_sequences(sequences), lambda output_n1, _: output_n1.squeeze(-1), micro_batch_size)

    def scores(self, sequences: Sequences, micro_batch_size: Budget | int) -> Tensor:
        """The scalar head's output at each sequence's last token, [b] fp32; otherwise as `values`."""
        return self.values(sequences.at_ends(), micro_batch_size).sum(dim=1)  # zeros elsewhere

    def logprobs(
        self,
        sequences: Sequences | Tensor,
        micro_batch_size: Budget | int,
        temperature: float = 1.0,
        as_response: bool = False,
    ) -> Tensor:
        """Log-probability of the token after each wanted one, [b, s - 1] fp32; zeros elsewhere. The whole batch on every
        rank of the layout. The last token is only predicted, never read. `as_response`: over the tokens that can be sampled,
        not all rows of the embedding."""

        def read(logits_nv: Logits, targets_n: Tensor) -> Tensor:
            logits_nv = logits_nv.without(self.unknown_v) if as_response else logits_nv
            return logits_nv.logprobs(targets_n, temperature)

        return self._read(as_sequences(sequences), read, micro_batch_size, inputs_until=-1)

    def logprobs_and_choices(
        self, sequences: Sequences | Tensor, micro_batch_size: Budget | int
    ) -> tuple[Tensor, Tensor]:
        """`logprobs`, and whether greedy decoding would choose that token: bool [b, s - 1]. One pass for both."""

        def read(logits_nv: Logits, targets_n: Tensor) -> Tensor:
            logprobs_n = logits_nv.logprobs(targets_n)
            return torch.stack([logprobs_n, logits_nv.is_likeliest(targets_n).to(logprobs_n.dtype)], dim=-1)

        both = self._read(as_sequences(sequences), read, micro_batch_size, inputs_until=-1, numbers=(2,))
        return both[..., 0], both[..., 1] > 0

    def arrange(self, sequences: Sequences, rows: Sequence[int], micro_batch_size: Budget | int) -> Arrangement:
        """Some of the sequences as this model reads them: a budget in tokens packs them."""
        packed = Budget.of(micro_batch_size).tokens is not None
        arrangement = arrange(sequences, rows, self.pad_length(1), packed)
        self.tally.add(arrangement)
        return arrangement

    def _read(
        self,
        sequences: Sequences,
        read: Callable[[Any, Tensor], Tensor],
        micro_batch_size: Budget | int,
        inputs_until: int | None = None,
        numbers: tuple[int, ...] = (),
    ) -> Tensor:
        """One number per input token, or an array of them of the shape `numbers`: `read(output_n, next_n)` of the model's
        output for some tokens, and the tokens after them.

        Each data-parallel rank passes its sequences forward, `read` runs on the last stage, and all get the whole batch.
        """
        tokens_ns, inputs = sequences.tokens_ns, sequences.until(inputs_until)
        result = torch.zeros(*inputs.tokens_ns.shape, *numbers, device=tokens_ns.device)
        if not self.layout.is_member:
            return result

        def microbatch(rows: list[int]) -> Microbatch:
            wanted = inputs.wanted(rows)
            row_n, column_n = (index.to(tokens_ns.device) for index in wanted.nonzero(as_tuple=True))
            row_n = torch.tensor(rows, device=tokens_ns.device)[row_n]

            def keep(output_n: Tensor | Logits) -> tuple[Tensor, dict[str, Tensor]]:
                next_n = tokens_ns[row_n, (column_n + 1).clamp(max=tokens_ns.shape[1] - 1)]
                result[row_n, column_n] = read(output_n, next_n)
                return result.new_zeros(()), {}

            return Microbatch.of(self.arrange(inputs, rows, micro_batch_size), wanted, keep)

        mine = plan(inputs, micro_batch_size, self.layout.dp_size)[self.layout.dp_rank]
        with self.evaluating(), self.resting.awake() if self.resting else contextlib.nullcontext():
            if mine:
                forward_backward(self.chunks, [microbatch(rows) for rows in mine], self.layout, forward_only=True)
        return collectives.share_rows(result, self.layout)


def _set_sequence_parallel(modules: Sequence[GPTModel], value: bool) -> None:
    for module in modules:
        set_model_to_sequence_parallel(module, value)
