"""Language-model microbatches, which SFT, pretraining and the ptx mix share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.algorithms.losses import language_model_loss
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right, and which tokens are targets. The whole batch, the same on every rank."""

    tokens_bs: Tensor
    target_bs: Tensor
    """bool [b, s]: this token is to be predicted (from those before it)."""

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int] | Tensor], first_targets: Sequence[int]) -> "TokenBatch":
        """`first_targets[i]` is the position of sequence i's first target: its prompt's length, or 1 for plain text."""
        width = max(len(sequence) for sequence in sequences)
        tokens = torch.zeros(len(sequences), width, dtype=torch.long)
        target = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, (sequence, first) in enumerate(zip(sequences, first_targets, strict=True)):
            tokens[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
            target[row, first : len(sequence)] = True
        return cls(tokens.to(collectives.device()), target.to(collectives.device()))

    @property
    def num_targets(self) -> int:
        return int(self.target_bs[:, 1:].sum())


def language_model_microbatches(
    batch: TokenBatch,
    role: Role,
    micro_batch_size: int,
    metric: str,
    weight: float = 1.0,
    normalizer: float | None = None,
) -> list[Microbatch]:
    """This data-parallel rank's share of the batch: weight / (targets of the whole batch) times the sum over targets."""
    normalizer = float(normalizer or max(batch.num_targets, 1))
    group = role.layout.groups.tp

    def microbatch(rows: Tensor, counts: bool) -> Microbatch:
        target = batch.target_bs[rows] & counts
        width = max(int(target.any(dim=0).nonzero().amax()) + 1, 2) if target.any() else 2
        tokens = batch.tokens_bs[rows, :width]

        def loss_of(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = token_logprobs(logits[:, : width - 1], tokens[:, 1:], group)
            loss, _ = language_model_loss(logprobs, target[:, 1:width], normalizer=normalizer)
            return weight * loss, {metric: loss.detach()}

        return Microbatch(pad_to_layout(tokens[:, :-1], role), loss_of)  # the last token is predicted, never read

    return [microbatch(rows, counts) for rows, counts in local_rows(len(batch.tokens_bs), role, micro_batch_size)]


def local_rows(count: int, role: Role, micro_batch_size: int) -> list[tuple[Tensor, bool]]:
    """Rows of a global batch in this data-parallel rank's microbatches.

    The flag is False where a rank has nothing to do and passes row 0 forward, uncounted: a schedule needs a microbatch.
    Ranks outside the layout have none.
    """
    if not role.layout.is_member:
        return []
    mine = torch.arange(role.layout.dp_rank, count, role.layout.dp_size, device=collectives.device())
    if len(mine) == 0:
        return [(torch.zeros(1, dtype=torch.long, device=collectives.device()), False)]
    return [(rows, True) for rows in mine.split(micro_batch_size)]


def pad_to_layout(tokens_bs: Tensor, role: Role) -> Tensor:
    """Columns added so that the layout can split the sequence."""
    width = tokens_bs.shape[1]
    return torch.nn.functional.pad(tokens_bs, (0, role.pad_length(width) - width))


def language_model_nll(role: Role, batch: TokenBatch, micro_batch_size: int) -> tuple[float, int]:
    """Sum of -log p over the targets of a batch, and their number; on every rank."""
    logprobs = role.logprobs(batch.tokens_bs, micro_batch_size)
    target = batch.target_bs[:, 1:]
    return -float(logprobs[target].double().sum()), int(target.sum())
