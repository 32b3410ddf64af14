"""Separates the two gradients that one update sums."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives, compat
from megatron_rlhf.parallel.offload import storage_of
from megatron_rlhf.trainers.optimizer import reduce_gradients

log = logging.getLogger(__name__)

_AT_ONCE = 2**22  # numbers in fp64
_TOO_MANY_TIMES, _REPORTS = 10, 3


@dataclass(frozen=True)
class Comparison:
    """Norms of the gradient of an update's first part and of the rest, and the cosine of the angle between them."""

    first_norm: float
    rest_norm: float
    cosine: float


@dataclass(frozen=True)
class KeptGradient:
    """The gradient of the first part of an update, reduced over ranks: only a copy of this rank's gradient buffers.

    The buffers themselves are unchanged, so that the update is bit for bit what it would have been.
    """

    buffers: Sequence[Tensor]
    copies: Sequence[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, role: Role) -> "KeptGradient":
        """The gradient accumulated so far and not yet reduced. Collective over the role's layout."""
        buffers = [buffer for chunk in role.chunks for buffer in _gradient_buffers(chunk)]
        copies = [buffer.clone() for buffer in buffers]
        reduce_gradients(role)
        for buffer, copy in zip(buffers, copies, strict=True):
            for kept, other in zip(buffer.split(_AT_ONCE), copy.split(_AT_ONCE), strict=True):
                reduced = kept.clone()
                kept.copy_(other)
                other.copy_(reduced)
        return cls(buffers, copies)

    @torch.no_grad()
    def compare(self, optimizer: MegatronOptimizer, scale: float) -> Comparison:
        """Compare with the rest of the whole gradient, made ready by the optimizer. Collective over the role's layout.

        Megatron-Core says which numbers count for a norm: those repeated on ranks, and embeddings shared by stages,
        once.

        Args:
            scale: the factor of fp16's losses; the optimizer has divided the whole gradient by it.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=collectives.device())
        for part in optimizer.chained_optimizers:
            sums = torch.zeros_like(totals)
            for whole in compat.gradients_for_norm(part):
                kept = self._kept(whole)
                for w, k in zip(whole.flatten().split(_AT_ONCE), kept.flatten().split(_AT_ONCE), strict=True):
                    first = k.double() / scale
                    rest = w.double() - first
                    sums += torch.stack([first.dot(first), rest.dot(rest), first.dot(rest)])
            totals += collectives.sum_over(sums, part.get_grad_stats_parallel_group())
        first_square, rest_square, product = totals.tolist()
        lengths = math.sqrt(first_square) * math.sqrt(rest_square)
        return Comparison(math.sqrt(first_square), math.sqrt(rest_square), product / lengths if lengths else 0.0)

    def _kept(self, whole: Tensor) -> Tensor:
        """The part of the copy at the position that `whole` has in its buffer."""
        for buffer, copy in zip(self.buffers, self.copies, strict=True):
            if storage_of(whole) == storage_of(buffer):
                start = whole.storage_offset() - buffer.storage_offset()
                return copy.as_strided(whole.shape, whole.stride(), copy.storage_offset() + start)
        raise AssertionError("a gradient that is no part of the gradient buffers")


def _gradient_buffers(chunk: torch.nn.Module) -> list[Tensor]:
    assert isinstance(chunk, DistributedDataParallel)
    return [buffer.grad_data for buffer in chunk.buffers]


@dataclass
class DominanceWatch:
    """Warns when the text's gradient dominates PPO's in several reports in a row."""

    in_a_row: int = 0

    def update(self, ppo_norm: float, text_norm: float, coef: float) -> None:
        """One report; `coef` is the gamma that `text_norm` includes."""
        self.in_a_row = self.in_a_row + 1 if text_norm > _TOO_MANY_TIMES * ppo_norm else 0
        if self.in_a_row == _REPORTS:
            log.warning(
                "the text's gradient was more than %d times PPO's in the last %d reports (now %.3g against %.3g): clipping "
                "and Adam go by their sum, so hardly anything of an update is left to the reward. Lower ppo.ptx_coef "
                "(%g now, %.2g would make both alike), or take ppo.ptx_coef=auto; where the text's gradient is mostly noise, "
                "more text an update helps (ppo.ptx_ratio, ppo.minibatch_size). docs/gamma.md says more",
                _TOO_MANY_TIMES,
                _REPORTS,
                text_norm,
                ppo_norm,
                coef,
                coef * ppo_norm / text_norm,
            )
