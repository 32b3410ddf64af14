"""Attention with torch's fused kernels, and decoding from a key/value cache."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_rlhf.models.layers.wanted import at_places, wanted_of
from megatron_rlhf.parallel import context
from megatron_rlhf.parallel.packing import Segments


class ScaledDotProductAttention(MegatronModule):
    """Megatron-Core's core attention on `torch.nn.functional.scaled_dot_product_attention`: never materialises the scores."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads
        assert pg_collection is not None
        self.context = pg_collection.cp

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """[q, b, heads, d] and [k, b, groups, d] -> [q, b, heads * d], or [n, 1, heads * d] of wanted tokens.

        Without a mask ([b, 1, q, k], True = attend) it is causal; a single query is the newest token and sees all keys.
        Under context parallelism each rank's queries see the keys of all ranks that come before them. In a packed row,
        the segments determine who sees whom.
        """
        attended_sbe = self._all(query_sbnd, key_sbgd, value_sbgd, attention_mask, packed_seq_params)
        wanted_n = wanted_of(packed_seq_params, self.layer_number)
        return attended_sbe if wanted_n is None else at_places(attended_sbe, wanted_n)

    def _all(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        attention_mask: Tensor | None,
        segments: Segments | None,
    ) -> Tensor:
        if segments is not None and segments.lengths:
            assert attention_mask is None and query_sbnd.shape[1] == 1, "a packed row is one row, and causal"
            return self._by_segment(query_sbnd, key_sbgd, value_sbgd, segments)
        if self.context.size() > 1:
            assert attention_mask is None and len(key_sbgd) == len(query_sbnd), "decoding needs a layout with context=1"
            key_sbgd = context.gather(key_sbgd, 0, self.context, sum_gradients=True)
            value_sbgd = context.gather(value_sbgd, 0, self.context, sum_gradients=True)
            queries = context.local_tokens(len(key_sbgd), self.context).to(query_sbnd.device)
            attention_mask = queries.unsqueeze(-1) >= torch.arange(len(key_sbgd), device=query_sbnd.device)
        return self._attend(query_sbnd, key_sbgd, value_sbgd, attention_mask).flatten(2)

    def _attend(self, query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, mask: Tensor | None) -> Tensor:
        grouped = self.grouped
        if grouped and mask is not None and kernels_refuse_groups_with_a_mask(query_sbnd.device):
            copies = query_sbnd.shape[2] // key_sbgd.shape[2]
            key_sbgd, value_sbgd = (x.repeat_interleave(copies, dim=2) for x in (key_sbgd, value_sbgd))
            grouped = False
        context_bnsd = F.scaled_dot_product_attention(
            query_sbnd.permute(1, 2, 0, 3),
            key_sbgd.permute(1, 2, 0, 3),
            value_sbgd.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None and len(query_sbnd) > 1,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        return context_bnsd.permute(2, 0, 1, 3)

    def _by_segment(self, query_s1nd: Tensor, key_s1gd: Tensor, value_s1gd: Tensor, segments: Segments) -> Tensor:
        """One block of queries after another: nothing is computed across sequences."""
        pieces = [(0, len(query_s1nd))]
        if self.context.size() > 1:
            key_s1gd = context.gather(key_s1gd, 0, self.context, sum_gradients=True)
            value_s1gd = context.gather(value_s1gd, 0, self.context, sum_gradients=True)
            pieces = context.local_pieces(len(key_s1gd), self.context)
        sizes, blocks = segments.blocks(pieces)
        keys, values = key_s1gd.split(sizes), value_s1gd.split(sizes)
        attended = []
        for block, queries in zip(blocks, query_s1nd.split([sizes[block.part] for block in blocks]), strict=True):
            key, value = (_joined([parts[i] for i in block.keys]) for parts in (keys, values))
            mask = segments.mask(len(queries), len(key), key.device) if len(block.keys) > 1 else None
            attended.append(self._attend(queries, key, value, mask))
        return torch.cat(attended).flatten(2)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def kernels_refuse_groups_with_a_mask(device: torch.device) -> bool:
    """CUDA's fused kernels take groups of queries or a mask, not both: with both, torch materialises the scores in fp32."""
    return device.type == "cuda"


class CachedSelfAttention(SelfAttention):
    """SelfAttention that decodes from a `KeyValueCache`: each key is rotated once, not for every new token."""

    def _adjust_key_value_for_inference(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs):
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        if not inference_context.is_static_batching():  # Megatron-Core's engine keeps keys and values itself
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        if rotary_pos_emb is not None:
            cos, sin = inference_context.rotation(rotary_pos_emb[0], query.dtype)
            heads = [query.shape[2], key.shape[2]]
            query, key = rotate(torch.cat([query, key], dim=2), cos, sin).split(heads, dim=2)
        key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, None, AttnMaskType.no_mask, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., d], rotated as Megatron-Core and Llama do: the two halves of a head are the two coordinates. `sin` has the sign with
    which it multiplies the other half."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]  # a model may rotate a part of each head
    rotated = (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
