"""Megatron-Core's GPTModel with what packed rows, padded vocabularies and scalar heads need."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_rlhf.models.layers.cache import KeyValueCache, decodes
from megatron_rlhf.models.layers.linear import Packable, await_weights
from megatron_rlhf.models.layers.wanted import at_places, narrowed, places_sb, wanted_of
from megatron_rlhf.models.logits import Logits
from megatron_rlhf.models.scalar_head import ScalarHead
from megatron_rlhf.parallel.packing import Segments
from megatron_rlhf.parallel.vocab import PADDED_LOGIT


class PackedModel(GPTModel, ABC):
    """GPTModel that reads packed rows, and whose last layer and output layer see only the requested tokens.

    Their places in [b, s], flattened, come as `loss_mask`: Megatron-Core passes that to `_postprocess`, and does not
    use it when there are no labels. The output is then [1, places, ...]: scalars, or what `logits` makes logits of.
    """

    gradient_is_partial: ClassVar[bool]
    """Each tensor-parallel rank's output layer has a part of the gradient of its input."""

    def forward(self, input_ids: Tensor, *args, loss_mask: Tensor | None = None, **kwargs) -> Tensor:
        """As GPTModel's, for requested tokens; of prompts that are read before decoding, the last one of each."""
        rows, length = input_ids.shape
        cache, place_n = kwargs.get("inference_context"), None
        if loss_mask is not None:
            loss_mask = place_n = places_sb(loss_mask, length, rows)
        elif isinstance(cache, KeyValueCache):
            place_n, length = cache.wanted_n, cache.capacity
        if self.post_process and self._narrows and place_n is not None and 0 < len(place_n) < input_ids.numel():
            segments = kwargs.get("packed_seq_params")
            kwargs["packed_seq_params"] = narrowed(segments, self.config.num_layers, place_n, length)
        return super().forward(input_ids, *args, loss_mask=loss_mask, **kwargs)

    @property
    def _narrows(self) -> bool:
        """The last layer may choose tokens. Where they are split over ranks it cannot, and fp8 wants multiples of them."""
        config = self.config
        return not (config.sequence_parallel or config.context_parallel_size > 1 or config.fp8 or config.fp4)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple:
        prepared = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        segments = kwargs.get("packed_seq_params")
        if segments is None or not segments.lengths or self.position_embedding_type != "rope":
            return prepared
        table_s11d = self.rotary_pos_emb.get_emb(segments.max_seqlen_q)
        return (prepared[0], table_s11d[position_ids[0]], *prepared[2:])

    def _postprocess(self, hidden_states: Tensor, loss_mask: Tensor | None = None, **kwargs) -> Tensor:
        if not self.post_process or loss_mask is None:
            return super()._postprocess(hidden_states=hidden_states, **kwargs)
        hidden_n1h = self._requested(hidden_states, loss_mask, kwargs.get("packed_seq_params"))
        return self._read(hidden_n1h.squeeze(1)).unsqueeze(0)

    def _requested(self, hidden_sbh: Tensor, place_n: Tensor, segments: Segments | None) -> Tensor:
        """Hidden states [n, 1, h] at places in [s, b], on every tensor-parallel rank."""
        if wanted_of(segments, self.config.num_layers) is not None:  # the last layer gave no others
            return hidden_sbh
        if self.config.sequence_parallel:
            hidden_sbh = gather_from_sequence_parallel_region(
                hidden_sbh, tensor_parallel_output_grad=self.gradient_is_partial, group=self.pg_collection.tp
            )
        return at_places(hidden_sbh, place_n)

    @abstractmethod
    def _read(self, hidden_nh: Tensor) -> Tensor:
        """What the model gives for these: [n, ...]."""


class LanguageModel(Packable, PackedModel):
    """GPTModel whose padded vocabulary entries have no probability. Output: logits [b, s, padded vocab / tp], or the hidden
    states of requested tokens."""

    gradient_is_partial = True

    def __init__(self, *args, real_vocab_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size

    def forward(self, input_ids: Tensor, *args, **kwargs) -> Tensor:
        """As PackedModel's. fp8 decodes in the contexts that Megatron-Core's block makes for its layers."""
        cache = kwargs.get("inference_context")
        if decodes(cache) and not (self.config.fp8 or self.config.fp4):
            return self._decode(input_ids, kwargs["position_ids"], kwargs["attention_mask"], cache)
        return super().forward(input_ids, *args, **kwargs)

    def _decode(self, tokens_b1: Tensor, positions_b1: Tensor, mask: Tensor | None, cache: KeyValueCache) -> Tensor:
        """This stage's part of a pass over one token of each sequence, without what the block does around training layers."""
        decoder = self.decoder
        x_1bh = self.embedding(tokens_b1, positions_b1) if self.pre_process else decoder.input_tensor
        angles = self.rotary_pos_emb(cache.capacity) if self.position_embedding_type == "rope" else None
        for layer in decoder.layers:
            x_1bh = layer.decode(x_1bh, cache, angles, mask)
        if decoder.final_layernorm is not None:
            x_1bh = decoder.final_layernorm(x_1bh)
        return self._postprocess(x_1bh, inference_context=cache) if self.post_process else x_1bh

    def _postprocess(self, hidden_states: Tensor, loss_mask: Tensor | None = None, **kwargs) -> Tensor:
        cache = kwargs.get("inference_context")
        if self.post_process and isinstance(cache, KeyValueCache):  # only the next token's logits are wanted
            if cache.wanted_n is None:  # one token each of the sequences
                hidden_states = hidden_states.transpose(0, 1)
            else:
                hidden_states = self._requested(hidden_states, cache.wanted_n, kwargs.get("packed_seq_params"))
            part_b1v = self._product(hidden_states, self._unembedding(), None)
            output = gather_from_tensor_model_parallel_region(part_b1v, group=self.pg_collection.tp)
        else:
            output = super()._postprocess(hidden_states, loss_mask, **kwargs)
        if not self.post_process or loss_mask is not None:
            return output
        padded = self._padded(output.shape[-1], output.device)
        return output if padded is None else output.masked_fill(padded, PADDED_LOGIT)

    def weight_to_pack(self) -> Tensor | None:
        return self._unembedding() if self.post_process else None

    def _unembedding(self) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        await_weights(self.embedding.word_embeddings if tied and self.pre_process else self.output_layer)
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def logits(self, hidden_nh: Tensor) -> Logits:
        """Logits of hidden states, which all context-parallel ranks have."""
        weight, groups = self._unembedding(), self.pg_collection
        if groups.tp.size() > 1 and not self.config.sequence_parallel:  # there, gathering them sums their gradients
            hidden_nh = copy_to_tensor_model_parallel_region(hidden_nh, group=groups.tp)
        return Logits(hidden_nh, weight, self._padded(len(weight), weight.device), groups.tp, groups.cp)

    def _padded(self, columns: int, device: torch.device) -> Tensor | None:
        if self.vocab_size == self.real_vocab_size:
            return None
        first = 0 if columns == self.vocab_size else self.pg_collection.tp.rank() * columns
        return torch.arange(first, first + columns, device=device) >= self.real_vocab_size

    def _read(self, hidden_nh: Tensor) -> Tensor:
        return hidden_nh


class ScalarModel(PackedModel):
    """GPTModel with a scalar head in place of the unembedding (reward and value model). Output: [b, s, 1], fp32."""

    gradient_is_partial = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = ScalarHead(self.config, self.pg_collection)

    def _read(self, hidden_nh: Tensor) -> Tensor:
        await_weights(self.output_layer)
        return self.output_layer.of(hidden_nh)
