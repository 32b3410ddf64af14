"""Language-model microbatches, which SFT, pretraining and the ptx mix share."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rlhf.algorithms.losses import language_model_loss
from megatron_rlhf.config.budgets import Budget
from megatron_rlhf.models.logits import Logits
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.packing import Sequences, plan
from megatron_rlhf.parallel.pipeline import Microbatch


def texts_to_score(
    rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None, prompts: Sequence[int] | None = None
) -> Sequences:
    """Texts whose last token is scored."""
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return Sequences(tokens.to(collectives.device()), lengths, None, prompt_lengths, prompts).at_ends()


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right, and which tokens are targets. The whole batch, the same on every rank."""

    tokens_bs: Tensor
    target_bs: Tensor
    """bool [b, s], on the CPU: this token is to be predicted (from those before it)."""

    @classmethod
    def pack(
        cls, sequences: Sequence[Sequence[int] | Tensor], targets: Sequence[int | npt.NDArray[np.bool_]]
    ) -> "TokenBatch":
        """`targets[i]`: which tokens of sequence i are targets, or the position of the first: all from there on (its
        prompt's length, or 1 for plain text)."""
        width = max(len(sequence) for sequence in sequences)
        tokens = torch.zeros(len(sequences), width, dtype=torch.long)
        target = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, (sequence, wanted) in enumerate(zip(sequences, targets, strict=True)):
            tokens[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
            if isinstance(wanted, np.ndarray):
                target[row, : len(sequence)] = torch.from_numpy(wanted)
            else:
                target[row, wanted : len(sequence)] = True
        return cls(tokens.to(collectives.device()), target)

    @property
    def num_targets(self) -> int:
        return int(self.target_bs[:, 1:].sum())

    @functools.cached_property
    def sequences(self) -> Sequences:
        """Each up to its last target, at least two tokens; wanted are the tokens that predict targets."""
        places = torch.arange(self.target_bs.shape[1])
        lengths = torch.where(self.target_bs, places, 1).amax(dim=1) + 1
        wanted = torch.zeros_like(self.target_bs)
        wanted[:, :-1] = self.target_bs[:, 1:]
        return Sequences(self.tokens_bs, lengths.tolist(), wanted)


def language_model_microbatches(
    batch: TokenBatch,
    role: Role,
    micro_batch_size: Budget | int,
    metric: str,
    weight: float = 1.0,
    normalizer: float | None = None,
) -> list[Microbatch]:
    """This data-parallel rank's share of the batch: weight / (targets of the whole batch) times the sum over targets."""
    normalizer = float(normalizer or max(batch.num_targets, 1))
    inputs = batch.sequences.until(-1)

    def microbatch(rows: list[int], counts: bool) -> Microbatch:
        wanted = inputs.wanted(rows)
        row_n, column_n = wanted.nonzero(as_tuple=True)
        targets_n = batch.tokens_bs[torch.tensor(rows)[row_n], column_n + 1]
        mask_n = torch.full_like(targets_n, counts, dtype=torch.bool)

        def loss_of(logits_nv: Logits) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_n = logits_nv.logprobs(targets_n)
            loss, _ = language_model_loss(logprobs_n, mask_n, normalizer=normalizer)
            return weight * loss, {metric: loss.detach()}

        return Microbatch.of(role.arrange(inputs, rows, micro_batch_size), wanted, loss_of)

    return [microbatch(rows, counts) for rows, counts in local_rows(inputs, role, micro_batch_size)]


def local_rows(sequences: Sequences, role: Role, size: Budget | int) -> list[tuple[list[int], bool]]:
    """Rows of a global batch in this data-parallel rank's microbatches; ranks outside the layout have none.

    The flag is False if a rank has no rows and runs the shortest one, uncounted, because a schedule needs a microbatch.
    """
    if not role.layout.is_member:
        return []
    mine = plan(sequences, size, role.layout.dp_size)[role.layout.dp_rank]
    shortest = min(range(len(sequences.lengths)), key=lambda row: sequences.lengths[row])
    return [(rows, True) for rows in mine] or [([shortest], False)]


def language_model_nll(role: Role, batch: TokenBatch, micro_batch_size: Budget | int) -> tuple[float, int]:
    """Sum of -log p over the targets of a batch, and their number; on every rank."""
    logprobs = role.logprobs(batch.sequences, micro_batch_size)
    target = batch.target_bs[:, 1:]
    return -float(logprobs[target].double().sum()), int(target.sum())
