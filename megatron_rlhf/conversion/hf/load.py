"""Hugging Face folders as a source of weights for any role at any layout."""

import heapq
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rlhf.checkpoint.sharded import META
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig
from megatron_rlhf.conversion.hf.folder import CONFIG
from megatron_rlhf.conversion.hf.weights import Described, Weights
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout

log = logging.getLogger(__name__)


def is_hf_folder(path: str | Path) -> bool:
    """The folder holds a Hugging Face model, not one of our checkpoints."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / META).exists()


def read_model_config(folder: str | Path) -> tuple[ModelConfig, bool]:
    """Shape of the model in a Hugging Face folder, and whether it has a scalar head.

    Raises:
        UserError: for an architecture, or a feature of one, that our modules do not support.
    """
    described = Described.read(Path(folder))
    return described.model, described.scalar


def require_whole(folder: str | Path, scalar: bool) -> None:
    """Raise UserError unless a folder's files hold what its config.json describes, before a role is built by it.

    Only the files' headers are read. `scalar`: the role has a scalar head.
    """
    _open(Path(folder), Described.read(Path(folder)), scalar)


def _open(folder: Path, described: Described, scalar: bool) -> Weights:
    return Weights.open(folder, described, with_head=described.scalar or not scalar)


def load_into(role: Role, folder: str | Path) -> None:
    """Load a role's weights, at its layout, from a Hugging Face folder. Collective over the layout.

    Each rank reads a share of what it holds, and receives the rest from the data-parallel ranks that hold the same. A
    scalar role loaded from a language model keeps the head that it was built with.

    Raises:
        UserError: when a tensor is missing, unknown, of another shape, or the model does not fit the role.
    """
    described = Described.read(Path(folder))
    if described.scalar and not role.scalar:
        raise UserError(f"{folder}: its head gives one number a token; the {role.name} needs a language model")
    weights = _open(Path(folder), described, role.scalar)
    if role.scalar and not described.scalar:
        log.info("%s: the scalar head is new, the rest comes from the language model in %s", role.name, folder)
    if not role.layout.is_member:
        return
    blocks = [tensor for tensor in sharded_tensors(role.modules, role.layout) if tensor.key in weights.shapes]
    group = role.layout.groups.dp_cp
    with torch.no_grad():
        pieces = _pieces(blocks, group.size())
        for tensor, first, last, reader in pieces:
            if reader == group.rank():
                layers = tensor.prepend_axis_num
                layer = tensor.global_offset[0] if layers else None
                row, *rest = tensor.global_offset[layers:]
                shape = (last - first, *tensor.data.shape[1:])
                tensor.data[first:last].copy_(weights.block(tensor.key, layer, (row + first, *rest), shape))
        for tensor, first, last, reader in pieces if group.size() > 1 else ():
            dist.broadcast(tensor.data[first:last], group_src=reader, group=group)


def _pieces(blocks: Sequence[ShardedTensor], ranks: int) -> list[tuple[ShardedTensor, int, int, int]]:
    """(tensor, first row, row after the last, which of `ranks` equal ranks reads it): each reads about as many numbers.

    A tensor stays whole where it is no more than a rank's share.
    """
    share = sum(block.data.numel() for block in blocks) / ranks
    pieces = []
    for block in blocks:
        rows = len(block.data)
        count = min(math.ceil(block.data.numel() / share), rows)
        pieces += [(block, rows * i // count, rows * (i + 1) // count) for i in range(count)]
    loads = [(0.0, rank) for rank in range(ranks)]
    found = []
    for block, first, last in sorted(pieces, key=lambda piece: -piece[0].data[piece[1] : piece[2]].numel()):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + block.data[first:last].numel(), rank))
        found.append((block, first, last, rank))
    return found


def sharded_tensors(chunks: Sequence[GPTModel], layout: ParallelLayout) -> list[ShardedTensor]:
    """This rank's weights as blocks of whole tensors, each with its name and place; their data are the chunks' own."""
    found: list[ShardedTensor] = []
    with layout:
        for chunk in chunks:
            for entry in chunk.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp}).values():
                if isinstance(entry, ShardedTensorFactory):  # the gate and up halves of SwiGLU
                    found += entry.build()
                elif isinstance(entry, ShardedTensor):
                    found.append(entry)
    return found
