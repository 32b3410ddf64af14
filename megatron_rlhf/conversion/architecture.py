"""How a Hugging Face architecture is described: one table of names, read when importing and when exporting.

Our side of a table has the names of Megatron-Core's distributed checkpoints, where each tensor is whole (no layout in
it) and a layer's tensor is known by its name and the layer's number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megatron_rlhf.config.model import Activation, ModelConfig, Norm, Positions

QKV = "decoder.layers.self_attention.linear_qkv"
PROJECTION = "decoder.layers.self_attention.linear_proj"
QUERY_NORM = "decoder.layers.self_attention.q_layernorm"
KEY_NORM = "decoder.layers.self_attention.k_layernorm"
FC1 = "decoder.layers.mlp.linear_fc1"
FC2 = "decoder.layers.mlp.linear_fc2"
FINAL_NORM = "decoder.final_layernorm"
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
HEAD = "output_layer.weight"
HEAD_BIAS = "output_layer.bias"


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a Hugging Face tensor; each of our tensors is a sequence of such runs."""

    name: str
    start: int
    count: int


class Order(Enum):
    """How the rows of one of our tensors map to Hugging Face's."""

    same = "same"
    stacked = "stacked"
    """Several Hugging Face tensors, one after the other: gate, then up."""
    grouped = "grouped"
    """Hugging Face: all queries, all keys, all values. Megatron-Core: per group its queries, its key, its value."""


@dataclass(frozen=True)
class HFTensor:
    """Where Hugging Face keeps one of our tensors. `{}` in a name stands for the layer."""

    names: tuple[str, ...]
    order: Order = Order.same
    transposed: bool = False
    """Stored as [in, out] (GPT-2's Conv1D)."""

    def runs(self, rows: int, model: ModelConfig, layer: int | None) -> list[Run]:
        """The `rows` rows of our tensor, first to last, as runs of Hugging Face's."""
        names = [name.format(layer) for name in self.names]
        if self.order is Order.grouped:
            return _grouped(names, model)
        return [Run(name, 0, rows // len(names)) for name in names]


def same(name: str, transposed: bool = False) -> HFTensor:
    """The same rows under another name."""
    return HFTensor((name,), transposed=transposed)


def stacked(*names: str) -> HFTensor:
    """Several tensors, one after the other."""
    return HFTensor(names, Order.stacked)


def grouped(*names: str, transposed: bool = False) -> HFTensor:
    """Queries, keys and values: three tensors, or one that holds them one after the other."""
    assert len(names) in (1, 3), names
    return HFTensor(names, Order.grouped, transposed)


def _grouped(names: list[str], model: ModelConfig) -> list[Run]:
    heads, groups, width = attention_shape(model)
    queries = heads // groups * width
    starts = (0, 0, 0) if len(names) == 3 else (0, heads * width, (heads + groups) * width)
    kinds = list(zip(names * (3 // len(names)), starts, (queries, width, width), strict=True))
    return [Run(name, start + group * count, count) for group in range(groups) for name, start, count in kinds]


def attention_shape(model: ModelConfig) -> tuple[int, int, int]:
    """Heads, query groups and the width of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.head_dim or model.hidden_size // heads


def is_layer(key: str) -> bool:
    """There is one such tensor in every layer."""
    return key.startswith("decoder.layers.")


def tensor_shapes(model: ModelConfig, scalar: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model, whole and without padding; those of a layer once."""
    hidden, (heads, groups, width) = model.hidden_size, attention_shape(model)
    ffn = model.ffn_hidden_size or 4 * hidden
    linears = {
        QKV: ((heads + 2 * groups) * width, hidden),
        PROJECTION: (hidden, heads * width),
        FC1: (2 * ffn if model.activation is Activation.swiglu else ffn, hidden),
        FC2: (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {WORD_EMBEDDINGS: (model.vocab_size, hidden)}
    if model.positions is Positions.learned:
        shapes[POSITION_EMBEDDINGS] = (model.max_sequence_length + model.position_offset, hidden)
    for norm in (f"{QKV}.layer_norm_", f"{FC1}.layer_norm_", f"{FINAL_NORM}."):
        shapes[f"{norm}weight"] = (hidden,)
        if model.norm is Norm.layernorm:
            shapes[f"{norm}bias"] = (hidden,)
    for linear, shape in linears.items():
        shapes[f"{linear}.weight"] = shape
        if model.linear_bias or (model.qkv_bias and linear == QKV):
            shapes[f"{linear}.bias"] = shape[:1]
    if model.qk_norm:
        shapes |= {f"{QUERY_NORM}.weight": (width,), f"{KEY_NORM}.weight": (width,)}
    if scalar:
        shapes |= {HEAD: (1, hidden), HEAD_BIAS: (1,)}
    elif not model.tied_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    return shapes


class Head(Enum):
    """The head on the last hidden state, by the end of the class's name."""

    language = "ForCausalLM"
    score = "ForSequenceClassification"
    """One number per text, read at its last token: a reward model."""
    token = "ForTokenClassification"
    """One number per token: a value model."""


@dataclass(frozen=True)
class Architecture:
    """A Hugging Face model type: how its configuration and its tensors map to ours."""

    model_type: str
    """As config.json has it."""
    classes: str
    """Prefix of its classes' names: 'Llama' of LlamaForSequenceClassification."""
    prefix: str
    """Prefix of the base model's tensors where a head is added."""
    tensors: Mapping[str, HFTensor]
    """Our tensor -> Hugging Face's."""
    fields: Mapping[str, str | tuple[str, ...]]
    """Field of ModelConfig -> key of config.json with the same value; several keys must agree."""
    fixed: Mapping[str, Any]
    """Fields of ModelConfig that are fixed for this architecture."""
    activations: Mapping[Activation, tuple[str, ...]]
    """Our activation -> its names in config.json, the one to write first."""
    activation_key: str = "hidden_act"
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json -> the values that can be converted, the one to write first; others are refused by name."""
    rope_keys: tuple[str, str | None] = ("rope_theta", None)
    """Keys of the rotary base and of the rotated share of a head, where they are outside of rope_parameters."""
    language_class: str = "ForCausalLM"
    """Ending of the language model's class name."""
    token_head: str | None = "score"
    """The head of ...ForTokenClassification, which a value model is exported as; None where there is no such class."""
    unused: tuple[str, ...] = ()
    """Patterns of tensors that old files hold and no model reads (masks, rotary tables)."""

    @property
    def layer_prefix(self) -> str:
        """Name of the list of layers: 'model.layers'."""
        return next(tensor.names[0] for key, tensor in self.tensors.items() if is_layer(key)).split(".{}")[0]

    def class_name(self, head: Head) -> str:
        """The class of transformers that has this head."""
        return self.classes + (self.language_class if head is Head.language else head.value)

    def head_module(self, head: Head) -> str | None:
        """Name of the head's module; None where the architecture has no class with this head."""
        if head is Head.language:
            return self.tensors[HEAD].names[0].removesuffix(".weight")
        return "score" if head is Head.score else self.token_head

    def hf_tensor(self, key: str, head: Head) -> HFTensor:
        """Where Hugging Face keeps one of our tensors."""
        if key in (HEAD, HEAD_BIAS):
            return same(f"{self.head_module(head)}.{key.rpartition('.')[2]}")
        return self.tensors[key]


def layer_norms(attention: str, mlp: str, final: str, bias: bool) -> dict[str, HFTensor]:
    """The three norms of a pre-norm transformer, by the names of their modules."""
    modules = {f"{QKV}.layer_norm_": attention, f"{FC1}.layer_norm_": mlp, f"{FINAL_NORM}.": final}
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{name}{kind}": same(f"{hf_name}.{kind}") for name, hf_name in modules.items() for kind in kinds}
