"""What Megatron-Core's dynamic engine needs of a GPU, on a CPU: flash-attn's two functions in plain torch, and CUDA graphs.

The engine itself is Megatron-Core's own, with the branch in plain torch that it has for where Triton is missing.
"""

import contextlib

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Stands for `torch.cuda.CUDAGraph`: the calls that were captured, with the tensors, numbers and places of that time."""

    captured = replayed = 0

    def __init__(self):
        self.calls = []

    def replay(self):
        Graph.replayed += 1
        for function, args, kwargs, places in self.calls:
            results = function(*args, **kwargs)
            for place, result in zip(tree_leaves(places), tree_leaves(results), strict=True):
                if (
                    isinstance(place, Tensor) and place.data_ptr() != result.data_ptr()
                ):  # else a view, or written in place
                    place.copy_(result)


def _sum(tensors, group, operation):
    ProcessGroup.unbox(group).allreduce(tensors).wait()


def _gather(output, part, group):
    ProcessGroup.unbox(group)._allgather_base(output, part).wait()


_COLLECTIVES = {"c10d::allreduce_": _sum, "c10d::_allgather_base_": _gather}
"""The dispatcher only starts them; these run to their end."""


class _Capture(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: a number is read")
        results = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self.graph.calls.append((_COLLECTIVES[function.name()], args[:3], {}, None))
        else:
            self.graph.calls.append((function, args, kwargs or {}, results))
        return results


@contextlib.contextmanager
def graph(graph, capture_error_mode):
    Graph.captured += 1
    with _Capture(graph):
        yield


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    softmax_scale,
    causal,
    window_size,
    block_table,
    return_attn_probs,
):
    assert causal and window_size == (-1, -1) and not return_attn_probs
    queries, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert queries.max() <= max_seqlen_q and keys.max() <= max_seqlen_k
    assert max_seqlen_q > 1 or queries.min() > 0, "issue 1537: one query each, and an empty sequence"
    return _varlen(q, k, v, queries, keys, block_table, softmax_scale)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size, block_table, num_splits
):
    assert causal and window_size == (-1, -1) and q.shape[1] == 1
    ones = torch.ones_like(cache_seqlens)
    return _varlen(q.squeeze(1), k_cache, v_cache, ones, cache_seqlens, block_table, softmax_scale).unsqueeze(1)


@torch.library.custom_op("stand_in::varlen", mutates_args=())
def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, table: Tensor, scale: float) -> Tensor:
    out = torch.full_like(q, torch.nan)  # the kernel leaves rows between sequences as they were allocated
    first = 0
    for row, (count, length) in enumerate(zip(queries.tolist(), keys.tolist(), strict=True)):
        used = table[row, : -(-length // k.shape[1])].long()
        assert (used >= 0).all()
        key, value = (cache[used].flatten(0, 1)[:length] for cache in (k, v))
        out[first : first + count] = _attend(q[first : first + count], key, value, scale) if length else 0.0
        first += count
    return out


def _attend(q_snd: Tensor, k_sgd: Tensor, v_sgd: Tensor, scale: float) -> Tensor:
    """Causal attention in fp64; the last query is the last key's."""
    copies = q_snd.shape[1] // k_sgd.shape[1]
    key, value = (x.double().repeat_interleave(copies, dim=1) for x in (k_sgd, v_sgd))
    scores = torch.einsum("qnd,knd->nqk", q_snd.double(), key) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(key) - len(q_snd) + 1)
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(later, -torch.inf).softmax(dim=-1), value).to(q_snd.dtype)


def install(monkeypatch) -> None:
    """Let the engine run on this CPU, until the end of the test."""
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer import attention

    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    monkeypatch.setattr(attention, "flash_attn_with_kvcache", flash_attn_with_kvcache)
    monkeypatch.setattr(attention, "is_fa_min_version", lambda version: True)
    monkeypatch.setattr(communication_utils, "_is_cuda", lambda tensor: None)  # between pipeline stages
    monkeypatch.setattr(dynamic_context, "triton_append_key_value_cache", None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    Graph.captured = Graph.replayed = 0
