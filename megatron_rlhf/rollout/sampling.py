"""Choosing the next token. Its randomness depends on what is sampled, never on which rank or batch samples it.

Shapes: logits [b, v] over the whole vocabulary; one key per token that is drawn.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampler:
    """Temperature, top-k and top-p sampling with counter-based random numbers.

    A token is argmax_v log p_v - log(e_v) with independent exponentials e_v, which is a draw from p (the Gumbel-max trick).
    Each e_v is a hash of (the token's key, v), and that key a hash of (row key, position). Rounding differences between layouts
    change the outcome only where two candidates tie to within rounding; an inverse-CDF draw would also change with every sum
    before it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __call__(
        self,
        logits_bv: Tensor,
        keys_b: Tensor,
        banned: Tensor | None = None,
        banned_b: Tensor | None = None,
        seen_bv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [b] and their log-probabilities [b] under softmax(logits / temperature), from the tokens' keys [b] (`mix`).

        In rows where `banned_b` is true, none of the tokens `banned` is drawn. The repetition penalty is on the tokens `seen_bv`.

        The log-probability is that before tokens are banned or penalised and before top-k and top-p, the one that training
        recomputes. temperature 0 takes the most likely token.
        """
        logits_bv = logits_bv.float()
        candidates_bv = logprobs_bv = self._logprobs(logits_bv)
        if seen_bv is not None:
            penalised_bv = torch.where(seen_bv, penalise(logits_bv, self.repetition_penalty), logits_bv)
            candidates_bv = self._logprobs(penalised_bv)
        if banned is not None and banned_b is not None:
            without_bv = candidates_bv.index_fill(-1, banned, -torch.inf)
            candidates_bv = torch.where(banned_b.unsqueeze(-1), without_bv, candidates_bv)
        if self.temperature == 0:
            tokens_b = candidates_bv.argmax(dim=-1)
        else:
            candidates_bv = filter_top_p(filter_top_k(candidates_bv, self.top_k), self.top_p)
            uniform_bv = uniform_numbers(keys_b, logits_bv.shape[-1])
            exponential_bv = uniform_bv.neg_().log1p_().neg_()  # -log(1 - u): most precise where small, and small wins
            tokens_b = (candidates_bv - exponential_bv.log_()).max(dim=-1).indices  # faster than argmax
        return tokens_b, logprobs_bv.gather(-1, tokens_b.unsqueeze(-1)).squeeze(-1)

    def _logprobs(self, logits_bv: Tensor) -> Tensor:
        temperature = self.temperature or 1.0
        return torch.log_softmax(logits_bv if temperature == 1 else logits_bv / temperature, dim=-1)


def penalise(logits: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that are less wanted (Keskar et al. 2019, section 4.1)."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Everything below the k-th largest logit becomes -inf; k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020); p = 1 keeps all."""
    if p >= 1:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # a token stays if those before it do not reach p
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, before >= p)
    return logits.masked_fill(drop, -torch.inf)


def row_keys(seed: int, iteration: int, prompt_ids: Tensor, sample_indices: Tensor) -> Tensor:
    """One 32-bit key per row, from what is sampled: run, iteration, prompt, and which of its samples."""
    base = torch.full_like(prompt_ids, seed & _MASK)
    return mix(mix(mix(base, torch.full_like(prompt_ids, iteration)), prompt_ids), sample_indices)


def mix(keys: Tensor, values: Tensor) -> Tensor:
    """Hash a value into a 32-bit key (int64 tensors)."""
    return _scramble(_scramble((keys ^ 0x9E3779B9).int()) + (values * 0x85EBCA6B).int()).long() & _MASK


def uniform_numbers(keys_b: Tensor, count: int) -> Tensor:
    """[b, count] numbers in (0, 1), fp32, from keys [b]: number j hashes (key, j)."""
    bits = _scramble(keys_b.int().unsqueeze(-1) + _counters(count, keys_b.device))
    # The half excludes 0. Numbers next to 1 round to 1 in fp32, and are clamped to the largest number below it.
    return bits.view(torch.uint32).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


@functools.lru_cache(maxsize=4)
def _counters(count: int, device: torch.device) -> Tensor:
    return (torch.arange(1, count + 1, device=device) * 0x9E3779B1).int()


def _scramble(x: Tensor) -> Tensor:
    """In place: a 32-bit integer finaliser, xor-shifts and odd multipliers, each invertible modulo 2**32.

    int32, whose sums and products wrap: four times as fast as int64.
    """
    x.bitwise_xor_(_shifted(x, 16)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shifted(x, 15)).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_(_MASK >> bits)  # int32 has a sign, which the shift repeats
