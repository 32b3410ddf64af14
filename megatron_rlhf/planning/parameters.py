"""How many weights a model has, and how many of them one rank holds."""

from collections.abc import Sequence

from megatron_rlhf.config.lora import selects
from megatron_rlhf.config.model import Activation, ModelConfig, Norm, ParallelConfig, Positions


def head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    return model.num_query_groups or model.num_attention_heads


def ffn_width(model: ModelConfig) -> int:
    return model.ffn_hidden_size or 4 * model.hidden_size


def attention_width(model: ModelConfig) -> int:
    """All heads together: the hidden size in most models."""
    return model.num_attention_heads * head_dim(model)


def qkv_width(model: ModelConfig) -> int:
    """Queries, keys and values of one token."""
    return attention_width(model) + 2 * query_groups(model) * head_dim(model)


def first_mlp_width(model: ModelConfig) -> int:
    """Outputs of the first MLP matrix; a gated one has two halves."""
    return ffn_width(model) * (2 if model.activation is Activation.swiglu else 1)


def padded_vocabulary(model: ModelConfig, tensor: int) -> int:
    """Rows of the embedding: rounded up so that all tensor-parallel ranks hold the same number."""
    multiple = model.vocab_multiple * tensor
    return -(-model.vocab_size // multiple) * multiple


def layer_parameters(model: ModelConfig, tensor: int) -> int:
    """Weights of one transformer layer on one tensor-parallel rank."""
    return sum(layer_weights(model, tensor).values())


def layer_weights(model: ModelConfig, tensor: int) -> dict[str, int]:
    """The same, weight by weight, by their names in checkpoints."""
    h, t = model.hidden_size, tensor
    qkv, attention, fc1, ffn = qkv_width(model), attention_width(model), first_mlp_width(model), ffn_width(model)
    matrices = {
        "self_attention.linear_qkv": (h * qkv, qkv // t),
        "self_attention.linear_proj": (h * attention, h),
        "mlp.linear_fc1": (h * fc1, fc1 // t),
        "mlp.linear_fc2": (h * ffn, h),
    }
    weights = {}
    for name, (size, bias) in matrices.items():
        weights[f"{name}.weight"] = size // t
        if model.linear_bias or (model.qkv_bias and name.endswith("qkv")):
            weights[f"{name}.bias"] = bias
    kinds = _norm_kinds(model)
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        weights |= {f"{name}.layer_norm_{kind}": h for kind in kinds}
    if model.qk_norm:
        norms = ("self_attention.q_layernorm", "self_attention.k_layernorm")
        weights |= {f"{name}.{kind}": head_dim(model) for name in norms for kind in kinds}
    return weights


def _norm_kinds(model: ModelConfig) -> tuple[str, ...]:
    return ("weight",) if model.norm is Norm.rmsnorm else ("weight", "bias")


def stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Layers on a pipeline stage, over all its virtual stages."""
    if parallel.last_stage_layers is None:
        return model.num_layers // parallel.pipeline
    last = parallel.last_stage_layers
    return last if stage == parallel.pipeline - 1 else (model.num_layers - last) // (parallel.pipeline - 1)


def layers_of(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[int]:
    """Which layers a pipeline stage has, counted from 0, over all its virtual stages."""
    count = stage_layers(model, parallel, stage)
    if parallel.virtual_stages == 1:
        first = stage * stage_layers(model, parallel, 0)
        return list(range(first, first + count))
    each = count // parallel.virtual_stages
    firsts = [(chunk * parallel.pipeline + stage) * each for chunk in range(parallel.virtual_stages)]
    return [layer for first in firsts for layer in range(first, first + each)]


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int, scalar: bool) -> int:
    """Weights on one rank of a pipeline stage."""
    layers = stage_layers(model, parallel, stage) * layer_parameters(model, parallel.tensor)
    return layers + sum(outer_weights(model, parallel, stage, scalar).values())


def outer_weights(model: ModelConfig, parallel: ParallelConfig, stage: int, scalar: bool) -> dict[str, int]:
    """Those outside the layers, by their names in checkpoints. A tied embedding lives on the first and on the last stage."""
    h, last = model.hidden_size, parallel.pipeline - 1
    embedding = padded_vocabulary(model, parallel.tensor) // parallel.tensor * h
    weights = {}
    if stage == 0:
        weights["embedding.word_embeddings.weight"] = embedding
        if model.positions is Positions.learned:
            rows = model.max_sequence_length + model.position_offset
            weights["embedding.position_embeddings.weight"] = rows * h
    if stage == last:
        weights |= {f"decoder.final_layernorm.{kind}": h for kind in _norm_kinds(model)}
        if scalar:
            weights |= {"output_layer.weight": h, "output_layer.bias": 1}
        elif not model.tied_embeddings:
            weights["output_layer.weight"] = embedding
        elif last > 0:
            weights["embedding.word_embeddings.weight"] = embedding
    return weights


def trained_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, scalar: bool, patterns: Sequence[str]
) -> int:
    """Weights on one rank of a stage that patterns select (`config.lora.selects`)."""
    weights = outer_weights(model, parallel, stage, scalar)
    for layer in layers_of(model, parallel, stage):
        in_layer = layer_weights(model, parallel.tensor).items()
        weights |= {f"decoder.layers.{layer}.{name}": count for name, count in in_layer}
    return sum(count for name, count in weights.items() if any(selects(pattern, name) for pattern in patterns))


def total_parameters(model: ModelConfig, scalar: bool = False) -> int:
    """Weights of the whole model, the vocabulary unpadded."""
    unpadded = ModelConfig(**{**vars(model), "vocab_multiple": 1})
    return stage_parameters(unpadded, ParallelConfig(), 0, scalar)


def matmul_parameters(model: ModelConfig, scalar: bool = False) -> int:
    """Weights that multiply every token, the unembedding among them: the basis for counting FLOPs."""
    matrices = qkv_width(model) + attention_width(model) + first_mlp_width(model) + ffn_width(model)
    unembedding = 0 if scalar else model.vocab_size
    return model.hidden_size * (model.num_layers * matrices + unembedding)
