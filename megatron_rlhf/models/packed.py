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

from megatron_rlhf.models.cache import KeyValueCache
from megatron_rlhf.models.linear import Packable, await_weights
from megatron_rlhf.models.logits import Logits
from megatron_rlhf.models.scalar_head import ScalarHead
from megatron_rlhf.parallel.vocab import PADDED_LOGIT


class PackedModel(GPTModel, ABC):
    """GPTModel that reads packed rows, and whose output layer sees only the requested tokens.

    Their places in [b, s], flattened, come as `loss_mask`: Megatron-Core passes that to `_postprocess`, and does not
    use it when there are no labels. The output is then [1, places, ...]: scalars, or what `logits` makes logits of.
    """

    gradient_is_partial: ClassVar[bool]
    """Each tensor-parallel rank's output layer has a part of the gradient of its input."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple:
        prepared = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        segments = kwargs.get("packed_seq_params")
        if segments is None or self.position_embedding_type != "rope":
            return prepared
        table_s11d = self.rotary_pos_emb.get_emb(segments.max_seqlen_q)
        return (prepared[0], table_s11d[position_ids[0]], *prepared[2:])

    def _postprocess(self, hidden_states: Tensor, loss_mask: Tensor | None = None, **kwargs) -> Tensor:
        if not self.post_process or loss_mask is None:
            return super()._postprocess(hidden_states=hidden_states, **kwargs)
        return self._read(self._places(hidden_states, loss_mask)).unsqueeze(0)

    def _places(self, hidden_sbh: Tensor, place_n: Tensor) -> Tensor:
        """Hidden states [n, h] at places in [b, s], on every tensor-parallel rank."""
        if self.config.sequence_parallel:
            hidden_sbh = gather_from_sequence_parallel_region(
                hidden_sbh, tensor_parallel_output_grad=self.gradient_is_partial, group=self.pg_collection.tp
            )
        length, rows, _ = hidden_sbh.shape
        place_n = place_n if rows == 1 else place_n % length * rows + place_n // length
        return hidden_sbh.flatten(0, 1).index_select(0, place_n)

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

    def _postprocess(self, hidden_states: Tensor, loss_mask: Tensor | None = None, **kwargs) -> Tensor:
        cache = kwargs.get("inference_context")
        if self.post_process and isinstance(cache, KeyValueCache):  # only the next token's logits are wanted
            part_1bv = self._product(cache.last_hidden(hidden_states), self._unembedding(), None)
            output = gather_from_tensor_model_parallel_region(part_1bv, group=self.pg_collection.tp).transpose(0, 1)
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
