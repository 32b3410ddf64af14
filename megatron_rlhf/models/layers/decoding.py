"""Layers that compute what is wanted of them, and no more; when decoding, one new token of each sequence, written out.

Megatron-Core's modules do around four products and an attention what training may ask for. For a whole sequence that is nothing;
of a decoded token it is about a tenth of the time on a CPU.
"""

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from megatron_rlhf.models.layers.attention import rotate
from megatron_rlhf.models.layers.cache import KeyValueCache, decodes
from megatron_rlhf.models.layers.wanted import at_places, wanted_of

_TOLD_ATTENTION = ("attention_mask", "rotary_pos_emb", "inference_context", "packed_seq_params")


class DecodingLayer(TransformerLayer):
    """TransformerLayer that decodes from a `KeyValueCache`. It reads prompts, and trains, as Megatron-Core's."""

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Hidden states [s, b, h] through one layer; other arguments as in TransformerLayer."""
        cache = kwargs.get("inference_context")
        if decodes(cache):
            return self.decode(hidden_states, cache, kwargs["rotary_pos_emb"], kwargs["attention_mask"]), None
        return self._read(hidden_states, **kwargs)

    def decode(self, x_1bh: Tensor, cache: KeyValueCache, angles: Tensor | None, mask: Tensor | None) -> Tensor:
        """One token of each sequence: [1, b, h]. `angles`: the rotary table, if positions are rotary; `mask`: keys attended to,
        [b, 1, 1, s], or None for all."""
        if self._has_whole_groups():
            return self._decode(x_1bh, cache, angles, mask)
        return self._read(x_1bh, attention_mask=mask, rotary_pos_emb=angles, inference_context=cache)[0]

    def _has_whole_groups(self) -> bool:
        """Else ranks share a key's heads, and Megatron-Core gathers them."""
        return self.config.num_query_groups >= self.pg_collection.tp.size()

    def _read(self, hidden_sbh: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        wanted_n = wanted_of(kwargs.get("packed_seq_params"), self.layer_number)
        if wanted_n is None:
            return super().forward(hidden_sbh, **kwargs)
        residual_n1h = at_places(hidden_sbh, wanted_n)
        return self._forward_mlp(self._attended(hidden_sbh, residual_n1h, **kwargs)), None

    def _attended(self, hidden_sbh: Tensor, residual_n1h: Tensor, **kwargs) -> Tensor:
        """The sum after attention for wanted tokens alone: [n, 1, h]. Attention computes no other here."""
        told = {name: kwargs.get(name) for name in _TOLD_ATTENTION}
        attended_with_bias = self.self_attention(self.input_layernorm(hidden_sbh), **told)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(attended_with_bias, residual_n1h, self.hidden_dropout)

    def _decode(self, x_1bh: Tensor, cache: KeyValueCache, angles: Tensor | None, mask: Tensor | None) -> Tensor:
        x_1bh = x_1bh + self._attend(x_1bh, cache, angles, mask)
        return x_1bh + self._transform(x_1bh)

    def _attend(self, x_1bh: Tensor, cache: KeyValueCache, angles: Tensor | None, mask: Tensor | None) -> Tensor:
        attention = self.self_attention
        groups, d = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        # As the layer's weight has them: a group's queries, its key, its value.
        heads_bgnd = _product(attention.linear_qkv, self.input_layernorm(x_1bh)).view(x_1bh.shape[1], groups, -1, d)
        rotated_bgnd, value_bgd = heads_bgnd[:, :, :-1], heads_bgnd[:, :, -1]
        if self.config.qk_layernorm:
            queries = attention.q_layernorm(rotated_bgnd[:, :, :-1])
            rotated_bgnd = torch.cat([queries, attention.k_layernorm(rotated_bgnd[:, :, -1:])], dim=2)
        if angles is not None:
            cos, sin = cache.rotation(angles, x_1bh.dtype)
            rotated_bgnd = rotate(rotated_bgnd, cos[0].unsqueeze(1), sin[0].unsqueeze(1))
        keys_bgsd, values_bgsd = cache.extend(self.layer_number, rotated_bgnd[:, :, -1], value_bgd)
        # The group's queries are the rows of one product with its keys: each attends to all of them.
        context_bgnd = F.scaled_dot_product_attention(rotated_bgnd[:, :, :-1], keys_bgsd, values_bgsd, attn_mask=mask)
        return _product(attention.linear_proj, context_bgnd.reshape(1, x_1bh.shape[1], -1))

    def _transform(self, x_1bh: Tensor) -> Tensor:
        mlp, normed_1bh, activation = self.mlp, self.pre_mlp_layernorm(x_1bh), self.config.activation_func
        if self.config.bias_activation_fusion:  # one kernel of the MLP's
            return _with_bias(*mlp(normed_1bh))
        inner_1bf = _product(mlp.linear_fc1, normed_1bh)
        if self.config.gated_linear_unit:
            gate_1bf, up_1bf = inner_1bf.chunk(2, dim=-1)
            return _product(mlp.linear_fc2, activation(gate_1bf).mul_(up_1bf))
        return _product(mlp.linear_fc2, activation(inner_1bf))


class ParallelResidualLayer(DecodingLayer):
    """x + attention(norm(x)) + mlp(norm'(x)), as in GPT-NeoX; Megatron-Core's own layer passes the first sum to the MLP."""

    def _read(self, hidden_sbh: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        wanted_n = wanted_of(kwargs.get("packed_seq_params"), self.layer_number)
        if wanted_n is None:
            attended, _ = self._forward_attention(hidden_sbh, **kwargs)
        else:
            residual_n1h = at_places(hidden_sbh, wanted_n)
            attended, hidden_sbh = self._attended(hidden_sbh, residual_n1h, **kwargs), residual_n1h
        return self._forward_post_mlp(self.mlp(self._forward_pre_mlp_layernorm(hidden_sbh)), attended), None

    def _decode(self, x_1bh: Tensor, cache: KeyValueCache, angles: Tensor | None, mask: Tensor | None) -> Tensor:
        return x_1bh + self._attend(x_1bh, cache, angles, mask) + self._transform(x_1bh)


def _product(linear: torch.nn.Module, x: Tensor) -> Tensor:
    return _with_bias(*linear(x))


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias
