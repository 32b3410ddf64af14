"""Log-probabilities and entropy of logits whose vocabulary is split over tensor-parallel ranks.

Shapes: logits [..., vocab / tp], tokens [...]; `group=None` means that one rank holds the whole vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
PADDED_LOGIT = -3e4
"""Of what is no token: no softmax gives it any probability, yet it is finite: p * log p stays 0 and not NaN in fp16 too."""


def token_logprobs(logits: Tensor, tokens: Tensor, group: Group, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`, fp32 (fp64 for fp64 logits), shaped as `tokens`, on every rank of `group`.

    Differentiable with respect to this rank's logits: d logprob / d logit_j = ([j = token] - softmax_j) / temperature.
    No rank ever holds the whole vocabulary: one maximum, one sum and one gathered logit a token cross the group.
    """
    assert logits.shape[:-1] == tokens.shape, f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}"
    assert temperature > 0, f"temperature {temperature} must be positive"
    return _TokenLogprobs.apply(logits, tokens, group, temperature)


def entropy(logits: Tensor, group: Group) -> Tensor:
    """Entropy in nats of softmax(logits), fp32, shape [...]; differentiable with respect to this rank's logits."""
    return _Entropy.apply(logits, group)


def without(logits: Tensor, unknown_v: Tensor | None, group: Group) -> Tensor:
    """The logits with no probability on some tokens; None: all as they are.

    Args:
        unknown_v: bool over the whole padded vocabulary, as `logits` are split.
    """
    if unknown_v is None:
        return logits
    width = logits.shape[-1]
    first = group.rank() * width if group is not None and width < len(unknown_v) else 0
    return logits.masked_fill(unknown_v[first : first + width], PADDED_LOGIT)


def _all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _log_softmax(logits: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """(logits less the largest of the whole vocabulary, log sum exp of those): their difference is log softmax.

    They stay apart until a logit is chosen, so that no digit is spent on the level that all logits share.
    """
    shifted = logits - _all_reduce(logits.amax(dim=-1, keepdim=True), group, dist.ReduceOp.MAX)
    return shifted, _all_reduce(shifted.exp().sum(dim=-1, keepdim=True), group).log()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, group: Group, temperature: float) -> Tensor:
        shifted, normalizer = _log_softmax(_full_precision(logits) / temperature, group)
        width = shifted.shape[-1]
        first = 0 if group is None else group.rank() * width
        local = tokens - first
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1).unsqueeze(-1)
        chosen = shifted.gather(-1, local).squeeze(-1)
        chosen = _all_reduce(torch.where(here, chosen, 0.0), group)
        ctx.save_for_backward((shifted - normalizer).exp_(), local, here)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return chosen - normalizer.squeeze(-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, local, here = ctx.saved_tensors
        grad = (grad / ctx.temperature).unsqueeze(-1)
        grad_logits = probabilities * -grad
        grad_logits.scatter_add_(-1, local, torch.where(here.unsqueeze(-1), grad, 0.0))
        return grad_logits.to(ctx.dtype), None, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, group: Group) -> Tensor:
        shifted, normalizer = _log_softmax(_full_precision(logits), group)
        logprobs = shifted - normalizer
        probabilities = logprobs.exp()
        # A logit of -inf has p = 0 and adds nothing; 0 * -inf would add NaN.
        logprobs = torch.where(probabilities > 0, logprobs, 0.0)
        result = _all_reduce(-(probabilities * logprobs).sum(dim=-1), group)
        ctx.save_for_backward(probabilities, logprobs, result)
        ctx.dtype = logits.dtype
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, logprobs, result = ctx.saved_tensors
        grad_logits = -probabilities * (logprobs + result.unsqueeze(-1)) * grad.unsqueeze(-1)
        return grad_logits.to(ctx.dtype), None
