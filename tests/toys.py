"""Small models with the same weights at every layout; weights and gradients put together from all ranks."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rlhf.config.model import Activation, ModelConfig, Norm, ParallelConfig, Positions, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.parallel.pipeline import Microbatch, forward_backward
from megatron_rlhf.trainers.step import TrainedRole

GPT2_LIKE = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=67, max_sequence_length=48)
LLAMA_LIKE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=67,
    max_sequence_length=48,
    positions=Positions.rope,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    linear_bias=False,
    tied_embeddings=False,
)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Block:
    """A rank's part of one tensor of the model."""

    name: str
    global_shape: tuple[int, ...]
    place: tuple[slice, ...]
    values: np.ndarray


def make_role(
    model: ModelConfig,
    parallel: ParallelConfig | None = None,
    name: str = "policy",
    scalar: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    precision: Precision = Precision.fp32,
    layout: ParallelLayout | None = None,
    **adapters: object,
) -> Role:
    """A role at a layout; its weights depend on the seed alone."""
    layout = layout or ParallelLayout.create(parallel or ParallelConfig())
    with layout:
        model_parallel_cuda_manual_seed(seed + 1, force_reset_rng=True)
    role = Role.build(name, model, layout, precision, scalar, dropout, **adapters)
    fill_weights(role, seed)
    return role


def train(role: Role, **optimizer: object) -> TrainedRole:
    """The role with an optimizer; gradients are not clipped unless asked for."""
    settings = {"lr": 1e-3, "clip_norm": 0.0, **optimizer}
    return TrainedRole.create(role, OptimizerConfig(**settings), Precision.fp32)


@torch.no_grad()
def fill_weights(role: Role, seed: int) -> None:
    """Random weights that are large enough for attention and norms to matter: errors show."""
    for tensor in _sharded(role):
        random = np.random.default_rng([seed, zlib.crc32(tensor.key.encode())])
        scale = 0.1 if tensor.key.endswith("bias") else 0.15
        # Row by row: rows that pad the vocabulary come last and do not change the others.
        is_gain = "norm" in tensor.key and tensor.key.endswith("weight")
        whole = random.standard_normal(tensor.global_shape) * scale + float(is_gain)
        part = whole[_place(tensor)].reshape(tuple(tensor.data.shape))
        tensor.data.copy_(torch.from_numpy(part))


def weight_blocks(role: Role) -> list[Block]:
    """This rank's weights."""
    return [
        Block(tensor.key, tuple(tensor.global_shape), _place(tensor), tensor.data.detach().float().numpy().copy())
        for tensor in _sharded(role)
    ]


def gradient_blocks(trained: TrainedRole, microbatches: Sequence[Microbatch]) -> list[Block]:
    """This rank's gradients of the microbatches' losses, reduced over ranks; frozen weights as they are. The role's weights
    are kept."""
    for chunk in trained.role.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    forward_backward(trained.role.chunks, microbatches, trained.role.layout)
    parameters = [p for chunk in trained.role.chunks for p in chunk.parameters() if p.requires_grad]
    weights = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        blocks = weight_blocks(trained.role)
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return blocks


def assemble(ranks: Iterable[Iterable[Block]], vocab_size: int) -> Arrays:
    """Whole tensors from the blocks of all ranks, without the vocabulary's padding. Copies of a block must be equal."""
    arrays: Arrays = {}
    for blocks in ranks:
        for block in blocks:
            array = arrays.setdefault(block.name, np.full(block.global_shape, np.nan, dtype=np.float32))
            values = block.values.reshape(array[block.place].shape)
            before = array[block.place]
            assert np.isnan(before).all() or np.allclose(before, values, rtol=1e-6, atol=1e-7), (
                f"{block.name} differs between ranks by {np.abs(before - values).max()}"
            )
            array[block.place] = values
    for name, array in arrays.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight") and len(array) > 1:
            arrays[name] = array[:vocab_size]
        assert not np.isnan(arrays[name]).any(), f"no rank holds all of {name}"
    return arrays


def assert_close(actual: Arrays, expected: Arrays, relative: float) -> float:
    """Every tensor differs from the expected one by at most `relative` times that tensor's largest number; returns the maximum.

    A tensor that is only rounding (a gradient that is zero by symmetry) is measured against a tenth of the largest of all.
    """
    assert actual.keys() == expected.keys()
    floor = 0.1 * max(np.abs(array).max() for array in expected.values())
    largest = 0.0
    for name, array in expected.items():
        scale = max(np.abs(array).max(), floor)
        gap = np.abs(actual[name] - array).max()
        assert gap <= relative * scale, f"{name}: differs by {gap:.3g}, largest number {scale:.3g}"
        largest = max(largest, float(gap / scale))
    return largest


def _sharded(role: Role) -> list[ShardedTensor]:
    metadata, found = {"dp_cp_group": role.layout.groups.dp_cp}, []
    with role.layout:
        for module in role.modules:
            for entry in module.sharded_state_dict(metadata=metadata).values():
                if isinstance(entry, ShardedTensorFactory):  # the two halves of SwiGLU's first matrix
                    found += entry.build()
                elif isinstance(entry, ShardedTensor):
                    found.append(entry)
    return found


def _place(tensor: ShardedTensor) -> tuple[slice, ...]:
    sizes = [1] * tensor.prepend_axis_num + list(tensor.data.shape)
    return tuple(slice(start, start + size) for start, size in zip(tensor.global_offset, sizes, strict=True))
