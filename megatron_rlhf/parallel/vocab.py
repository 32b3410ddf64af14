"""Log-probabilities and entropy of logits whose vocabulary is split over tensor-parallel ranks.

Shapes: logits [..., vocab / tp], tokens [...]; `group=None` means that one rank holds the whole vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
PADDED_LOGIT = -3e4
"""Logit of rows that are not tokens: softmax gives it no probability, yet it is finite: p * log p is 0 and not NaN, in
fp16 too."""


def token_logprobs(logits: Tensor, tokens: Tensor, group: Group, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`, fp32 (fp64 for fp64 logits), shaped as `tokens`, on every rank of `group`.

    Differentiable with respect to this rank's logits: d logprob / d logit_j = ([j = token] - softmax_j) / temperature.
    No rank ever holds the whole vocabulary: one maximum, one sum and one gathered logit per token cross the group.
    Apart from their gradient, nothing of the logits' size is kept or made.
    """
    return _token_logprobs(logits, tokens, group, temperature, False)[0]


def token_logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, group: Group, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same, and the entropy of softmax(logits / temperature) as a statistic, without gradient, from the same pass."""
    return _token_logprobs(logits, tokens, group, temperature, True)


def _token_logprobs(
    logits: Tensor, tokens: Tensor, group: Group, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    assert logits.shape[:-1] == tokens.shape, f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}"
    assert temperature > 0, f"temperature {temperature} must be positive"
    return _TokenLogprobs.apply(logits, tokens, group, temperature, with_entropy)


def entropy(logits: Tensor, group: Group) -> Tensor:
    """Entropy in nats of softmax(logits), fp32, shape [...]; differentiable with respect to this rank's logits."""
    return _Entropy.apply(logits, group)


def is_likeliest(logits: Tensor, tokens: Tensor, group: Group) -> Tensor:
    """bool, shaped as `tokens`: no other token has a larger logit. The same on every rank of `group`."""
    local, here = _on_this_rank(tokens.unsqueeze(-1), logits.shape[-1], group)
    chosen = torch.where(here, logits.gather(-1, local), -torch.inf).squeeze(-1)
    both = all_reduce(torch.stack([chosen, logits.amax(dim=-1)]), group, dist.ReduceOp.MAX)
    return both[0] >= both[1]


def without(logits: Tensor, unknown_v: Tensor | None, group: Group) -> Tensor:
    """The logits with no probability on some tokens; None: unchanged.

    Args:
        unknown_v: bool over the whole padded vocabulary, as `logits` are split.
    """
    if unknown_v is None:
        return logits
    width = logits.shape[-1]
    first = group.rank() * width if group is not None and width < len(unknown_v) else 0
    return logits.masked_fill(unknown_v[first : first + width], PADDED_LOGIT)


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """In place, over a group, if there is one."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _log_softmax(logits: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """(logits less the largest of the whole vocabulary, log sum exp of those): their difference is log softmax.

    They stay separate until a logit is chosen, so that no precision is lost to the offset that all logits share.
    """
    shifted = logits - all_reduce(logits.amax(dim=-1, keepdim=True), group, dist.ReduceOp.MAX)
    return shifted, all_reduce(shifted.exp().sum(dim=-1, keepdim=True), group).log()


class _TokenLogprobs(torch.autograd.Function):
    """A few rows at a time, so that intermediate results stay in the cache (on a GPU: stay small)."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, tokens: Tensor, group: Group, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        flat_nv = logits.reshape(-1, logits.shape[-1])
        full = torch.float64 if logits.dtype is torch.float64 else torch.float32
        largest_n1 = all_reduce(flat_nv.amax(dim=-1, keepdim=True).to(full), group, dist.ReduceOp.MAX)
        local_n1, here_n1 = _on_this_rank(tokens.reshape(-1, 1), flat_nv.shape[-1], group)
        chosen_n1 = (flat_nv.gather(-1, local_n1).to(full) - largest_n1) / temperature
        # Rows: the chosen token's shifted logit, the sum of exp of all, their mean weighted by it.
        sums_3n = torch.stack(
            [torch.where(here_n1, chosen_n1, 0.0).squeeze(-1)] + [flat_nv.new_zeros(len(flat_nv), dtype=full)] * 2
        )
        for rows in _chunks(flat_nv):
            shifted = _shifted(flat_nv[rows], largest_n1[rows], temperature)
            sums_3n[1, rows] = (weights := shifted.exp()).sum(dim=-1)
            if with_entropy:  # a logit of -inf weighs 0 and adds nothing; 0 * -inf would add NaN
                sums_3n[2, rows] = weights.mul_(shifted.clamp_(min=torch.finfo(full).min)).sum(dim=-1)
        chosen_n, total_n, weighted_n = all_reduce(sums_3n, group)
        ctx.save_for_backward(flat_nv, largest_n1, total_n.unsqueeze(-1), local_n1, here_n1)
        ctx.temperature, ctx.shape = temperature, logits.shape
        entropy_n = (total_n.log() - weighted_n / total_n).view(tokens.shape)
        ctx.mark_non_differentiable(entropy_n)
        return (chosen_n - total_n.log()).view(tokens.shape), entropy_n

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        flat_nv, largest_n1, total_n1, local_n1, here_n1 = ctx.saved_tensors
        grad_n1 = (grad / ctx.temperature).reshape(-1, 1)
        grad_nv = torch.empty_like(flat_nv)
        for rows in _chunks(flat_nv):
            out = grad_nv[rows] if grad_nv.dtype is largest_n1.dtype else None
            part = _shifted(flat_nv[rows], largest_n1[rows], ctx.temperature, out)
            part.exp_().mul_(-grad_n1[rows] / total_n1[rows])
            part.scatter_add_(-1, local_n1[rows], torch.where(here_n1[rows], grad_n1[rows], 0.0))
            if out is None:
                grad_nv[rows] = part
        return grad_nv.view(ctx.shape), None, None, None, None


def _shifted(logits_nv: Tensor, largest_n1: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """In the type of `largest_n1`, and a copy of that type only where the logits have another."""
    if logits_nv.dtype is largest_n1.dtype:
        shifted = torch.sub(logits_nv, largest_n1, out=out)
    else:
        shifted = logits_nv.to(largest_n1.dtype).sub_(largest_n1)
    return shifted if temperature == 1 else shifted.div_(temperature)


def _on_this_rank(tokens: Tensor, width: int, group: Group) -> tuple[Tensor, Tensor]:
    """(column of each token in this rank's part of the vocabulary, whether it is there at all)."""
    local = tokens - (0 if group is None else group.rank() * width)
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _chunks(logits_nv: Tensor) -> Iterator[slice]:
    """Rows whose logits take about a megabyte in fp32; 64 on a GPU."""
    elements = 2**24 if logits_nv.is_cuda else 2**18
    step = max(elements // logits_nv.shape[-1], 1)
    for start in range(0, len(logits_nv), step):
        yield slice(start, start + step)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, group: Group) -> Tensor:
        shifted, normalizer = _log_softmax(_full_precision(logits), group)
        logprobs = shifted - normalizer
        probabilities = logprobs.exp()
        # A logit of -inf has p = 0 and adds nothing; 0 * -inf would add NaN.
        logprobs = torch.where(probabilities > 0, logprobs, 0.0)
        result = all_reduce(-(probabilities * logprobs).sum(dim=-1), group)
        ctx.save_for_backward(probabilities, logprobs, result)
        ctx.dtype = logits.dtype
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, logprobs, result = ctx.saved_tensors
        grad_logits = -probabilities * (logprobs + result.unsqueeze(-1)) * grad.unsqueeze(-1)
        return grad_logits.to(ctx.dtype), None
