"""The shape of a GPT and how it is laid out over ranks."""

from dataclasses import dataclass, fields, replace
from enum import Enum


class Positions(Enum):
    """How a model encodes the order of its tokens."""

    learned = "learned"
    rope = "rope"


class RopeScaling(Enum):
    """How rotary positions are stretched beyond the length that a model was first trained with."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"


class Norm(Enum):
    """Normalisation before attention and MLP."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Activation(Enum):
    """Nonlinearity of the MLP; gelu is the tanh approximation of GPT-2 and GPT-3, gelu_exact the one with erf."""

    gelu = "gelu"
    gelu_exact = "gelu_exact"
    relu = "relu"
    swiglu = "swiglu"


class Recompute(Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    full = "full"


class FusedKernels(Enum):
    """Whether several small operations run as one kernel."""

    auto = "auto"
    on = "on"
    off = "off"


class Precision(Enum):
    """Arithmetic of weights and activations; master weights and optimizer state are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8_hybrid = "fp8_hybrid"


class Fp8Recipe(Enum):
    """How Transformer Engine finds the scales that bring numbers into fp8's range; nvfp4: into fp4's."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"

    @property
    def multiple(self) -> int:
        """Tokens and widths of a matrix product must be multiples of this: kernels' alignment, or a whole block."""
        return {Fp8Recipe.blockwise: 128, Fp8Recipe.mxfp8: 32, Fp8Recipe.nvfp4: 128}.get(self, 16)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the first GPUs that support it: Ada; Hopper; Blackwell, whose matrix units apply the
        scales themselves."""
        blackwell = dict.fromkeys((Fp8Recipe.mxfp8, Fp8Recipe.nvfp4), (10, 0))
        return {Fp8Recipe.blockwise: (9, 0), **blackwell}.get(self, (8, 9))


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only transformer: GPT-3's shape by default, Llama's by `positions=rope norm=rmsnorm activation=swiglu`."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Attention heads; must divide hidden_size unless head_dim is given."""
    vocab_size: int
    """Tokens that the model knows; at least the tokenizer's."""
    max_sequence_length: int = 2048
    """Longest sequence (prompt and response together), in tokens."""
    num_query_groups: int | None = None
    """Key/value heads of grouped-query attention; one per attention head when not given."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_attention_heads when not given."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; 4 x hidden_size when not given."""
    positions: Positions = Positions.learned
    """learned: an embedding per position (GPT-2, GPT-3); rope: rotary (Llama)."""
    position_offset: int = 0
    """Rows of the position embedding that come before the first token's (OPT: 2)."""
    rope_base: float = 10000.0
    """Base period of rotary positions."""
    rope_fraction: float = 1.0
    """Share of each head's width that is rotated (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling = RopeScaling.none
    """linear: positions divided by the factor; llama3: long periods stretched, short ones kept (Llama 3.1)."""
    rope_scaling_factor: float = 1.0
    """How far rope_scaling stretches."""
    rope_original_length: int = 8192
    """Context before the stretching, in tokens (llama3)."""
    rope_low_frequency: float = 1.0
    """Periods longer than the original length divided by this are stretched in full (llama3)."""
    rope_high_frequency: float = 4.0
    """Periods shorter than the original length divided by this are kept (llama3)."""
    norm: Norm = Norm.layernorm
    """layernorm or rmsnorm, always before the sublayer."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside the norms."""
    activation: Activation = Activation.gelu
    """gelu, gelu_exact, relu or swiglu (gated, three matrices)."""
    linear_bias: bool = True
    """Biases in attention and MLP projections."""
    qkv_bias: bool = False
    """A bias on query, key and value only, when linear_bias is off (Qwen2)."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Qwen3)."""
    parallel_residual: bool = False
    """Attention and MLP read the same residual stream, side by side (GPT-NeoX)."""
    tied_embeddings: bool = True
    """Input and output embeddings are one matrix."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    vocab_multiple: int = 1
    """The embedding's rows are padded to a multiple of this times the tensor-parallel size; padding gets no probability."""

    def padded_vocab_size(self, tensor: int) -> int:
        """Rows of the embedding: the vocabulary rounded up so that each of `tensor` ranks holds as many."""
        multiple = self.vocab_multiple * tensor
        return (self.vocab_size + multiple - 1) // multiple * multiple


@dataclass(kw_only=True)
class ParallelConfig:
    """How one model is spread: tensor x pipeline x context ranks hold one copy, data parallelism takes the rest."""

    tensor: int = 1
    """Ranks that split each matrix; must divide heads and query groups."""
    pipeline: int = 1
    """Ranks that split the layers into stages; must divide the number of layers."""
    virtual_stages: int = 1
    """Model chunks on each pipeline rank (interleaved schedule, smaller bubble); pipeline x this must divide the layers."""
    last_stage_layers: int | None = None
    """Layers on the last pipeline stage, for when not all stages can have the same number; the other stages share the rest."""
    context: int = 1
    """Ranks that share each sequence: activations of long ones are split, attention gathers keys and values."""
    expert: int = 1
    """Ranks that split experts; models here have none, so only 1."""
    sequence: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks (saves activation memory)."""
    distributed_optimizer: bool = False
    """Shard master weights and moments over the data-parallel ranks."""
    overlap_grad_reduce: bool = True
    """With distributed_optimizer: sum gradients over the data-parallel ranks while the last backward pass goes on."""
    overlap_param_gather: bool = True
    """With distributed_optimizer: gather updated weights while the next forward pass goes on, which waits for those it uses."""
    fused_kernels: FusedKernels = FusedKernels.auto
    """Kernels for bias and activation, dropout and residual, rotary positions (Transformer Engine's), weight gradients into
    fp32 (Apex's). auto: on a GPU those that are there; off: none."""
    recompute: Recompute = Recompute.none
    """none, selective (attention only) or full (every layer): trades time for activation memory."""

    @property
    def token_multiple(self) -> int:
        """Sequences are padded to a multiple of this: two pieces for each context-parallel rank, split once more by
        sequence parallelism."""
        return (self.tensor if self.sequence else 1) * (2 * self.context if self.context > 1 else 1)

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


NO_SHAPE = ("init_std", "vocab_multiple")
"""Fields that affect how weights are initialised and laid out, not which model it is."""


def without_implied(model: ModelConfig) -> ModelConfig:
    """The same shape, with None wherever None means the same: equal shapes are then equal objects."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    return replace(
        model,
        num_query_groups=None if model.num_query_groups == heads else model.num_query_groups,
        head_dim=None if model.head_dim is not None and model.head_dim * heads == hidden else model.head_dim,
        ffn_hidden_size=None if model.ffn_hidden_size == 4 * hidden else model.ffn_hidden_size,
    )


def model_differences(expected: ModelConfig, found: ModelConfig) -> list[str]:
    """Fields in which two shapes differ, as 'num_layers 4 against 6'; padding and initialisation do not count."""
    expected, found = without_implied(expected), without_implied(found)
    return [
        f"{field.name} {getattr(expected, field.name)} against {getattr(found, field.name)}"
        for field in fields(ModelConfig)
        if field.name not in NO_SHAPE and getattr(expected, field.name) != getattr(found, field.name)
    ]
