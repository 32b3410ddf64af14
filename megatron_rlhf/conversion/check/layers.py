"""Running a model that is not in memory: Megatron-Core's from a checkpoint, transformers' from a Hugging Face folder.

Each is built with one transformer layer, which takes the weights of layer 0, then of layer 1, and so on, and with a
vocabulary of as many rows as a batch has different tokens or a piece of the unembedding needs: a large embedding is
never whole in memory. Arithmetic is fp32 on both sides, whatever the type of the stored weights.
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

from megatron_rlhf.config.model import ModelConfig, Precision
from megatron_rlhf.conversion.architecture import HEAD, HEAD_BIAS, WORD_EMBEDDINGS
from megatron_rlhf.conversion.check.tokens import Batch, Vocabulary
from megatron_rlhf.conversion.hf.config import without_nulls
from megatron_rlhf.conversion.hf.folder import CONFIG, read_json
from megatron_rlhf.conversion.hf.load import sharded_tensors
from megatron_rlhf.conversion.hf.weights import Described, Weights
from megatron_rlhf.conversion.whole_tensors import Place, TensorSource
from megatron_rlhf.models.gpt import build_chunks
from megatron_rlhf.models.layers.cache import KeyValueCache
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout

_TRACED = 4  # positions whose hidden states are kept after every layer


@dataclass(frozen=True)
class Outcome:
    """A model's outputs for a batch."""

    hidden_nh: Tensor
    """Last hidden states of the real tokens."""
    trace: list[Tensor]
    """Hidden states of the first row's last positions, before the first layer and after every layer."""


@dataclass(frozen=True)
class Ran:
    """A model that ran on some batches, and its head."""

    outcomes: list[Outcome]
    head: Callable[[slice], Callable[[Tensor], Tensor]]
    """Loads a piece of the unembedding, and gives: hidden states [n, h] -> its logits [n, piece]. A scalar head has one
    piece: [n, 1]."""


def run_megatron(described: Described, source: TensorSource, layout: ParallelLayout, batches: Sequence[Batch]) -> Ran:
    """Megatron-Core's model, padded right as in training, left as in sampling. `layout`: a layout of one rank."""
    with layout:
        model_parallel_cuda_manual_seed(0)
    vocabulary = Vocabulary.of(described.model, batches)
    small = ModelConfig(
        **{**vars(described.model), "num_layers": 1, "vocab_size": vocabulary.rows, "vocab_multiple": 1}
    )
    (chunk,) = build_chunks(small, layout, Precision.fp32, described.scalar)
    wide = {WORD_EMBEDDINGS} if described.scalar else {WORD_EMBEDDINGS, HEAD}
    tensors = [tensor for tensor in sharded_tensors([chunk], layout) if tensor.key not in wide]

    def load(layer: int | None) -> None:
        for tensor in tensors:
            if bool(tensor.prepend_axis_num) == (layer is not None):
                offset, shape = tensor.global_offset[tensor.prepend_axis_num :], tensor.data.shape
                rows, *columns = (slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                tensor.data.copy_(source.read(Place(tensor.key, layer), rows)[(slice(None), *columns)])

    load(None)
    vocabulary.fill(
        chunk.embedding.word_embeddings.weight, lambda rows: source.read(Place(WORD_EMBEDDINGS, None), rows)
    )
    chunk.decoder.layers[0] = layers = _EveryLayer(chunk.decoder.layers[0], source.num_layers, load, row_axis=1)
    chunk.eval()
    chunk.post_process = False  # hidden states come out; the head runs on pieces of them

    def run(batch: Batch) -> Tensor:
        with layout:
            return chunk(vocabulary.ids(batch), **_megatron_arguments(batch)).transpose(0, 1)

    outcomes = layers.run_all(run, batches)
    return Ran(outcomes, _megatron_head(chunk.output_layer, vocabulary.rows, described, source, layout))


def _megatron_arguments(batch: Batch) -> dict[str, Any]:
    if not batch.left:
        return {"position_ids": batch.positions_bs, "attention_mask": None}
    width = batch.tokens_bs.shape[1]
    cache = KeyValueCache(slots=0, capacity=width)
    cache.prefill(batch.positions_bs)
    causal = torch.ones(width, width, dtype=torch.bool, device=batch.real_bs.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=batch.real_bs.device)  # a softmax over nothing is NaN
    visible_bss = causal & batch.real_bs.unsqueeze(1) | itself
    return {
        "position_ids": batch.positions_bs,
        "attention_mask": visible_bss.unsqueeze(1),
        "inference_context": cache,
        "runtime_gather_output": True,
    }


def _megatron_head(
    output_layer: nn.Module, rows: int, described: Described, source: TensorSource, layout: ParallelLayout
) -> Callable[[slice], Callable[[Tensor], Tensor]]:
    # Only the output layer is passed, so that the rest of the model can be freed.
    place = Place(WORD_EMBEDDINGS if described.model.tied_embeddings else HEAD, None)

    def head(piece: slice) -> Callable[[Tensor], Tensor]:
        weight, count = None, 1
        if not described.scalar:
            count = piece.stop - piece.start
            weight = torch.zeros(rows, described.model.hidden_size, device=collectives.device())
            weight[:count] = source.read(place, piece)

        def outputs(hidden_nh: Tensor) -> Tensor:
            with layout:
                return output_layer(hidden_nh.unsqueeze(1), weight=weight)[0][:, 0, :count]

        return outputs

    return head


def run_transformers(weights: Weights, batches: Sequence[Batch]) -> Ran:
    """transformers' model. Its parameters are loaded by their own names, without our tables."""
    described = weights.described
    vocabulary = Vocabulary.of(described.model, batches)
    model = _hf_model(weights, vocabulary.rows)
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings()
    parameters = _hf_parameters(model, weights)
    prefix = described.architecture.layer_prefix
    (embedding_name,) = (name for name, parameter in parameters.items() if parameter is embedding)
    wide = {id(embedding)} if unembedding is None else {id(embedding), id(unembedding.weight)}

    def load(layer: int | None) -> None:
        for name, parameter in parameters.items():
            inside = name.startswith(f"{prefix}.0.")
            if inside == (layer is not None) and id(parameter) not in wide:
                stored = name.replace(f"{prefix}.0.", f"{prefix}.{layer}.", 1) if inside else name
                parameter.copy_(weights.files.read(weights.stored(stored)))

    load(None)
    vocabulary.fill(embedding, lambda rows: weights.files.read(weights.stored(embedding_name), rows))
    stack = model.get_submodule(prefix)
    stack[0] = layers = _EveryLayer(stack[0], weights.num_layers, load, row_axis=0)
    base = model.base_model

    def run(batch: Batch) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": batch.real_bs.long(), "use_cache": False}
        if "position_ids" in inspect.signature(base.forward).parameters:
            arguments["position_ids"] = batch.positions_bs
        return base(vocabulary.ids(batch), **arguments).last_hidden_state

    outcomes = layers.run_all(run, batches)
    if described.scalar:
        scalar_head = model.get_submodule(str(described.architecture.head_module(described.head)))
        return Ran(outcomes, lambda piece: scalar_head)
    # Some architectures name their unembedding differently in memory and in files.
    head_name = described.hf_tensor(HEAD).names[0] if HEAD in weights.stored_shapes else embedding_name

    def head(piece: slice) -> Callable[[Tensor], Tensor]:
        count = piece.stop - piece.start
        unembedding.weight[:count] = weights.files.read(weights.stored(head_name), piece)
        return lambda hidden_nh: unembedding(hidden_nh)[:, :count]

    return Ran(outcomes, head)


def _hf_model(weights: Weights, vocabulary_rows: int) -> Any:
    """With one layer and a small vocabulary; its weights are random."""
    architecture = weights.described.architecture
    content = without_nulls(read_json(weights.files.folder / CONFIG), architecture)
    content |= {str(architecture.fields["num_layers"]): 1, str(architecture.fields["vocab_size"]): vocabulary_rows}
    content |= {key: None for key in content if key.endswith("_token_id")}  # they are of the whole vocabulary
    content.pop("layer_types", None)  # a list with an entry for every layer
    for key in [key for key in content if "attn_implementation" in key or key in ("auto_map", "use_kernels")]:
        del content[key]  # these may name code to download and run
    config = CONFIG_MAPPING[architecture.model_type].from_dict(content)
    config.pad_token_id = None
    model_class = getattr(transformers, architecture.class_name(weights.described.head))
    return model_class(config).float().eval().to(collectives.device())


def _hf_parameters(model: Any, weights: Weights) -> dict[str, nn.Parameter]:
    """Parameters by the names of their tensors."""
    parameters = dict(model.named_parameters())
    if weights.described.scalar:
        name = str(weights.described.architecture.head_module(weights.described.head))
        head = model.get_submodule(name)
        if head.bias is None and HEAD_BIAS in weights.stored_shapes:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))  # what modeling_reward.py does
            parameters[f"{name}.bias"] = head.bias
    return parameters


@dataclass
class _Call:
    """One batch on its way through the layers."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Any
    trace: list[Tensor]


class _EveryLayer(nn.Module):
    """Replaces all layers: one layer that takes each one's weights in turn, for all batches at once."""

    def __init__(self, layer: nn.Module, count: int, load: Callable[[int], None], row_axis: int) -> None:
        super().__init__()
        self.layer, self.count, self.load, self.row_axis = layer, count, load, row_axis
        self.calls: list[_Call] = []
        self.finished: list[_Call] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for attributes, such as the kind of attention
            return getattr(super().__getattr__("layer"), name)

    def run_all(self, run: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> list[Outcome]:
        """`run` runs the model on a batch and gives its last hidden states [b, s, h]; each layer is loaded once."""
        self.load(0)
        for batch in batches:
            run(batch)
        for number in range(1, self.count):
            self.load(number)
            for call in self.calls:
                call.output = self.layer(self._hidden(call.output), *call.arguments, **call.named)
                call.trace.append(self._traced(self._hidden(call.output)))
        traces = [call.trace for call in self.calls]
        self.calls, self.finished = [], self.calls
        return [Outcome(run(batch)[batch.real_bs], trace) for batch, trace in zip(batches, traces, strict=True)]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A model's first run goes through layer 0; its second gets the output of the last layer."""
        if self.finished:
            return self.finished.pop(0).output
        output = self.layer(hidden_states, *args, **kwargs)
        trace = [self._traced(hidden_states), self._traced(self._hidden(output))]
        self.calls.append(_Call(args, kwargs, output, trace))
        return output

    def _hidden(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def _traced(self, hidden: Tensor) -> Tensor:
        return hidden.select(self.row_axis, 0)[-_TRACED:].clone()
