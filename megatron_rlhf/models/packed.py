"""Megatron-Core's GPTModel with what packed rows, padded vocabularies and scalar heads need."""

from typing import ClassVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rlhf.models.scalar_head import ScalarHead
from megatron_rlhf.parallel.vocab import PADDED_LOGIT


class PackedModel(GPTModel):
    """GPTModel that reads packed rows, and whose output layer sees only the requested tokens.

    Their places in [b, s], flattened, come as `loss_mask`: Megatron-Core passes that to `_postprocess`, and does not
    use it when there are no labels. The output is then [1, places, ...].
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
        layer, split = self.output_layer, self.config.sequence_parallel
        if split:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=self.gradient_is_partial, group=self.pg_collection.tp
            )
        length, rows, _ = hidden_states.shape
        place_n = loss_mask if rows == 1 else loss_mask % length * rows + loss_mask // length
        hidden_states = hidden_states.flatten(0, 1).index_select(0, place_n).unsqueeze(1)
        if split:  # gathered above, and its gradient is summed there
            layer.sequence_parallel, layer.disable_grad_reduce = False, True
        try:
            return super()._postprocess(hidden_states=hidden_states, **kwargs)
        finally:
            if split:
                layer.sequence_parallel, layer.disable_grad_reduce = True, False


class LanguageModel(PackedModel):
    """GPTModel whose padded vocabulary entries have no probability. Output: logits [b, s, padded vocab / tp]."""

    gradient_is_partial = True

    def __init__(self, *args, real_vocab_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size

    def _postprocess(self, hidden_states: Tensor, loss_mask: Tensor | None = None, **kwargs) -> Tensor:
        inference_context = kwargs.get("inference_context")
        if self.post_process and inference_context is not None:  # decoding needs only the next token's logits
            hidden_states = inference_context.last_hidden(hidden_states)
        output = super()._postprocess(hidden_states, loss_mask, **kwargs)
        if not self.post_process or self.vocab_size == self.real_vocab_size:
            return output
        columns = output.shape[-1]
        first = 0 if columns == self.vocab_size else self.pg_collection.tp.rank() * columns
        padded = torch.arange(first, first + columns, device=output.device) >= self.real_vocab_size
        return output.masked_fill(padded, PADDED_LOGIT)


class ScalarModel(PackedModel):
    """GPTModel with a scalar head in place of the unembedding (reward and value model). Output: [b, s, 1], fp32."""

    gradient_is_partial = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = ScalarHead(self.config, self.pg_collection)
