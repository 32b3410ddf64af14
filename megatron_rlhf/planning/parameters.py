"""How many weights a model has, and how many of them one rank holds."""

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
    h, t = model.hidden_size, tensor
    matrices = h * (qkv_width(model) + attention_width(model) + first_mlp_width(model) + ffn_width(model)) // t
    biases = 0
    if model.linear_bias:
        biases += first_mlp_width(model) // t + 2 * h
    if model.linear_bias or model.qkv_bias:
        biases += qkv_width(model) // t
    norms = 2 * norm_parameters(model, h)
    if model.qk_norm:
        norms += 2 * norm_parameters(model, head_dim(model))
    return matrices + biases + norms


def norm_parameters(model: ModelConfig, width: int) -> int:
    return width if model.norm is Norm.rmsnorm else 2 * width


def stage_layers(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Layers on a pipeline stage, over all its virtual stages."""
    if parallel.last_stage_layers is None:
        return model.num_layers // parallel.pipeline
    last = parallel.last_stage_layers
    return last if stage == parallel.pipeline - 1 else (model.num_layers - last) // (parallel.pipeline - 1)


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int, scalar: bool) -> int:
    """Weights on one rank of a pipeline stage. A tied embedding lives on the first and on the last stage."""
    h, last = model.hidden_size, parallel.pipeline - 1
    embedding = padded_vocabulary(model, parallel.tensor) // parallel.tensor * h
    total = stage_layers(model, parallel, stage) * layer_parameters(model, parallel.tensor)
    if stage == 0:
        total += embedding
        if model.positions is Positions.learned:
            total += (model.max_sequence_length + model.position_offset) * h
    if stage == last:
        total += norm_parameters(model, h)
        if scalar:
            total += h + 1
        elif not model.tied_embeddings or last > 0:
            total += embedding
    return total


def total_parameters(model: ModelConfig, scalar: bool = False) -> int:
    """Weights of the whole model, the vocabulary unpadded."""
    unpadded = ModelConfig(**{**vars(model), "vocab_multiple": 1})
    return stage_parameters(unpadded, ParallelConfig(), 0, scalar)


def matmul_parameters(model: ModelConfig, scalar: bool = False) -> int:
    """Weights that multiply every token, the unembedding among them: the basis for counting FLOPs."""
    matrices = qkv_width(model) + attention_width(model) + first_mlp_width(model) + ffn_width(model)
    unembedding = 0 if scalar else model.vocab_size
    return model.hidden_size * (model.num_layers * matrices + unembedding)
