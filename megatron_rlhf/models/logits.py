"""A language model's logits, of which only as many exist at a time as fit: a part of the vocabulary after the other.

n tokens of a vocabulary of 128k have n x 128k logits, and their gradient is as large. What a loss wants of them is a number or
two per token. Forward: maximum, sum of exponentials and the chosen logit are collected over parts of the vocabulary. Backward:
the parts are computed again, one more product with the unembedding. A part's rows of the unembedding get their whole gradient
at once, so nothing is rounded more often than without parts.

Legend: n = tokens, h = hidden size, v = vocabulary (this tensor-parallel rank's part), w = a part of it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_rlhf.parallel import context, vocab

AT_ONCE = {"cuda": 2**26, "cpu": 2**24}
"""Logits that exist at a time, by kind of device. All logits, if they are no more."""


@dataclass(frozen=True)
class Logits:
    """Logits [n, v], by the last hidden states and the unembedding."""

    hidden_nh: Tensor
    weight_vh: Tensor
    barred_v: Tensor | None
    """bool: no tokens, their logits are `vocab.PADDED_LOGIT`."""
    group: dist.ProcessGroup
    """Splits the vocabulary."""
    context: dist.ProcessGroup
    """Its ranks have all n tokens and share the work on them."""

    @property
    def made_of(self) -> tuple[Tensor, Tensor]:
        """What gradients with respect to the logits go on to."""
        return self.hidden_nh, self.weight_vh

    def without(self, unknown_v: Tensor | None) -> "Logits":
        """With no probability on some tokens, given over the whole padded vocabulary; None: unchanged."""
        if unknown_v is None:
            return self
        width = len(self.weight_vh)
        unknown_v = unknown_v[self.group.rank() * width :][:width]
        return dataclasses.replace(self, barred_v=unknown_v if self.barred_v is None else unknown_v | self.barred_v)

    def logprobs(self, tokens_n: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) at `tokens_n`, fp32, on every rank of both groups."""
        return self._over_context(_Asked(temperature), tokens_n)[0]

    def logprobs_and_entropy(
        self, tokens_n: Tensor, temperature: float = 1.0, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of softmax(logits / temperature), from one pass; a mere statistic unless it is to be
        `differentiable`."""
        return self._over_context(_Asked(temperature, True, differentiable), tokens_n)

    @torch.no_grad()
    def is_likeliest(self, tokens_n: Tensor) -> Tensor:
        """bool [n]: no other token has a larger logit. The same on every rank of both groups."""
        local_n = tokens_n - self.group.rank() * len(self.weight_vh)
        chosen_n = largest_n = torch.full_like(tokens_n, -torch.inf, dtype=self.hidden_nh.dtype)
        for columns in _parts(self.hidden_nh, self.weight_vh):
            logits_nw = _part(self.hidden_nh, self.weight_vh, self.barred_v, columns)
            here_n, at_n1 = _chosen(local_n, columns)
            chosen_n = torch.where(here_n, logits_nw.gather(-1, at_n1).squeeze(-1), chosen_n)
            largest_n = torch.maximum(largest_n, logits_nw.amax(dim=-1))
        chosen_n, largest_n = vocab.all_reduce(torch.stack([chosen_n, largest_n]), self.group, dist.ReduceOp.MAX)
        return chosen_n >= largest_n

    def _over_context(self, asked: "_Asked", tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        ranks, count = self.context.size(), len(tokens_n)
        if ranks == 1:
            return self._own(asked, self.hidden_nh, tokens_n)
        padding = -count % (2 * ranks)
        rows = torch.arange(count + padding, device=tokens_n.device).clamp(max=count - 1)
        mine = context.split(rows, 0, self.context)
        found = self._own(asked, self.hidden_nh[mine], tokens_n[mine])
        logprobs, entropy = (context.gather(x, 0, self.context, sum_gradients=False)[:count] for x in found)
        return logprobs, entropy

    def _own(self, asked: "_Asked", hidden_nh: Tensor, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        if hidden_nh.shape[0] * self.weight_vh.shape[0] > AT_ONCE[hidden_nh.device.type]:
            return _InParts.apply(hidden_nh, self.weight_vh, self.barred_v, tokens_n, self.group, asked)
        logits_nv, temperature = _part(hidden_nh, self.weight_vh, self.barred_v), asked.temperature
        if asked.entropy and not asked.differentiable:
            return vocab.token_logprobs_and_entropy(logits_nv, tokens_n, self.group, temperature)
        logprobs_n = vocab.token_logprobs(logits_nv, tokens_n, self.group, temperature)
        return logprobs_n, vocab.entropy(logits_nv / temperature, self.group) if asked.entropy else logprobs_n


@dataclass(frozen=True)
class _Asked:
    temperature: float
    entropy: bool = False
    differentiable: bool = False
    """The entropy has a gradient, too."""


def _part(hidden_nh: Tensor, weight_vh: Tensor, barred_v: Tensor | None, columns: slice = slice(None)) -> Tensor:
    logits_nw = F.linear(hidden_nh, weight_vh[columns])
    return logits_nw if barred_v is None else logits_nw.masked_fill_(barred_v[columns], vocab.PADDED_LOGIT)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: Tensor,
        weight_vh: Tensor,
        barred_v: Tensor | None,
        tokens_n: Tensor,
        group: dist.ProcessGroup,
        asked: _Asked,
    ) -> tuple[Tensor, Tensor]:
        full = torch.float64 if hidden_nh.dtype is torch.float64 else torch.float32
        local_n = tokens_n - group.rank() * len(weight_vh)
        ctx.inputs = barred_v, local_n, asked, full
        count = len(hidden_nh)
        largest_n = torch.full((count,), torch.finfo(full).min, dtype=full, device=hidden_nh.device)
        # Rows: the chosen logit, the sum of exp(logit - largest), and the sum of (logit - largest) weighted by that.
        chosen_n, total_n, weighted_n = sums_3n = hidden_nh.new_zeros(3, count, dtype=full)
        for columns in _parts(hidden_nh, weight_vh):
            logits_nw = _scaled(hidden_nh, weight_vh, columns, ctx.inputs)
            above_n = torch.maximum(largest_n, logits_nw.amax(dim=-1))
            here_n, at_n1 = _chosen(local_n, columns)
            chosen_n += torch.where(here_n, logits_nw.gather(-1, at_n1).squeeze(-1), 0.0)
            _rebase(sums_3n, largest_n, above_n)
            shifted_nw = logits_nw.sub_(above_n.unsqueeze(-1))
            exponentials_nw = shifted_nw.exp()
            total_n += exponentials_nw.sum(dim=-1)
            if asked.entropy:
                weighted_n += exponentials_nw.mul_(shifted_nw).sum(dim=-1)
            largest_n = above_n
        overall_n = vocab.all_reduce(largest_n.clone(), group, dist.ReduceOp.MAX)
        _rebase(sums_3n, largest_n, overall_n)
        chosen_n, total_n, weighted_n = vocab.all_reduce(sums_3n, group)
        log_total_n = total_n.log() + overall_n
        entropy_n = total_n.log() - weighted_n / total_n
        ctx.save_for_backward(hidden_nh, weight_vh, log_total_n, entropy_n)
        ctx.set_materialize_grads(False)
        if not asked.differentiable:
            ctx.mark_non_differentiable(entropy_n)
        return chosen_n - log_total_n, entropy_n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_nh, weight_vh, log_total_n, entropy_n = ctx.saved_tensors
        barred_v, local_n, asked, full = ctx.inputs
        of_logprob, of_entropy = (None if g is None else (g / asked.temperature).unsqueeze(-1) for g in gradients)
        hidden_grad_nh = torch.zeros_like(hidden_nh, dtype=full)
        weight_grad_vh = torch.empty_like(weight_vh) if ctx.needs_input_grad[1] else None
        for columns in _parts(hidden_nh, weight_vh):
            logprobs_nw = _scaled(hidden_nh, weight_vh, columns, ctx.inputs).sub_(log_total_n.unsqueeze(-1))
            grad_nw = logprobs_nw.exp()
            if of_entropy is not None:
                slope_nw = logprobs_nw.add_(entropy_n.unsqueeze(-1)).mul_(-of_entropy)
                grad_nw.mul_(slope_nw if of_logprob is None else slope_nw.sub_(of_logprob))
            elif of_logprob is not None:
                grad_nw.mul_(-of_logprob)
            if of_logprob is not None:
                here_n, at_n1 = _chosen(local_n, columns)
                grad_nw.scatter_add_(-1, at_n1, torch.where(here_n.unsqueeze(-1), of_logprob, 0.0))
            if barred_v is not None:
                grad_nw.masked_fill_(barred_v[columns], 0.0)
            grad_nw = grad_nw.to(hidden_nh.dtype)
            hidden_grad_nh += grad_nw @ weight_vh[columns]
            if weight_grad_vh is not None:
                torch.mm(grad_nw.T, hidden_nh, out=weight_grad_vh[columns])
        return hidden_grad_nh.to(hidden_nh.dtype), weight_grad_vh, None, None, None, None


def _parts(hidden_nh: Tensor, weight_vh: Tensor) -> Iterator[slice]:
    width = max(AT_ONCE[hidden_nh.device.type] // len(hidden_nh), 1)
    for start in range(0, len(weight_vh), width):
        yield slice(start, min(start + width, len(weight_vh)))


def _scaled(hidden_nh: Tensor, weight_vh: Tensor, columns: slice, inputs: tuple) -> Tensor:
    barred_v, _, asked, full = inputs
    logits_nw = _part(hidden_nh, weight_vh, barred_v, columns).to(full)
    return logits_nw if asked.temperature == 1 else logits_nw.div_(asked.temperature)


def _chosen(local_n: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether a token is in a part, and its column there."""
    column_n = local_n - columns.start
    width = columns.stop - columns.start
    return (column_n >= 0) & (column_n < width), column_n.clamp(0, width - 1).unsqueeze(-1)


def _rebase(sums_3n: Tensor, from_n: Tensor, to_n: Tensor) -> None:
    """Sums relative to one maximum, relative to a larger one; in place."""
    _, total_n, weighted_n = sums_3n
    step_n = from_n - to_n
    weighted_n.add_(step_n.clamp(min=torch.finfo(step_n.dtype).min) * total_n).mul_(step_n.exp())
    total_n.mul_(step_n.exp())
