"""Running a model that is not in memory: ours from a checkpoint's tensors, theirs from a Hugging Face folder.

Each is built with one transformer layer, which takes the weights of layer 0, then of layer 1, and so on. Arithmetic is
fp32 on both sides, whatever the type of the stored weights.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_rlhf.checkpoint.architecture import HEAD, HEAD_BIAS
from megatron_rlhf.checkpoint.hf import sharded_tensors
from megatron_rlhf.checkpoint.hf_folder import CONFIG, read_json
from megatron_rlhf.checkpoint.hf_weights import Described, Weights
from megatron_rlhf.checkpoint.whole import Place, TensorSource
from megatron_rlhf.config.model import ModelConfig, Precision
from megatron_rlhf.models.attention import KeyValueCache
from megatron_rlhf.models.gpt import build_chunks
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.layout import ParallelLayout

_TRACED = 4  # positions whose hidden states are kept after every layer


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on one side; the first row is the longest."""

    tokens_bs: Tensor
    real_bs: Tensor
    """bool: not padding."""
    left: bool

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], left: bool) -> "Batch":
        """Pad rows to the longest."""
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(len(row))
            tokens[i, where], real[i, where] = torch.tensor(row), True
        return cls(tokens.to(collectives.device()), real.to(collectives.device()), left)

    @property
    def positions_bs(self) -> Tensor:
        """Of every real token, counted without padding."""
        return (self.real_bs.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Outcome:
    """What a model made of a batch."""

    hidden_nh: Tensor
    """Last hidden states of the real tokens."""
    trace: list[Tensor]
    """Hidden states of the first row's last positions, before the first layer and after every layer."""


Head = Callable[[Tensor], Tensor]
"""Hidden states [n, h] -> logits or scalars [n, ...]."""


def run_ours(
    described: Described, source: TensorSource, layout: ParallelLayout, batches: Sequence[Batch]
) -> tuple[list[Outcome], Head]:
    """Megatron-Core's model, padded on the right as in training, on the left as in sampling. `layout`: of one rank."""
    with layout:
        model_parallel_cuda_manual_seed(0)
    one_layer = ModelConfig(**{**vars(described.model), "num_layers": 1, "vocab_multiple": 1})
    (chunk,) = build_chunks(one_layer, layout, Precision.fp32, described.scalar)
    tensors = sharded_tensors([chunk], layout)

    def load(layer: int | None) -> None:
        for tensor in tensors:
            if bool(tensor.prepend_axis_num) == (layer is not None):
                offset, shape = tensor.global_offset[tensor.prepend_axis_num :], tensor.data.shape
                block = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                tensor.data.copy_(source.read(Place(tensor.key, layer))[block])

    load(None)
    chunk.decoder.layers[0] = layers = _EveryLayer(chunk.decoder.layers[0], source.num_layers, load, row_axis=1)
    chunk.eval()
    chunk.post_process = False  # hidden states come out; the head runs on pieces of them
    outcomes = []
    for batch in batches:
        with layout:
            hidden_bsh = chunk(batch.tokens_bs, **_our_arguments(batch)).transpose(0, 1)
        outcomes.append(Outcome(hidden_bsh[batch.real_bs], layers.trace))
    return outcomes, _our_head(chunk, layout)


def _our_arguments(batch: Batch) -> dict[str, Any]:
    if not batch.left:
        return {"position_ids": batch.positions_bs, "attention_mask": None}
    width = batch.tokens_bs.shape[1]
    cache = KeyValueCache(width)
    cache.position_ids_bs = batch.positions_bs
    causal = torch.ones(width, width, dtype=torch.bool, device=batch.real_bs.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=batch.real_bs.device)  # a softmax over nothing is NaN
    visible_bss = causal & batch.real_bs.unsqueeze(1) | itself
    return {
        "position_ids": batch.positions_bs,
        "attention_mask": visible_bss.unsqueeze(1),
        "inference_context": cache,
        "runtime_gather_output": True,
    }


def _our_head(chunk: GPTModel, layout: ParallelLayout) -> Head:
    # Holds the head alone, so that the rest of the model can go.
    output_layer = chunk.output_layer
    weight = chunk.embedding.word_embeddings.weight if chunk.share_embeddings_and_output_weights else None

    def head(hidden_nh: Tensor) -> Tensor:
        with layout:
            return output_layer(hidden_nh.unsqueeze(1), weight=weight)[0].squeeze(1)

    return head


def run_theirs(weights: Weights, batches: Sequence[Batch]) -> tuple[list[Outcome], Head]:
    """transformers' model. Its parameters are filled by their own names: our tables have no part in it."""
    architecture = weights.described.architecture
    content = read_json(weights.files.folder / CONFIG)
    content[str(architecture.fields["num_layers"])] = 1
    content.pop("layer_types", None)  # a list with an entry for every layer
    config = CONFIG_MAPPING[architecture.model_type].from_dict(content)
    model_class = getattr(transformers, architecture.class_name(weights.described.head))
    model = model_class(config).float().eval().to(collectives.device())
    parameters, head = _their_parameters(model, weights)
    prefix = architecture.layer_prefix

    def load(layer: int | None) -> None:
        for name, parameter in parameters.items():
            inside = name.startswith(f"{prefix}.0.")
            if inside == (layer is not None):
                stored = name.replace(f"{prefix}.0.", f"{prefix}.{layer}.", 1) if inside else name
                parameter.copy_(weights.files.read(weights.stored(stored)))

    load(None)
    stack = model.get_submodule(prefix)
    stack[0] = layers = _EveryLayer(stack[0], weights.num_layers, load, row_axis=0)
    base = model.base_model
    outcomes = []
    for batch in batches:
        arguments: dict[str, Any] = {"attention_mask": batch.real_bs.long(), "use_cache": False}
        if "position_ids" in inspect.signature(base.forward).parameters:
            arguments["position_ids"] = batch.positions_bs
        hidden_bsh = base(batch.tokens_bs, **arguments).last_hidden_state
        outcomes.append(Outcome(hidden_bsh[batch.real_bs], layers.trace))
    return outcomes, head


def _their_parameters(model: Any, weights: Weights) -> tuple[dict[str, nn.Parameter], nn.Module]:
    """Parameters by the names of their tensors, and the head."""
    described, parameters = weights.described, dict(model.named_parameters())
    if described.scalar:
        name = str(described.architecture.head_module(described.head))
        head = model.get_submodule(name)
        if head.bias is None and HEAD_BIAS in weights.stored_shapes:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))  # what modeling_reward.py does
            parameters[f"{name}.bias"] = head.bias
    else:
        head = model.get_output_embeddings()
        if HEAD in weights.stored_shapes:  # in memory some architectures call it otherwise than in files
            parameters = {name: p for name, p in parameters.items() if p is not head.weight}
            parameters[described.theirs(HEAD).names[0]] = head.weight
    return parameters, head


class _EveryLayer(nn.Module):
    """Stands in the place of all layers: runs one layer once for each, after loading that one's weights."""

    def __init__(self, layer: nn.Module, count: int, load: Callable[[int], None], row_axis: int) -> None:
        super().__init__()
        self.layer, self.count, self.load, self.row_axis = layer, count, load, row_axis
        self.trace: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for attributes, such as the kind of attention
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.trace = [self._traced(hidden_states)]
        for number in range(self.count):
            self.load(number)
            output = self.layer(hidden_states, *args, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
            self.trace.append(self._traced(hidden_states))
        return output

    def _traced(self, hidden: Tensor) -> Tensor:
        return hidden.select(self.row_axis, 0)[-_TRACED:].clone()
