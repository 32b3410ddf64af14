"""Proof of a conversion: every tensor compared bit by bit, and both models run on the same tokens.

Neither model is ever whole in memory: each side runs with one transformer layer, which takes the weights of layer 0,
then of layer 1, and so on. Arithmetic is fp32 on both sides, whatever the type of the stored weights.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_rlhf.checkpoint.architecture import HEAD, HEAD_BIAS
from megatron_rlhf.checkpoint.hf import sharded_tensors
from megatron_rlhf.checkpoint.hf_folder import CONFIG, read_json, same_bits
from megatron_rlhf.checkpoint.hf_weights import Described, Weights
from megatron_rlhf.checkpoint.whole import Place, TensorSource, places
from megatron_rlhf.config.model import ModelConfig, Precision
from megatron_rlhf.models.attention import KeyValueCache
from megatron_rlhf.models.gpt import build_chunks
from megatron_rlhf.parallel.layout import ParallelLayout

TOLERANCE = 1e-4
"""Largest difference of outputs, as a share of the largest output. Summing in another order costs 1e-6 to 1e-5 in fp32;
a wrong epsilon, activation or rotary table costs more than 1e-3."""


class CheckFailed(Exception):
    """The two sides of a conversion differ. The message names the first place where they do."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on one side."""

    tokens_bs: Tensor
    real_bs: Tensor
    """bool: not padding."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], left: bool) -> "Batch":
        """Pad rows to the longest."""
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(len(row))
            tokens[i, where], real[i, where] = torch.tensor(row), True
        return cls(tokens, real)

    @property
    def positions_bs(self) -> Tensor:
        """Of every real token, counted without padding."""
        return (self.real_bs.cumsum(1) - 1).clamp(min=0)


def test_rows(model: ModelConfig, text: Sequence[int], length: int) -> list[list[int]]:
    """Random tokens over the whole length, a text, and a short row of random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, model.max_sequence_length)
    rows = [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in (length, max(length // 3, 1))]
    return [rows[0], *([list(text[:length])] if text else []), rows[1]]


def compare_tensors(ours: TensorSource, theirs: Weights) -> int:
    """Compare every tensor of theirs with what ours gives, bit by bit; returns how many there are.

    Raises:
        CheckFailed: naming the first that differs.
    """
    count = 0
    for place in places(theirs.stored_shapes, theirs.num_layers):
        for name, value in theirs.described.to_theirs(place, ours.read(place)):
            stored = theirs.files.read(theirs.stored(name))
            if not same_bits(value, stored):
                raise CheckFailed(f"tensor {name} ({place} of ours) differs: {_difference(value, stored)}")
            count += 1
    return count


def compare_outputs(
    ours: TensorSource, theirs: Weights, layout: ParallelLayout, rows: Sequence[Sequence[int]]
) -> float:
    """Run both models on the same tokens, padded on the right and on the left; the largest difference of outputs.

    Args:
        layout: of one rank.

    Raises:
        CheckFailed: naming the first layer whose output differs, when it is more than TOLERANCE.
    """
    worst = 0.0
    with torch.no_grad():
        a, b = OurSide(theirs.described, ours, layout), TheirSide(theirs)
        for left in (False, True):
            batch = Batch.of(rows, left)
            hidden_a, hidden_b = a.hidden(batch, left), b.hidden(batch)
            difference, largest = _compare(a.head, b.head, hidden_a[batch.real_bs], hidden_b[batch.real_bs])
            if not difference <= TOLERANCE * max(largest, 1.0):
                where = _first_layer_that_differs(a.trace, b.trace, batch.real_bs)
                raise CheckFailed(
                    f"outputs differ by {difference:.3g} (largest output {largest:.3g}, tolerance {TOLERANCE:g} of it), "
                    f"padding on the {'left' if left else 'right'}; the first to differ is {where}"
                )
            worst = max(worst, difference)
    return worst


def _compare(head_a: Callable, head_b: Callable, hidden_a: Tensor, hidden_b: Tensor) -> tuple[float, float]:
    """Largest difference and largest value of the heads' outputs; in pieces, a vocabulary is wide."""
    gaps, sizes = [], []
    for piece_a, piece_b in zip(hidden_a.split(256), hidden_b.split(256), strict=True):
        output_a, output_b = head_a(piece_a), head_b(piece_b)
        gaps.append((output_a - output_b).abs().max())
        sizes.append(output_b.abs().max())
    return float(torch.stack(gaps).max()), float(torch.stack(sizes).max())  # torch's maximum of a NaN is NaN


def _first_layer_that_differs(ours: list[Tensor], theirs: list[Tensor], real_bs: Tensor) -> str:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a[real_bs], b[real_bs]
        if not (a - b).abs().max() <= TOLERANCE * max(float(b.abs().max()), 1.0):
            return "the embedding" if i == 0 else f"layer {i - 1}"
    return "the final norm or the head"


def _difference(ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{list(ours.shape)} {ours.dtype} against {list(theirs.shape)} {theirs.dtype}"
    gap = (ours.double() - theirs.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} values, by up to {float(gap.max()):.3g}"


class _EveryLayer(nn.Module):
    """Stands in the place of all layers: runs one layer once for each, after loading that one's weights."""

    def __init__(self, layer: nn.Module, count: int, load: Callable[[int], None], batch_first: bool) -> None:
        super().__init__()
        self.layer, self.count, self.load, self.batch_first = layer, count, load, batch_first
        self.trace: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for attributes, such as the kind of attention
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.trace = [hidden_states if self.batch_first else hidden_states.transpose(0, 1)]
        for number in range(self.count):
            self.load(number)
            output = self.layer(hidden_states, *args, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
            self.trace.append(hidden_states if self.batch_first else hidden_states.transpose(0, 1))
        return output


class OurSide:
    """Megatron-Core's model, run from the checkpoint's tensors."""

    def __init__(self, described: Described, source: TensorSource, layout: ParallelLayout) -> None:
        one_layer = ModelConfig(**{**vars(described.model), "num_layers": 1, "vocab_multiple": 1})
        with layout:
            model_parallel_cuda_manual_seed(0)
        (self.chunk,) = build_chunks(one_layer, layout, Precision.fp32, described.scalar)
        self.chunk.eval()
        self.layout, self.source = layout, source
        self.tensors = sharded_tensors([self.chunk], layout)
        self._load(None)
        self.layers = _EveryLayer(self.chunk.decoder.layers[0], source.num_layers, self._load, batch_first=False)
        self.chunk.decoder.layers[0] = self.layers
        self.chunk.post_process = False  # hidden states come out; the head runs on pieces of them

    def _load(self, layer: int | None) -> None:
        for tensor in self.tensors:
            if bool(tensor.prepend_axis_num) == (layer is not None):
                offset, shape = tensor.global_offset[tensor.prepend_axis_num :], tensor.data.shape
                block = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                tensor.data.copy_(self.source.read(Place(tensor.key, layer))[block])

    @property
    def trace(self) -> list[Tensor]:
        return self.layers.trace

    def hidden(self, batch: Batch, left: bool) -> Tensor:
        """Last hidden states [b, s, h]: padded on the right as training runs it, on the left as sampling does."""
        arguments: dict[str, Any] = {"position_ids": batch.positions_bs, "attention_mask": None}
        if left:
            width = batch.tokens_bs.shape[1]
            cache = KeyValueCache(width)
            cache.position_ids_bs = batch.positions_bs
            causal = torch.ones(width, width, dtype=torch.bool).tril()
            visible = causal & batch.real_bs.unsqueeze(1) | torch.eye(width, dtype=torch.bool)
            arguments |= {
                "attention_mask": visible.unsqueeze(1),
                "inference_context": cache,
                "runtime_gather_output": True,
            }
        with self.layout:
            return self.chunk(batch.tokens_bs, **arguments).transpose(0, 1)

    def head(self, hidden_nh: Tensor) -> Tensor:
        """Logits or scalars of hidden states."""
        shared = self.chunk.share_embeddings_and_output_weights
        weight = self.chunk.embedding.word_embeddings.weight if shared else None
        with self.layout:
            return self.chunk.output_layer(hidden_nh.unsqueeze(1), weight=weight)[0].squeeze(1)


class TheirSide:
    """transformers' model, run from the Hugging Face folder."""

    def __init__(self, weights: Weights) -> None:
        self.weights, described = weights, weights.described
        architecture = described.architecture
        content = read_json(weights.files.folder / CONFIG)
        content[str(architecture.fields["num_layers"])] = 1
        content.pop("layer_types", None)  # a list with an entry for every layer
        config = CONFIG_MAPPING[architecture.model_type].from_dict(content)
        model_class = getattr(transformers, architecture.class_name(described.head))
        self.model = model_class(config).float().eval()
        self.prefix = architecture.layer_prefix
        self.own = dict(self.model.named_parameters())
        if described.scalar:
            module = str(architecture.head_module(described.head))
            self.head = self.model.get_submodule(module)
            if self.head.bias is None and HEAD_BIAS in weights.stored_shapes:
                self.head.bias = nn.Parameter(torch.zeros(1))  # what modeling_reward.py does
                self.own[f"{module}.bias"] = self.head.bias
        else:
            self.head = self.model.get_output_embeddings()
            if HEAD in weights.stored_shapes:  # in memory it has another name than in files, with some architectures
                self.own = {name: p for name, p in self.own.items() if p is not self.head.weight}
                self.own[described.theirs(HEAD).names[0]] = self.head.weight
        self._load(None)
        stack = self.model.get_submodule(self.prefix)
        stack[0] = self.layers = _EveryLayer(stack[0], weights.num_layers, self._load, batch_first=True)

    def _load(self, layer: int | None) -> None:
        """Every parameter of one layer, or of none, from the tensor of its own name: our table has no part in it."""
        for name, parameter in self.own.items():
            inside = name.startswith(f"{self.prefix}.0.")
            if inside == (layer is not None):
                stored = name.replace(f"{self.prefix}.0.", f"{self.prefix}.{layer}.", 1) if inside else name
                parameter.copy_(self.weights.files.read(self.weights.stored(stored)))

    @property
    def trace(self) -> list[Tensor]:
        return self.layers.trace

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [b, s, h]."""
        base = self.model.base_model
        arguments: dict[str, Any] = {"attention_mask": batch.real_bs.long(), "use_cache": False}
        if "position_ids" in inspect.signature(base.forward).parameters:
            arguments["position_ids"] = batch.positions_bs
        return base(batch.tokens_bs, **arguments).last_hidden_state
