"""Statistics over the real tokens of a padded batch.

A mask may be bool, int or float: nonzero marks a real token. What is at a masked position has no influence on values or
gradients, even NaN or inf. That is why masking selects (`torch.where`) and never multiplies: 0 * NaN is NaN.

Tensors are [b, t] = batch, response position, unless said otherwise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same_shape(**tensors: Tensor) -> None:
    """Asserts that all tensors, given by name, have one shape: broadcasting would hide a caller's mistake."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert len(set(shapes.values())) == 1, f"shapes must be equal, got {shapes}"


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Returns `values` with 0 at the masked positions, with no gradient flowing through them.

    Mask the inputs of a formula, not its result: 0 times the NaN inside it would still be a NaN gradient.
    """
    assert_same_shape(values=values, mask=mask)
    return torch.where(mask.bool(), values, 0)


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Returns the sum of the real tokens over `dim` (None: over all)."""
    return zero_masked(values, mask).sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Returns the mean of the real tokens over `dim` (None: over all).

        mean = sum_i m_i x_i / sum_i m_i

    The mean over zero tokens is 0, with gradient 0: an empty row adds nothing.

    Args:
      values: any shape.
      mask: the shape of `values`.
      dim: what to average over.
    """
    return masked_sum(values, mask, dim) / mask.bool().sum(dim).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Returns the variance of all real tokens, a scalar.

        var = sum_i m_i (x_i - mean)^2 / (n - 1),    n = sum_i m_i

    The variance of one token, or of none, is 0.

    Args:
      values: any shape.
      mask: the shape of `values`.
      unbiased: divide by n - 1 (Bessel's correction) rather than by n.
    """
    deviations = zero_masked(values - masked_mean(values, mask), mask)
    count = mask.bool().sum()
    return deviations.square().sum() / (count - int(unbiased)).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scales the real tokens to variance 1 and shifts them to mean 0.

        y_i = (x_i - mean) / sqrt(var + eps)    [+ mean, if the mean is kept]

    The variance is the unbiased one. As OpenAI's lm-human-preferences does to advantages, but over real tokens only.

    Args:
      values: any shape.
      mask: the shape of `values`.
      shift_mean: False keeps the mean.
      eps: keeps a constant batch finite.

    Returns:
      The shape of `values`; 0 at the masked positions.
    """
    values = zero_masked(values, mask)
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + eps)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


def response_mask(tokens: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Marks the tokens of each response up to and including its first stop token.

    Args:
      tokens: [b, t] generated token ids.
      stop_ids: ids that end a response.

    Returns:
      [b, t] bool; all True in a row without a stop token.
    """
    assert tokens.ndim == 2, f"tokens must be [b, t], got {tuple(tokens.shape)}"
    is_stop = torch.isin(tokens, torch.tensor(stop_ids, dtype=tokens.dtype, device=tokens.device))
    stops_before = is_stop.cumsum(dim=1) - is_stop.long()
    return stops_before == 0
